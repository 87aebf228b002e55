package fastpath

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/netns"
)

// rig is two hosts with a container each, joined by the kernel's own VXLAN, and
// an address outside. The fast path is put on top by the test.
type rig struct {
	t     *testing.T
	hosts [2]*host
	six   bool // the underlay is IPv6
	mtu   int
}

// host is one of the two.
type host struct {
	*space
	rig       *rig
	n         int // 1 or 2
	local     netip.Addr
	container *container
}

// container is attached to the bridge of its host.
type container struct {
	*space
	v4, v6 netip.Addr
	mac    conf.MAC
	link   string
}

// space is a network namespace with a name.
type space struct {
	t    *testing.T
	name string
	ns   netns.NS
}

const overlayName = "net"

var (
	overlay4 = netip.MustParsePrefix("9.200.0.0/16")
	overlay6 = netip.MustParsePrefix("fd09:200::/32")
)

func newSpace(t *testing.T, name string) *space {
	t.Helper()
	full := fmt.Sprintf("ovlfp%d-%s", os.Getpid(), name)
	run(t, "ip", "netns", "add", full)
	t.Cleanup(func() { run(t, "ip", "netns", "delete", full) })
	ns, err := netns.Open("/run/netns/" + full)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ns.Close)
	s := &space{t, full, ns}
	// Link-local addresses are good at once, and with them neighbour discovery.
	s.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.all.accept_dad=0")
	s.ip("link set lo up")
	return s
}

func run(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
	return string(out)
}

// try runs a program in the namespace.
func (s *space) try(argv ...string) (string, error) {
	out, err := exec.Command("ip", append([]string{"netns", "exec", s.name}, argv...)...).CombinedOutput()
	return string(out), err
}

func (s *space) run(argv ...string) string {
	s.t.Helper()
	return run(s.t, append([]string{"ip", "netns", "exec", s.name}, argv...)...)
}

// feed runs a program in the namespace with this standard input.
func (s *space) feed(input string, argv ...string) {
	s.t.Helper()
	cmd := exec.Command("ip", append([]string{"netns", "exec", s.name}, argv...)...)
	cmd.Stdin = strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("%s: %v: %s\n%s", strings.Join(argv, " "), err, out, input)
	}
}

// ip runs lines of ip(8) in the namespace.
func (s *space) ip(lines ...string) {
	s.t.Helper()
	cmd := exec.Command("ip", "-n", s.name, "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("ip -n %s: %v: %s\n%s", s.name, err, out, strings.Join(lines, "\n"))
	}
}

func newRig(t *testing.T, six bool) *rig {
	t.Helper()
	r := &rig{t: t, six: six, mtu: 1450}
	if six {
		r.mtu = 1430
	}
	for i := range r.hosts {
		n := i + 1
		h := &host{space: newSpace(t, fmt.Sprintf("h%d", n)), rig: r, n: n, local: netip.AddrFrom4([4]byte{172, 30, 0, byte(n)})}
		if six {
			h.local = netip.MustParseAddr(fmt.Sprintf("fd00:30::%d", n))
		}
		r.hosts[i] = h
	}
	r.hosts[0].ip("link add eth0 type veth peer name eth0 netns " + r.hosts[1].name)
	for _, h := range r.hosts {
		h.up()
		h.container = h.attach("c", 2, mark.FastPathGroup)
	}
	return r
}

// up makes the customary way: VTEP, bridge, routes, masquerade.
func (h *host) up() {
	n, o := h.n, 3-h.n
	other, zero := fmt.Sprintf("172.30.0.%d", o), ""
	if h.rig.six {
		other, zero = fmt.Sprintf("fd00:30::%d", o), "udp6zerocsumrx"
	}
	h.ip(fmt.Sprintf("address add 172.30.0.%d/24 dev eth0", n), fmt.Sprintf("address add fd00:30::%d/64 dev eth0 nodad", n), "link set eth0 up")
	h.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	h.ip(
		fmt.Sprintf("link add vtep1024 address 02:00:00:00:00:0%d mtu %d type vxlan id 1024 dstport 64000 nolearning local %s %s", n, h.rig.mtu, h.local, zero),
		"link set vtep1024 up", fmt.Sprintf("address add 45.0.0.%d/24 dev vtep1024", n), fmt.Sprintf("address add fd45::%d/64 dev vtep1024 nodad", n),
		fmt.Sprintf("neigh add 45.0.0.%d lladdr 02:00:00:00:00:0%d nud permanent dev vtep1024", o, o),
		fmt.Sprintf("neigh add fd45::%d lladdr 02:00:00:00:00:0%d nud permanent dev vtep1024", o, o),
		fmt.Sprintf("link add name m-net address 02:00:00:00:01:0%d up mtu %d type bridge", n, h.rig.mtu),
		fmt.Sprintf("address add 9.200.%d.1/24 dev m-net", n), fmt.Sprintf("address add fd09:200:0:%d::1/64 dev m-net nodad", n),
		fmt.Sprintf("route add 9.200.%d.0/24 via 45.0.0.%d", o, o), fmt.Sprintf("route add fd09:200:0:%d::/64 via fd45::%d", o, o),
	)
	h.run("bridge", "fdb", "append", fmt.Sprintf("02:00:00:00:00:0%d", o), "dev", "vtep1024", "dst", other, "self", "permanent")
	h.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-s", overlay4.String(), "!", "-d", overlay4.String(), "-j", "MASQUERADE")
	h.run("ip6tables", "-t", "nat", "-A", "POSTROUTING", "-s", overlay6.String(), "!", "-d", overlay6.String(), "-j", "MASQUERADE")
}

