package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// inNS runs f on a thread of its own in a new network namespace, which goes with
// the thread.
func inNS(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes network namespaces")
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		defer func() { done <- err }()
		if err == nil {
			f()
		}
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T) *Conn {
	t.Helper()
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func obeyed(t *testing.T, c *Conn, b *Batch) {
	t.Helper()
	for _, err := range c.Each(b) {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// makeBridge makes a bridge that is up, has an address and answers with its
// index.
func makeBridge(t *testing.T, c *Conn, name string) int {
	t.Helper()
	var b Batch
	b.AddLink("make "+name, name, true)
	b.Nest(unix.IFLA_LINKINFO, func() { b.AttrString(unix.IFLA_INFO_KIND, "bridge") })
	obeyed(t, c, &b)
	l, ok, err := c.LinkByName(name)
	if err != nil || !ok {
		t.Fatalf("%s: %v, %v", name, ok, err)
	}
	b.Reset()
	b.AddAddress("", l.Index, netip.MustParsePrefix("44.128.0.1/14"))
	obeyed(t, c, &b)
	return l.Index
}

func ip(t *testing.T, args string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v\n%s", args, err, out)
	}
}

// Looking for a name leaves the socket as it was, so that it can be used for more.
func TestHas(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: a socket is bound to a device")
	}
	c := open(t)
	for range 2 {
		for name, want := range map[string]bool{"lo": true, "no-such-device": false} {
			if got, err := c.Has(name); got != want || err != nil {
				t.Errorf("%s: %v, %v, want %v", name, got, err, want)
			}
		}
	}
	if i, ok, err := c.Find("lo"); i.Index != 1 || !ok || err != nil {
		t.Errorf("lo: %+v, %v, %v", i, ok, err)
	}
}

// The kernel finds a link by any of its names. One that only has the name as
// another one is taken, and is not the link that was looked for.
func TestAltname(t *testing.T) {
	inNS(t, func() {
		ip(t, "link add eth0 type bridge")
		ip(t, "link property add dev eth0 altname d-dcos")
		c := open(t)
		if taken, err := c.Has("d-dcos"); !taken || err != nil {
			t.Errorf("Has: %v, %v, want it to be taken", taken, err)
		}
		if i, ok, err := c.Find("d-dcos"); ok || err != nil {
			t.Errorf("Find: %+v, %v, %v, want none", i, ok, err)
		}
		if l, ok, err := c.LinkByName("d-dcos"); ok || err != nil {
			t.Errorf("LinkByName: %+v, %v, %v, want none", l, ok, err)
		}
		l, ok, err := c.LinkByName("eth0")
		if !ok || err != nil || len(l.Altnames) != 1 || l.Altnames[0] != "d-dcos" {
			t.Errorf("eth0: %+v, %v, %v", l, ok, err)
		}
	})
}

// Every refusal is told apart from its neighbours in the batch, with the
// kernel's own words, and the rest of the batch is obeyed, whatever its size.
func TestSend(t *testing.T) {
	inNS(t, func() {
		c := open(t)
		const n = 5000 // more than one send could carry
		var b Batch
		for i := range n {
			r := Route{Dst: netip.PrefixFrom(netip.AddrFrom4([4]byte{9, byte(i >> 8), byte(i), 0}), 24), Metric: 5, Protocol: 44, Kind: unix.RTN_BLACKHOLE}
			if i%3 == 0 {
				r.Kind, r.OIF = unix.RTN_UNICAST, 4711 // which is not there
			}
			b.AddRoute(fmt.Sprintf("route %d", i), 0, r)
		}
		refused, err := c.Send(&b)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if got, want := refused[i] != nil, i%3 == 0; got != want {
				t.Fatalf("message %d: refused %v, want %v", i, refused[i], want)
			}
		}
		if !errors.Is(refused[0], unix.ENODEV) || !strings.HasPrefix(refused[3].Error(), "route 3: no such device") {
			t.Errorf("refused with %v, %v", refused[0], refused[3])
		}
		all, err := List(c, RoutesRequest(unix.AF_INET, unix.RT_TABLE_MAIN), ParseRoute)
		if err != nil || len(all) != n-(n+2)/3 {
			t.Errorf("%d routes, %v, want %d", len(all), err, n-(n+2)/3)
		}

		// Where the kernel says why, so do we.
		b.Reset()
		b.AddLink("make a bridge", "a name that is much too long", false)
		if err := c.Each(&b)[0]; err == nil || !strings.Contains(err.Error(), "(") {
			t.Errorf("no sentence from the kernel: %v", err)
		}
	})
}

