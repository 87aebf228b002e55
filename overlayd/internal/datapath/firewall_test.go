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

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

func TestChains(t *testing.T) {
	c := bothIP.config(0, 1)
	c.Bridges = c.Bridges[1:3] // d-dcos, m-dcos6
	c.Overlays = append(c.Overlays,
		Overlay{Name: "safe", Subnets: []netip.Prefix{prefix("10.8.0.0/16"), prefix("fd02::/64")}, Isolation: true},
		Overlay{Name: "safer", Subnets: []netip.Prefix{prefix("10.9.0.0/16")}, Isolation: true})
	text := func(ip6 bool) string {
		var lines []string
		for _, ch := range chains(c, ip6) {
			for _, r := range ch.rules {
				lines = append(lines, ch.name+" "+r)
			}
		}
		return strings.Join(lines, "\n")
	}
	want4 := `
		OVERLAY-VXLAN -i m-+ -p udp -m udp --dport 64000 -j REDIRECT --to-ports 9
		OVERLAY-VXLAN -i d-+ -p udp -m udp --dport 64000 -j REDIRECT --to-ports 9
		OVERLAY-VXLAN -i vtep1024 -p udp -m udp --dport 64000 -j REDIRECT --to-ports 9
		OVERLAY-FORWARD -s 10.8.0.0/16 -d 9.0.0.0/8 -j DROP
		OVERLAY-FORWARD -s 9.0.0.0/8 -d 10.8.0.0/16 -j DROP
		OVERLAY-FORWARD -s 10.8.0.0/16 -d 10.9.0.0/16 -j DROP
		OVERLAY-FORWARD -s 10.9.0.0/16 -d 10.8.0.0/16 -j DROP
		OVERLAY-FORWARD -s 10.9.0.0/16 -d 9.0.0.0/8 -j DROP
		OVERLAY-FORWARD -s 9.0.0.0/8 -d 10.9.0.0/16 -j DROP
		OVERLAY-FORWARD -d 9.0.0.0/8 -i vtep1024 -j ACCEPT
		OVERLAY-FORWARD -d 10.8.0.0/16 -i vtep1024 -j ACCEPT
		OVERLAY-FORWARD -d 10.9.0.0/16 -i vtep1024 -j ACCEPT
		OVERLAY-FORWARD -s 9.0.0.128/25 -i d-dcos -j ACCEPT
		OVERLAY-FORWARD -i d-dcos -o d-dcos -j ACCEPT
		OVERLAY-FORWARD -d 9.0.0.0/8 -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
		OVERLAY-FORWARD -d 10.8.0.0/16 -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
		OVERLAY-FORWARD -d 10.9.0.0/16 -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
		OVERLAY-MASQ -d 9.0.0.0/8 -j RETURN
		OVERLAY-MASQ -d 10.8.0.0/16 -j RETURN
		OVERLAY-MASQ -d 10.9.0.0/16 -j RETURN
		OVERLAY-MASQ -d 44.128.0.0/14 -j RETURN
		OVERLAY-MASQ -d 224.0.0.0/4 -j RETURN
		OVERLAY-MASQ -s 9.0.0.0/8 -j MASQUERADE
		OVERLAY-MASQ -s 10.8.0.0/16 -j MASQUERADE
		OVERLAY-MASQ -s 10.9.0.0/16 -j MASQUERADE
	`
	want6 := `
		OVERLAY-VXLAN -i m-+ -p udp -m udp --dport 64000 -j REDIRECT --to-ports 9
		OVERLAY-VXLAN -i d-+ -p udp -m udp --dport 64000 -j REDIRECT --to-ports 9
		OVERLAY-VXLAN -i vtep1024 -p udp -m udp --dport 64000 -j REDIRECT --to-ports 9
		OVERLAY-FORWARD -s fd02::/64 -d fd01:b::/64 -j DROP
		OVERLAY-FORWARD -s fd01:b::/64 -d fd02::/64 -j DROP
		OVERLAY-FORWARD -d fd01:b::/64 -i vtep1024 -j ACCEPT
		OVERLAY-FORWARD -d fd02::/64 -i vtep1024 -j ACCEPT
		OVERLAY-FORWARD -s fd01:b::/81 -i m-dcos6 -j ACCEPT
		OVERLAY-FORWARD -i m-dcos6 -o m-dcos6 -j ACCEPT
		OVERLAY-FORWARD -d fd01:b::/64 -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
		OVERLAY-FORWARD -d fd02::/64 -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
		OVERLAY-MASQ -d fd01:b::/64 -j RETURN
		OVERLAY-MASQ -d fd02::/64 -j RETURN
		OVERLAY-MASQ -d fd01:a::/64 -j RETURN
		OVERLAY-MASQ -d fe80::/10 -j RETURN
		OVERLAY-MASQ -d ff00::/8 -j RETURN
		OVERLAY-MASQ -s fd01:b::/64 -j MASQUERADE
		OVERLAY-MASQ -s fd02::/64 -j MASQUERADE
	`
	if diff := cmp.Diff(block(want4), text(false)); diff != "" {
		t.Errorf("IPv4 (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(block(want6), text(true)); diff != "" {
		t.Errorf("IPv6 (-want +got):\n%s", diff)
	}

	// The kernel prints the rules as we write them, whichever iptables it is:
	// else every look would find a difference.
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			dir := t.TempDir()
			for _, name := range []string{"iptables", "ip6tables"} {
				for _, suffix := range []string{"", "-restore"} {
					path, err := exec.LookPath(name + "-" + flavour + suffix)
					if err != nil {
						t.Skipf("%s-%s%s is not installed", name, flavour, suffix)
					}
					if err := os.Symlink(path, filepath.Join(dir, name+suffix)); err != nil {
						t.Fatal(err)
					}
				}
			}
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			l := newLAN(t)
			h := newHost(t, "h")
			l.plug(h.netNS, "172.16.0.2/12")
			if r := h.mustSet(c, true); r.Changed == 0 {
				t.Error("the first Set changed nothing")
			}
			h.mustBeIdle(c)
			h.sh("iptables -A OVERLAY-FORWARD -j RETURN; ip6tables -t nat -F; iptables -I FORWARD -j OVERLAY-FORWARD; iptables -I FORWARD -s 1.2.3.4 -j ACCEPT")
			if r := h.mustSet(c, true); r.Changed != 3 {
				t.Errorf("%d chains were repaired, want 3", r.Changed)
			}
			h.mustBeIdle(c)
			if got := h.lines("iptables -S FORWARD"); got[1] != "-A FORWARD -j OVERLAY-FORWARD" || len(got) != 3 {
				t.Errorf("FORWARD is %q", got)
			}
			h.mustSet(Config{VTEP: c.VTEP}, true)
			h.mustNotHave("iptables -S; ip6tables -S; iptables -t nat -S; ip6tables -t nat -S", "OVERLAY")
		})
	}
}

