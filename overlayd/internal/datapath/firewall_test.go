package datapath

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan/plantest"
)

// firewalls are the implementations and the flavours of iptables.
var firewalls = []string{"nftables", "iptables-nft", "iptables-legacy"}

// eachFirewall runs a test with every firewall; the hosts that it makes use it.
func eachFirewall(t *testing.T, test func(t *testing.T)) {
	for _, name := range firewalls {
		t.Run(name, func(t *testing.T) {
			useFirewall(t, name)
			test(t)
		})
	}
}

// useFirewall makes the hosts of the test use a firewall.
func useFirewall(t *testing.T, name string) {
	kind, flavour, ok := strings.Cut(name, "-")
	t.Setenv(firewallVariable, kind)
	if !ok {
		return
	}
	dir := t.TempDir()
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, suffix := range []string{"", "-save", "-restore"} {
			path, err := exec.LookPath(name + "-" + flavour + suffix)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(path, filepath.Join(dir, name+suffix)); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// What is set again is left alone, also by the next process, and whatever others
// do to it is repaired.
func TestFirewallIsKept(t *testing.T) {
	eachFirewall(t, func(t *testing.T) {
		c := bothIP.Host(0, 3)
		c.Overlays[0].Isolation = conf.IsolationStrict
		l := newLAN(t)
		h := newHost(t, "h")
		l.plug(h.netNS, "172.16.0.2/12")
		h.mustSet(c, true)
		h.mustBeIdle(c)
		for _, damage := range []string{"nft flush ruleset", "for t in iptables ip6tables; do for x in raw filter nat; do $t -t $x -F; done; done"} {
			h.sh(damage)
			repaired := h.mustSet(c, true).Changed
			if hit := os.Getenv(firewallVariable) == "iptables" && !strings.Contains(damage, "nft") || strings.Contains(damage, "nft") && !strings.Contains(t.Name(), "legacy"); hit && repaired == 0 {
				t.Errorf("after %s nothing was repaired", damage)
			}
			h.mustBeIdle(c)
		}
		h.mustSet(Host{VTEP: c.VTEP}, true)
		h.mustNotHave("iptables-save; ip6tables-save; nft list ruleset; ipset list -n", "OVERLAY")
		h.mustNotHave("ipset list -n", "overlay-")
	})
}

// The other implementation's rules go when this one's are there, and no packet
// is lost meanwhile.
func TestFirewallSwitch(t *testing.T) {
	n := bothIP
	l, hosts := n.plugHosts(t, 2)
	_ = l
	a, b := n.Host(0, 2).Bridges[0], n.Host(1, 2).Bridges[0]
	near, _ := hosts[0].container(a.Name, a.Addrs[0], 5)
	_, farAddr := hosts[1].container(b.Name, b.Addrs[0], 5)
	near.mustPing("", farAddr)
	lost := near.pinging(farAddr, 300, func() {
		for _, kind := range []string{"nftables", "iptables", "nftables", "iptables"} {
			for i, h := range hosts {
				h.dp.Close()
				t.Setenv(firewallVariable, kind)
				h.dp = h.newDatapath()
				h.mustSet(n.Host(i, 2), true)
				h.mustBeIdle(n.Host(i, 2))
				if kind == "nftables" {
					h.mustHave("nft list tables", "inet overlay")
					h.mustNotHave("iptables-save; ip6tables-save", "OVERLAY")
					h.mustNotHave("ipset list -n", "overlay-")
				} else {
					h.mustNotHave("nft list tables", "inet overlay")
					h.mustHave("iptables-save", "-A FORWARD -j OVERLAY-FORWARD")
				}
			}
		}
	})
	if lost != 0 {
		t.Errorf("%d packets were lost", lost)
	}
}

// pinging sends a number of pings, a hundred a second, while f runs, and returns
// how many were not answered.
func (h *netNS) pinging(dst string, count int, f func()) (lost int) {
	h.t.Helper()
	var out strings.Builder
	cmd := exec.Command("ping", "-n", "-q", "-i", "0.01", "-c", fmt.Sprint(count), "-W", "1", dst)
	cmd.Stdout = &out
	h.do(func() {
		if err := cmd.Start(); err != nil {
			h.t.Error(err)
		}
	})
	f()
	_ = cmd.Wait()
	var sent, got int
	for line := range strings.Lines(out.String()) {
		if n, _ := fmt.Sscanf(line, "%d packets transmitted, %d received", &sent, &got); n == 2 {
			return sent - got
		}
	}
	h.t.Fatalf("ping printed %q", out.String())
	return 0
}

// A packet from outside with the address of a container, or of another host's
// VTEP, is not taken for one of the overlay.
func TestOverlaySourcesFromOutside(t *testing.T) {
	eachFirewall(t, func(t *testing.T) {
		n := bothIP
		l, hosts := n.plugHosts(t, 2)
		outside := newNS(t, "out")
		l.plug(outside, "172.16.9.9/12")
		a := n.Host(0, 2).Bridges[0]
		c, addr := hosts[0].container(a.Name, a.Addrs[0], 5)
		outside.sh("ip route add 9.0.0.0/8 via " + n.AgentIP(0).String())
		far := n.Host(1, 2)
		for _, source := range []string{plantest.Nth(n.AgentSubnet(n.Overlays[0], 1), 32, 9).Addr().String(), far.VTEP.IP.Addr().String()} {
			outside.sh("ip addr add " + source + "/32 dev lo")
			var got net.PacketConn
			var err error
			c.do(func() { got, err = net.ListenPacket("udp4", addr+":0") })
			if err != nil {
				t.Fatal(err)
			}
			to := got.LocalAddr().(*net.UDPAddr).AddrPort()
			for _, from := range []string{source, "172.16.9.9"} { // the second one arrives
				var s net.Conn
				outside.do(func() {
					s, err = (&net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}).Dial("udp4", to.String())
				})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := s.Write([]byte(from)); err != nil {
					t.Fatal(err)
				}
				s.Close()
			}
			if err := got.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 100)
			size, _, err := got.ReadFrom(buf)
			if err != nil || string(buf[:size]) != "172.16.9.9" {
				t.Errorf("the container got a packet from %q, %v", buf[:size], err)
			}
			got.Close()
		}
	})
}

