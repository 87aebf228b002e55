package kernel

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

func entriesOf(fdb map[conf.MAC]netip.Addr) plan.Entries {
	return plan.Entries{Forwarding: plan.Forwarding{FDB: fdb}}
}

// The agent IPs of peers are in order whatever comes and goes, and two VTEPs may be
// at one.
func TestWaysToUpdate(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	all := map[conf.MAC]netip.Addr{}
	var d waysTo
	for range 200 {
		had, want := map[conf.MAC]netip.Addr{}, map[conf.MAC]netip.Addr{}
		for mac, ip := range all {
			if r.IntN(3) == 0 {
				had[mac] = ip
			}
		}
		for range r.IntN(20) {
			mac := conf.MAC{5: byte(r.IntN(64))}
			if old, ok := all[mac]; ok {
				had[mac] = old
			}
			want[mac] = netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(40))})
		}
		for mac := range had {
			delete(all, mac)
		}
		for mac, ip := range want {
			all[mac] = ip
		}
		d.update(entriesOf(had), entriesOf(want))
		if !slices.Equal(d.peers, inOrder(all)) {
			t.Fatalf("have %v, want %v", d.peers, inOrder(all))
		}
	}
}
