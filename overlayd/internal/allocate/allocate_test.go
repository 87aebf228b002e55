package allocate

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"overlayd.internal/overlay/conf"
)

// take calls Next n times and fails the test if the pool ends before.
func take(t *testing.T, p *Pool, n int) []string {
	t.Helper()
	var out []string
	for range n {
		block, ok := p.Next()
		if !ok {
			t.Fatalf("the pool ended after %d of %d", len(out), n)
		}
		out = append(out, block.String())
	}
	return out
}

func TestNextLowestFirst(t *testing.T) {
	subnets := func(overlay string, bits int) *Pool {
		return NewSubnets(netip.MustParsePrefix(overlay), bits)
	}
	addrs := func(subnet string) *Pool { return NewAddrs(netip.MustParsePrefix(subnet)) }
	tests := []struct {
		name  string
		pool  *Pool
		want  []string // what Next gives
		total uint64
		ends  bool // the pool is exhausted after want
	}{
		{"documented IPv4 overlay", subnets("9.0.0.0/8", 24), []string{"9.0.0.0/24", "9.0.1.0/24", "9.0.2.0/24"}, 65536, false},
		{"documented IPv6 overlay", subnets("fd01:b::/64", 80), []string{"fd01:b::/80", "fd01:b:0:0:1::/80", "fd01:b:0:0:2::/80"}, 65536, false},
		{"documented VTEP addresses", addrs("44.128.0.0/20"), []string{"44.128.0.1/32", "44.128.0.2/32", "44.128.0.3/32"}, 4094, false},
		{"documented VTEP IPv6 addresses", addrs("fd01:a::/64"), []string{"fd01:a::1/128", "fd01:a::2/128", "fd01:a::3/128"}, 1<<62 - 2, false},
		{"one block", subnets("10.0.0.0/24", 24), []string{"10.0.0.0/24"}, 1, true},
		{"end of the address space", subnets("255.255.255.0/24", 26),
			[]string{"255.255.255.0/26", "255.255.255.64/26", "255.255.255.128/26", "255.255.255.192/26"}, 4, true},
		{"end of the IPv6 address space", subnets("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff0/124", 126),
			[]string{"ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff0/126", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff4/126",
				"ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff8/126", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffc/126"}, 4, true},
		{"host bits of the overlay are ignored", subnets("10.1.2.3/16", 24), []string{"10.1.0.0/24"}, 256, false},
		{"length inside a byte", subnets("10.0.0.0/16", 22), []string{"10.0.0.0/22", "10.0.4.0/22", "10.0.8.0/22"}, 64, false},
		{"length inside a nibble's byte", subnets("fd01::/64", 76),
			[]string{"fd01::/76", "fd01::10:0:0:0/76", "fd01::20:0:0:0/76"}, 4096, false},
		{"more than 64 bits of blocks", subnets("fd00::/8", 125), []string{"fd00::/125", "fd00::8/125"}, 1 << 62, false},
		{"exactly 62 bits of blocks", subnets("fd00::/8", 70), []string{"fd00::/70", "fd00::400:0:0:0/70"}, 1 << 62, false},
		{"smallest address pool", addrs("10.0.0.0/30"), []string{"10.0.0.1/32", "10.0.0.2/32"}, 2, true},
		{"smallest IPv6 address pool", addrs("fd00::/126"), []string{"fd00::1/128", "fd00::2/128"}, 2, true},
		{"no address in a /31", addrs("10.0.0.0/31"), nil, 0, true},
		{"no address in a /32", addrs("10.0.0.0/32"), nil, 0, true},
		{"block shorter than the overlay", subnets("10.0.0.0/16", 8), nil, 0, true},
		{"block longer than an address", subnets("10.0.0.0/16", 33), nil, 0, true},
		{"no overlay", NewSubnets(netip.Prefix{}, 24), nil, 0, true},
		{"no VTEP subnet", NewAddrs(netip.Prefix{}), nil, 0, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.pool.Total(); got != tt.total {
				t.Errorf("Total() = %d, want %d", got, tt.total)
			}
			if diff := cmp.Diff(tt.want, take(t, tt.pool, len(tt.want))); diff != "" {
				t.Errorf("Next (-want +got):\n%s", diff)
			}
			if got := tt.pool.Used(); got != uint64(len(tt.want)) {
				t.Errorf("Used() = %d, want %d", got, len(tt.want))
			}
			if tt.ends {
				if block, ok := tt.pool.Next(); ok {
					t.Errorf("Next() = %v, want the pool exhausted", block)
				}
			}
		})
	}
}

// TestCarry steps over byte borders, where the original allocator produced
// subnets it had given out before.
func TestCarry(t *testing.T) {
	tests := []struct {
		name, overlay string
		bits          int
		from, want    string
	}{
		{"one byte", "9.0.0.0/8", 24, "9.0.255.0/24", "9.1.0.0/24"},
		{"two bytes", "8.0.0.0/7", 24, "8.255.255.0/24", "9.0.0.0/24"},
		{"inside a byte", "9.0.0.0/8", 26, "9.0.255.192/26", "9.1.0.0/26"},
		{"three bytes and a half", "8.0.0.0/6", 28, "8.255.255.240/28", "9.0.0.0/28"},
		{"IPv6 at a word", "fd01:b::/48", 64, "fd01:b:0:ff::/64", "fd01:b:0:100::/64"},
		{"IPv6 over the middle", "fd01:b::/32", 80, "fd01:b:0:0:ffff::/80", "fd01:b:0:1::/80"},
		{"IPv6 over many bytes", "fd01:b::/32", 80, "fd01:b:ffff:0:ffff::/80", "fd01:b:ffff:1::/80"},
		{"IPv6 /76", "fd01:b::/32", 76, "fd01:b:0:0:fff0::/76", "fd01:b:0:1::/76"},
		{"IPv6 /76 far", "fd01:b::/32", 76, "fd01:b:0:ffff:fff0::/76", "fd01:b:1::/76"},
		{"IPv6 address", "fd01:a::/48", 128, "fd01:a::ffff:ffff:ffff:ffff/128", "fd01:a:0:1::/128"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := NewSubnets(netip.MustParsePrefix(tt.overlay), tt.bits)
			p.cursor = netip.MustParsePrefix(tt.from).Addr()
			if diff := cmp.Diff([]string{tt.from, tt.want}, take(t, p, 2)); diff != "" {
				t.Errorf("Next (-want +got):\n%s", diff)
			}
		})
	}
}