// Containers on two hosts and an outsider, with every host dropping what it is
// not told to forward.
func TestForwardPolicyDrop(t *testing.T) { eachRouting(t, bothIP, testForwardPolicyDrop) }

func testForwardPolicyDrop(t *testing.T, n network) {
	l, hosts := n.plugHosts(t, 2)
	outside := newNS(t, "out")
	l.plug(outside, "172.16.9.9/12", "fd00:9::9/64")
	for i, h := range hosts {
		h.sh(fmt.Sprintf("ip addr add fd00:9::%d/64 dev eth0 nodad; iptables -P FORWARD DROP; ip6tables -P FORWARD DROP", i+1))
		outside.sh(fmt.Sprintf("ip route add %s via %s", n.AgentSubnet(n.Overlays[0], i), n.AgentIP(i)))
		outside.sh(fmt.Sprintf("ip route add %s via fd00:9::%d", n.AgentSubnet(n.Overlays[1], i), i+1))
	}
	for o, there := range []string{"172.16.9.9", "fd00:9::9"} {
		a := n.Host(0, 2).Bridges[2*o]   // m-
		b := n.Host(1, 2).Bridges[2*o+1] // d-
		near, nearAddr := hosts[0].container(a.Name, a.Addrs[0], 5)
		far, farAddr := hosts[1].container(b.Name, b.Addrs[0], 6)
		other := n.Host(0, 2).Bridges[2*o+1]
		half, halfAddr := hosts[0].container(other.Name, other.Addrs[0], 7)

		near.mustPing("", farAddr)
		far.mustPing("", nearAddr)
		near.mustPing("", halfAddr)
		half.mustPing("", nearAddr)
		near.mustPing("", there)
		far.mustPing("", there)
		hosts[1].mustPing("", nearAddr) // from the VTEP address
		near.mustPing("", a.Addrs[0].Addr().String())
		// Nobody outside opens a connection to a container.
		outside.mustNotPing("", nearAddr)
		outside.mustNotPing("", farAddr)
		hosts[0].sh("iptables -P FORWARD ACCEPT; ip6tables -P FORWARD ACCEPT")
		outside.mustPing("", nearAddr) // and it was not for want of a route
		hosts[0].sh("iptables -P FORWARD DROP; ip6tables -P FORWARD DROP")
	}
}

// Who leaves the overlays has the address of the host, who stays keeps his own.
func TestMasquerade(t *testing.T) {
	eachFirewall(t, func(t *testing.T) { eachRouting(t, bothIP, testMasquerade) })
}

