package datapath

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
)

// Three hosts, every gateway reaches every other: IPv4, IPv6, both, and on an
// IPv6 underlay. The cluster with only IPv6 overlays needs FDB entries that do
// not come from an IPv4 overlay.
func TestTraffic(t *testing.T) {
	for _, tc := range []struct {
		name   string
		n      network
		under6 bool
		mtu    int
	}{
		{"ipv4", onlyIPv4, false, 1450},
		{"ipv6", onlyIPv6, false, 1450},
		{"both", bothIP, false, 1450},
		{"both over ipv6", bothIP, true, 1430},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := tc.n
			n.Under6 = tc.under6
			_, hosts := n.plugHosts(t, 3)
			for i, h := range hosts {
				// Sent with a checksum; over IPv6 also received without, as the fast
				// path of a peer sends.
				receives := " udpcsum noudp6zerocsumtx noudp6zerocsumrx "
				if tc.under6 {
					receives = " udpcsum noudp6zerocsumtx udp6zerocsumrx "
				}
				h.mustHave("ip -d link show vtep1024", receives)
				cfg := n.Host(i, 3)
				if r := h.mustSet(cfg, true); r.Changed != 0 || r.MTU != tc.mtu {
					t.Errorf("host %d: second Set changed %d objects, MTU %d, want 0 and %d", i, r.Changed, r.MTU, tc.mtu)
				}
				for j := range hosts {
					for o := range n.Overlays {
						if i != j {
							h.mustPing(n.gateway(o, i, conf.Mesos), n.gateway(o, j, conf.Docker))
							h.mustPing(n.gateway(o, i, conf.Docker), n.gateway(o, j, conf.Mesos))
						}
					}
				}
			}
		})
	}
}

func TestSecondSetChangesNothing(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 1)
	cfg := bothIP.Host(0, 500)
	if r := hosts[0].mustSet(cfg, false); r.Changed != 499*5 {
		t.Errorf("500 peers changed %d objects, want 5 for each peer", r.Changed)
	}
	hosts[0].mustBeIdle(cfg)
	if r := hosts[0].mustSet(cfg, false); r.Changed != 0 {
		t.Errorf("Set without resync changed %d objects", r.Changed)
	}
	// Another process that starts anew, after this one, finds everything in place.
	hosts[0].dp.Close()
	hosts[0].dp = hosts[0].newDatapath()
	if r := hosts[0].mustSet(cfg, false); r.Changed != 0 {
		t.Errorf("first Set of a new process changed %d objects", r.Changed)
	}
}

