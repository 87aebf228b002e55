package coordinator_test

import (
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// TestThousandJoin: a thousand hosts join over TLS with one token, each with a
// key, a certificate and connections of its own, and lease. A power cut that all
// come back from is no worse: they have their certificates then.
func TestThousandJoin(t *testing.T) {
	const hosts, limit = 1000, time.Minute
	n := secure(t)
	token := n.token(t, api.TokenRequest{Uses: hosts})
	members := make([]*person, hosts)
	for i := range members {
		members[i] = n.join(t, fmt.Sprintf("agent-%d", i), token)
	}
	round := func(what string) {
		start := time.Now()
		var all sync.WaitGroup
		turn := make(chan struct{}, 64*runtime.NumCPU())
		for i, m := range members {
			all.Go(func() {
				turn <- struct{}{}
				defer func() { <-turn }()
				_, err := m.Register(t.Context(), api.RegisterRequest{
					AgentID: fmt.Sprintf("agent-%d", i), AgentIP: netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}), Bridges: conf.Halves[:],
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		took := time.Since(start)
		if took > limit {
			t.Errorf("%s: %v, want at most %v", what, took, limit)
		}
		t.Logf("%s: %d hosts in %v", what, hosts, took.Round(time.Millisecond))
	}
	round("join and lease")
	for _, m := range members {
		m.CloseIdleConnections()
	}
	round("come back")
}
