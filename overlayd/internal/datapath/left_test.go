package datapath

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan/plantest"
)

// leftSite is two hosts, and a container of the first that injects VXLAN into the
// overlay of the second. The first translates what it sends, as an administrator has
// it do.
type leftSite struct {
	t           *testing.T
	hosts       []*host
	here, there Host
	attacker    *netNS
	got         net.PacketConn
	packet      []byte
}

func newLeftSite(t *testing.T, n network) *leftSite {
	_, hosts := n.plugHosts(t, 2)
	s := &leftSite{t: t, hosts: hosts, here: n.Host(0, 2), there: n.Host(1, 2)}
	here, there := s.here.Bridges, s.there.Bridges
	s.attacker, _ = hosts[0].container(here[0].Name, here[0].Addrs[0], 5)
	peer, from := hosts[0].container(here[1].Name, here[1].Addrs[0], 5)
	victim, addr := hosts[1].container(there[1].Name, there[1].Addrs[0], 5)
	peer.mustPing("", addr)
	s.got = listenUDP(t, victim, addr)
	s.packet = vxlanPacket(s.there.VTEP.MAC, netip.MustParseAddr(from), s.to(), "injected")
	hosts[0].sh(fmt.Sprintf("nft 'add table ip admin; add chain ip admin post { type nat hook postrouting priority 99; }; add rule ip admin post ip saddr %s oifname eth0 masquerade'", here[0].Addrs[0].Masked()))
	return s
}

// to is where the victim listens.
func (s *leftSite) to() netip.AddrPort { return s.got.LocalAddr().(*net.UDPAddr).AddrPort() }

// mustStop has everybody of from send VXLAN to a VTEP, of which nothing may arrive.
func (s *leftSite) mustStop(when string, vtep netip.Addr, packet []byte, from ...*netNS) {
	s.t.Helper()
	for _, ns := range from {
		for range 20 {
			sendUDP(s.t, ns, netip.AddrPortFrom(vtep, conf.VXLANPort), packet)
		}
	}
	// From the other host's own, which nothing here may stop.
	sendUDP(s.t, s.hosts[1].netNS, s.to(), []byte("the end"))
	if injected := until(s.t, s.got, "the end"); len(injected) > 0 {
		s.t.Errorf("%s: %d of %d were delivered", when, len(injected), 20*len(from))
	}
}

// A container whose overlay, or half of one, this host has no more keeps its bridge.
// It injects nothing, and sends elsewhere as before, where the host translates it.
func TestLeftBridges(t *testing.T) { eachFirewall(t, testLeftBridges) }

func testLeftBridges(t *testing.T) {
	s := newLeftSite(t, onlyIPv4)
	h, here, there, attacker := s.hosts[0], s.here, s.there, s.attacker
	attacker.mustPing("", there.VTEP.Local.String())
	half, other := here, here
	half.Bridges = here.Bridges[1:]
	other.Overlays = append([]Overlay{}, here.Overlays...)
	other.Overlays[0].Name = "other"
	other.Overlays[0].Subnets, other.Overlays[0].Agent = []netip.Prefix{prefix("10.77.0.0/16")}, []netip.Prefix{prefix("10.77.1.0/24")}
	other.Bridges = []Bridge{{Name: "d-other", Overlay: "other", Addrs: []netip.Prefix{prefix("10.77.1.129/25")}}}
	for _, step := range []struct {
		name string
		cfg  Host
	}{{"its half is gone", half}, {"its overlay is gone", other}} {
		h.mustSet(step.cfg, true)
		if !attacker.pings("", there.VTEP.Local.String()) {
			t.Errorf("%s: the container does not reach the underlay", step.name)
		}
		s.mustStop(step.name, there.VTEP.Local, s.packet, attacker)
	}
	h.sh("ip netns exec " + attacker.name + " ip link del eth0")
	if r := h.mustSet(other, true); r.Drift.Counts[driftFirewall] != 0 {
		t.Errorf("that the bridge goes with its last container is taken for drift: %v", r.Drift)
	}
	h.mustNotHave("ip link", here.Bridges[0].Name)
	if _, there := h.dp.rules.left[here.Bridges[0].Name]; there || len(h.dp.rules.left) != 1 {
		t.Errorf("the rules have %v, and the other bridge alone is left", h.dp.rules.left)
	}
	h.mustBeIdle(other)
}