// TestWholeOverlays leases everything there is in the two documented overlays
// and looks at all that follows from a lease.
func TestWholeOverlays(t *testing.T) {
	const n = 65536
	oui := conf.MAC{0x70, 0xb3, 0xd5}
	overlay4, overlay6 := netip.MustParsePrefix("9.0.0.0/8"), netip.MustParsePrefix("fd01:b::/64")
	vtep4, vtep6 := netip.MustParsePrefix("44.128.0.0/15"), netip.MustParsePrefix("fd01:a::/64")
	subnets4, subnets6 := NewSubnets(overlay4, 24), NewSubnets(overlay6, 80)
	vteps4, vteps6 := NewAddrs(vtep4), NewAddrs(vtep6)

	seen := map[netip.Prefix]bool{}
	macs := map[conf.MAC]bool{}
	fresh := func(p netip.Prefix, within netip.Prefix) {
		t.Helper()
		if seen[p] || p != p.Masked() || !within.Contains(p.Addr()) || !within.Contains(conf.LastAddr(p)) {
			t.Fatalf("%s is a duplicate (%v), has host bits or is not inside %s", p, seen[p], within)
		}
		seen[p] = true
	}
	for i := range n {
		s4, ok1 := subnets4.Next()
		s6, ok2 := subnets6.Next()
		v4, ok3 := vteps4.Next()
		v6, ok4 := vteps6.Next()
		if !ok1 || !ok2 || !ok3 || !ok4 {
			t.Fatalf("agent %d: a pool is exhausted", i)
		}
		hi, lo := byte(i>>8), byte(i)
		if want := netip.PrefixFrom(netip.AddrFrom4([4]byte{9, hi, lo, 0}), 24); s4 != want {
			t.Fatalf("agent %d: IPv4 subnet %s, want %s", i, s4, want)
		}
		if want := netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 1, 3: 0x0b, 8: hi, 9: lo}), 80); s6 != want {
			t.Fatalf("agent %d: IPv6 subnet %s, want %s", i, s6, want)
		}
		fresh(s4, overlay4)
		fresh(s6, overlay6)
		fresh(v4, vtep4)
		fresh(v6, vtep6)
		for _, s := range []netip.Prefix{s4, s6} {
			for _, h := range conf.Halves {
				fresh(h.Of(s), s)
			}
		}
		mac := conf.VTEPMAC(oui, v4.Addr())
		if macs[mac] {
			t.Fatalf("agent %d: MAC %s is a duplicate", i, mac)
		}
		macs[mac] = true
	}
	for name, p := range map[string]*Pool{"IPv4": subnets4, "IPv6": subnets6} {
		if block, ok := p.Next(); ok {
			t.Errorf("%s: subnet %s after the last", name, block)
		}
		if p.Used() != n || p.Total() != n {
			t.Errorf("%s: used %d of %d, want %d of %d", name, p.Used(), p.Total(), n, n)
		}
	}
}