// Containers on two hosts and an outsider, with every host dropping what it is
// not told to forward.
func TestForwardPolicyDrop(t *testing.T) {
	n := bothIP
	l, hosts := n.plugHosts(t, 2)
	outside := newNS(t, "out")
	l.plug(outside, "172.16.9.9/12", "fd00:9::9/64")
	for i, h := range hosts {
		h.sh(fmt.Sprintf("ip addr add fd00:9::%d/64 dev eth0 nodad; iptables -P FORWARD DROP; ip6tables -P FORWARD DROP", i+1))
		outside.sh(fmt.Sprintf("ip route add %s via %s", n.agentSubnet(n.overlays[0], i), n.agentIP(i)))
		outside.sh(fmt.Sprintf("ip route add %s via fd00:9::%d", n.agentSubnet(n.overlays[1], i), i+1))
	}
	for o, there := range []string{"172.16.9.9", "fd00:9::9"} {
		a := n.config(0, 2).Bridges[2*o]   // m-
		b := n.config(1, 2).Bridges[2*o+1] // d-
		near, nearAddr := hosts[0].container(a.Name, a.Addrs[0], 5)
		far, farAddr := hosts[1].container(b.Name, b.Addrs[0], 6)
		other := n.config(0, 2).Bridges[2*o+1]
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
	n := bothIP
	l, hosts := n.plugHosts(t, 2)
	outside := newNS(t, "out")
	l.plug(outside, "172.16.9.9/12", "fd00:9::9/64")
	hosts[0].sh("ip addr add fd00:9::1/64 dev eth0 nodad")
	for o, tc := range []struct{ there, as string }{
		{"172.16.9.9", n.agentIP(0).String()},
		{"fd00:9::9", "fd00:9::1"},
	} {
		a := n.config(0, 2).Bridges[2*o]
		b := n.config(1, 2).Bridges[2*o]
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
		vtep := []netip.Prefix{n.config(1, 2).VTEP.IP, n.config(1, 2).VTEP.IP6}[o].Addr().String()
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
func TestIsolation(t *testing.T) {
	n := network{overlays: []Overlay{overlay4("open", "9.0.0.0/8"), overlay4("safe", "10.8.0.0/16"), overlay4("safe6", "fd02::/64"), overlay4("open6", "fd01:b::/64")}, length: 24, length6: 80}
	n.overlays[1].Isolation, n.overlays[2].Isolation = true, true
	l, hosts := n.plugHosts(t, 2)
	outside := newNS(t, "out")
	l.plug(outside, "172.16.9.9/12")
	type place struct {
		*netNS
		addr string
	}
	at := map[string]place{}
	for i, h := range hosts {
		for _, b := range n.config(i, 2).Bridges {
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
	n.overlays[1].Isolation, n.overlays[2].Isolation = false, false
	for i, h := range hosts {
		h.mustSet(n.config(i, 2), false)
	}
	at["open0"].mustPing("", at["safe1"].addr)
	n.overlays[1].Isolation = true
	for i, h := range hosts {
		h.mustSet(n.config(i, 2), false)
	}
	at["open0"].mustNotPing("", at["safe1"].addr)
}

// What a container sends to the VXLAN port of a host, by any address it can
// reach, is not taken for a packet of another host: it could carry anything into
// any overlay.
func TestVXLANFromContainers(t *testing.T) {
	n := network{overlays: []Overlay{overlay4("open", "9.0.0.0/8"), overlay4("safe", "10.8.0.0/16")}, length: 24}
	n.overlays[1].Isolation = true
	_, hosts := n.plugHosts(t, 2)
	here, there := n.config(0, 2), n.config(1, 2)
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

func sendUDP(t *testing.T, from *netNS, to netip.AddrPort, payload []byte) {
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
	out = append(append(out, mac[:]...), testOUI[:]...) // any source
	out = binary.BigEndian.AppendUint16(out, unix.ETH_P_IP)
	return append(append(out, ip...), udp...)
}

// Without iptables everything else is there, and the report says what to do.
func TestNoIptables(t *testing.T) {
	l := newLAN(t)
	h := newHost(t, "h")
	l.plug(h.netNS, "172.16.0.2/12")
	cfg := bothIP.config(0, 2)
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
	if r := h.mustSet(cfg, false); r.Changed != 6 {
		t.Errorf("installed, it changed %d tables, want 6", r.Changed)
	}
	h.mustBeIdle(cfg)
}

// A ping that is under way while agents come and go loses nothing.
func TestRestartLosesNothing(t *testing.T) {
	n := bothIP
	_, hosts := n.plugHosts(t, 2)
	a, b := n.config(0, 2).Bridges[0], n.config(1, 2).Bridges[0]
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
	extra := overlay4("extra", "10.7.0.0/16")
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
			extra.Isolation = round%4 == 1
			m.overlays = append(m.overlays[:2:2], extra)
		}
		for i, h := range hosts {
			h.dp.Close()
			h.dp = h.newDatapath()
			h.mustSet(m.config(i, 2+round%3), round%2 == 0)
		}
	}
}