// Whatever is damaged by hand is put back, and announced where the kernel says
// so.
func TestRepair(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 2)
	h, cfg := hosts[0], bothIP.Host(0, 2)
	gateway := cfg.Bridges[0].Addrs[0].String()
	for _, tc := range []struct {
		name, kind, damage string
	}{
		{"vtep deleted", "link", "ip link del vtep1024"},
		{"vtep down", "link", "ip link set vtep1024 down"},
		{"vtep mtu", "link", "ip link set vtep1024 mtu 1300"},
		{"vtep mtu below ipv6", "link", "ip link set vtep1024 mtu 1200"},
		{"vtep learning", "link", "ip link set vtep1024 type vxlan learning"},
		{"vtep in a bridge", "link", "ip link add br9 type bridge; ip link set vtep1024 master br9"},
		{"bridge with another mac", "link", "ip link set m-dcos address 02:00:00:00:00:07"},
		{"bridge with spanning tree", "link", "ip link set m-dcos type bridge stp_state 1"},
		{"bridge that snoops", "link", "ip link set m-dcos type bridge mcast_snooping 1"},
		{"local route removed", "route", "ip route del local 9.0.0.1 dev m-dcos table local"},
		{"local ipv6 route removed", "address", "ip -6 route del local fd01:b::1 dev m-dcos6 table local"},
		{"range reachable", "route", "ip route del unreachable 9.0.0.0/8 metric 4294967294"},
		{"ipv6 range reachable", "route", "ip -6 route del unreachable fd01:b::/64 metric 4294967294"},
		{"route to a peer by a better one", "route", "ip route del 9.0.1.0/24; ip route add 9.0.1.0/24 via 44.128.0.77 dev vtep1024 onlink proto 44 metric 1"},
		{"router advertisements", "sysctl", "sysctl -qw net.ipv6.conf.m-dcos6.accept_ra=1"},
		{"vtep forwarding off", "sysctl", "sysctl -qw net.ipv4.conf.vtep1024.forwarding=0"},
		{"bridge forwarding off", "sysctl", "sysctl -qw net.ipv4.conf.m-dcos.forwarding=0"},
		{"vtep with another mac", "link", "ip link set vtep1024 address 02:00:00:00:00:01"},
		{"vtep address removed", "address", "ip addr del " + cfg.VTEP.IP.String() + " dev vtep1024"},
		{"vtep ipv6 address removed", "address", "ip addr del " + cfg.VTEP.IP6.String() + " dev vtep1024"},
		{"stray vtep address", "address", "ip addr add 44.131.255.9/14 dev vtep1024"},
		{"bridge deleted", "link", "ip link del m-dcos"},
		{"bridge down", "link", "ip link set d-dcos6 down"},
		{"bridge mtu", "link", "ip link set m-dcos mtu 1000"},
		{"bridge renamed", "link", "ip link set m-dcos down; ip link set m-dcos name lost"},
		{"gateway removed", "address", "ip addr del " + gateway + " dev m-dcos"},
		{"stray gateway", "address", "ip addr add 9.7.7.1/25 dev m-dcos"},
		{"connected route removed", "route", "ip route del 9.0.0.0/25 dev m-dcos"},
		{"connected ipv6 route removed", "route", "ip route del " + cfg.Bridges[2].Addrs[0].Masked().String() + " dev m-dcos6"},
		{"routes flushed", "route", "ip route flush proto 44"},
		{"ipv6 routes flushed", "route", "ip -6 route flush proto 44"},
		{"everything on the vtep flushed", "route", "ip route flush dev vtep1024; ip -6 route flush dev vtep1024"},
		{"stray route", "route", "ip route add 9.9.9.0/24 dev vtep1024 proto 44"},
		{"blackhole removed", "route", "ip route del blackhole 9.0.0.0/24 metric 4294967295"},
		{"neighbours flushed", "neighbour", "ip neigh flush dev vtep1024 nud permanent"},
		{"neighbour changed", "neighbour", "ip neigh replace 44.128.0.2 lladdr 02:00:00:00:00:02 dev vtep1024 nud permanent"},
		{"stray neighbour", "neighbour", "ip neigh add 44.128.0.9 lladdr 02:00:00:00:00:02 dev vtep1024 nud permanent"},
		{"fdb removed", "fdb", "bridge fdb del 70:b3:d5:80:00:02 dev vtep1024"},
		{"fdb changed", "fdb", "bridge fdb replace 70:b3:d5:80:00:02 dev vtep1024 dst 172.16.0.77"},
		{"stray fdb entry", "fdb", "bridge fdb add 02:00:00:00:00:03 dev vtep1024 dst 172.16.0.78"},
		{"default fdb entry", "fdb", "bridge fdb append 00:00:00:00:00:00 dev vtep1024 dst 172.16.0.78"},
		{"forwarding off", "sysctl", "sysctl -qw net.ipv4.ip_forward=0"},
		{"ipv6 forwarding off", "sysctl", "sysctl -qw net.ipv6.conf.all.forwarding=0"},
		{"rp_filter", "sysctl", "sysctl -qw net.ipv4.conf.vtep1024.rp_filter=1"},
		{"filter flushed", "firewall", "iptables -F; ip6tables -F"},
		{"nat flushed", "firewall", "iptables -t nat -F; ip6tables -t nat -F"},
		{"rule in front", "firewall", "iptables -I FORWARD -j DROP"},
		{"chain changed", "firewall", "iptables -D OVERLAY-FORWARD 1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h, other := h.in(t), hosts[1].in(t)
			var changes <-chan struct{}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			h.do(func() { changes = h.dp.Changes(ctx) })
			h.sh(tc.damage)
			select {
			case <-changes:
			case <-time.After(10 * time.Second):
				t.Error("not announced")
			}
			r := h.mustSet(cfg, true)
			if r.Changed == 0 {
				t.Errorf("nothing was changed")
			}
			if r.Drift.Counts[tc.kind] == 0 || len(r.Drift.What) == 0 {
				t.Errorf("drift is %v, want something of kind %s", r.Drift, tc.kind)
			}
			h.mustBeIdle(cfg)
			for o := range bothIP.Overlays {
				h.mustPing(bothIP.gateway(o, 0, conf.Mesos), bothIP.gateway(o, 1, conf.Docker))
				other.mustPing(bothIP.gateway(o, 1, conf.Mesos), bothIP.gateway(o, 0, conf.Docker))
			}
		})
	}
}