func testMasquerade(t *testing.T, n network) {
	l, hosts := n.plugHosts(t, 2)
	outside := newNS(t, "out")
	l.plug(outside, "172.16.9.9/12", "fd00:9::9/64")
	hosts[0].sh("ip addr add fd00:9::1/64 dev eth0 nodad")
	for o, tc := range []struct{ there, as string }{
		{"172.16.9.9", n.AgentIP(0).String()},
		{"fd00:9::9", "fd00:9::1"},
	} {
		a := n.Host(0, 2).Bridges[2*o]
		b := n.Host(1, 2).Bridges[2*o]
		near, nearAddr := hosts[0].container(a.Name, a.Addrs[0], 5)
		far, farAddr := hosts[1].container(b.Name, b.Addrs[0], 6)
		if from := seenFrom(t, near, outside, tc.there); from != tc.as {
			t.Errorf("outside sees %s, want %s", from, tc.as)
		}
		if from := seenFrom(t, near, far, farAddr); from != nearAddr {
			t.Errorf("another container sees %s, want %s", from, nearAddr)
		}
		if from := seenFrom(t, near, hosts[0].netNS, a.Addrs[0].Addr().String()); from != nearAddr {
			t.Errorf("its own host sees %s, want %s", from, nearAddr)
		}
		vtep := []netip.Prefix{n.Host(1, 2).VTEP.IP, n.Host(1, 2).VTEP.IP6}[o].Addr().String()
		if from := seenFrom(t, near, hosts[1].netNS, vtep); from != nearAddr {
			t.Errorf("another host, at its VTEP, sees %s, want %s", from, nearAddr)
		}
	}
}

