package fastpath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// other makes a second bridge of the overlay on a host, with the upper half of
// its subnet, and a container on it.
func (h *host) other(name string, last byte, group int) *container {
	h.t.Helper()
	gateway4, gateway6 := fmt.Sprintf("9.200.%d.129/25", h.n), fmt.Sprintf("fd09:200:0:%d:8000::1/65", h.n)
	if _, err := h.try("ip", "link", "show", "d-net"); err != nil {
		h.ip(fmt.Sprintf("link add name d-net address 02:00:00:00:02:0%d up mtu %d type bridge", h.n, h.rig.mtu),
			"address add "+gateway4+" dev d-net", "address add "+gateway6+" dev d-net nodad")
		// What was there takes the whole subnet for its link.
		h.container.ip(fmt.Sprintf("route add 9.200.%d.128/25 via 9.200.%d.1", h.n, h.n), fmt.Sprintf("route add fd09:200:0:%d:8000::/65 via fd09:200:0:%d::1", h.n, h.n))
	}
	return h.attachTo("d-net", name, last, group, gateway4, gateway6)
}

// nearTaken is how many packets went from container to container while f ran.
func nearTaken(t *testing.T, p *Path, f func()) uint64 {
	t.Helper()
	before := traffic(t, p).Near.Packets
	f()
	return traffic(t, p).Near.Packets - before
}

// Containers of one overlay behind two bridges of a host talk past the kernel; what
// needs an answer, an isolation or a translation of the kernel gets it.
func TestNear(t *testing.T) {
	r := newRig(t, false)
	h := r.hosts[0]
	a, b := h.container, h.other("d", 130, mark.FastPathGroup)
	published := h.other("p", 131, 0)
	p := h.fast()
	if n := p.Attached(); n != 2 {
		t.Fatalf("%d interfaces have the fast path, want both", n)
	}
	for _, to := range []netip.Addr{b.v4, b.v6} {
		if n := nearTaken(t, p, func() {
			if n, out := a.ping(5, to); n != 5 {
				t.Errorf("%s", out)
			}
		}); n != 10 {
			t.Errorf("to %s: %d packets of 5 pings went past the kernel, want 10", to, n)
		}
		before := traffic(t, p)
		if err := exchange(a.space, b.space, to); err != nil {
			t.Error(err)
		}
		after := traffic(t, p)
		if n := after.Near.Bytes - before.Near.Bytes; n < 2<<20 {
			t.Errorf("to %s: %d bytes of an exchange of 1 MiB went past the kernel", to, n)
		}
		if after.Out != before.Out || after.In != before.In {
			t.Errorf("to %s: it counts as traffic with other hosts: %+v", to, after)
		}
	}

	t.Run("hops", func(t *testing.T) {
		for _, tt := range []struct {
			to      netip.Addr
			gateway string
		}{{b.v4, "From 9.200.1.1 "}, {b.v6, "From fd09:200:0:1::1 "}} {
			if _, out := a.ping(1, tt.to, "-t", "1"); !strings.Contains(out, tt.gateway) {
				t.Errorf("want %q in: %s", tt.gateway, out)
			}
			if n, out := a.ping(1, tt.to, "-t", "2"); n != 1 {
				t.Errorf("%s", out)
			}
		}
		at := b.listen(netip.AddrPortFrom(b.v4, 5000).String())
		fd := b.tap("eth0")
		arrives(t, a.dial(netip.AddrPortFrom(b.v4, 5000).String()), at)
		seen := 0
		for _, f := range frames(t, fd) {
			if len(f) <= 34 || f[12] != 8 || f[13] != 0 || f[23] != unix.IPPROTO_UDP {
				continue
			}
			if seen++; f[22] != 63 {
				t.Errorf("a datagram arrives with %d hops left, want 63", f[22])
			}
		}
		if seen == 0 {
			t.Error("the datagram that has arrived was not seen")
		}
	})
	t.Run("too big", func(t *testing.T) {
		for _, l := range []string{a.link, b.link} {
			h.ip("link set " + l + " mtu 1500")
		}
		a.ip("link set eth0 mtu 1500")
		h.ip("link set " + b.link + " mtu 1300")
		defer func() {
			for _, l := range []string{a.link, b.link} {
				h.ip("link set " + l + " mtu 1450")
			}
			a.ip("link set eth0 mtu 1450")
		}()
		if n := nearTaken(t, p, func() { a.ping(2, b.v4, "-s", "1400", "-W", "0.2") }); n != 0 {
			t.Errorf("%d packets larger than the receiver's link went past the kernel", n)
		}
	})
	t.Run("published", func(t *testing.T) { nearPublished(t, r, p, published) })
	t.Run("spoofed", func(t *testing.T) {
		at := b.listen("[::]:4000") // or it would answer what the kernel lets through
		sender, gateway := a.tap("eth0"), conf.MAC{2, 0, 0, 0, 1, 1}
		send := func(data []byte) {
			if _, err := unix.Write(sender, data); err != nil {
				t.Error(err)
			}
		}
		// Frames arrive in the order in which they were sent, if perhaps later: when one of
		// its own has, those before it have been counted as well.
		round := 0
		more := func(data []byte) uint64 {
			return nearTaken(t, p, func() {
				if data != nil {
					send(data)
				}
				round++
				text := fmt.Sprintf("its own %d", round)
				send(datagram(gateway, a.mac, a.v4, b.v4, 4000, 64, text))
				at.SetReadDeadline(time.Now().Add(10 * time.Second))
				for got := ""; got != text; {
					var buf [64]byte
					n, _, err := at.ReadFrom(buf[:])
					if err != nil {
						t.Fatalf("a frame of its own does not arrive: %v", err)
					}
					got = string(buf[:n])
				}
			})
		}
		if n := more(nil); n != 1 {
			t.Errorf("%d frames went past the kernel, want the one of its own", n)
		}
		for _, f := range spoofedFrames(a, b, gateway) {
			if n := more(f.data); n != 1 {
				t.Errorf("past the kernel: %s", f.name)
			}
		}
	})
	t.Run("another overlay", func(t *testing.T) {
		w := h.wanted()
		w.Overlays = []Overlay{{Name: overlayName, Subnets: []netip.Prefix{netip.MustParsePrefix("9.200.0.0/17")}}, {Name: "two", Subnets: []netip.Prefix{netip.MustParsePrefix("9.201.0.0/16")}}}
		foreign := conf.Attachment{Network: "two", ContainerID: "x", IfName: "eth0"}
		h.run("ip", "link", "set", b.link, "alias", mark.NewAlias("two", conf.Mesos, foreign, []netip.Addr{b.v4, b.v6}, time.Second).String())
		apply(t, h, p, w)
		wait(t, func() error {
			if n := nearTaken(t, p, func() { a.ping(2, b.v4) }); n != 0 {
				return fmt.Errorf("%d packets to another overlay went past the kernel's firewall", n)
			}
			return nil
		})
		if n := nearTaken(t, p, func() { a.ping(2, b.v4); b.ping(2, a.v4) }); n != 0 {
			t.Errorf("%d packets between two overlays went past the kernel's firewall", n)
		}
	})
	t.Run("gone", func(t *testing.T) {
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		h.ip("link delete " + b.link)
		next := h.other("n", 130, 0)
		wait(t, func() error {
			if n, out := a.ping(1, next.v4, "-W", "0.2"); n != 1 {
				return errors.New(out)
			}
			return nil
		})
	})
}