// The last overlay of a host goes while containers are on its bridges. They inject
// nothing all the same, whatever becomes of the agent, and what they send is checked
// and bounded as before. With the last of them everything goes.
func TestLeftWithoutOverlays(t *testing.T) { eachFirewall(t, testLeftWithoutOverlays) }

func testLeftWithoutOverlays(t *testing.T) {
	s := newLeftSite(t, onlyIPv4)
	h, none := s.hosts[0], Host{VTEP: s.here.VTEP, Peers: s.here.Peers}
	gateway := s.here.Bridges[1].Addrs[0]
	checked, port := h.attach(conf.Docker, "dcos", gateway, 9)
	alias := mark.NewAlias("dcos", conf.Docker, conf.Attachment{Network: "dcos", ContainerID: "c9", IfName: "eth0"}, []netip.Addr{plantest.Nth(gateway.Masked(), 32, 9).Addr()}, 0)
	alias.MAC = conf.MAC{2, 0, 0, 0, 0, 9}
	lie := plantest.Nth(gateway.Masked(), 32, 10)
	checked.sh(fmt.Sprintf("ip link set eth0 address %s; ip addr add %s dev eth0", alias.MAC, lie))
	h.sh(fmt.Sprintf("ip link set %s alias %q; nft add rule ip admin post ip saddr %s oifname eth0 masquerade", port, alias, gateway.Masked()))
	h.mustSet(s.here, true)
	own := vxlanPacket(s.here.VTEP.MAC, gateway.Addr().Next(), s.to(), "from the own host")
	look := func(when string) {
		t.Helper()
		if !s.attacker.pings("", s.there.VTEP.Local.String()) {
			t.Errorf("%s: the container does not reach the underlay", when)
		}
		s.mustStop(when, s.there.VTEP.Local, s.packet, s.attacker, checked)
		s.mustStop(when+", to its own host", s.here.VTEP.Local, own, s.attacker, checked)
		checked.mustPing("", gateway.Addr().String())
		checked.mustNotPing(lie.Addr().String(), gateway.Addr().String())
		if h.dp.rules.guard.off == nil {
			h.mustHave("nft list chain inet guard-overlay OVERLAY-FORWARD", "@devices", "OVERLAY-HOPS")
		}
	}
	for _, resync := range []bool{true, false} {
		h.mustSet(none, resync)
		look(fmt.Sprintf("without overlays, resync %t", resync))
	}
	h.mustBeIdle(none)
	h.dp.Close()
	look("no agent runs")
	h.dp = h.newDatapath()
	h.mustSet(none, true)
	look("an agent that has never known the overlay")
	alone := Host{VTEP: s.here.VTEP}
	h.mustSet(alone, false)
	look("without peers")

	for _, bridge := range []string{"m-dcos", "d-dcos"} {
		for _, l := range h.lines("ip -o link show master "+bridge, ": v") {
			link, _, _ := strings.Cut(strings.Fields(l)[1], "@")
			h.sh("ip link del " + link)
		}
	}
	if r := h.mustSet(alone, true); r.Drift.Counts[driftFirewall]+r.Drift.Counts[driftSourceCheck] > 0 {
		t.Errorf("that the bridges go with their last container is taken for drift: %v", r.Drift)
	}
	h.mustNotHave("ip link", "dcos")
	h.mustNotHave("iptables-save; ip6tables-save; nft list ruleset", "OVERLAY")
	h.mustNotHave("nft list ruleset", "table bridge")
	h.mustNotHave("ipset list -n", "overlay-")
}

