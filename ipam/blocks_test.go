package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
)

func manyRanges(n int) (out []netip.Prefix) {
	for i := range n {
		out = append(out, netip.PrefixFrom(netip.AddrFrom4([4]byte{9, 0, byte(i), 0}), 28))
	}
	return out
}

// blocks has three ranges of five addresses in IPv4 and two in IPv6.
var blocks = prefixes("9.0.1.0/29", "9.0.5.0/29", "9.0.9.0/29", "fd01:b::/81", "fd01:c::/81")

// The first block is filled before the next, and what was released in it is used
// again first.
func TestBlocksInOrder(t *testing.T) {
	b := newBench(t)
	var got []string
	for i := range 15 {
		a := b.get(req(fmt.Sprint(i), blocks))
		got = append(got, a.Addrs[0].String())
		if i < 3 {
			diff(t, "IPv6", a.Addrs[1], netip.MustParseAddr(fmt.Sprintf("fd01:b::%d", i+2)))
		}
	}
	want := []string{}
	for _, block := range []string{"9.0.1.", "9.0.5.", "9.0.9."} {
		for i := 2; i <= 6; i++ {
			want = append(want, block+fmt.Sprint(i))
		}
	}
	diff(t, "in order", got, want)
	_, err := b.allocate(req("one too many", blocks))
	var full *ExhaustedError
	if !errors.As(err, &full) || full.Stats.Used != 15 || full.Stats.Total != 15 || !strings.Contains(err.Error(), "9.0.1.0/29, 9.0.5.0/29, 9.0.9.0/29: 15 used, 0 cooling, 15 in all") {
		t.Errorf("the refusal is %v", err)
	}
	b.release("7")
	b.now += cooling
	b.release("2")
	diff(t, "cooled before cooling", b.get(req("x", blocks)).Addrs[0].String(), "9.0.5.4")
	early := b.get(req("y", blocks))
	diff(t, "then early", []string{early.Addrs[0].String(), early.Flush[0].String()}, []string{"9.0.1.4", "9.0.1.4"})
	diff(t, "the same attachment", b.get(req("12", blocks)).Addrs, addrs("9.0.9.4", "fd01:b::e"))
	diff(t, "counted once for all", Sum(b.stats(blocks[:3]))[0].Early, uint64(1))
}

// Programs that do not know of a further block yet, and those that do, work on one
// store at the same time.
func TestBlocksComeAndGo(t *testing.T) {
	b := newBench(t)
	for i := range 5 {
		b.get(req(fmt.Sprint(i), small))
	}
	if _, err := b.allocate(req("5", small)); err == nil {
		t.Fatal("a sixth of five")
	}
	two := prefixes("9.0.1.0/29", "9.0.5.0/29")
	diff(t, "further", b.get(req("5", two)).Addrs, addrs("9.0.5.2"))
	b.release("3")
	b.now += cooling
	diff(t, "who does not know", b.get(req("6", small)).Addrs, addrs("9.0.1.5"))
	diff(t, "who does", b.get(req("7", two)).Addrs, addrs("9.0.5.3"))
	diff(t, "use", Sum(b.stats(two)), []Stats{{
		Range: small[0], Total: 10, Used: 7, Further: ", 9.0.5.0/29", FurtherAddresses: 5,
	}})
	diff(t, "by name", b.get(req("8", two, "9.0.5.6")).Addrs, addrs("9.0.5.6"))
	_, err := b.allocate(req("9", two, "9.0.9.2"))
	if err == nil || !strings.Contains(err.Error(), "is outside 9.0.1.0/29, 9.0.5.0/29") {
		t.Errorf("outside: %v", err)
	}
}