// nearPublished: an attachment with host ports is not taken in either direction,
// and its host port answers its neighbours.
func nearPublished(t *testing.T, r *rig, p *Path, published *container) {
	h, a := r.hosts[0], r.hosts[0].container
	if n := nearTaken(t, p, func() {
		if n, out := a.ping(3, published.v4); n != 3 {
			t.Errorf("to it: %s", out)
		}
		if n, out := published.ping(3, a.v6); n != 3 {
			t.Errorf("from it: %s", out)
		}
	}); n != 0 {
		t.Errorf("%d packets of an attachment with host ports went past the kernel", n)
	}
	h.run("iptables", "-t", "nat", "-A", "PREROUTING", "-d", "9.200.1.1", "-p", "udp", "--dport", "8080",
		"-j", "DNAT", "--to-destination", netip.AddrPortFrom(published.v4, 80).String())
	server := published.listen(netip.AddrPortFrom(published.v4, 80).String())
	client := a.dial("9.200.1.1:8080")
	sender := arrives(t, client, server)
	if _, err := server.WriteTo([]byte("answer"), net.UDPAddrFromAddrPort(sender)); err != nil {
		t.Fatal(err)
	}
	client.SetReadDeadline(time.Now().Add(2 * time.Second))
	var b [64]byte
	if n, err := client.Read(b[:]); err != nil || string(b[:n]) != "answer" {
		t.Errorf("answer through the host port: %q, %v", b[:n], err)
	}
}

// What the fast path leaves to the kernel is counted where it leaves and where it
// arrives, the same packets and bytes, in VXLAN and without.
func TestPassed(t *testing.T) {
	for _, direct := range []bool{false, true} {
		t.Run(fmt.Sprintf("direct=%v", direct), func(t *testing.T) {
			r := newRig(t, false)
			var paths [2]*Path
			for i, h := range r.hosts {
				if direct {
					h.direct()
					paths[i] = h.fastDirect()
				} else {
					paths[i] = h.fast()
				}
			}
			a, b := r.hosts[0].container, r.hosts[1].container
			wait(t, func() error { return exchange(a.space, b.space, b.v4) })
			before := [2]Traffic{traffic(t, paths[0]), traffic(t, paths[1])}
			if n, out := a.ping(4, b.v4, "-s", "4000"); n != 4 { // three fragments each
				t.Fatalf("%s", out)
			}
			after := [2]Traffic{traffic(t, paths[0]), traffic(t, paths[1])}
			// Ethernet and IP headers of three, and 4,008 bytes of ICMP.
			want := Count{12, 4 * (3*34 + 4008)}
			for i := range paths {
				for _, tt := range []struct {
					what       string
					now, since Count
				}{
					{"out", after[i].PassedOut, before[i].PassedOut}, {"in", after[i].PassedIn, before[i].PassedIn},
				} {
					if got := (Count{tt.now.Packets - tt.since.Packets, tt.now.Bytes - tt.since.Bytes}); got != want {
						t.Errorf("host %d left %+v to the kernel on the way %s, want %+v", i+1, got, tt.what, want)
					}
				}
			}
		})
	}
}
