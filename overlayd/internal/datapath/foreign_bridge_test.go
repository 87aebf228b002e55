package datapath

import (
	"fmt"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// A bridge of an administrator may be called like one of ours, and have the agent IP.
// Then VXLAN and everything else arrives by it as by any interface.
func TestForeignBridges(t *testing.T) { eachFirewall(t, testForeignBridges) }

func testForeignBridges(t *testing.T) {
	n := onlyIPv4
	_, hosts := n.plugHosts(t, 2)
	h, peer := hosts[0], hosts[1]
	ip := n.AgentIP(0).String()
	cfg, there := n.Host(0, 2), n.Host(1, 2)
	h.sh(fmt.Sprintf("ip link add d-lan type bridge; ip link set d-lan up; ip link set eth0 master d-lan; ip addr del %s/12 dev eth0; ip addr add %s/12 dev d-lan", ip, ip))
	vm := newNS(t, "vm")
	h.sh("ip link add m-lab type bridge; ip addr add 10.99.0.1/24 dev m-lab; ip link set m-lab up; ip link add vm1 type veth peer name eth0 netns " + vm.name + "; ip link set vm1 master m-lab up")

	alone := Host{VTEP: cfg.VTEP}
	h.mustSet(alone, true)
	h.mustNotHave("iptables-save; ip6tables-save; nft list ruleset", "OVERLAY")

	cfg.Overlays[0].Isolation = conf.IsolationStrict
	h.mustSet(cfg, true)
	if len(h.dp.rules.left) > 0 {
		t.Errorf("bridges %v are taken for some that are left", h.dp.rules.left)
	}
	h.mustNotHave("iptables-save; nft list ruleset", "d-lan")
	// An address that no rule knows as that of a peer.
	peer.sh("ip addr add 172.16.77.7/12 dev eth0")
	peer.mustPing("172.16.77.7", ip)
	here, _ := h.container(cfg.Bridges[0].Name, cfg.Bridges[0].Addrs[0], 5)
	_, addr := peer.container(there.Bridges[0].Name, there.Bridges[0].Addrs[0], 5)
	here.mustPing("", addr)
	h.mustBeIdle(cfg)
}

// The host end of a container whose overlay was removed by force, or whose bridge has
// gone another way, is set down also where it is not in a bridge at that moment.
func TestEndsWithoutBridge(t *testing.T) { eachFirewall(t, testEndsWithoutBridge) }

func testEndsWithoutBridge(t *testing.T) {
	for _, tc := range []struct {
		name, before string
		takenDown    []string
	}{
		{"taken out, and the overlay by force", "ip link set %s nomaster", []string{"dcos"}},
		{"its bridge was deleted", "ip link del m-dcos; ip link show %s", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newLeftSite(t, onlyIPv4)
			h, gateway := s.hosts[0], s.here.Bridges[0].Addrs[0]
			c, port := h.attach(conf.Mesos, "dcos", gateway, 9)
			none := Host{VTEP: s.here.VTEP, Peers: s.here.Peers, TakenDown: tc.takenDown}
			h.sh(fmt.Sprintf(tc.before, port))
			h.sh("sysctl -qw net.ipv4.conf." + port + ".rp_filter=0 net.ipv4.conf.all.rp_filter=0")
			h.mustSet(none, true)
			mac := strings.Fields(h.sh("ip -o link show " + port + " | sed 's/.*link.ether //'"))[0]
			c.sh(fmt.Sprintf("ip route replace default via %s dev eth0 onlink; ip neigh replace %s lladdr %s dev eth0", s.here.VTEP.Local, s.here.VTEP.Local, mac))
			s.mustStop(tc.name, s.there.VTEP.Local, s.packet, c)
			if l := h.sh("ip -o link show " + port); strings.Contains(l, ",UP") {
				t.Errorf("it is up: %s", l)
			}
			h.mustSet(none, true) // the rules know a bridge until it has gone
			h.mustBeIdle(none)
			// What comes back has its containers again.
			h.mustSet(s.here, true)
			h.mustHave("ip link show "+port, "master m-dcos", ",UP")
		})
	}
}

// Where the pool of VTEPs holds a network of the host nothing may be done for peers,
// and nothing fails because some come or go.
func TestPeersWithoutVTEP(t *testing.T) { eachFirewall(t, testPeersWithoutVTEP) }

func testPeersWithoutVTEP(t *testing.T) {
	l := newLAN(t)
	h := newHost(t, "h")
	l.plug(h.netNS, "172.16.0.2/12", "44.128.7.1/24")
	full := onlyIPv4.Host(0, 3)
	one := full
	one.Peers = full.Peers[:1]
	for i, step := range []struct {
		w      Host
		resync bool
	}{{full, true}, {one, false}, {full, false}, {full, true}, {one, false}} {
		r := h.set(step.w, step.resync)
		if r.Err == nil || strings.Contains(r.Err.Error(), "\n") || !strings.Contains(r.Err.Error(), "holds a network of this host") {
			t.Errorf("step %d: the failures are %v", i, r.Err)
		}
	}
	h.mustNotHave("ip route", "proto "+fmt.Sprint(mark.RouteProtocol))
	h.sh("ip addr del 44.128.7.1/24 dev eth0")
	h.mustSet(full, true)
	h.mustBeIdle(full)
}
