package fastpath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// direct has the kernel of a host send to the other without VXLAN, in the
// underlay's family.
func (h *host) direct() {
	h.t.Helper()
	o := h.rig.hosts[2-h.n]
	if h.rig.six {
		h.ip(fmt.Sprintf("route replace fd09:200:0:%d::/64 via %s dev eth0", o.n, o.local))
	} else {
		h.ip(fmt.Sprintf("route replace 9.200.%d.0/24 via %s dev eth0", o.n, o.local))
	}
}

// wantedDirect is wanted by a host that sends without VXLAN, to a peer that takes
// it.
func (h *host) wantedDirect() Wanted {
	w := h.wanted()
	w.Send, w.Take = true, true
	w.Peers[0].Direct = true
	return w
}

func (h *host) fastDirect() *Path {
	h.t.Helper()
	p := h.open()
	if err := p.Apply(context.Background(), h.wantedDirect(), true); err != nil {
		h.t.Fatal(err)
	}
	return p
}

// Between hosts on a link the programs send what is of the underlay's family as it
// is, and take it so, with and without a fast path on the other side; the rest
// goes in VXLAN.
func TestDirect(t *testing.T) {
	for _, six := range []bool{false, true} {
		for _, with := range [][2]bool{{true, true}, {true, false}, {false, true}} {
			t.Run(fmt.Sprintf("underlay6=%v,with=%v", six, with), func(t *testing.T) {
				r := newRig(t, six)
				var paths [2]*Path
				for i, h := range r.hosts {
					h.direct()
					if with[i] {
						paths[i] = h.fastDirect()
					}
				}
				a, b := r.hosts[0].container, r.hosts[1].container
				for _, to := range []netip.Addr{b.v4, b.v6} {
					plain := to.Is6() == six
					wait(t, func() error { return exchange(a.space, b.space, to) }) // neighbours are known
					vxlan := r.hosts[1].outer(t, func() {
						wait(t, func() error { return exchange(a.space, b.space, to) })
					})
					if plain != (vxlan == 0) {
						t.Errorf("to %s: %d packets were VXLAN, want any: %v", to, vxlan, !plain)
					}
					for i, p := range paths {
						if p == nil {
							continue
						}
						if n := taken(t, p, func() { a.ping(5, to) }); n != 10 && i == 0 || n == 0 {
							t.Errorf("to %s: the fast path of host %d took %d packets of 5 pings", to, i+1, n)
						}
					}
				}
			})
		}
	}
}

// outer counts the VXLAN packets that come and go at the underlay of a host while f
// runs.
func (h *host) outer(t *testing.T, f func()) (n int) {
	t.Helper()
	fd := h.tap("eth0")
	f()
	for _, frame := range frames(t, fd) {
		port := 14 + 20 + 2 // of the destination, behind Ethernet and IPv4
		if h.rig.six {
			port += 20
		}
		if len(frame) > port+1 && int(frame[port])<<8|int(frame[port+1]) == 64000 {
			n++
		}
	}
	return n
}

// tap opens a packet socket on a device, which sees frames before any program does.
func (s *space) tap(dev string) int {
	s.t.Helper()
	const all = unix.ETH_P_ALL << 8
	fd := inside(s, func() (int, error) {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
		if err != nil {
			return 0, err
		}
		l, err := net.InterfaceByName(dev)
		if err != nil {
			return fd, err
		}
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
		return fd, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Index})
	})
	s.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// frames are what a packet socket has got since.
func frames(t *testing.T, fd int) (out [][]byte) {
	t.Helper()
	for buf := make([]byte, 1<<17); ; {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, bytes.Clone(buf[:min(n, 256)]))
	}
}