// attach makes a container with the last byte in both of its addresses.
func (h *host) attach(name string, last byte, group int) *container {
	h.t.Helper()
	return h.attachTo("m-net", name, last, group, fmt.Sprintf("9.200.%d.1/24", h.n), fmt.Sprintf("fd09:200:0:%d::1/64", h.n))
}

// attachTo makes one at a bridge with these addresses.
func (h *host) attachTo(bridge, name string, last byte, group int, gateway4, gateway6 string) *container {
	h.t.Helper()
	g4, g6 := netip.MustParsePrefix(gateway4), netip.MustParsePrefix(gateway6)
	c := &container{
		space: newSpace(h.t, fmt.Sprintf("%s%d", name, h.n)),
		v4:    withLast(g4.Addr(), last),
		v6:    withLast(g6.Addr(), last),
	}
	a := conf.Attachment{Network: overlayName, ContainerID: name, IfName: "eth0"}
	c.link, c.mac = mark.HostEnd(conf.Mesos, a.Key()), conf.MAC{2, 0, 0, 0, last, byte(h.n)}
	alias := mark.NewAlias(overlayName, conf.Mesos, a, []netip.Addr{c.v4, c.v6}, time.Second)
	h.ip(fmt.Sprintf("link add %s up mtu %d group %d master %s type veth peer name eth0 mtu %d address %s netns %s",
		c.link, h.rig.mtu, group, bridge, h.rig.mtu, c.mac, c.name))
	h.run("ip", "link", "set", c.link, "alias", alias.String())
	c.ip("link set eth0 up", fmt.Sprintf("address add %s/%d dev eth0", c.v4, g4.Bits()), fmt.Sprintf("address add %s/%d dev eth0 nodad", c.v6, g6.Bits()),
		fmt.Sprintf("route add default via %s", g4.Addr()), fmt.Sprintf("route add default via %s", g6.Addr()))
	return c
}

// withLast is an address with another last byte.
func withLast(a netip.Addr, last byte) netip.Addr {
	b := a.AsSlice()
	b[len(b)-1] = last
	a, _ = netip.AddrFromSlice(b)
	return a
}

// wanted is what the fast path of the host has to know.
func (h *host) wanted() Wanted {
	o := h.rig.hosts[2-h.n]
	return Wanted{
		Local: h.local, VTEPMAC: conf.MAC{2, 0, 0, 0, 0, byte(h.n)},
		Overlays: []Overlay{{Name: overlayName, Subnets: []netip.Prefix{overlay4, overlay6}}},
		Peers: []conf.Peer{{
			AgentID: fmt.Sprint("agent", o.n), AgentIP: o.local, VTEPMAC: conf.MAC{2, 0, 0, 0, 0, byte(o.n)},
			Subnets: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("9.200.%d.0/24", o.n)), netip.MustParsePrefix(fmt.Sprintf("fd09:200:0:%d::/64", o.n))},
		}},
	}
}

// open loads a fast path for the host.
func (h *host) open() *Path {
	h.t.Helper()
	var p *Path
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	err := h.ns.Inside(func() (err error) { p, err = New(log); return err })
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { p.Close() })
	return p
}

// fast loads a fast path and applies what is wanted.
func (h *host) fast() *Path {
	h.t.Helper()
	p := h.open()
	if err := p.Apply(context.Background(), h.wanted(), true); err != nil {
		h.t.Fatal(err)
	}
	return p
}

// fast puts the fast path on both hosts.
func (r *rig) fast() [2]*Path {
	r.t.Helper()
	return [2]*Path{r.hosts[0].fast(), r.hosts[1].fast()}
}

// traffic is what a fast path counted.
func traffic(t *testing.T, p *Path) Traffic {
	t.Helper()
	all, err := p.Traffic()
	if err != nil {
		t.Fatal(err)
	}
	return all[overlayName]
}

// wait repeats f until it returns nil.
func wait(t *testing.T, f func() error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// inside opens a socket in the namespace.
func inside[T any](s *space, open func() (T, error)) T {
	s.t.Helper()
	var v T
	err := s.ns.Inside(func() (err error) { v, err = open(); return err })
	if err != nil {
		s.t.Fatalf("%s: %v", s.name, err)
	}
	return v
}

// listen opens a datagram socket of the namespace.
func (s *space) listen(addr string) net.PacketConn {
	s.t.Helper()
	c := inside(s, func() (net.PacketConn, error) { return net.ListenPacket("udp", addr) })
	s.t.Cleanup(func() { c.Close() })
	return c
}

// dial opens a datagram socket of the namespace to an address.
func (s *space) dial(to string) net.Conn {
	s.t.Helper()
	c := inside(s, func() (net.Conn, error) { return net.Dial("udp", to) })
	s.t.Cleanup(func() { c.Close() })
	return c
}