// TestSendWithLittleRoom: a socket that may hold little of what is to be sent is
// given fewer messages at once.
func TestSendWithLittleRoom(t *testing.T) {
	inNS(t, func() {
		c := open(t)
		if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 16<<10); err != nil {
			t.Fatal(err)
		}
		n := 2*c.MaxSend() + 1
		var b Batch
		for range n {
			b.AddRoute("add a route", 0, Route{Dst: netip.MustParsePrefix("fd00::/64"), OIF: 4711, Kind: unix.RTN_UNICAST}) // which is not there
		}
		refused, err := c.Send(&b)
		if err != nil || len(refused) != n {
			t.Errorf("%d of %d messages were answered: %v", len(refused), n, err)
		}
	})
}

// Without an answer nothing is said to be done.
func TestEachWithoutAnswer(t *testing.T) {
	inNS(t, func() {
		c := open(t)
		var b Batch
		b.SetLink("set up interface x", 1)
		c.Close()
		if err := c.Each(&b)[0]; err == nil || errors.As(err, new(*Error)) || !strings.HasPrefix(err.Error(), "set up interface x: ") {
			t.Errorf("error is %v", err)
		}
	})
}

// A dump that the kernel says was interrupted is begun anew, and what was read
// of it is dropped.
func TestDumpInterrupted(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	c := &Conn{fd: pair[0]}
	defer c.Close()
	answer := func(seq uint32, flags uint16, indexes ...int) {
		var b Batch
		for _, i := range indexes {
			b.SetLink("", i)
		}
		done := [4]byte{}
		b.Begin("", unix.NLMSG_DONE, 0, done[:])
		for i := range b.Len() {
			b.seal(i, seq, false)
			binary.NativeEndian.PutUint16(b.buf[b.starts[i]+6:], flags)
		}
		if err := unix.Send(pair[1], b.buf, 0); err != nil {
			t.Fatal(err)
		}
	}
	answer(1, unix.NLM_F_DUMP_INTR, 1, 3)
	answer(2, 0, 1, 2, 3)
	links, err := c.Links()
	if err != nil || len(links) != 3 || links[1].Index != 2 {
		t.Errorf("links %+v, %v, want 1, 2 and 3", links, err)
	}
	for i := range uint32(dumpTries) {
		answer(3+i, unix.NLM_F_DUMP_INTR, 1)
	}
	if _, err := c.Links(); !errors.Is(err, errInterrupted) {
		t.Errorf("a table that never stands still: %v", err)
	}
}

// What is written is read back.
func TestRoundTrip(t *testing.T) {
	inNS(t, func() {
		ip(t, "link set lo up")
		c := open(t)
		index := makeBridge(t, c, "br0")
		mac := conf.MAC{2, 0, 0, 0, 0, 9}
		via := netip.MustParseAddr("44.128.0.9")
		want := Route{Dst: netip.MustParsePrefix("9.0.1.0/24"), Via: via, OIF: index, Metric: 9, Protocol: 44, Kind: unix.RTN_UNICAST,
			Flags: unix.RTNH_F_ONLINK, Table: unix.RT_TABLE_MAIN}
		neighbour := Neighbour{Family: unix.AF_INET, Index: index, State: unix.NUD_PERMANENT, IP: via, MAC: mac}
		var b Batch
		b.ReplaceNeighbour("", neighbour)
		b.AddRoute("", 0, want)
		b.AddAddress("", index, netip.MustParsePrefix("fd01::1/64"))
		obeyed(t, c, &b)

		if r, ok, err := c.Lookup(Packet{Dst: netip.MustParseAddr("9.0.1.7")}); !ok || err != nil || r.Dst != want.Dst || r.Via != via || r.Metric != 9 || r.Protocol != 44 {
			t.Errorf("route read back: %+v, %v, %v", r, ok, err)
		}
		if r, ok, err := c.Lookup(Packet{Dst: netip.MustParseAddr("192.0.2.1")}); ok || err != nil {
			t.Errorf("route to nowhere: %+v, %v, %v", r, ok, err)
		}
		got, err := List(c, NeighboursRequest(unix.AF_INET, index), ParseNeighbour)
		if err != nil || len(got) != 1 || got[0] != neighbour {
			t.Errorf("neighbours: %+v, %v", got, err)
		}
		addrs, err := c.Addresses(index)
		if err != nil || len(addrs) < 2 || addrs[0].Prefix.String() != "44.128.0.1/14" {
			t.Errorf("addresses: %+v, %v", addrs, err)
		}
		// The kernel receives for an IPv6 address a moment after it was added.
		for until := time.Now().Add(10 * time.Second); ; {
			local, err := c.IsLocal(netip.MustParseAddr("fd01::1"))
			if err != nil || time.Now().After(until) {
				t.Fatalf("fd01::1 is local: %v, %v", local, err)
			}
			if local {
				break
			}
		}
		if local, err := c.IsLocal(netip.MustParseAddr("fd02::1")); local || err != nil {
			t.Errorf("fd02::1 is local: %v, %v", local, err)
		}
	})
}
