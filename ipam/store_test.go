package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
	"go.uber.org/goleak"

	"overlayd.internal/overlay/conf"
)

// TestMain lets a test run itself again as another process: see child.
func TestMain(m *testing.M) {
	if name := os.Getenv("IPAM_TEST_CHILD"); name != "" {
		os.Exit(children[name]())
	}
	goleak.VerifyTestMain(m)
}

const cooling = 150 * time.Second

// A bench is one store on a clock of its own.
type bench struct {
	t   *testing.T
	o   Options
	now time.Duration
}

func newBench(t *testing.T) *bench {
	b := &bench{t: t, now: time.Hour}
	b.o = Options{Dir: tempDir(t), Overlay: "dcos", BootID: "boot-1", Cooling: cooling, Now: func() time.Duration { return b.now }}
	return b
}

// tempDir is on tmpfs where there is one, as the store is in earnest.
func tempDir(t testing.TB) string {
	if st, err := os.Stat("/dev/shm"); err != nil || !st.IsDir() {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp("/dev/shm", "ovl-ipam-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func (b *bench) file() string { return filepath.Join(b.o.Dir, b.o.Overlay+".db") }

// with opens the store for one operation, as the programs do, and verifies it.
func (b *bench) with(op func(*Store)) {
	b.t.Helper()
	s, err := Open(b.t.Context(), b.o)
	if err != nil {
		b.t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			b.t.Error(err)
		}
	}()
	op(s)
	verify(b.t, s)
}

func verify(t testing.TB, s *Store) {
	t.Helper()
	problems, err := s.Verify(context.Background())
	if err != nil || problems != nil {
		t.Fatalf("verify: %v %s", err, strings.Join(problems, "\n"))
	}
}

func att(id string) conf.Attachment {
	return conf.Attachment{Network: "net", ContainerID: id, IfName: "eth0"}
}

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

// small has five addresses for containers, .2 to .6.
var small = prefixes("9.0.1.0/29")

func req(id string, ranges []netip.Prefix, want ...string) Request {
	return Request{Attachment: att(id), Half: conf.Mesos, Ranges: ranges, Want: addrs(want...)}
}

func (b *bench) allocate(r Request) (a Allocation, err error) {
	b.t.Helper()
	b.with(func(s *Store) { a, err = s.Allocate(b.t.Context(), r) })
	return a, err
}

func (b *bench) get(r Request) Allocation {
	b.t.Helper()
	a, err := b.allocate(r)
	if err != nil {
		b.t.Fatal(err)
	}
	return a
}

func (b *bench) release(id string) []netip.Addr {
	b.t.Helper()
	var out []netip.Addr
	b.with(func(s *Store) {
		var err error
		if out, err = s.Release(b.t.Context(), att(id)); err != nil {
			b.t.Fatal(err)
		}
	})
	return out
}

func (b *bench) stats(ranges []netip.Prefix) []Stats {
	b.t.Helper()
	var out []Stats
	b.with(func(s *Store) {
		var err error
		if out, err = s.Stats(b.t.Context(), conf.Mesos, ranges); err != nil {
			b.t.Fatal(err)
		}
	})
	return out
}

func diff(t *testing.T, what string, got, want any) {
	t.Helper()
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

func TestAllocateInOrderThenOldest(t *testing.T) {
	b := newBench(t)
	for i, want := range []string{"9.0.1.2", "9.0.1.3", "9.0.1.4"} {
		diff(t, "fresh", b.get(req(fmt.Sprint("c", i), small)), Allocation{Addrs: addrs(want)})
	}
	diff(t, "released", b.release("c1"), addrs("9.0.1.3"))
	b.now += time.Second
	b.release("c0")
	// Never-used ones first, then those that have rested, oldest release first.
	b.now += cooling
	for i, want := range []string{"9.0.1.5", "9.0.1.6", "9.0.1.3", "9.0.1.2"} {
		diff(t, "next", b.get(req(fmt.Sprint("d", i), small)), Allocation{Addrs: addrs(want)})
	}
	_, err := b.allocate(req("late", small))
	var ex *ExhaustedError
	if !errors.As(err, &ex) {
		t.Fatalf("got %v, want an *ExhaustedError", err)
	}
	diff(t, "exhausted", *ex, ExhaustedError{"dcos", conf.Mesos, Stats{Range: small[0], Total: 5, Used: 5}})
	diff(t, "text", err.Error(), "overlay dcos: no address left in the mesos half 9.0.1.0/29: 5 used, 0 cooling, 5 in all; remove containers or give the overlay a shorter prefix")
}

func TestCoolingIsUsedEarlyRatherThanFail(t *testing.T) {
	b := newBench(t)
	for i := range 5 {
		b.get(req(fmt.Sprint("c", i), small))
	}
	b.release("c3")
	b.now += 10 * time.Second
	b.release("c1")
	diff(t, "cooling", b.stats(small), []Stats{{Range: small[0], Total: 5, Used: 3, Cooling: 2}})
	diff(t, "early", b.get(req("d", small)), Allocation{Addrs: addrs("9.0.1.5"), Flush: addrs("9.0.1.5")})
	diff(t, "counted", b.stats(small), []Stats{{Range: small[0], Total: 5, Used: 4, Cooling: 1, Early: 1}})
	b.now += cooling
	diff(t, "cooled", b.stats(small), []Stats{{Range: small[0], Total: 5, Used: 4, Early: 1}})
	diff(t, "in time", b.get(req("e", small)), Allocation{Addrs: addrs("9.0.1.3")})
}

func TestNoCooling(t *testing.T) {
	b := newBench(t)
	b.o.Cooling = 0
	for i := range 5 {
		b.get(req(fmt.Sprint("c", i), small))
	}
	b.release("c0")
	diff(t, "at once", b.get(req("d", small)), Allocation{Addrs: addrs("9.0.1.2")})
}

func TestSameAttachmentSameAddress(t *testing.T) {
	b := newBench(t)
	dual := prefixes("9.0.1.0/25", "fd01:b::/81")
	first := b.get(req("c", dual))
	diff(t, "first", first, Allocation{Addrs: addrs("9.0.1.2", "fd01:b::2")})
	diff(t, "again", b.get(req("c", dual)), Allocation{Addrs: first.Addrs, Existing: true})
	diff(t, "by name", b.get(req("c", dual, "9.0.1.2")), Allocation{Addrs: first.Addrs, Existing: true})
	_, err := b.allocate(req("c", dual, "9.0.1.9"))
	var un *UnavailableError
	if !errors.As(err, &un) || !strings.Contains(un.Reason, "which has [9.0.1.2 fd01:b::2]; delete it first") {
		t.Errorf("another name: %v", err)
	}
	second := req("c", dual)
	second.IfName = "eth1"
	diff(t, "second interface", b.get(second), Allocation{Addrs: addrs("9.0.1.3", "fd01:b::3")})
	b.with(func(s *Store) {
		rec, found, err := s.Get(t.Context(), att("c"))
		if err != nil {
			t.Fatal(err)
		}
		diff(t, "record", rec, Record{Attachment: att("c"), Half: conf.Mesos, Addrs: first.Addrs, BootID: "boot-1", Since: time.Hour})
		diff(t, "found", found, true)
	})
}

func TestWant(t *testing.T) {
	half := prefixes("9.0.1.0/25", "fd01:b::/81")
	for _, tt := range []struct{ name, want, reason string }{
		{"free", "9.0.1.77", ""},
		{"next in line", "9.0.1.4", ""},
		{"last", "9.0.1.126", ""},
		{"free IPv6", "fd01:b::7fff:ffff:ffff", ""},
		{"network", "9.0.1.0", "is the network address of 9.0.1.0/25"},
		{"gateway", "9.0.1.1", "is the gateway of 9.0.1.0/25"},
		{"broadcast", "9.0.1.127", "is the broadcast address of 9.0.1.0/25"},
		{"other half", "9.0.1.128", "is outside 9.0.1.0/25"},
		{"gateway IPv6", "fd01:b::1", "is the gateway of fd01:b::/81"},
		{"in use", "9.0.1.2", "is in use by net/a/eth0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			b.get(req("a", half))
			b.get(req("b", half))
			got, err := b.allocate(req("c", half, tt.want))
			if tt.reason == "" {
				if err != nil || !slices.Contains(got.Addrs, netip.MustParseAddr(tt.want)) || len(got.Addrs) != 2 {
					t.Fatalf("got %v, %v", got, err)
				}
				// It is in nobody else's way.
				diff(t, "next", b.get(req("d", prefixes("9.0.1.0/25"))).Existing, false)
				return
			}
			var un *UnavailableError
			if !errors.As(err, &un) || un.Reason != tt.reason {
				t.Fatalf("got %v, want %q", err, tt.reason)
			}
			diff(t, "nothing taken", b.stats(half)[0].Used, uint64(2))
		})
	}
}

func TestWantCoolingAddress(t *testing.T) {
	b := newBench(t)
	b.get(req("a", small))
	b.release("a")
	diff(t, "early", b.get(req("b", small, "9.0.1.2")), Allocation{Addrs: addrs("9.0.1.2"), Flush: addrs("9.0.1.2")})
	diff(t, "counted", b.stats(small), []Stats{{Range: small[0], Total: 5, Used: 1, Early: 1}})
}

func TestWantsThatCannotBe(t *testing.T) {
	b := newBench(t)
	for _, want := range [][]string{{"fd01:b::2"}, {"9.0.1.2", "9.0.1.3"}} {
		_, err := b.allocate(req("c", small, want...))
		var un *UnavailableError
		if !errors.As(err, &un) {
			t.Errorf("%v: got %v", want, err)
		}
	}
}

func TestBadRequests(t *testing.T) {
	b := newBench(t)
	long := strings.Repeat("x", 5000)
	for name, r := range map[string]Request{
		"no range":        req("c", nil),
		"overlapping":     req("c", prefixes("9.0.1.0/25", "9.0.1.64/26")),
		"no room":         req("c", prefixes("9.0.1.0/31")),
		"no id":           req("", small),
		"long id":         req(long, small),
		"no such half":    {Attachment: att("c"), Half: "left", Ranges: small},
		"mapped":          req("c", prefixes("::ffff:9.0.1.0/121")),
		"too many ranges": req("c", manyRanges(maxRanges+1)),
	} {
		if _, err := b.allocate(r); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	diff(t, "used", b.stats(small)[0].Used, uint64(0))
}

// The IPv6 range is exhausted, so the IPv4 address must not be kept either.
func TestAllOrNothing(t *testing.T) {
	b := newBench(t)
	ranges := prefixes("9.0.1.0/25", "fd01:b::/126") // two addresses in IPv6
	b.get(req("a", ranges))
	b.get(req("b", ranges))
	_, err := b.allocate(req("c", ranges))
	var ex *ExhaustedError
	if !errors.As(err, &ex) || ex.Stats.Range != ranges[1] || ex.Stats.Total != 2 {
		t.Fatalf("got %v", err)
	}
	diff(t, "IPv4 used", b.stats(ranges)[0].Used, uint64(2))
	b.release("a")
	b.now += cooling
	diff(t, "no gap", b.get(req("d", ranges)).Addrs, addrs("9.0.1.4", "fd01:b::2"))
}

func TestHalvesAreSeparate(t *testing.T) {
	b := newBench(t)
	b.get(req("a", small))
	upper := req("a", prefixes("9.0.1.8/29"))
	upper.Half = conf.Docker
	diff(t, "other half", b.get(upper).Addrs, addrs("9.0.1.10"))
	diff(t, "both released", b.release("a"), addrs("9.0.1.2", "9.0.1.10"))
	diff(t, "again", b.release("a"), []netip.Addr(nil))
	diff(t, "never stored", b.release("zzz"), []netip.Addr(nil))
}

func TestRangesThatChanged(t *testing.T) {
	b := newBench(t)
	old, new := prefixes("9.0.1.0/29"), prefixes("9.0.7.0/29", "fd01:b:7::/81")
	b.get(req("a", old))
	b.get(req("b", old))
	diff(t, "moved", b.get(req("a", new)), Allocation{Addrs: addrs("9.0.7.2", "fd01:b:7::2")})
	diff(t, "old kept", b.get(req("b", old)), Allocation{Addrs: addrs("9.0.1.3"), Existing: true})
	// Back again: what is in use there stays out of reach, what was used rests.
	for i, want := range []string{"9.0.1.4", "9.0.1.5", "9.0.1.6"} {
		diff(t, "back", b.get(req(fmt.Sprint("d", i), old)).Addrs, addrs(want))
	}
	diff(t, "early", b.get(req("e", old)), Allocation{Addrs: addrs("9.0.1.2"), Flush: addrs("9.0.1.2")})
	diff(t, "full", b.stats(old), []Stats{{Range: old[0], Total: 5, Used: 5, Early: 1}})
	// Another length over the same addresses.
	diff(t, "shorter prefix", b.get(req("f", prefixes("9.0.1.0/28"))).Addrs, addrs("9.0.1.7"))
	diff(t, "released", b.release("b"), addrs("9.0.1.3"))
}

func TestReleasedOutsideTheRangesIsForgottenOnceCool(t *testing.T) {
	b := newBench(t)
	old, new := prefixes("9.0.1.0/30"), prefixes("9.0.7.0/30") // one address each
	b.get(req("a", old))
	b.get(req("b", new))
	b.release("a")
	b.release("b")
	b.now += cooling
	b.get(req("c", new))
	b.with(func(s *Store) {
		_, ok, err := findTicket(s, netip.MustParseAddr("9.0.1.2"))
		if ok || err != nil {
			t.Errorf("still queued: %v %v", ok, err)
		}
	})
}

func TestGC(t *testing.T) {
	b := newBench(t)
	ranges := prefixes("9.0.1.0/25")
	for i := range 6 {
		b.get(req(fmt.Sprint("c", i), ranges))
	}
	other := req("c0", ranges)
	other.Network = "other"
	b.get(other)
	docker := req("c0", prefixes("9.0.1.128/25"))
	docker.Half = conf.Docker
	b.get(docker)
	b.with(func(s *Store) {
		got, err := s.GC(t.Context(), "net", conf.Mesos, func(r Record) bool { return r.ContainerID == "c2" || r.ContainerID == "c4" })
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, r := range got {
			ids = append(ids, r.ContainerID)
		}
		slices.Sort(ids)
		diff(t, "released", ids, []string{"c0", "c1", "c3", "c5"})
		left, err := s.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		diff(t, "left", len(left), 4)
	})
	st := b.stats(ranges)[0]
	diff(t, "they cool", []uint64{st.Used, st.Cooling}, []uint64{3, 4})
}

func TestReboot(t *testing.T) {
	b := newBench(t)
	for i := range 3 {
		b.get(req(fmt.Sprint("c", i), small))
	}
	b.release("c1")
	b.o.BootID, b.now = "boot-2", time.Second
	diff(t, "all rest", b.stats(small), []Stats{{Range: small[0], Total: 5, Cooling: 3}})
	diff(t, "not existing", b.get(req("c0", small)), Allocation{Addrs: addrs("9.0.1.5")})
	b.get(req("d", small))
	if a := b.get(req("e", small)); len(a.Flush) != 1 {
		t.Errorf("not flushed: %v", a)
	}
}

func TestHugeRange(t *testing.T) {
	b := newBench(t)
	huge := prefixes("fd01:b::/65")
	diff(t, "first", b.get(req("a", huge)).Addrs, addrs("fd01:b::2"))
	diff(t, "by name", b.get(req("b", huge, "fd01:b::7fff:ffff:ffff:ffff")).Addrs, addrs("fd01:b::7fff:ffff:ffff:ffff"))
	diff(t, "total is capped", b.stats(huge)[0].Total, conf.Capacity(huge[0]))
	top := prefixes("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff8/125")
	for i := range 6 {
		b.get(req(fmt.Sprint("t", i), top))
	}
	if _, err := b.allocate(req("t9", top)); err == nil {
		t.Error("past the end of the address space")
	}
}

// An IPv6 half never runs out of new addresses, so what was released must not
// pile up.
func TestSparseRangeForgets(t *testing.T) {
	b := newBench(t)
	huge := prefixes("fd01:b::/81")
	entries := func() (n uint64) {
		b.with(func(s *Store) {
			if err := s.db.view(func(tx *bolt.Tx) error {
				h, err := s.half(tx, conf.Mesos)
				if err == nil {
					_, n, err = h.readSum()
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
		})
		return n
	}
	for i := range 400 {
		b.get(req("c", huge))
		b.release("c")
		b.now += time.Second
		if i >= 200 { // 150 are cooling, two entries each
			if n := entries(); n > 2*160 {
				t.Fatalf("%d entries after %d launches", n, i)
			}
		}
	}
	// At the end of the range another lap begins, past what is in use.
	b.get(req("first", huge, "fd01:b::2"))
	b.with(func(s *Store) {
		if err := s.update(func(tx *bolt.Tx) error {
			h, err := s.half(tx, conf.Mesos)
			if err != nil {
				return err
			}
			if err := h.loadSpans(); err != nil {
				return err
			}
			h.spans[0].pass(h.spans[0].last)
			return h.flush()
		}); err != nil {
			t.Fatal(err)
		}
	})
	b.now += time.Second
	if a := b.get(req("d", huge)); len(a.Flush) != 1 {
		t.Errorf("cooling ones are used before a new lap: %v", a)
	}
	for i := range 80 { // two are forgotten at each
		b.now += cooling
		b.get(req(fmt.Sprint("e", i), huge))
	}
	diff(t, "next lap", b.get(req("f", huge)).Addrs[0].Less(netip.MustParseAddr("fd01:b::400")), true)
}

func TestBusy(t *testing.T) {
	b := newBench(t)
	held, err := Open(t.Context(), b.o)
	if err != nil {
		t.Fatal(err)
	}
	b.o.LockTimeout = 20 * time.Millisecond
	if _, err := Open(t.Context(), b.o); !errors.Is(err, ErrBusy) {
		t.Errorf("got %v, want ErrBusy", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	b.o.LockTimeout = time.Minute
	if _, err := Open(ctx, b.o); !errors.Is(err, ErrBusy) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want ErrBusy and the context's error", err)
	}
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	// Those who gave up do not keep the lock.
	b.get(req("c", small))
	if _, err := held.Allocate(t.Context(), req("c", small)); err == nil {
		t.Error("a closed store allocates")
	}
}

func TestOverlayNameIsNoPath(t *testing.T) {
	b := newBench(t)
	for _, name := range []string{"", "../x", "a/b", "much-too-long-name"} {
		b.o.Overlay = name
		if _, err := Open(t.Context(), b.o); err == nil {
			t.Errorf("%q: opened", name)
		}
	}
}

func TestFilesAreForUsAlone(t *testing.T) {
	b := newBench(t)
	b.o.Dir = filepath.Join(b.o.Dir, "run", "ipam")
	b.get(req("c", small))
	for path, want := range map[string]os.FileMode{b.o.Dir: 0o700 | os.ModeDir, b.file(): 0o600} {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		diff(t, path, st.Mode(), want)
	}
}

// A fresh store asks what is in use already: somebody may have removed the file
// under running containers.
func TestFirstFileAsksTheKernel(t *testing.T) {
	b := newBench(t)
	b.o.Rebuild = func(context.Context) (Known, error) {
		return Known{Records: []Record{
			{Attachment: att("a"), Half: conf.Mesos, Addrs: addrs("9.0.1.2")},
			{Attachment: att("b"), Half: conf.Mesos, Addrs: addrs("9.0.1.2", "9.0.1.4")}, // claims a's too
		}}, nil
	}
	diff(t, "existing", b.get(req("a", small)), Allocation{Addrs: addrs("9.0.1.2"), Existing: true})
	// Nobody knows what was cooling, so conntrack is flushed for a while.
	diff(t, "new", b.get(req("c", small)), Allocation{Addrs: addrs("9.0.1.3"), Flush: addrs("9.0.1.3")})
	b.now += cooling
	diff(t, "later", b.get(req("d", small)), Allocation{Addrs: addrs("9.0.1.5")})
	b.o.Rebuild = func(context.Context) (Known, error) { return Known{}, errors.New("netlink is away") }
	diff(t, "asked once", b.get(req("e", small)), Allocation{Addrs: addrs("9.0.1.6")})
	b.o.Overlay = "dcos2"
	if _, err := Open(t.Context(), b.o); err == nil || !strings.Contains(err.Error(), "netlink is away") {
		t.Errorf("got %v", err)
	}
}

// TestBridgePorts: a half holds no more containers than its bridge has ports,
// however they are asked for.
func TestBridgePorts(t *testing.T) {
	for _, ranges := range [][]netip.Prefix{prefixes("9.0.0.0/20"), prefixes("fd01::/80"), prefixes("9.0.0.0/20", "fd01::/80")} {
		t.Run(fmt.Sprint(ranges), func(t *testing.T) {
			b := newBench(t)
			b.with(func(s *Store) {
				for i := range conf.BridgePorts {
					if _, err := s.Allocate(t.Context(), req(fmt.Sprint("c", i), ranges)); err != nil {
						t.Fatalf("container %d: %v", i, err)
					}
				}
				full := func(what string, err error) {
					t.Helper()
					var e *ExhaustedError
					if !errors.As(err, &e) || e.Stats.Used != 1023 || e.Stats.Total != 1023 || e.Stats.Free() != 0 ||
						!strings.Contains(err.Error(), "1023 in all because a Linux bridge has at most 1023 ports") {
						t.Errorf("%s: %v", what, err)
					}
				}
				_, err := s.Allocate(t.Context(), req("next", ranges))
				full("one more", err)
				named := req("named", ranges)
				named.Want = []netip.Addr{conf.LastContainer(ranges[0]).Prev()}
				_, err = s.Allocate(t.Context(), named)
				full("one by name", err)
				named.Exact = true
				_, err = s.Allocate(t.Context(), named)
				full("one that another plugin has chosen", err)
				single := SingleRequest{Half: conf.Mesos, Ranges: ranges, From: ranges[0], Name: func(a netip.Addr) conf.Attachment { return conf.DockerAttachment("dcos", a) }}
				_, err = s.AllocateSingle(t.Context(), single)
				full("one of Docker's", err)
				single.From = netip.PrefixFrom(conf.FirstContainer(ranges[0]), ranges[0].Bits()+1).Masked()
				_, err = s.AllocateSingle(t.Context(), single)
				full("one of Docker's from a part", err)
				portless := req("portless", ranges) // of a main plugin that has no use for our bridge
				portless.NetNS.Path = "/run/netns/x"
				if _, err := s.Allocate(t.Context(), portless); err != nil {
					t.Errorf("one that takes no port: %v", err)
				}
				if _, err := s.Release(t.Context(), att("portless")); err != nil {
					t.Fatal(err)
				}
				if a, err := s.Allocate(t.Context(), req("c7", ranges)); err != nil || !a.Existing {
					t.Errorf("one that has an address: %+v, %v", a, err)
				}
				if _, err := s.Release(t.Context(), att("c7")); err != nil {
					t.Fatal(err)
				}
				stats, err := s.Stats(t.Context(), conf.Mesos, ranges)
				if err != nil || stats[0].Used != 1022 || stats[0].Cooling < 1 || stats[0].Free() != 1 {
					t.Errorf("after one was released: %+v, %v", stats, err)
				}
				if _, err := s.Allocate(t.Context(), named); err != nil {
					t.Errorf("in its place: %v", err)
				}
				verify(t, s)
			})
		})
	}
}

// TestExact: addresses that another plugin has chosen are filed, all or none, also
// where that leaves a family out.
func TestExact(t *testing.T) {
	b := newBench(t)
	ranges := prefixes("9.0.1.0/26", "fd01::/80")
	exact := func(id string, want ...string) Request {
		r := req(id, ranges)
		r.Want, r.Exact = addrs(want...), true
		return r
	}
	b.get(req("own", ranges)) // 9.0.1.2
	diff(t, "one family", b.get(exact("a", "9.0.1.9")), Allocation{Addrs: addrs("9.0.1.9")})
	diff(t, "again", b.get(exact("a", "9.0.1.9")), Allocation{Addrs: addrs("9.0.1.9"), Existing: true})
	diff(t, "other ones", b.get(exact("a", "9.0.1.10", "fd01::99")), Allocation{Addrs: addrs("9.0.1.10", "fd01::99")})
	diff(t, "no longer chosen by another", b.get(req("a", ranges)), Allocation{Addrs: addrs("9.0.1.10", "fd01::99"), Existing: true})
	b.with(func(s *Store) {
		var un *UnavailableError
		if _, err := s.Allocate(t.Context(), exact("b", "9.0.1.11", "fd01::99")); !errors.As(err, &un) || un.Addr != netip.MustParseAddr("fd01::99") {
			t.Errorf("got %v, want that fd01::99 is in use", err)
		}
		if _, err := s.Allocate(t.Context(), exact("b")); err == nil {
			t.Error("no address was chosen, and taken")
		}
		r := req("c", ranges)
		r.Want = addrs("9.0.1.10")
		if _, err := s.Allocate(t.Context(), r); !errors.As(err, &un) {
			t.Errorf("got %v, want that 9.0.1.10 is in use", err)
		}
		verify(t, s)
	})
}