// None of the changes that Set makes itself sends the caller round in circles.
func TestOwnChangesEnd(t *testing.T) {
	l := newLAN(t)
	h := newHost(t, "h")
	l.plug(h.netNS, "172.16.0.2/12")
	var changes <-chan struct{}
	h.do(func() { changes = h.dp.Changes(t.Context()) })
	passes := 0
	for _, size := range []int{300, 2, 300} {
		cfg := bothIP.Host(0, size)
		h.mustSet(cfg, false)
		for quiet := false; !quiet; {
			select {
			case <-changes:
				passes++
				if r := h.mustSet(cfg, true); r.Changed != 0 {
					t.Fatalf("the extra pass changed %d objects", r.Changed)
				}
			case <-time.After(200 * time.Millisecond):
				quiet = true
			}
		}
	}
	if passes > 3 {
		t.Errorf("%d extra passes after 3 changes", passes)
	}
}

// A change of the underlay is announced and followed.
func TestUnderlayChanges(t *testing.T) {
	l := newLAN(t)
	h := newHost(t, "h")
	l.plug(h.netNS, "172.16.0.2/12")
	cfg := bothIP.Host(0, 3)
	h.mustSet(cfg, true)
	var changes <-chan struct{}
	h.do(func() { changes = h.dp.Changes(t.Context()) })
	after := func(script string) Report {
		t.Helper()
		h.sh(script)
		select {
		case <-changes:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: not announced", script)
		}
		return h.set(cfg, true)
	}

	if r := after("ip link set eth0 mtu 1400"); r.MTU != 1350 || r.Err != nil {
		t.Errorf("MTU %d, %v; want 1350", r.MTU, r.Err)
	}
	for _, dev := range []string{"vtep1024", "m-dcos", "d-dcos6"} {
		h.mustHave("ip link show "+dev, "mtu 1350")
	}
	r := after("ip addr del 172.16.0.2/12 dev eth0")
	if r.Err == nil || r.Err.Error() != "agent IP 172.16.0.2 is on no interface of this host" || r.MTU != 1350 {
		t.Errorf("without the agent IP: MTU %d, %v", r.MTU, r.Err)
	}
	if r := h.set(cfg, false); r.Err == nil {
		t.Error("a Set without resync forgot that the agent IP is gone")
	}
	if r := after("ip addr add 172.16.0.2/12 dev eth0"); r.Err != nil {
		t.Error(r.Err)
	}
	h.mustBeIdle(cfg)
}

func TestChangesEndWithContext(t *testing.T) {
	h := newHost(t, "h")
	ctx, cancel := context.WithCancel(t.Context())
	var changes <-chan struct{}
	h.do(func() { changes = h.dp.Changes(ctx) })
	cancel()
	for range changes {
	}
}