func TestReleaseIsReusedLowestFirst(t *testing.T) {
	p := NewSubnets(netip.MustParsePrefix("10.0.0.0/22"), 24)
	take(t, p, 4)
	if _, ok := p.Next(); ok {
		t.Fatal("a fifth block from a pool of four")
	}
	for _, s := range []string{"10.0.3.0/24", "10.0.1.0/24"} {
		if !p.Release(netip.MustParsePrefix(s)) {
			t.Errorf("Release(%s) = false", s)
		}
	}
	if diff := cmp.Diff([]string{"10.0.1.0/24", "10.0.3.0/24"}, take(t, p, 2)); diff != "" {
		t.Errorf("Next (-want +got):\n%s", diff)
	}
	if _, ok := p.Next(); ok {
		t.Error("the pool should be exhausted again")
	}
	for _, s := range []string{"10.0.4.0/24", "10.0.1.0/25", "10.0.1.1/24"} {
		if p.Release(netip.MustParsePrefix(s)) {
			t.Errorf("Release(%s) = true for a block that is none of the pool's", s)
		}
	}
}

func TestNextSkipsReserved(t *testing.T) {
	p := NewAddrs(netip.MustParsePrefix("10.0.0.0/29"))
	for _, s := range []string{"10.0.0.1/32", "10.0.0.2/32", "10.0.0.4/32"} {
		if err := p.Reserve(netip.MustParsePrefix(s)); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"10.0.0.3/32", "10.0.0.5/32", "10.0.0.6/32"}, take(t, p, 3)); diff != "" {
		t.Errorf("Next (-want +got):\n%s", diff)
	}
	if _, ok := p.Next(); ok || p.Used() != p.Total() {
		t.Errorf("used %d of %d, want all", p.Used(), p.Total())
	}
}

func TestReserveRefuses(t *testing.T) {
	subnets := NewSubnets(netip.MustParsePrefix("10.0.0.0/16"), 24)
	addrs := NewAddrs(netip.MustParsePrefix("fd00::/64"))
	if err := subnets.Reserve(netip.MustParsePrefix("10.0.7.0/24")); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		pool *Pool
		give netip.Prefix
		want string
	}{
		{"in use", subnets, netip.MustParsePrefix("10.0.7.0/24"), "in use already"},
		{"outside", subnets, netip.MustParsePrefix("10.1.0.0/24"), "not inside the pool 10.0.0.0/16"},
		{"other family", subnets, netip.MustParsePrefix("fd00::/24"), "not inside the pool 10.0.0.0/16"},
		{"zero", subnets, netip.Prefix{}, "not inside the pool 10.0.0.0/16"},
		{"length", subnets, netip.MustParsePrefix("10.0.8.0/25"), "the pool 10.0.0.0/16 hands out /24"},
		{"host bits", subnets, netip.MustParsePrefix("10.0.8.1/24"), "the block is 10.0.8.0/24"},
		{"network address", addrs, netip.MustParsePrefix("fd00::/128"), "never given out"},
		{"last address", addrs, netip.MustParsePrefix("fd00::ffff:ffff:ffff:ffff/128"), "never given out"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			used := tt.pool.Used()
			err := tt.pool.Reserve(tt.give)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Reserve(%s) = %v, want an error with %q", tt.give, err, tt.want)
			}
			if tt.pool.Used() != used {
				t.Errorf("Used() went from %d to %d", used, tt.pool.Used())
			}
		})
	}
}

