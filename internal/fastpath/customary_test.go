package fastpath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// taken is how many packets the fast path of a host took while f ran.
func taken(t *testing.T, p *Path, f func()) uint64 {
	t.Helper()
	before := traffic(t, p)
	f()
	after := traffic(t, p)
	return after.Out.Packets + after.In.Packets - before.Out.Packets - before.In.Packets
}

// ping sends n echo requests and says how many were answered.
func (s *space) ping(n int, to netip.Addr, args ...string) (int, string) {
	s.t.Helper()
	out, _ := s.try(append([]string{"ping", "-n", "-i", "0.02", "-W", "2", "-c", strconv.Itoa(n), to.String()}, args...)...)
	for _, line := range strings.Split(out, "\n") {
		if _, after, ok := strings.Cut(line, "packets transmitted, "); ok {
			got, _ := strconv.Atoi(strings.Fields(after)[0])
			return got, out
		}
	}
	return 0, out
}

// What may not be taken goes the customary way, and is answered there.
func TestLeftToTheKernel(t *testing.T) {
	r := newRig(t, false)
	h := r.hosts[0]
	published := r.hosts[1].attach("p", 7, 0)
	paths := r.fast()
	a, b := h.container, r.hosts[1].container
	if n, out := a.ping(3, b.v4); n != 3 {
		t.Fatalf("ping: %s", out)
	}

	t.Run("hops", func(t *testing.T) {
		for ttl, from := range map[int]string{1: "From 9.200.1.1 ", 2: "From 45.0.0.2 "} {
			if _, out := a.ping(1, b.v4, "-t", strconv.Itoa(ttl)); !strings.Contains(out, from) || !strings.Contains(out, "Time to live exceeded") {
				t.Errorf("ttl %d: want %q and the reason in: %s", ttl, from, out)
			}
		}
		if n, out := a.ping(1, b.v4, "-t", "3"); n != 1 {
			t.Errorf("ttl 3: %s", out)
		}
		for ttl, from := range map[int]string{1: "From fd09:200:0:1::1 ", 2: "From fd45::2 "} {
			if _, out := a.ping(1, b.v6, "-t", strconv.Itoa(ttl)); !strings.Contains(out, from) {
				t.Errorf("IPv6 hop limit %d: want %q in: %s", ttl, from, out)
			}
		}
	})
	t.Run("too big", func(t *testing.T) {
		h.ip("link set " + a.link + " mtu 1500")
		a.ip("link set eth0 mtu 1500")
		defer h.ip("link set " + a.link + " mtu 1450")
		defer a.ip("link set eth0 mtu 1450")
		if _, out := a.ping(1, b.v4, "-M", "do", "-s", "1472"); !strings.Contains(out, "mtu = 1450") && !strings.Contains(out, "mtu=1450") {
			t.Errorf("IPv4: want to be told the MTU: %s", out)
		}
		if _, out := a.ping(1, b.v6, "-M", "do", "-s", "1452"); !strings.Contains(out, "mtu = 1450") && !strings.Contains(out, "mtu=1450") {
			t.Errorf("IPv6: want to be told the MTU: %s", out)
		}
	})
	t.Run("smaller underlay", func(t *testing.T) {
		h.ip("route add 172.30.0.2/32 dev eth0 mtu 1300")
		defer h.ip("route delete 172.30.0.2/32 dev eth0")
		if n, out := a.ping(2, b.v4, "-s", "1400"); n == 0 {
			t.Errorf("%s", out)
		}
		if err := exchange(a.space, b.space, b.v4); err != nil {
			t.Error(err)
		}
	})
	t.Run("fragments", func(t *testing.T) {
		if n, out := a.ping(2, b.v4, "-s", "4000"); n != 2 {
			t.Errorf("%s", out)
		}
		if n, out := a.ping(2, b.v6, "-s", "4000"); n != 2 {
			t.Errorf("IPv6: %s", out)
		}
	})
	t.Run("outside", func(t *testing.T) {
		outside := r.hosts[1].listen("172.30.0.2:9999")
		c := a.dial("172.30.0.2:9999")
		n := taken(t, paths[0], func() {
			if got := arrives(t, c, outside); got.Addr().String() != "172.30.0.1" {
				t.Errorf("arrived from %s, want the host's address 172.30.0.1", got)
			}
		})
		if n != 0 {
			t.Errorf("%d packets to the outside were taken", n)
		}
	})
	t.Run("gateway of a peer", func(t *testing.T) {
		if n, out := a.ping(2, netip.MustParseAddr("9.200.2.1")); n != 2 {
			t.Errorf("%s", out)
		}
	})
	t.Run("published", func(t *testing.T) {
		n := taken(t, paths[1], func() {
			if n, out := a.ping(3, published.v4); n != 3 {
				t.Errorf("to it: %s", out)
			}
			if n, out := published.ping(3, a.v4); n != 3 {
				t.Errorf("from it: %s", out)
			}
			if n, out := published.ping(3, a.v6); n != 3 {
				t.Errorf("IPv6, from it: %s", out)
			}
		})
		if n != 0 {
			t.Errorf("%d packets of an attachment with host ports were taken", n)
		}
	})
	t.Run("host port", func(t *testing.T) { hostPort(t, r, published) })
	t.Run("spoofed", func(t *testing.T) { spoofed(t, r, paths) })
	t.Run("VXLAN port", func(t *testing.T) {
		at := b.listen(netip.AddrPortFrom(b.v4, 64000).String())
		c := a.dial(netip.AddrPortFrom(b.v4, 64000).String())
		if n := taken(t, paths[0], func() { arrives(t, c, at) }); n != 0 {
			t.Errorf("%d packets for the VXLAN port were taken past its guard", n)
		}
	})
	t.Run("overlay that has gone", func(t *testing.T) {
		w := h.wanted()
		w.Overlays = nil
		apply(t, h, paths[0], w)
		n := taken(t, paths[0], func() {
			if n, out := a.ping(3, b.v4); n != 3 {
				t.Errorf("%s", out)
			}
		})
		if n != 0 {
			t.Errorf("%d packets of an overlay that is not wanted were taken", n)
		}
		apply(t, h, paths[0], h.wanted())
	})
	t.Run("stranger", func(t *testing.T) {
		w := h.wanted()
		w.Peers = nil
		apply(t, h, paths[0], w)
		defer apply(t, h, paths[0], h.wanted())
		if n := taken(t, paths[0], func() { b.ping(2, a.v4) }); n != 0 {
			t.Errorf("%d packets from or to a host that is no peer were taken", n)
		}
	})
}