func TestPeerRemoved(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 1)
	h := hosts[0]
	h.mustSet(bothIP.Host(0, 4), true)
	h.mustHave("ip -6 route; ip route", "via 44.128.0.3")
	for _, resync := range []bool{false, true} {
		cfg := bothIP.Host(0, 4)
		cfg.Peers = slices.DeleteFunc(cfg.Peers, func(p conf.Peer) bool { return p.AgentID == "agent-2" })
		if r := h.mustSet(cfg, resync); r.Changed != 5 {
			t.Errorf("resync %t: changed %d objects, want 5", resync, r.Changed)
		}
		everything := "ip route show table all; ip -6 route show table all; ip neigh; ip -6 neigh; ip neigh show nud permanent; bridge fdb"
		for _, left := range []string{"44.128.0.3", "fd01:a::3", "70:b3:d5:80:00:03", "172.16.0.4", "9.0.2.0", "fd01:b::2:0:0:0"} {
			h.mustNotHave(everything, left)
		}
		h.mustBeIdle(cfg)
		h.mustSet(bothIP.Host(0, 4), resync)
	}
}

func TestAgentIPChanges(t *testing.T) {
	n := bothIP
	_, hosts := n.plugHosts(t, 2)
	a, b := n.Host(0, 2), n.Host(1, 2)
	moved := netip.MustParseAddr("172.16.0.200")
	hosts[0].sh("ip addr add 172.16.0.200/12 dev eth0; ip addr del 172.16.0.2/12 dev eth0; ip addr replace 172.16.0.200/12 dev eth0")
	a.VTEP.Local = moved
	b.Peers = slices.Clone(b.Peers)
	b.Peers[0].AgentIP = moved
	hosts[0].mustSet(a, false)
	if r := hosts[1].mustSet(b, false); r.Changed != 1 {
		t.Errorf("the peer changed %d objects, want the FDB entry", r.Changed)
	}
	hosts[0].mustHave("ip -d link show vtep1024", "local 172.16.0.200")
	hosts[0].mustPing(n.gateway(0, 0, conf.Mesos), n.gateway(0, 1, conf.Docker))
	hosts[1].mustPing(n.gateway(1, 1, conf.Mesos), n.gateway(1, 0, conf.Docker))
	hosts[0].mustBeIdle(a)
	hosts[1].mustBeIdle(b)
}

// What is not ours stays, whatever we do.
func TestForeignThingsStay(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 1)
	h := hosts[0]
	h.sh(`ip link add x0 type veth peer name x1; ip link set x0 up; ip link set x1 up; ip addr add 10.1.1.1/24 dev x0
		ip link add br-x type bridge; ip link add m-stranger type bridge; ip link add vx9 type vxlan id 9 dstport 4789
		ip route add 9.0.1.0/24 via 10.1.1.9 metric 5000; ip route add 9.77.0.0/16 via 10.1.1.9; ip route add 10.9.0.0/16 via 10.1.1.9 proto 43
		ip -6 route add fd01:b:0:0:7::/80 dev x0; ip neigh add 10.1.1.9 lladdr 02:00:00:00:00:01 dev x0 nud permanent
		bridge fdb append 00:00:00:00:00:00 dev vx9 dst 10.1.1.9
		iptables -N MINE; iptables -A MINE -j RETURN; iptables -A FORWARD -j MINE; iptables -t nat -A POSTROUTING -s 10.9.0.0/16 -j MASQUERADE`)
	foreign := func() string {
		return h.sh(`ip link show br-x; ip link show m-stranger; ip -d link show vx9; ip -4 addr show x0
			ip route show proto boot; ip route show proto 43; ip -6 route show dev x0; ip neigh show dev x0 nud permanent; bridge fdb show dev vx9
			iptables -S | grep -v OVERLAY; iptables -t nat -S | grep -v OVERLAY`)
	}
	before := foreign()
	for _, size := range []int{5, 1, 3} {
		h.mustSet(bothIP.Host(0, size), true)
	}
	h.mustSet(Host{VTEP: bothIP.Host(0, 1).VTEP}, true)
	if diff := cmp.Diff(before, foreign()); diff != "" {
		t.Errorf("something foreign changed (-before +after):\n%s", diff)
	}
	h.mustNotHave("iptables -S; ip6tables -S; iptables -t nat -S; ip6tables -t nat -S", "OVERLAY")
	h.mustNotHave("ip link", "dcos")
}