// A block is retired only if nothing in either half is in use or cooling, and then
// nobody gets an address of it, whatever he has read before.
func TestRetire(t *testing.T) {
	b := newBench(t)
	two := prefixes("9.0.1.0/29", "9.0.5.0/29")
	further := map[conf.Half][]netip.Prefix{conf.Mesos: prefixes("9.0.5.0/29"), conf.Docker: prefixes("9.0.5.8/29")}
	retire := func(want bool) {
		t.Helper()
		b.with(func(s *Store) {
			got, err := s.Retire(t.Context(), further)
			if err != nil || got != want {
				t.Errorf("retired %v, %v; want %v", got, err, want)
			}
			listed, err := s.Retired(t.Context(), conf.Docker, prefixes("9.0.1.8/29", "9.0.5.8/29"))
			if err != nil || slices.Contains(listed, further[conf.Docker][0]) != want {
				t.Errorf("retired are %v, %v", listed, err)
			}
		})
	}
	b.get(req("six", prefixes("fd01:b::/81")))
	b.with(func(s *Store) {
		for range 2 {
			if got, err := s.Retire(t.Context(), further, prefixes("::/0")...); err != nil || got {
				t.Errorf("retired %v, %v, while an address that must not be is in use", got, err)
			}
			if _, err := s.Release(t.Context(), att("six")); err != nil {
				t.Fatal(err)
			}
		}
		b.now += cooling
	})
	b.with(func(s *Store) {
		if got, err := s.Retire(t.Context(), further, prefixes("::/0")...); err != nil || !got {
			t.Errorf("retired %v, %v", got, err)
		}
		if err := s.Reinstate(t.Context(), further); err != nil {
			t.Fatal(err)
		}
	})
	docker := req("docker", prefixes("9.0.5.8/29"))
	docker.Half = conf.Docker
	b.get(docker)
	retire(false) // in use in the other half
	b.release("docker")
	retire(false) // cooling
	b.now += cooling
	retire(true)
	retire(true)
	for i := range 5 {
		b.get(req(fmt.Sprint(i), two))
	}
	if _, err := b.allocate(req("5", two)); !errors.As(err, new(*ExhaustedError)) {
		t.Errorf("an address of a block that is given back: %v", err)
	}
	if _, err := b.allocate(req("5", two, "9.0.5.4")); !errors.As(err, new(*UnavailableError)) {
		t.Errorf("one by name: %v", err)
	}
	b.with(func(s *Store) {
		for range 2 {
			if err := s.Reinstate(t.Context(), further); err != nil {
				t.Error(err)
			}
		}
	})
	diff(t, "reinstated", b.get(req("5", two)).Addrs, addrs("9.0.5.2"))
	diff(t, "the other half", b.get(Request{Attachment: att("d"), Half: conf.Docker, Ranges: prefixes("9.0.5.8/29")}).Addrs, addrs("9.0.5.11"))
}

// The ports of the bridge are one number for all blocks.
func TestBlocksShareTheBridge(t *testing.T) {
	b := newBench(t)
	large := prefixes("9.0.0.0/22", "9.0.4.0/22")
	diff(t, "in all", Sum(b.stats(large))[0].Total, uint64(conf.BridgePorts))
	b.with(func(s *Store) {
		for i := range conf.BridgePorts {
			if _, err := s.Allocate(t.Context(), req(fmt.Sprint(i), large)); err != nil {
				t.Fatal(i, err)
			}
		}
	})
	_, err := b.allocate(req("x", large))
	if err == nil || !strings.Contains(err.Error(), "a Linux bridge has at most 1023 ports") {
		t.Errorf("one port too many: %v", err)
	}
}

func TestDockerInBlocks(t *testing.T) {
	b := newBench(t)
	r := single("9.0.1.0/29")
	r.Ranges = prefixes("9.0.1.0/29", "9.0.5.0/29", "fd01:b::/81")
	var got []string
	for range 10 {
		got = append(got, b.mustSingle(r))
	}
	diff(t, "in order", []string{got[0], got[4], got[5], got[9]}, []string{"9.0.1.2", "9.0.1.6", "9.0.5.2", "9.0.5.6"})
	if _, err := b.single(r); !errors.As(err, new(*ExhaustedError)) {
		t.Errorf("one too many: %v", err)
	}
	b.releaseDocker("9.0.5.3")
	r.Want = netip.MustParseAddr("9.0.5.3")
	diff(t, "by name", b.mustSingle(r), "9.0.5.3")
}
