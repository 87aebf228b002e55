package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
)

var dual = prefixes("9.0.1.0/25", "fd01:b::/81")

func single(from string, want ...string) SingleRequest {
	r := SingleRequest{
		Half: conf.Docker, Ranges: dual, From: netip.MustParsePrefix(from),
		Name: func(a netip.Addr) conf.Attachment { return conf.DockerAttachment("dcos", a) },
	}
	for _, w := range want {
		r.Want = netip.MustParseAddr(w)
	}
	return r
}

func (b *bench) single(r SingleRequest) (a Allocation, err error) {
	b.t.Helper()
	b.with(func(s *Store) { a, err = s.AllocateSingle(b.t.Context(), r) })
	return a, err
}

func (b *bench) mustSingle(r SingleRequest) string {
	b.t.Helper()
	a, err := b.single(r)
	if err != nil || len(a.Addrs) != 1 {
		b.t.Fatalf("%+v: %v, %v", r, a, err)
	}
	return a.Addrs[0].String()
}

func (b *bench) releaseDocker(a string) {
	b.t.Helper()
	b.with(func(s *Store) {
		got, err := s.Release(b.t.Context(), conf.DockerAttachment("dcos", netip.MustParseAddr(a)))
		if err != nil || len(got) != 1 {
			b.t.Fatalf("release %s: %v, %v", a, got, err)
		}
	})
}

func TestSingleSharesTheHalf(t *testing.T) {
	b := newBench(t)
	cni := req("cni", dual)
	cni.Half = conf.Docker
	diff(t, "first", b.mustSingle(single("9.0.1.0/25")), "9.0.1.2")
	diff(t, "a family at a time", b.get(cni).Addrs, addrs("9.0.1.3", "fd01:b::2"))
	diff(t, "IPv6", b.mustSingle(single("fd01:b::/81")), "fd01:b::3")
	diff(t, "by name", b.mustSingle(single("9.0.1.0/25", "9.0.1.4")), "9.0.1.4")
	diff(t, "next", b.mustSingle(single("9.0.1.0/25")), "9.0.1.5")

	b.with(func(s *Store) {
		rec, found, err := s.Get(t.Context(), conf.DockerAttachment("dcos", netip.MustParseAddr("9.0.1.2")))
		diff(t, "record", []any{rec, found, err}, []any{Record{
			Attachment: conf.Attachment{Network: "docker/dcos", ContainerID: "9.0.1.2", IfName: "docker"}, Half: conf.Docker,
			Addrs: addrs("9.0.1.2"), BootID: "boot-1", Since: time.Hour,
		}, true, nil})
		diff(t, "is Docker's", rec.IsDocker(), true)
		// A CNI network of the overlay's name has its own garbage only.
		if gone, err := s.GC(t.Context(), "dcos", conf.Docker, func(Record) bool { return false }); err != nil || gone != nil {
			t.Errorf("GC took %v, %v", gone, err)
		}
	})
	diff(t, "CNI is not Docker's", cni.IsDocker(), false)
}

func TestSingleReuse(t *testing.T) {
	b := newBench(t)
	b.mustSingle(single("9.0.1.0/25"))
	b.releaseDocker("9.0.1.2")
	got, err := b.single(single("9.0.1.0/25", "9.0.1.2"))
	diff(t, "before it cooled", []any{got, err}, []any{Allocation{Addrs: addrs("9.0.1.2"), Flush: addrs("9.0.1.2")}, nil})
	b.releaseDocker("9.0.1.2")
	b.now += cooling
	got, err = b.single(single("9.0.1.0/25", "9.0.1.2"))
	diff(t, "after", []any{got, err}, []any{Allocation{Addrs: addrs("9.0.1.2")}, nil})
}

func TestSingleFromAPart(t *testing.T) {
	b := newBench(t)
	// The part at the end: without the broadcast address.
	for _, want := range []string{"9.0.1.124", "9.0.1.125", "9.0.1.126"} {
		diff(t, "next of the part", b.mustSingle(single("9.0.1.124/30")), want)
	}
	_, err := b.single(single("9.0.1.124/30"))
	var full *ExhaustedError
	if !errors.As(err, &full) {
		t.Fatalf("a full part: %v", err)
	}
	diff(t, "stats of a full part", full.Stats, Stats{Range: netip.MustParsePrefix("9.0.1.124/30"), Total: 3, Used: 3})
	diff(t, "outside the part, by name", b.mustSingle(single("9.0.1.124/30", "9.0.1.77")), "9.0.1.77")

	b.releaseDocker("9.0.1.125")
	b.now += time.Second
	b.releaseDocker("9.0.1.124")
	diff(t, "the one free for longest", b.mustSingle(single("9.0.1.124/30")), "9.0.1.125")

	// The part at the beginning: without network address and gateway.
	diff(t, "first part", b.mustSingle(single("9.0.1.0/30")), "9.0.1.2")
	diff(t, "IPv6 part", b.mustSingle(single("fd01:b::8000/113")), "fd01:b::8000")
	diff(t, "IPv6 part", b.mustSingle(single("fd01:b::8000/113")), "fd01:b::8001")

	// Whoever takes from the whole goes around them.
	for i := range 120 {
		if _, err := b.single(single("9.0.1.0/25")); err != nil {
			t.Fatalf("address %d of the whole: %v", i, err)
		}
	}
	if _, err = b.single(single("9.0.1.0/25")); err != nil {
		t.Fatalf("the last, early: %v", err)
	}
	if _, err = b.single(single("9.0.1.0/25")); !errors.As(err, &full) {
		t.Fatalf("a full half: %v", err)
	}
}

func TestSingleRefused(t *testing.T) {
	for _, tt := range []struct {
		req  SingleRequest
		want string
	}{
		{single("9.0.1.0/25", "9.0.1.9"), "address 9.0.1.9 is in use by a container of Docker"},
		{single("9.0.1.0/25", "9.0.1.2"), "address 9.0.1.2 is in use by net/cni/eth0"},
		{single("9.0.1.0/25", "9.0.1.1"), "address 9.0.1.1 is the gateway of 9.0.1.0/25"},
		{single("9.0.1.0/25", "9.0.1.200"), "address 9.0.1.200 is outside 9.0.1.0/25"},
		{single("9.0.1.0/25", "fd01:b::2"), "address fd01:b::2 is outside 9.0.1.0/25"},
		{single("9.0.2.0/25"), "allocate an address: range 9.0.2.0/25 is in none of [9.0.1.0/25 fd01:b::/81]"},
		{single("9.0.0.0/23"), "allocate an address: range 9.0.0.0/23 is in none of [9.0.1.0/25 fd01:b::/81]"},
	} {
		t.Run(fmt.Sprint(tt.req.From, tt.req.Want), func(t *testing.T) {
			b := newBench(t)
			cni := req("cni", dual)
			cni.Half = conf.Docker
			b.get(cni)
			b.mustSingle(single("9.0.1.0/25", "9.0.1.9"))
			if _, err := b.single(tt.req); err == nil || err.Error() != tt.want {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			b.with(func(s *Store) {
				if st, err := s.Stats(t.Context(), conf.Docker, dual); err != nil || st[0].Used != 2 {
					t.Errorf("statistics afterwards: %v, %v", st, err)
				}
			})
		})
	}

	b := newBench(t)
	taken := single("9.0.1.0/25")
	taken.Name = func(netip.Addr) conf.Attachment { return att("one") }
	b.mustSingle(taken)
	if _, err := b.single(taken); err == nil || err.Error() != "allocate an address: net/one/eth0 has [9.0.1.2] already" {
		t.Errorf("a name that is filed: %v", err)
	}
}