// A route of somebody else is reported as long as it is there, and our own
// comes when it goes.
func TestForeignRouteInTheWay(t *testing.T) {
	_, hosts := onlyIPv4.plugHosts(t, 1)
	h := hosts[0]
	h.sh("ip route add 9.0.1.0/24 dev lo metric 2")
	cfg := onlyIPv4.Host(0, 3)
	// Not known yet: the kernel refuses.
	r := h.set(cfg, false)
	if err := r.Overlays["dcos"]; err == nil || !strings.Contains(err.Error(), "route add 9.0.1.0/24 via 44.128.0.2 dev vtep1024 proto 44 metric 2: file exists") {
		t.Errorf("first: %v", err)
	}
	h.mustHave("ip route", "9.0.2.0/24 via 44.128.0.3")
	for _, resync := range []bool{true, false} {
		r = h.set(cfg, resync)
		if err := r.Overlays["dcos"]; err == nil || err.Error() != "route 9.0.1.0/24 dev lo protocol 3 metric 2 is not ours and takes the place of the one via VTEP 44.128.0.2; remove it (ip route show 9.0.1.0/24)" {
			t.Errorf("resync %t: %v", resync, err)
		}
	}
	h.sh("ip route del 9.0.1.0/24 dev lo metric 2")
	h.mustSet(cfg, true)
	h.mustHave("ip route", "9.0.1.0/24 via 44.128.0.2")
}

// One overlay that cannot be configured does not stop the others, and what
// failed is tried again without being asked to read the kernel.
func TestOneOverlayFails(t *testing.T) {
	l := newLAN(t)
	h := newHost(t, "h")
	l.plug(h.netNS, "172.16.0.2/12")
	h.sh("ip link add m-dcos6 type veth peer name other")
	cfg := bothIP.Host(0, 3)
	r := h.set(cfg, true)
	want := "link m-dcos6 is in the way: the bridge of overlay dcos6 needs that name, but it is a veth; remove or rename it"
	if r.Err != nil || len(r.Overlays) != 1 || r.Overlays["dcos6"] == nil || r.Overlays["dcos6"].Error() != want {
		t.Errorf("report %v", r)
	}
	h.mustHave("ip addr show m-dcos", "9.0.0.1/25")
	h.mustHave("ip addr show d-dcos6", "/81")
	h.sh("ip link del m-dcos6")
	h.mustSet(cfg, true)
	h.mustHave("ip addr show m-dcos6", "fd01:b::1/81")
}

