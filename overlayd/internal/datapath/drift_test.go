package datapath

import (
	"net"
	"slices"
	"testing"
	"time"
)

// What is asked for anew, or follows from the underlay or from a problem that has
// ended, was not taken away by anybody.
func TestNoDrift(t *testing.T) {
	_, hosts := onlyIPv4.plugHosts(t, 1)
	h := hosts[0]
	none := func(what string, cfg Host) {
		t.Helper()
		r := h.set(cfg, true)
		if r.Changed == 0 {
			t.Errorf("%s: nothing changed", what)
		}
		if len(r.Drift.Counts) > 0 {
			t.Errorf("%s: drift %v", what, r.Drift)
		}
	}
	cfg := onlyIPv4.Host(0, 3)
	none("more peers", cfg)
	more := onlyIPv4.Host(0, 5)
	h.sh("ip link set m-dcos down")
	none("more peers and a damage", more)
	h.sh("ip link set eth0 mtu 1400")
	none("another MTU of the underlay", more)
	fewer := more
	fewer.Bridges = slices.Clone(more.Bridges[:1])
	none("fewer bridges", fewer)
	none("all bridges", more)
	h.sh("ip route del 9.0.1.0/24; ip route add 9.0.1.0/24 dev lo metric 2")
	if r := h.set(more, true); r.Overlays["dcos"] == nil {
		t.Errorf("a route in the way is not reported")
	}
	h.sh("ip route del 9.0.1.0/24 dev lo metric 2")
	none("a route in the way has gone", more)

	h.sh("ip link set m-dcos down")
	if r := h.mustSet(more, true); r.Drift.Counts["link"] != 1 {
		t.Errorf("a device set down: drift %v", r.Drift)
	}
	if r := h.mustSet(more, true); len(r.Drift.Counts) > 0 {
		t.Errorf("everything in place: drift %v", r.Drift)
	}
	// A new process cannot tell what was lost from what is new.
	h.dp = h.newDatapath()
	h.sh("ip link set m-dcos down")
	none("a new process", more)
}

// Rules of the legacy flavour and sets of ipset, of whose changes the kernel tells
// nobody, are announced all the same.
func TestSilentChanges(t *testing.T) {
	useFirewall(t, "iptables-legacy")
	cfg := bothIP.Host(0, 3)
	damages := []string{"iptables -F", "ip6tables -t raw -I PREROUTING -j DROP", "ipset flush overlay-peers4"}
	var hosts []*host
	var changes []<-chan struct{}
	for i := range damages {
		l := newLAN(t)
		h := newHost(t, "h")
		l.plug(h.netNS, bothIP.AgentIP(0).String()+"/12")
		h.mustSet(cfg, true)
		h.do(func() { changes = append(changes, h.dp.Changes(t.Context())) })
		// What happened while the devices were made.
		h.mustBeIdle(cfg)
		for quiet := false; !quiet; {
			select {
			case <-changes[i]:
			case <-time.After(300 * time.Millisecond):
				quiet = true
			}
		}
		hosts = append(hosts, h)
	}
	for i, damage := range damages {
		hosts[i].sh(damage)
	}
	deadline := time.After(9 * time.Second)
	for i, damage := range damages {
		select {
		case <-changes[i]:
		case <-deadline:
			t.Fatalf("%s: not announced", damage)
		}
		if r := hosts[i].mustSet(cfg, true); r.Drift.Counts[driftFirewall] == 0 {
			t.Errorf("%s: drift %v", damage, r.Drift)
		}
	}
	// One that was repaired is not announced again.
	for i, damage := range damages {
		hosts[i].mustBeIdle(cfg)
		if hosts[i].dp.rulesAltered() {
			t.Errorf("%s: announced after the repair", damage)
		}
	}
}

// A connection to outside that began while there were no rules has no address of
// the host, and would never get one.
func TestFlowsOfNoRules(t *testing.T) {
	eachFirewall(t, func(t *testing.T) {
		n := onlyIPv4
		l, hosts := n.plugHosts(t, 1)
		outside := newNS(t, "outside")
		l.plug(outside, "172.16.9.9/12")
		h, cfg := hosts[0], n.Host(0, 1)
		c, addr := h.container(cfg.Bridges[0].Name, cfg.Bridges[0].Addrs[0], 5)
		// The chain stays, so the kernel takes it that nothing is to be translated.
		h.sh("nft flush chain inet overlay OVERLAY-MASQ 2>/dev/null || iptables -t nat -F POSTROUTING")
		var icmp net.PacketConn
		var err error
		outside.do(func() { icmp, err = net.ListenPacket("ip4:icmp", "0.0.0.0") })
		if err != nil {
			t.Fatal(err)
		}
		defer icmp.Close()
		if err := icmp.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		// One stream all the time: it has one flow, which traffic keeps.
		lost := c.pinging("172.16.9.9", 300, func() {
			// Its packets leave with its own address until then.
			for seen := 0; seen < 20; {
				_, from, err := icmp.ReadFrom(make([]byte, 1500))
				if err != nil {
					t.Error(err)
					return
				}
				if from.String() == addr {
					seen++
				}
			}
			h.mustSet(cfg, true)
		})
		if lost == 0 || lost > 200 {
			t.Errorf("%d of 300 packets were lost, want those before the repair", lost)
		}
	})
}