// What is not a peer's, or comes in where no peer does, is left to the firewall,
// and so is everything on a host that takes only VXLAN; a peer behind a router,
// and one that takes only VXLAN, gets it.
func TestDirectLeft(t *testing.T) {
	r := newRig(t, false)
	for _, h := range r.hosts {
		h.direct()
	}
	paths := [2]*Path{r.hosts[0].fastDirect(), r.hosts[1].fastDirect()}
	a, b := r.hosts[0].container, r.hosts[1].container
	wait(t, func() error { return exchange(a.space, b.space, b.v4) })
	in := func(f func()) uint64 {
		t.Helper()
		before := traffic(t, paths[1]).In.Packets
		f()
		return traffic(t, paths[1]).In.Packets - before
	}
	if n := in(func() { a.ping(3, b.v4) }); n != 3 {
		t.Errorf("%d of 3 packets of a peer were taken", n)
	}
	// The host itself sends from its agent IP.
	if n := in(func() { r.hosts[0].ping(3, b.v4) }); n != 0 {
		t.Errorf("%d packets of a host were taken", n)
	}
	for _, source := range []string{"9.200.2.9", "9.200.9.9", "9.201.1.2"} { // its own, nobody's, of another overlay
		r.hosts[0].ip("address add " + source + "/32 dev lo")
		if n := in(func() { r.hosts[0].ping(2, b.v4, "-I", source, "-W", "0.2") }); n != 0 {
			t.Errorf("%d packets from %s were taken", n, source)
		}
	}
	// From another device.
	r.hosts[0].ip("link add eth1 type veth peer name eth1 netns "+r.hosts[1].name, "link set eth1 up", "address add 10.1.1.1/24 dev eth1")
	r.hosts[1].ip("link set eth1 up", "address add 10.1.1.2/24 dev eth1")
	r.hosts[1].run("sysctl", "-qw", "net.ipv4.conf.eth1.rp_filter=0", "net.ipv4.conf.all.rp_filter=0")
	apply(t, r.hosts[1], paths[1], r.hosts[1].wantedDirect())
	if l, ok, err := paths[1].conn.LinkByName("eth1"); err != nil || !ok {
		t.Fatal(ok, err)
	} else if err := paths[1].attach(l.Index, enterFilter, paths[1].objs.EnterHost.FD()); err != nil {
		t.Fatal(err)
	}
	r.hosts[0].ip("route replace 9.200.2.0/24 via 10.1.1.2 dev eth1")
	r.hosts[0].ip("address add 9.200.1.77/32 dev lo")
	if n := in(func() { r.hosts[0].ping(2, b.v4, "-I", "9.200.1.77", "-W", "0.2") }); n != 0 {
		t.Errorf("%d packets at another device were taken", n)
	}
	r.hosts[0].direct()

	// A host that takes only VXLAN.
	w := r.hosts[1].wantedDirect()
	w.Take, w.Send = false, false
	apply(t, r.hosts[1], paths[1], w)
	if n := in(func() { a.ping(3, b.v4) }); n != 0 {
		t.Errorf("%d packets without VXLAN were taken by a host that takes only VXLAN", n)
	}
	w = r.hosts[0].wantedDirect()
	w.Peers[0].Direct = false
	apply(t, r.hosts[0], paths[0], w)
	if n := r.hosts[1].outer(t, func() { a.ping(3, b.v4) }); n == 0 {
		t.Error("a peer that takes only VXLAN was sent something else")
	}
	if n := in(func() { a.ping(3, b.v4) }); n != 3 {
		t.Errorf("%d of 3 packets in VXLAN were taken", n)
	}
	// A peer behind a router.
	apply(t, r.hosts[0], paths[0], r.hosts[0].wantedDirect())
	apply(t, r.hosts[1], paths[1], r.hosts[1].wantedDirect())
	r.hosts[0].ip("route add 172.30.0.2/32 via 10.1.1.2 dev eth1")
	wait(t, func() error {
		if n, out := a.ping(1, b.v4); n != 1 {
			return errors.New(out)
		}
		return nil
	})
	before := linkPackets(t, r.hosts[0].space, "eth1")
	if n := taken(t, paths[0], func() { a.ping(5, b.v4) }); n < 5 {
		t.Errorf("%d packets to a peer behind a router were taken", n)
	}
	if n := linkPackets(t, r.hosts[0].space, "eth1") - before; n < 5 {
		t.Errorf("%d packets went by the router", n)
	}
}

// A packet larger than the peer takes is left to the kernel, which knows whom to
// tell.
func TestPeerMTU(t *testing.T) {
	for _, direct := range []bool{false, true} {
		t.Run(fmt.Sprintf("direct=%v", direct), func(t *testing.T) {
			r := newRig(t, false)
			w := r.hosts[0].wanted()
			if direct {
				w = r.hosts[0].wantedDirect()
				for _, h := range r.hosts {
					h.direct()
				}
			}
			w.Peers[0].MTU = 1300
			p := r.hosts[0].open()
			if err := p.Apply(context.Background(), w, true); err != nil {
				t.Fatal(err)
			}
			a, b := r.hosts[0].container, r.hosts[1].container
			wait(t, func() error { return exchange(a.space, b.space, b.v4) })
			for size, want := range map[int]uint64{1300: 3, 1301: 0} {
				before := traffic(t, p).Out.Packets
				a.ping(3, b.v4, "-M", "do", "-s", fmt.Sprint(size-28))
				if n := traffic(t, p).Out.Packets - before; n != want {
					t.Errorf("%d packets of %d bytes were taken, want %d", n, size, want)
				}
			}
		})
	}
}