func TestBridges(t *testing.T) {
	_, hosts := onlyIPv4.plugHosts(t, 1)
	h, cfg := hosts[0], onlyIPv4.Host(0, 1)
	mac := "address 0a:58:09:00:00:01"
	h.mustHave("ip -d link show m-dcos", "stp_state 0", "forward_delay 0", "mcast_snooping 0")
	h.mustHave("ip link show m-dcos", "link/ether 0a:58:09:00:00:01")
	h.mustHave("ip link show m-dcos", "alias overlay: dcos/mesos")

	// Ports that come and go do not change the MTU.
	h.sh("ip link add x0 mtu 1300 type veth peer name x1; ip link set x0 master m-dcos")
	h.mustHave("ip link show m-dcos", "mtu 1450")
	h.sh("ip link del x0")
	h.mustHave("ip link show m-dcos", "mtu 1450")

	// A bridge that Docker made is used and, in the end, left to Docker.
	h.sh("ip link del d-dcos; ip link add d-dcos type bridge; ip addr add 9.0.0.129/25 dev d-dcos")
	h.mustSet(cfg, true)
	h.mustBeIdle(cfg)
	h.mustNotHave("ip link show d-dcos", "alias")
	// One that we were killed before naming is ours.
	h.sh("ip link del m-dcos; ip link add m-dcos " + mac + " type bridge")
	h.mustSet(cfg, true)
	h.mustHave("ip link show m-dcos", "alias overlay: dcos/mesos")

	// A bridge with a container on it outlives its overlay, and nothing is wrong
	// with that.
	h.container("m-dcos", cfg.Bridges[0].Addrs[0], 5)
	none := Host{VTEP: cfg.VTEP}
	for _, resync := range []bool{true, false, true} {
		h.mustSet(none, resync)
		h.mustHave("ip link", "m-dcos")
	}
	for _, port := range h.lines("ip -o link show master m-dcos", ": v") {
		h.sh("ip link del " + strings.Split(strings.Fields(port)[1], "@")[0])
	}
	h.mustSet(none, true)
	h.mustNotHave("ip link", "m-dcos")
	h.mustHave("ip link", "d-dcos")
}

// Hosts on which IPv6 is off by default get it on our devices.
func TestIPv6OffByDefault(t *testing.T) {
	l := newLAN(t)
	h := newHost(t, "h")
	h.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1")
	l.plug(h.netNS, "172.16.0.2/12")
	h.mustSet(onlyIPv6.Host(0, 2), true)
	h.mustBeIdle(onlyIPv6.Host(0, 2))
	gateway := onlyIPv6.Host(0, 2).Bridges[0].Addrs[0]
	c, _ := h.container("m-dcos6", gateway, 5)
	c.mustPing("", gateway.Addr().String())
}

// A host that got its default route from a router keeps listening to it.
func TestRouterAdvertisements(t *testing.T) {
	l := newLAN(t)
	h := newHost(t, "h")
	h.sh("sysctl -qw net.ipv6.conf.all.forwarding=0 net.ipv6.conf.default.accept_ra=1")
	l.plug(h.netNS, "172.16.0.2/12")
	ra := "sysctl -n net.ipv6.conf.eth0.accept_ra"
	h.mustSet(onlyIPv4.Host(0, 2), true)
	if got := strings.TrimSpace(h.sh(ra)); got != "1" {
		t.Errorf("without IPv6 overlays accept_ra is %s", got)
	}
	h.mustSet(bothIP.Host(0, 2), true)
	if got := strings.TrimSpace(h.sh(ra + "; sysctl -n net.ipv6.conf.all.forwarding net.ipv6.conf.m-dcos6.accept_ra net.ipv6.conf.vtep1024.accept_ra net.ipv6.conf.m-dcos.accept_ra")); got != "2\n1\n0\n0\n0" {
		t.Errorf("sysctls %q", got)
	}
}

// Peers come, go and change at random, and what the differences add up to is
// what the kernel would be given from scratch.
func TestDifferencesAddUp(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 1)
	h := hosts[0]
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 60 {
		cfg := bothIP.Host(0, 1)
		for i := range 8 {
			p := bothIP.Peer(i + 1)
			switch random.IntN(8) {
			case 0:
				continue
			case 1:
				p.AgentIP = netip.MustParseAddr("172.16.1.1")
			case 2: // has another's subnets, perhaps against that one's will
				p.Subnets = bothIP.Peer(random.IntN(8) + 1).Subnets
			case 3:
				p.Subnets = p.Subnets[:1]
			case 4: // another id: a host that was set up anew
				p.AgentID = fmt.Sprint("again-", i)
			}
			cfg.Peers = append(cfg.Peers, p)
		}
		for pass, resync := range []bool{false, true, false} {
			if r := h.mustSet(cfg, resync); pass > 0 && r.Changed != 0 {
				t.Fatalf("pass %d changed %d objects", pass, r.Changed)
			}
		}
	}
}
