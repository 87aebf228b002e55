package datapath

import (
	"fmt"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/datapath/plan/plantest"
)

var fourOverlays = network{plantest.Network{Overlays: []Overlay{
	plantest.Overlay4("a", "9.0.0.0/8"), plantest.Overlay4("b", "10.0.0.0/8"), plantest.Overlay4("c", "fd01:b::/64"), plantest.Overlay4("d", "fd01:c::/64"),
}, Length: 24, Length6: 80}}

// Cost of the first Set, with every peer new, in a fresh namespace.
func BenchmarkCold(b *testing.B) {
	for _, tc := range []struct {
		name string
		n    network
	}{{"ipv4", onlyIPv4}, {"ipv4+ipv6", bothIP}, {"2x ipv4, 2x ipv6", fourOverlays}} {
		for _, peers := range []int{100, 1000, 4000, 16000} {
			b.Run(fmt.Sprintf("%s/peers=%d", tc.name, peers), func(b *testing.B) {
				cfg := tc.n.Host(0, peers+1)
				var entries int
				var spent time.Duration
				for range b.N {
					b.StopTimer()
					h := newHost(b, "h")
					h.sh("ip link add eth0 type veth peer name peer0; ip link set eth0 up; ip addr add 172.16.0.2/12 dev eth0")
					none := cfg
					none.Peers = nil
					h.mustSet(none, true)
					b.StartTimer()
					start := time.Now()
					entries = h.mustSet(cfg, false).Changed
					spent += time.Since(start)
				}
				b.ReportMetric(float64(spent.Nanoseconds())/float64(b.N)/float64(entries), "ns/entry")
			})
		}
	}
}

// Cost of one more and one less peer, of a Set that changes nothing, and of one
// that reads the kernel.
func BenchmarkSteady(b *testing.B) {
	for _, peers := range []int{4000, 16000} {
		h := newHost(b, "h")
		h.sh("ip link add eth0 type veth peer name peer0; ip link set eth0 up; ip addr add 172.16.0.2/12 dev eth0")
		cfg, more := bothIP.Host(0, peers+1), bothIP.Host(0, peers+2)
		h.mustSet(cfg, true)
		b.Run(fmt.Sprintf("one more, one less/peers=%d", peers), func(b *testing.B) {
			for range b.N {
				h.mustSet(more, false)
				h.mustSet(cfg, false)
			}
		})
		b.Run(fmt.Sprintf("nothing/peers=%d", peers), func(b *testing.B) {
			for range b.N {
				h.mustSet(cfg, false)
			}
		})
		b.Run(fmt.Sprintf("resync/peers=%d", peers), func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				h.mustSet(cfg, true)
			}
		})
	}
}