// seenFrom connects from one namespace to another and returns the address the
// latter sees.
func seenFrom(t *testing.T, from, to *netNS, addr string) string {
	t.Helper()
	var ln net.Listener
	var err error
	to.do(func() { ln, err = net.Listen("tcp", net.JoinHostPort(addr, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var c net.Conn
	from.do(func() { c, err = net.DialTimeout("tcp", ln.Addr().String(), 5*time.Second) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	return netip.MustParseAddrPort(s.RemoteAddr().String()).Addr().String()
}

// An isolated overlay is reached by nobody of another, on one host or across
// hosts; within itself and to the outside it works.
func TestIsolation(t *testing.T) { eachFirewall(t, testIsolation) }

func testIsolation(t *testing.T) {
	n := network{plantest.Network{Overlays: []Overlay{plantest.Overlay4("open", "9.0.0.0/8"), plantest.Overlay4("safe", "10.8.0.0/16"), plantest.Overlay4("safe6", "fd02::/64"), plantest.Overlay4("open6", "fd01:b::/64")}, Length: 24, Length6: 80}}
	n.Overlays[1].Isolation, n.Overlays[2].Isolation = conf.IsolationOverlay, conf.IsolationOverlay
	l, hosts := n.plugHosts(t, 2)
	outside := newNS(t, "out")
	l.plug(outside, "172.16.9.9/12")
	type place struct {
		*netNS
		addr string
	}
	at := map[string]place{}
	for i, h := range hosts {
		for _, b := range n.Host(i, 2).Bridges {
			if b.Name[:1] == "m" {
				c, addr := h.container(b.Name, b.Addrs[0], 5)
				at[fmt.Sprint(b.Overlay, i)] = place{c, addr}
			}
		}
	}
	for _, to := range []string{"0", "1"} {
		at["safe0"].mustPing("", at["safe"+to].addr)
		at["safe60"].mustPing("", at["safe6"+to].addr)
		at["open0"].mustPing("", at["open"+to].addr)
		at["safe0"].mustNotPing("", at["open"+to].addr)
		at["open0"].mustNotPing("", at["safe"+to].addr)
		at["safe60"].mustNotPing("", at["open6"+to].addr)
		at["open60"].mustNotPing("", at["safe6"+to].addr)
	}
	at["safe0"].mustPing("", "172.16.9.9")
	// Lifted, they meet; put back, they part.
	n.Overlays[1].Isolation, n.Overlays[2].Isolation = conf.IsolationNone, conf.IsolationNone
	for i, h := range hosts {
		h.mustSet(n.Host(i, 2), false)
	}
	at["open0"].mustPing("", at["safe1"].addr)
	// An established connection is cut as well, one that is still allowed is not.
	cut := connect(t, at["open0"].netNS, at["safe1"].netNS, at["safe1"].addr)
	stays := connect(t, at["open0"].netNS, at["open1"].netNS, at["open1"].addr)
	n.Overlays[1].Isolation = conf.IsolationOverlay
	for i, h := range hosts {
		h.mustSet(n.Host(i, 2), false)
	}
	at["open0"].mustNotPing("", at["safe1"].addr)
	if cut.echoes() {
		t.Error("a connection that is no longer allowed goes on")
	}
	if !stays.echoes() {
		t.Error("a connection of another overlay was cut")
	}
	// One direction may be allowed: who is allowed opens connections, not the other.
	n.Overlays[1].Allow = []string{"open"}
	for i, h := range hosts {
		h.mustSet(n.Host(i, 2), false)
	}
	at["open0"].mustPing("", at["safe1"].addr)
	at["open0"].mustPing("", at["safe0"].addr)
	at["safe0"].mustNotPing("", at["open0"].addr)
	at["safe0"].mustNotPing("", at["open1"].addr)
}

// connection is an open TCP connection between two namespaces.
type connection struct{ near, far net.Conn }

func connect(t *testing.T, from, to *netNS, addr string) (c connection) {
	t.Helper()
	var ln net.Listener
	var err error
	to.do(func() { ln, err = net.Listen("tcp", net.JoinHostPort(addr, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	from.do(func() { c.near, err = net.DialTimeout("tcp", ln.Addr().String(), 5*time.Second) })
	if err != nil {
		t.Fatal(err)
	}
	if c.far, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.near.Close(); c.far.Close() })
	if !c.echoes() {
		t.Fatal("a new connection carries nothing")
	}
	return c
}

// echoes reports whether a byte gets there and back.
func (c connection) echoes() bool {
	deadline := time.Now().Add(time.Second)
	c.near.SetDeadline(deadline)
	c.far.SetDeadline(deadline)
	b := []byte("x")
	for _, way := range [][2]net.Conn{{c.near, c.far}, {c.far, c.near}} {
		if _, err := way[0].Write(b); err != nil {
			return false
		}
		if _, err := way[1].Read(b); err != nil {
			return false
		}
	}
	return true
}

// What a container sends to the VXLAN port of a host, by any address it can
// reach, is not taken for a packet of another host: it could carry anything into
// any overlay.
func TestVXLANFromContainers(t *testing.T) { eachFirewall(t, testVXLANFromContainers) }

func testVXLANFromContainers(t *testing.T) {
	n := network{plantest.Network{Overlays: []Overlay{plantest.Overlay4("open", "9.0.0.0/8"), plantest.Overlay4("safe", "10.8.0.0/16")}, Length: 24}}
	n.Overlays[1].Isolation = conf.IsolationOverlay
	_, hosts := n.plugHosts(t, 2)
	here, there := n.Host(0, 2), n.Host(1, 2)
	attacker, _ := hosts[0].container(here.Bridges[0].Name, here.Bridges[0].Addrs[0], 5)
	friend, from := hosts[0].container(here.Bridges[2].Name, here.Bridges[2].Addrs[0], 5)
	near, nearAddr := hosts[0].container(here.Bridges[3].Name, here.Bridges[3].Addrs[0], 5)
	far, farAddr := hosts[1].container(there.Bridges[3].Name, there.Bridges[3].Addrs[0], 5)
	for _, tt := range []struct {
		name   string
		to     netip.Addr
		mac    conf.MAC
		victim *netNS
		addr   string
	}{
		{"its own host", here.VTEP.Local, here.VTEP.MAC, near, nearAddr},
		{"its own gateway", here.Bridges[0].Addrs[0].Addr(), here.VTEP.MAC, near, nearAddr},
		{"another host", there.VTEP.Local, there.VTEP.MAC, far, farAddr},
		{"a gateway of another host", there.Bridges[0].Addrs[0].Addr(), there.VTEP.MAC, far, farAddr},
		{"the VTEP of another host", there.VTEP.IP.Addr(), there.VTEP.MAC, far, farAddr},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var victim net.PacketConn
			var err error
			tt.victim.do(func() { victim, err = net.ListenPacket("udp4", net.JoinHostPort(tt.addr, "0")) })
			if err != nil {
				t.Fatal(err)
			}
			defer victim.Close()
			to := victim.LocalAddr().(*net.UDPAddr).AddrPort()
			// As if from the other host: its loose rp_filter wants a way back by the VTEP.
			source := netip.MustParseAddr(from)
			if tt.victim == near {
				source = netip.MustParseAddr(farAddr)
			}
			sendUDP(t, attacker, netip.AddrPortFrom(tt.to, conf.VXLANPort), vxlanPacket(tt.mac, source, to, "injected"))
			sendUDP(t, friend, to, []byte("the end"))
			if err := victim.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 100)
			if size, _, err := victim.ReadFrom(b); err != nil || string(b[:size]) != "the end" {
				t.Errorf("the container got %q, %v", b[:size], err)
			}
		})
	}
}

func sendUDP(t testing.TB, from *netNS, to netip.AddrPort, payload []byte) {
	t.Helper()
	var c net.Conn
	var err error
	from.do(func() { c, err = net.Dial("udp", to.String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(payload); err != nil {
		t.Fatal(err)
	}
}

// vxlanPacket is a UDP packet in IPv4 in Ethernet in VXLAN.
func vxlanPacket(mac conf.MAC, from netip.Addr, to netip.AddrPort, payload string) []byte {
	udp := binary.BigEndian.AppendUint16(nil, 1)
	udp = binary.BigEndian.AppendUint16(udp, to.Port())
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(payload)))
	udp = append(udp, 0, 0) // no checksum
	udp = append(udp, payload...)

	ip := []byte{0x45, 0}
	ip = binary.BigEndian.AppendUint16(ip, uint16(20+len(udp)))
	ip = append(ip, 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0)
	ip = append(append(ip, from.AsSlice()...), to.Addr().AsSlice()...)
	sum := uint32(0)
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum>>16+sum))

	out := binary.BigEndian.AppendUint32([]byte{8, 0, 0, 0}, conf.VNI<<8)
	out = append(append(out, mac[:]...), plantest.OUI[:]...) // any source
	out = binary.BigEndian.AppendUint16(out, unix.ETH_P_IP)
	return append(append(out, ip...), udp...)
}

// Without the programs of iptables everything else is there, and the report says
// what to do. Who has not asked for iptables gets nftables.
func TestNoIptables(t *testing.T) {
	t.Setenv(firewallVariable, "iptables")
	l := newLAN(t)
	h := newHost(t, "h")
	l.plug(h.netNS, "172.16.0.2/12")
	cfg := bothIP.Host(0, 2)
	path := os.Getenv("PATH")
	t.Setenv("PATH", t.TempDir())
	r := h.set(cfg, true)
	t.Setenv("PATH", path)
	for _, name := range []string{"iptables", "ip6tables"} {
		if r.Err == nil || !strings.Contains(r.Err.Error(), name+" is not installed") || !strings.Contains(r.Err.Error(), "install the package iptables") {
			t.Errorf("report: %v", r.Err)
		}
	}
	h.mustHave("ip route", "9.0.1.0/24 via 44.128.0.2")
	h.mustHave("ip addr", conf.GatewayPrefix(conf.Mesos.Of(prefix("9.0.0.0/24"))).String())
	if r := h.mustSet(cfg, false); r.Changed == 0 {
		t.Error("installed, it changed nothing")
	}
	h.mustBeIdle(cfg)

	t.Setenv(firewallVariable, "auto")
	h = newHost(t, "other")
	l.plug(h.netNS, "172.16.0.2/12")
	t.Setenv("PATH", t.TempDir())
	h.mustSet(cfg, true)
	t.Setenv("PATH", path)
	h.mustHave("nft list tables", "inet overlay")
}

// A ping that is under way while agents come and go loses nothing.
func TestRestartLosesNothing(t *testing.T) {
	n := bothIP
	_, hosts := n.plugHosts(t, 2)
	a, b := n.Host(0, 2).Bridges[0], n.Host(1, 2).Bridges[0]
	near, _ := hosts[0].container(a.Name, a.Addrs[0], 5)
	_, farAddr := hosts[1].container(b.Name, b.Addrs[0], 5)
	for _, h := range hosts {
		h.sh("iptables -P FORWARD DROP")
	}
	near.mustPing("", farAddr)

	var ping *exec.Cmd
	var out strings.Builder
	var err error
	near.do(func() {
		ping = exec.Command("ping", "-n", "-q", "-i", "0.01", "-c", "200", "-W", "1", farAddr)
		ping.Stdout = &out
		err = ping.Start()
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- ping.Wait() }()
	extra := plantest.Overlay4("extra", "10.7.0.0/16")
	for round := 0; ; round++ {
		select {
		case err := <-done:
			if err != nil || !strings.Contains(out.String(), "200 received") || round < 3 {
				t.Errorf("after %d restarts: %v\n%s", round, err, out.String())
			}
			return
		default:
		}
		// A new process; on every other round with a changed firewall, and
		// with peers that come and go.
		m := n
		if round%2 == 1 {
			extra.Isolation = conf.IsolationOf(round%4 == 1)
			m.Overlays = append(m.Overlays[:2:2], extra)
		}
		for i, h := range hosts {
			h.dp.Close()
			h.dp = h.newDatapath()
			h.mustSet(m.Host(i, 2+round%3), round%2 == 0)
		}
	}
}