// A host without overlays and containers passes no VXLAN of strangers on to its peers,
// who would take it for its own.
func TestPeersWithoutOverlays(t *testing.T) { eachFirewall(t, testPeersWithoutOverlays) }

func testPeersWithoutOverlays(t *testing.T) {
	n := onlyIPv4
	l, hosts := n.plugHosts(t, 3)
	stranger := newNS(t, "stranger")
	l.plug(stranger, "172.16.9.9/12")
	there := n.Host(1, 3).Bridges[1]
	near, from := hosts[1].container(there.Name, there.Addrs[0], 4)
	victim, addr := hosts[1].container(there.Name, there.Addrs[0], 5)
	near.mustPing("", addr)
	s := &leftSite{t: t, hosts: hosts, got: listenUDP(t, victim, addr)}
	h, none := hosts[0], Host{VTEP: n.Host(0, 3).VTEP}
	// Another one sends to the container itself, as one of the third host's.
	liar := newNS(t, "liar")
	l.plug(liar, "172.16.9.10/12")
	lie := plantest.Nth(n.Host(2, 3).Bridges[1].Addrs[0].Masked(), 32, 5).Addr()
	liar.sh(fmt.Sprintf("ip addr add %s/32 dev lo; ip route add %s via %s", lie, addr, n.AgentIP(0)))
	mustStopLies := func(when string) {
		t.Helper()
		for range 20 {
			sendUDPFrom(t, liar, netip.AddrPortFrom(lie, 0), s.to(), []byte("lie"))
		}
		sendUDP(t, hosts[1].netNS, s.to(), []byte("the end"))
		if lies := until(t, s.got, "the end"); len(lies) > 0 {
			t.Errorf("%s: %d of 20 were delivered without VXLAN", when, len(lies))
		}
	}
	packet := vxlanPacket(none.VTEP.MAC, netip.MustParseAddr(from), s.to(), "injected")
	with := func(peers ...int) Host {
		w := none
		for _, i := range peers {
			w.Peers = append(w.Peers, n.Peer(i))
		}
		return w
	}
	for _, step := range []struct {
		name   string
		w      Host
		resync bool
	}{
		{"the last overlay has gone", with(1, 2), true},
		{"and all peers but one", with(1), false},
	} {
		h.mustSet(step.w, step.resync)
		s.mustStop(step.name, none.VTEP.Local, packet, stranger)
		if len(step.w.Peers) == 2 {
			mustStopLies(step.name)
		}
	}
	h.mustSet(none, false)
	h.mustNotHave("iptables-save; ip6tables-save; nft list ruleset", "OVERLAY")
	h.mustSet(with(1), false)
	s.mustStop("the first peer has come", none.VTEP.Local, packet, stranger)
	if r := h.mustSet(with(1, 2), false); !r.PeersOnly {
		t.Error("for one more peer everything was looked at")
	}
	s.mustStop("another one has come", none.VTEP.Local, packet, stranger)
	mustStopLies("another one has come")
	h.mustBeIdle(with(1, 2))
	other := with(1, 2)
	other.Overlays = []Overlay{{Name: "other", Subnets: []netip.Prefix{prefix("10.77.0.0/16")}, Agent: []netip.Prefix{prefix("10.77.1.0/24")}}}
	other.Bridges = []Bridge{{Name: "d-other", Overlay: "other", Addrs: []netip.Prefix{prefix("10.77.1.129/25")}}}
	h.mustSet(other, true)
	mustStopLies("with another overlay")
	// A network of the host's own is not shut out, whatever peers have.
	h.sh(fmt.Sprintf("ip addr add %s/24 dev eth0", lie.Next()))
	h.set(other, true)
	h.mustNotHave("nft list set inet guard-overlay afar4 2>&1 || :; nft list set inet overlay afar4 2>&1 || :; ipset save", n.Host(2, 3).Bridges[1].Addrs[0].Masked().Addr().String())
}

