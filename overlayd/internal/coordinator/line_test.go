package coordinator

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// TestLines: an event is one line of the JSON that any encoder makes of it, whatever
// it holds, and takes hardly more memory.
func TestLines(t *testing.T) {
	for _, peers := range []int{0, 1, fewPeers, fewPeers + 1, 1000} {
		e := api.PeerEvent{Revision: 7, Run: "r", Snapshot: true, Partial: true, Delete: []string{"a", `"put":[`}, Register: true, Report: true}
		for n := range peers {
			e.Put = append(e.Put, conf.Peer{
				AgentID: fmt.Sprintf("agent-<%d>", n), AgentIP: netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), Epoch: uint64(n),
				Subnets: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{9, byte(n >> 8), byte(n), 0}), 24)},
			})
		}
		want, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		got := encodeLine(e)
		if diff := cmp.Diff(string(want)+"\n", string(got)); diff != "" {
			t.Errorf("%d peers (-json +line):\n%s", peers, diff)
		}
		if len(got) > 4096 && cap(got) > len(got)+len(got)/8+8192 {
			t.Errorf("%d peers: a line of %d bytes takes %d", peers, len(got), cap(got))
		}
	}
}