func apply(t *testing.T, h *host, p *Path, w Wanted) {
	t.Helper()
	if err := h.ns.Inside(func() error { return p.Apply(t.Context(), w, false) }); err != nil {
		t.Fatal(err)
	}
}

// arrives sends one datagram and answers with where it came from.
func arrives(t *testing.T, from net.Conn, at net.PacketConn) netip.AddrPort {
	t.Helper()
	if _, err := from.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	at.SetReadDeadline(time.Now().Add(2 * time.Second))
	var b [64]byte
	_, sender, err := at.ReadFrom(b[:])
	if err != nil {
		t.Error(err)
		return netip.AddrPort{}
	}
	return netip.MustParseAddrPort(sender.String())
}

// hostPort: a container of another host calls a host port by way of the gateway
// address. The answers have to be translated back.
func hostPort(t *testing.T, r *rig, published *container) {
	for _, family := range []struct {
		iptables, gateway string
		to                netip.Addr
	}{{"iptables", "9.200.2.1", published.v4}, {"ip6tables", "fd09:200:0:2::1", published.v6}} {
		r.hosts[1].run(family.iptables, "-t", "nat", "-A", "PREROUTING", "-d", family.gateway, "-p", "udp", "--dport", "8080",
			"-j", "DNAT", "--to-destination", netip.AddrPortFrom(family.to, 80).String())
		server := published.listen(netip.AddrPortFrom(family.to, 80).String())
		client := r.hosts[0].container.dial(net.JoinHostPort(family.gateway, "8080"))
		sender := arrives(t, client, server)
		if _, err := server.WriteTo([]byte("answer"), net.UDPAddrFromAddrPort(sender)); err != nil {
			t.Fatal(err)
		}
		client.SetReadDeadline(time.Now().Add(2 * time.Second))
		var b [64]byte
		if n, err := client.Read(b[:]); err != nil || string(b[:n]) != "answer" {
			t.Errorf("%s: answer through the host port: %q, %v", family.iptables, b[:n], err)
		}
	}
}

// spoofed: what does not come from the container's own addresses and MAC is left
// to the firewall.
func spoofed(t *testing.T, r *rig, paths [2]*Path) {
	a, b := r.hosts[0].container, r.hosts[1].container
	a.ip("address add 9.200.1.99/24 dev eth0", "address add fd09:200:0:1::99/64 dev eth0 nodad")
	defer a.ip("address delete 9.200.1.99/24 dev eth0", "address delete fd09:200:0:1::99/64 dev eth0")
	for _, tt := range []struct {
		name string
		do   func()
	}{
		{"IPv4 source", func() { a.ping(2, b.v4, "-I", "9.200.1.99") }},
		{"IPv6 source", func() { a.ping(2, b.v6, "-I", "fd09:200:0:1::99") }},
		{"MAC", func() {
			// The addresses and routes stay; the neighbour entries go.
			a.ip("link set eth0 address 02:00:00:00:99:99")
			a.ping(2, b.v4)
			a.ping(2, b.v6)
			a.ip(fmt.Sprintf("link set eth0 address %s", a.mac))
		}},
	} {
		before := traffic(t, paths[0]).Out.Packets
		tt.do()
		if n := traffic(t, paths[0]).Out.Packets - before; n != 0 {
			t.Errorf("%s: %d packets were taken", tt.name, n)
		}
	}
	if n, out := a.ping(2, b.v4); n != 2 {
		t.Errorf("the rightful owner: %s", out)
	}
}

// vtepPackets is how many packets the kernel's VXLAN device sent and received.
func (h *host) vtepPackets() int { return linkPackets(h.t, h.space, conf.VTEPName) }

// packetsOf reads the counters of a device in the namespace of this thread.
func packetsOf(dev string) (int, error) {
	b, err := os.ReadFile("/proc/thread-self/net/dev")
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 10 && f[0] == dev+":" {
			in, _ := strconv.Atoi(f[2])
			out, _ := strconv.Atoi(f[10])
			return in + out, err
		}
	}
	return 0, errors.Join(err, fmt.Errorf("no device %s", dev))
}

// An attachment without the mark, a container of several addresses, and a link
// that is not ours have no program.
func TestNotAttached(t *testing.T) {
	r := newRig(t, false)
	h := r.hosts[0]
	h.attach("p", 7, 0)
	two := h.attach("t", 8, mark.FastPathGroup)
	h.ip(fmt.Sprintf("link set %s alias x", two.link))
	p := h.fast()
	if n := p.Attached(); n != 1 {
		t.Errorf("%d interfaces have the fast path, want the one", n)
	}
	if out := h.run("tc", "filter", "show", "dev", h.container.link, "ingress"); !strings.Contains(out, leaveFilter) {
		t.Errorf("no filter %s: %s", leaveFilter, out)
	}
}