// TestModel compares a Pool with a list of every block and a flag each.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		within := netip.MustParsePrefix(rapid.SampledFrom([]string{
			"10.0.255.0/24", "9.254.0.0/15", "255.255.255.128/25", "fd01:b:0:0:ff00::/72", "fd00::fff0/124",
		}).Draw(t, "pool"))
		var p *Pool
		var all []netip.Prefix
		if max := within.Addr().BitLen(); max-within.Bits() <= 8 && rapid.Bool().Draw(t, "addresses") {
			p = NewAddrs(within)
			for a := within.Addr(); within.Contains(a); a = a.Next() {
				all = append(all, netip.PrefixFrom(a, max))
			}
			all = all[1 : len(all)-1]
		} else {
			bits := within.Bits() + rapid.IntRange(0, 4).Draw(t, "bits")
			p = NewSubnets(within, bits)
			all = blocks(within, bits)
		}
		used := make([]bool, len(all))

		t.Repeat(map[string]func(*rapid.T){
			"next": func(t *rapid.T) {
				got, ok := p.Next()
				i := slices.Index(used, false)
				if ok != (i >= 0) || ok && got != all[i] {
					t.Fatalf("Next() = %v, %v; lowest free is number %d of %v", got, ok, i, all)
				}
				if ok {
					used[i] = true
				}
			},
			"next past": func(t *rapid.T) {
				passed := rapid.IntRange(0, 5).Draw(t, "passed")
				var free []int
				for i, u := range used {
					if !u {
						free = append(free, i)
					}
				}
				got, ok := p.NextPast(passed)
				if ok != (len(free) > 0) {
					t.Fatalf("NextPast(%d) = %v, %v; %d are free", passed, got, ok, len(free))
				}
				if ok {
					i := free[min(passed, len(free)-1)]
					if got != all[i] {
						t.Fatalf("NextPast(%d) = %v; want %v of %v", passed, got, all[i], all)
					}
					used[i] = true
				}
			},
			"reserve": func(t *rapid.T) {
				i := rapid.IntRange(0, len(all)-1).Draw(t, "block")
				if err := p.Reserve(all[i]); (err == nil) == used[i] {
					t.Fatalf("Reserve(%v) = %v, in use: %v", all[i], err, used[i])
				}
				used[i] = true
			},
			"release": func(t *rapid.T) {
				i := rapid.IntRange(0, len(all)-1).Draw(t, "block")
				if got := p.Release(all[i]); got != used[i] {
					t.Fatalf("Release(%v) = %v, in use: %v", all[i], got, used[i])
				}
				used[i] = false
			},
			"": func(t *rapid.T) {
				n := uint64(0)
				for _, u := range used {
					if u {
						n++
					}
				}
				if p.Used() != n || p.Total() != uint64(len(all)) {
					t.Fatalf("used %d of %d, want %d of %d", p.Used(), p.Total(), n, len(all))
				}
			},
		})
	})
}

// blocks cuts a prefix in two until the pieces have the length wanted.
func blocks(p netip.Prefix, bits int) []netip.Prefix {
	if p.Bits() == bits {
		return []netip.Prefix{p}
	}
	return append(blocks(conf.Mesos.Of(p), bits), blocks(conf.Docker.Of(p), bits)...)
}

func BenchmarkNext(b *testing.B) {
	for name, overlay := range map[string]string{"v4": "10.0.0.0/8", "v6": "fd00::/32"} {
		b.Run(name, func(b *testing.B) {
			p := NewSubnets(netip.MustParsePrefix(overlay), 24)
			if name == "v6" {
				p = NewSubnets(netip.MustParsePrefix(overlay), 80)
			}
			b.ReportAllocs()
			for b.Loop() {
				if block, ok := p.Next(); !ok {
					p = NewSubnets(p.within, p.bits)
				} else if !block.IsValid() {
					b.Fatal("invalid block")
				}
			}
		})
	}
}

// BenchmarkChurn is the worst case of the cursor: the lowest of 65,536 blocks
// is given back and two are taken.
func BenchmarkChurn(b *testing.B) {
	p := NewSubnets(netip.MustParsePrefix("9.0.0.0/8"), 24)
	for range 65536 {
		p.Next()
	}
	lowest := netip.MustParsePrefix("9.0.0.0/24")
	for b.Loop() {
		p.Release(lowest)
		p.Next()
		p.Next()
	}
}
