package fastpath

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// Replacing the programs of both hosts loses no packet, and neither does the end
// of the process in between.
func TestReplacement(t *testing.T) {
	r := newRig(t, false)
	old := r.fast()
	a, b := r.hosts[0].container, r.hosts[1].container
	const total = 3000
	at := b.listen(netip.AddrPortFrom(b.v4, 7000).String())
	c := a.dial(netip.AddrPortFrom(b.v4, 7000).String())
	got := make(chan int)
	go func() {
		seen := map[uint32]bool{}
		var buf [64]byte
		for len(seen) < total {
			at.SetReadDeadline(time.Now().Add(3 * time.Second))
			if _, _, err := at.ReadFrom(buf[:]); err != nil {
				break
			}
			seen[binary.BigEndian.Uint32(buf[:])] = true
		}
		got <- len(seen)
	}()
	tick := time.NewTicker(500 * time.Microsecond)
	defer tick.Stop()
	var path [2]*Path
	before := r.hosts[0].vtepPackets()
	for i := range uint32(total) {
		<-tick.C
		if _, err := c.Write(binary.BigEndian.AppendUint32(nil, i)); err != nil {
			t.Fatal(err)
		}
		switch i {
		case 500:
			old[0].Close() // as when the process is killed
		case 1000:
			path[0] = r.hosts[0].fast()
		case 1500:
			path[1] = r.hosts[1].fast()
			old[1].Close()
		case 2000:
			if err := path[0].Links(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := <-got; n != total {
		t.Errorf("%d of %d packets arrived", n, total)
	}
	// Of a container's ARP nothing crosses; whatever is more was not taken.
	if n := r.hosts[0].vtepPackets() - before; n > 10 {
		t.Errorf("%d packets went by the VXLAN device", n)
	}
}

// Without its process the fast path goes on, also when containers go and others
// come in their place.
func TestWithoutProcess(t *testing.T) {
	r := newRig(t, false)
	for _, p := range r.fast() {
		p.Close()
	}
	a, b := r.hosts[0].container, r.hosts[1].container
	before := r.hosts[0].vtepPackets()
	if n, out := a.ping(5, b.v4); n != 5 {
		t.Fatal(out)
	}
	if n := r.hosts[0].vtepPackets() - before; n > 2 {
		t.Errorf("%d packets went by the VXLAN device", n)
	}
	r.hosts[1].ip("link delete " + b.link)
	next := r.hosts[1].attach("n", 2, mark.FastPathGroup) // the same address
	if n, out := a.ping(3, next.v4); n != 3 {
		t.Errorf("to the next owner of the address: %s", out)
	}
	if n, out := next.ping(3, a.v6); n != 3 {
		t.Errorf("from the next owner of the address: %s", out)
	}
}

// watch has a path follow the links until end is called.
func watch(t *testing.T, p *Path) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- p.Watch(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// Watch attaches what comes and lets go of what leaves.
func TestWatch(t *testing.T) {
	r := newRig(t, false)
	paths := r.fast()
	defer watch(t, paths[1])()
	late := r.hosts[1].attach("l", 9, mark.FastPathGroup)
	attached := func(want int) {
		t.Helper()
		wait(t, func() error {
			if n := paths[1].Attached(); n != want {
				return fmt.Errorf("%d interfaces have the fast path, want %d", n, want)
			}
			return nil
		})
	}
	attached(2)
	late.ping(1, r.hosts[0].container.v4) // finds the neighbour on the underlay
	if n := taken(t, paths[1], func() { late.ping(3, r.hosts[0].container.v4) }); n != 6 {
		t.Errorf("%d packets of a new container were taken, want 6", n)
	}
	r.hosts[1].ip("link set " + late.link + " nomaster")
	attached(1)
	r.hosts[1].ip("link set " + late.link + " master m-net")
	attached(2)
	r.hosts[1].ip("link delete " + late.link)
	attached(1)
}

// Where packets to a container wait in a queue that somebody put before its interface,
// as the CNI plugin bandwidth does, they all do, in both directions the kernel's way.
func TestShaped(t *testing.T) {
	r := newRig(t, false)
	paths := r.fast()
	defer watch(t, paths[1])()
	h, far := r.hosts[1], r.hosts[0].container
	attached := func(when string, want int) {
		t.Helper()
		wait(t, func() error {
			if n := paths[1].Attached(); n != want {
				return fmt.Errorf("%s: %d interfaces have the fast path, want %d", when, n, want)
			}
			return nil
		})
	}
	sent := func() (n int) {
		t.Helper()
		var stats []struct{ Packets int }
		if err := json.Unmarshal([]byte(h.run("tc", "-s", "-j", "qdisc", "show", "dev", h.container.link, "root")), &stats); err != nil || len(stats) != 1 {
			t.Fatalf("the qdiscs of %s: %v, %v", h.container.link, stats, err)
		}
		return stats[0].Packets
	}
	far.ping(1, h.container.v4)
	attached("at first", 1)
	for _, family := range []netip.Addr{h.container.v4, h.container.v6} {
		h.run("tc", "qdisc", "add", "dev", h.container.link, "root", "tbf", "rate", "10mbit", "burst", "12500", "latency", "25ms")
		attached("shaped", 0)
		before := sent()
		if n := taken(t, paths[1], func() { far.ping(3, family) }); n != 0 {
			t.Errorf("%s: %d packets were taken past the queue", family, n)
		}
		if n := sent() - before; n < 3 {
			t.Errorf("%s: %d packets went through the queue, want 3", family, n)
		}
		h.run("tc", "qdisc", "del", "dev", h.container.link, "root")
		attached("no longer shaped", 1)
	}
	// A new process finds it so.
	h.run("tc", "qdisc", "add", "dev", h.container.link, "root", "tbf", "rate", "10mbit", "burst", "12500", "latency", "25ms")
	attached("shaped again", 0)
	if n := h.fast().Attached(); n != 0 {
		t.Errorf("another process attached the programs to %d interfaces that are shaped", n)
	}
}

// What a container has of a subnet that is another host's now is not taken, and is
// again when the subnet comes back.
func TestWithdrawn(t *testing.T) {
	r := newRig(t, false)
	p := r.hosts[0].fast()
	for _, step := range []struct {
		withdrawn []netip.Prefix
		want      int
	}{
		{nil, 1},
		{[]netip.Prefix{netip.MustParsePrefix("9.200.77.0/24")}, 1},
		{r.hosts[1].wanted().Peers[0].Subnets[:1], 0}, // its own
		{nil, 1},
	} {
		w := r.hosts[0].wanted()
		w.Withdrawn = step.withdrawn
		if err := p.Apply(t.Context(), w, false); err != nil {
			t.Fatal(err)
		}
		if n := p.Attached(); n != step.want {
			t.Errorf("with %v withdrawn %d containers have the fast path, want %d", step.withdrawn, n, step.want)
		}
	}
}

// A container whose interface came with the qdisc, as an ADD makes it, loses nothing
// when the fast path is taken and left.
func TestTakenAndLeft(t *testing.T) {
	r := newRig(t, false)
	h, a := r.hosts[0], r.hosts[0].container
	h.run("tc", "qdisc", "add", "dev", a.link, "clsact")
	const total, rounds = 100, 5
	enough, lost := make(chan struct{}), make(chan string, 1)
	go func() { // as long as it takes
		defer close(lost)
		for {
			select {
			case <-enough:
				return
			default:
			}
			if n, out := h.ping(total, a.v4, "-i", "0.001", "-q"); n != total {
				lost <- fmt.Sprintf("%d of %d answered: %s", n, total, out)
				return
			}
		}
	}()
	stop := sync.OnceFunc(func() {
		close(enough)
		for text := range lost {
			t.Errorf("while the fast path was taken and left: %s", text)
		}
	})
	defer stop()
	for range rounds {
		h.fast().Close()
		if err := h.ns.Inside(func() error { _, err := Leave(); return err }); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	h.fast()
	if out := h.run("tc", "filter", "show", "dev", a.link, "ingress"); !strings.Contains(out, leaveFilter) {
		t.Errorf("not attached: %s", out)
	}
}

// Remove leaves neither filters nor qdiscs, but those of others.
func TestRemove(t *testing.T) {
	r := newRig(t, false)
	h := r.hosts[0]
	h.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
	h.run("tc", "filter", "add", "dev", "eth0", "ingress", "prio", "7", "protocol", "ip", "u32", "match", "u32", "1", "0xffffffff", "flowid", "1:1")
	p := h.fast()
	a, b := h.container, r.hosts[1].container
	removed := 0
	if err := h.ns.Inside(func() (err error) { removed, err = Remove(); return err }); err != nil || removed != 2 {
		t.Fatalf("removed %d filters, %v; want 2", removed, err)
	}
	if out := h.run("tc", "qdisc", "show", "dev", a.link); strings.Contains(out, "clsact") {
		t.Errorf("a qdisc is left: %s", out)
	}
	if out := h.run("tc", "filter", "show", "dev", "eth0", "ingress"); strings.Contains(out, mark.FilterPrefix) || !strings.Contains(out, "pref 7") {
		t.Errorf("on the underlay: %s", out)
	}
	if n := taken(t, p, func() { a.ping(3, b.v4) }); n != 0 {
		t.Errorf("%d packets were taken", n)
	}
	if err := h.ns.Inside(func() (err error) { removed, err = Remove(); return err }); err != nil || removed != 0 {
		t.Errorf("again: removed %d filters, %v", removed, err)
	}
}

// A peer moves, comes and goes; a peer's address changes its MAC.
func TestPeersChange(t *testing.T) {
	r := newRig(t, false)
	paths := r.fast()
	h := r.hosts[0]
	a, b := h.container, r.hosts[1].container

	t.Run("moved subnet", func(t *testing.T) {
		w := h.wanted()
		usurper := w.Peers[0]
		usurper.AgentID, usurper.AgentIP, usurper.Epoch = "other", netip.MustParseAddr("172.30.0.9"), w.Peers[0].Epoch+1
		w.Peers = []conf.Peer{usurper, w.Peers[0]}
		apply(t, h, paths[0], w)
		if n := taken(t, paths[0], func() { b.ping(1, a.v4) }); n != 1 {
			t.Errorf("%d packets taken: want the request only, the newer lease has the subnet", n)
		}
		apply(t, h, paths[0], h.wanted())
		if n := taken(t, paths[0], func() { a.ping(2, b.v4) }); n != 4 {
			t.Errorf("%d packets taken after the dispute, want 4", n)
		}
	})
	t.Run("changes", func(t *testing.T) {
		usurper := h.wanted().Peers[0]
		usurper.AgentID, usurper.AgentIP, usurper.Epoch = "other", netip.MustParseAddr("172.30.0.9"), usurper.Epoch+1
		for _, step := range []struct {
			set   []conf.Peer
			gone  []string
			taken uint64 // of request and answer
		}{
			{[]conf.Peer{usurper}, nil, 1},
			{nil, []string{"other"}, 2},
			{nil, []string{"agent2"}, 0},
			{h.wanted().Peers, nil, 2},
		} {
			if err := paths[0].Update(step.set, step.gone); err != nil {
				t.Fatal(err)
			}
			if n := taken(t, paths[0], func() { b.ping(1, a.v4) }); n != step.taken {
				t.Errorf("set %d peers, took %v away: %d packets taken, want %d", len(step.set), step.gone, n, step.taken)
			}
		}
	})
	t.Run("other MAC", func(t *testing.T) {
		r.hosts[1].ip("link set eth0 address 02:00:00:00:77:02")
		h.ip("neigh flush dev eth0")
		wait(t, func() error {
			if n, out := a.ping(1, b.v4); n != 1 {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
		if n := taken(t, paths[0], func() { a.ping(2, b.v4) }); n != 4 {
			t.Errorf("%d packets taken, want 4", n)
		}
	})
	t.Run("other agent IP", func(t *testing.T) {
		r.hosts[1].ip("address add 172.30.0.22/24 dev eth0")
		r.hosts[1].local = netip.MustParseAddr("172.30.0.22")
		for i, h := range r.hosts {
			apply(t, h, paths[i], h.wanted())
		}
		h.ping(1, r.hosts[1].local) // finds the neighbour
		if n := taken(t, paths[0], func() { a.ping(2, b.v4) }); n != 4 {
			t.Errorf("%d packets taken, want 4", n)
		}
	})
}

// Peers behind a router are reached through it, by whatever device the route
// names, and a changed route is followed at once.
func TestRoutedUnderlay(t *testing.T) {
	r := newRig(t, false)
	router := newSpace(t, "router")
	for _, h := range r.hosts {
		router.ip(fmt.Sprintf("link add to%d type veth peer name ul netns %s", h.n, h.name), fmt.Sprintf("link set to%d up", h.n),
			fmt.Sprintf("address add 10.0.%d.254/24 dev to%d", h.n, h.n))
		h.ip("link set ul up", fmt.Sprintf("address add 10.0.%d.1/24 dev ul", h.n),
			fmt.Sprintf("route add 172.30.0.%d/32 via 10.0.%d.254", 3-h.n, h.n))
		router.ip(fmt.Sprintf("route add 172.30.0.%d/32 via 10.0.%d.1", h.n, h.n))
	}
	router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
	paths := r.fast()
	a, b := r.hosts[0].container, r.hosts[1].container
	if err := exchange(a.space, b.space, b.v4); err != nil {
		t.Fatal(err)
	}
	before := linkPackets(t, router, "to1")
	if n := taken(t, paths[0], func() { a.ping(5, b.v4) }); n != 10 {
		t.Errorf("%d packets taken, want 10", n)
	}
	if n := linkPackets(t, router, "to1") - before; n < 10 {
		t.Errorf("%d packets crossed the router, want 10", n)
	}
	for _, h := range r.hosts {
		h.ip(fmt.Sprintf("route delete 172.30.0.%d/32", 3-h.n))
	}
	// A way is remembered for 10 ms, and the new next hops are to be resolved.
	for range 20 {
		before = linkPackets(t, router, "to1")
		if a.ping(1, b.v4); linkPackets(t, router, "to1") == before {
			break
		}
	}
	before = linkPackets(t, router, "to1")
	if n := taken(t, paths[0], func() { a.ping(5, b.v4) }); n != 10 {
		t.Errorf("%d packets taken after the route has changed, want 10", n)
	}
	if n := linkPackets(t, router, "to1") - before; n > 2 {
		t.Errorf("%d packets still crossed the router", n)
	}
}

func linkPackets(t *testing.T, s *space, link string) (n int) {
	t.Helper()
	err := s.ns.Inside(func() (err error) { n, err = packetsOf(link); return err })
	if err != nil {
		t.Fatal(err)
	}
	return n
}
