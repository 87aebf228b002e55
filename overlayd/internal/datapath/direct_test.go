package datapath

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan/plantest"
)

// sentInVXLAN is how many packets the VTEP of a host has sent.
func (h *host) sentInVXLAN() string {
	h.t.Helper()
	return strings.TrimSpace(h.sh("awk '/vtep1024:/ { print $11 }' /proc/net/dev"))
}

// directly makes the hosts of a cluster send without VXLAN where they can.
func directly(n network) network {
	n.Direct = true
	return n
}

// eachRouting runs a test with hosts that send in VXLAN, and without where they
// can.
func eachRouting(t *testing.T, n network, test func(t *testing.T, n network)) {
	t.Run("vxlan", func(t *testing.T) { test(t, n) })
	t.Run("direct", func(t *testing.T) { test(t, directly(n)) })
}

// Without VXLAN, too, a source address of the overlays is taken only from where
// it may come from: a peer's subnet, at the device that peers send to.
func TestDirectSources(t *testing.T) {
	for name, n := range map[string]network{"IPv4": directly(onlyIPv4), "IPv6": directly(onlyIPv6)} {
		n.Under6 = name == "IPv6"
		t.Run(name, func(t *testing.T) {
			eachFirewall(t, func(t *testing.T) { testDirectSources(t, n) })
		})
	}
}

func testDirectSources(t *testing.T, n network) {
	l, hosts := n.plugHosts(t, 2)
	bits, length := 32, "/12"
	stranger := "172.16.9.9"
	if n.Under6 {
		bits, length, stranger = 128, "/64", "fd00:1::9:9"
	}
	outside, aside := newNS(t, "out"), newNS(t, "aside")
	l.plug(outside, stranger+length)
	// Another link of host 0, which no peer is on.
	hosts[0].sh("ip link add eth7 type veth peer name eth0 netns " + aside.name + "; ip link set eth7 up")
	hosts[0].sh("ip addr add 192.0.2.1/24 dev eth7; ip addr add 2001:db8::1/64 dev eth7 nodad")
	aside.sh("ip link set eth0 up; ip addr add 192.0.2.2/24 dev eth0; ip addr add 2001:db8::2/64 dev eth0 nodad")
	for _, dev := range []string{"all", "default", "eth0", "eth7"} { // so that nothing but our rules decides
		hosts[0].sh("sysctl -qw net.ipv4.conf." + dev + ".rp_filter=0")
	}
	a := n.Host(0, 2).Bridges[0]
	c, addr := hosts[0].container(a.Name, a.Addrs[0], 5)
	overlay := n.Overlays[0].Subnets[0]
	outside.sh(fmt.Sprintf("ip route add %s via %s", overlay, n.AgentIP(0)))
	aside.sh(fmt.Sprintf("ip route add %s via %s", overlay, map[bool]string{false: "192.0.2.1", true: "2001:db8::1"}[n.Under6]))
	nth := func(i int) string { return plantest.Nth(n.AgentSubnet(n.Overlays[0], i), bits, 9).Addr().String() }
	vtep := n.Host(1, 2).VTEP.IP
	if n.Under6 {
		vtep = n.Host(1, 2).VTEP.IP6
	}
	for _, tc := range []struct {
		what   string
		from   *netNS
		source string
		taken  bool
	}{
		{"no overlay address", outside, stranger, true},
		{"of a peer's subnet, where the peer is", outside, nth(1), true}, // who can send as the host can send as its containers
		{"of a peer's subnet, at another link", aside, nth(1), false},
		{"of the host's own subnet", outside, nth(0), false},
		{"of a subnet that nobody has", outside, nth(7), false},
		{"of a peer's VTEP", outside, vtep.Addr().String(), true},
		{"of a VTEP that nobody has", outside, vtep.Addr().Next().Next().String(), false},
	} {
		if tc.source != stranger {
			tc.from.sh(fmt.Sprintf("ip addr replace %s/%d dev lo nodad", tc.source, bits))
		}
		if got := reaches(t, tc.from, tc.source, c, addr, tc.taken); got != tc.taken {
			t.Errorf("source %s (%s): taken %v, want %v", tc.what, tc.source, got, tc.taken)
		}
	}
	// The same peer, once it is none.
	gone := n.Host(0, 2)
	gone.Peers = nil
	hosts[0].mustSet(gone, false)
	if reaches(t, outside, nth(1), c, addr, false) {
		t.Error("the subnet of a peer that is gone is still taken as a source")
	}
	hosts[0].mustSet(n.Host(0, 2), false)
	if !reaches(t, outside, nth(1), c, addr, true) {
		t.Error("the subnet of a new peer is not taken")
	}
	hosts[0].mustBeIdle(n.Host(0, 2))
}