// A bridge that Docker made is left with its containers as any other; it has no mark.
func TestLeftBridgeOfDocker(t *testing.T) { eachFirewall(t, testLeftBridgeOfDocker) }

func testLeftBridgeOfDocker(t *testing.T) {
	s := newLeftSite(t, onlyIPv4)
	h, docker := s.hosts[0], s.here.Bridges[1]
	gateway := docker.Addrs[0]
	h.sh(fmt.Sprintf("ip link del d-dcos; ip link add d-dcos type bridge; ip addr add %s dev d-dcos; ip link set d-dcos up", gateway))
	h.mustSet(s.here, true)
	attacker, _ := h.container("d-dcos", gateway, 6)
	h.sh(fmt.Sprintf("nft 'add rule ip admin post ip saddr %s oifname eth0 masquerade'", gateway.Masked()))
	attacker.mustPing("", s.there.VTEP.Local.String())
	half := s.here
	half.Bridges = s.here.Bridges[:1]
	for _, step := range []struct {
		name string
		w    Host
	}{{"its half is gone", half}, {"its overlay is gone", Host{VTEP: s.here.VTEP, Peers: s.here.Peers}}} {
		h.mustSet(step.w, true)
		s.mustStop(step.name, s.there.VTEP.Local, s.packet, attacker)
		h.mustBeIdle(step.w)
	}
}

// An overlay that is removed by force takes its bridges from under the containers.
// Their interfaces are good for nothing then, whatever they know of the host.
func TestTakenDown(t *testing.T) { eachFirewall(t, testTakenDown) }

func testTakenDown(t *testing.T) {
	s := newLeftSite(t, onlyIPv4)
	h := s.hosts[0]
	ports := h.lines("ip -o link show master m-dcos", ": v")
	if len(ports) != 1 {
		t.Fatalf("the ports are %q", ports)
	}
	port, _, _ := strings.Cut(strings.Fields(ports[0])[1], "@")
	none := Host{VTEP: s.here.VTEP, Peers: s.here.Peers, TakenDown: []string{"dcos"}}
	h.mustSet(none, true)
	h.mustNotHave("ip link", "dcos")
	mac := strings.Fields(h.sh("ip -o link show " + port + " | sed 's/.*link.ether //'"))[0]
	s.attacker.sh(fmt.Sprintf("ip route replace default via %s dev eth0 onlink; ip neigh replace %s lladdr %s dev eth0", s.here.VTEP.Local, s.here.VTEP.Local, mac))
	s.mustStop("taken down", s.there.VTEP.Local, s.packet, s.attacker)
	h.mustSet(none, true)
	s.mustStop("and looked at again", s.there.VTEP.Local, s.packet, s.attacker)
}

// A container on a bridge that is left is put back where systemd-networkd took its
// port out, and the bridge waits for it.
func TestPortsOfLeftBridges(t *testing.T) {
	_, hosts := onlyIPv4.plugHosts(t, 1)
	h, cfg := hosts[0], onlyIPv4.Host(0, 1)
	gateway := cfg.Bridges[1].Addrs[0]
	c, port := h.attach(conf.Docker, "dcos", gateway, 5)
	none := Host{VTEP: cfg.VTEP}
	h.mustSet(none, true)
	var changes <-chan struct{}
	h.do(func() { changes = h.dp.Changes(t.Context()) })
	for quiet := false; !quiet; {
		select {
		case <-changes:
		case <-time.After(300 * time.Millisecond):
			quiet = true
		}
	}
	h.sh("ip link set " + port + " nomaster; ip link set " + port + " down")
	select {
	case <-changes:
	case <-time.After(10 * time.Second):
		t.Error("it is not announced")
	}
	h.mustSet(none, true)
	h.mustHave("ip link show "+port, "master d-dcos")
	c.mustPing("", gateway.Addr().String())
	h.mustBeIdle(none)
}