// reaches reports whether a datagram from a source address arrives. It is more
// patient where one should.
func reaches(t *testing.T, from *netNS, source string, to *netNS, addr string, should bool) bool {
	t.Helper()
	var got net.PacketConn
	var err error
	to.do(func() { got, err = net.ListenPacket("udp", net.JoinHostPort(addr, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	buf := make([]byte, 10)
	tries := 4 // the first may wait for a neighbour
	if should {
		tries = 40
	}
	for range tries {
		var c net.Conn
		from.do(func() {
			c, err = (&net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(source)}}).Dial("udp", got.LocalAddr().String())
		})
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte("x"))
		c.Close()
		if err := got.SetReadDeadline(time.Now().Add(150 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := got.ReadFrom(buf); err == nil {
			return true
		}
	}
	return false
}

// Peers on the same link are sent to without VXLAN, those behind a router in it;
// a route that changes is followed, and so is a link that goes.
func TestDirect(t *testing.T) {
	for name, n := range map[string]network{"IPv4": directly(onlyIPv4), "IPv6": directly(onlyIPv6)} {
		t.Run(name, func(t *testing.T) {
			n.Under6 = name == "IPv6"
			testDirect(t, n)
		})
	}
}

func testDirect(t *testing.T, n network) {
	l := newLAN(t)
	length, ip := "/28", "ip"
	if n.Under6 {
		length, ip = "/126", "ip -6"
	}
	// Hosts 0 and 1 are on one link, host 2 behind a router, which has the last
	// address of the link.
	far, router := newLAN(t), newNS(t, "router")
	via := map[bool]string{false: "172.16.0.14", true: "fd00:1::1"}[n.Under6]
	behind := map[bool]string{false: "172.31.0.1", true: "fd00:2::1"}[n.Under6]
	l.plug(router, via+length)
	router.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
	router.sh("ip link set eth0 name eth1")
	far.plug(router, behind+map[bool]string{false: "/24", true: "/64"}[n.Under6])
	var hosts []*host
	for i := range 3 {
		hosts = append(hosts, newHost(t, fmt.Sprint("h", i)))
		at, next, plug := n.AgentIP(i).String()+length, via, l
		if i == 2 {
			at, next, plug = n.AgentIP(i).String()+map[bool]string{false: "/32", true: "/128"}[n.Under6], behind, far
		}
		plug.plug(hosts[i].netNS, at)
		hosts[i].sh(ip + " route add default via " + next + " dev eth0 onlink")
	}
	router.sh(ip + " route add " + n.AgentIP(2).String() + " dev eth0")
	// The link's own prefix must not hold host 2.
	for i := range 2 {
		hosts[i].sh(fmt.Sprintf("%s route add %s via %s dev eth0", ip, n.AgentIP(2), via))
	}
	for i, h := range hosts {
		h.mustSet(n.Host(i, 3), true)
		h.mustBeIdle(n.Host(i, 3))
	}
	subnet := func(i int) string { return n.AgentSubnet(n.Overlays[0], i).String() }
	routes := ip + " route show proto 44"
	hosts[0].mustHave(routes, subnet(1), "via "+n.AgentIP(1).String()+" dev eth0", "src "+n.AgentIP(0).String(), "onlink")
	hosts[0].mustHave(routes, subnet(2), "dev vtep1024")

	var addrs []string
	var containers []*netNS
	for i, h := range hosts {
		b := n.Host(i, 3).Bridges[0]
		c, addr := h.container(b.Name, b.Addrs[0], 5)
		containers, addrs = append(containers, c), append(addrs, addr)
	}
	ping := func(from, to int) (inVXLAN bool) {
		t.Helper()
		containers[from].mustPing("", addrs[to])
		before := hosts[from].sentInVXLAN()
		containers[from].mustPing("", addrs[to])
		return hosts[from].sentInVXLAN() != before
	}
	if ping(0, 1) || ping(1, 0) {
		t.Error("a peer on the link was sent VXLAN")
	}
	if !ping(0, 2) || !ping(2, 0) {
		t.Error("a peer behind a router was not sent VXLAN")
	}
	// The VXLAN port of a container is the container's own, by either way.
	for i, to := range containers {
		containers[1-min(i, 1)].reaches(to, netip.AddrPortFrom(netip.MustParseAddr(addrs[i]), conf.VXLANPort))
	}
	hosts[0].mustPing("", addrs[1]) // the host itself, which has its agent IP then
	hosts[0].mustPing("", n.gateway(0, 1, "mesos"))

	changed := func(what, script string, vxlan bool) {
		t.Helper()
		hosts[0].announced(script)
		hosts[0].mustSet(n.Host(0, 3), true)
		hosts[0].mustBeIdle(n.Host(0, 3))
		if got := ping(0, 1); got != vxlan {
			t.Errorf("after %s: VXLAN %v, want %v", what, got, vxlan)
		}
	}
	peer := n.AgentIP(1).String()
	changed("a route through a router", fmt.Sprintf("%s route add %s via %s dev eth0", ip, peer, via), true)
	changed("its end", fmt.Sprintf("%s route del %s via %s dev eth0", ip, peer, via), false)
	// A peer that does not take it, or no longer does.
	other := n
	other.Direct = false
	c := n.Host(0, 3)
	c.Peers = other.Host(0, 3).Peers
	hosts[0].mustSet(c, false)
	if !ping(0, 1) {
		t.Error("a peer that takes VXLAN only was sent something else")
	}
	hosts[0].mustBeIdle(c)
	// It still takes what comes without.
	if ping(1, 0) {
		t.Error("host 1 sends VXLAN")
	}
}

// Switching loses nothing, whoever begins, as long as whoever stops goes on
// listening until all know.
func TestDirectSwitch(t *testing.T) {
	eachFirewall(t, func(t *testing.T) {
		n := onlyIPv4
		_, hosts := n.plugHosts(t, 2)
		a, b := n.Host(0, 2).Bridges[0], n.Host(1, 2).Bridges[0]
		near, _ := hosts[0].container(a.Name, a.Addrs[0], 5)
		_, farAddr := hosts[1].container(b.Name, b.Addrs[0], 5)
		near.mustPing("", farAddr)
		// What each host does, and knows of the other.
		is, knows := [2]plan.Direct{}, [2]bool{}
		set := func(i int) {
			c := n.Host(i, 2)
			c.Direct, c.Peers[0].Direct = is[i], knows[i]
			hosts[i].mustSet(c, false)
		}
		off, listening, on := plan.Direct{}, plan.Direct{Take: true}, plan.Direct{Take: true, Send: true}
		ways := map[string]bool{}
		lost := near.pinging(farAddr, 1000, func() {
			for _, first := range []int{0, 1, 0, 1} {
				second := 1 - first
				for _, i := range []int{first, second} {
					is[i] = on
					set(i)
					knows[1-i] = true
					set(1 - i)
				}
				ways["direct"] = ways["direct"] || len(hosts[0].lines("ip route show proto 44", "dev eth0")) > 0 && len(hosts[1].lines("ip route show proto 44", "dev eth0")) > 0
				for _, i := range []int{first, second} {
					is[i] = listening
					set(i)
					knows[1-i] = false
					set(1 - i)
					is[i] = off
					set(i)
				}
				ways["vxlan"] = ways["vxlan"] || len(hosts[0].lines("ip route show proto 44", "dev eth0")) == 0
			}
		})
		if lost != 0 {
			t.Errorf("%d packets were lost", lost)
		}
		if !ways["direct"] || !ways["vxlan"] {
			t.Errorf("only these ways were taken: %v", ways)
		}
	})
}

// reaches checks that a datagram arrives.
func (h *netNS) reaches(other *netNS, to netip.AddrPort) {
	h.t.Helper()
	var c net.PacketConn
	var err error
	other.do(func() { c, err = net.ListenPacket("udp", to.String()) })
	if err != nil {
		h.t.Fatal(err)
	}
	defer c.Close()
	sendUDP(h.t, h, to, []byte("hello"))
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		h.t.Fatal(err)
	}
	if _, _, err := c.ReadFrom(make([]byte, 100)); err != nil {
		h.t.Errorf("from %s to %s: %v", h.name, to, err)
	}
}
