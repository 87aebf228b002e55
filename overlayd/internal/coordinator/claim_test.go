package coordinator_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
)

// An older copy of the file takes its place, in which a block is an agent's that has
// lost it since. That agent moves, or changes its bridges, or another host gets its
// address, before the later owner comes back: none of it gives more right to the block.
func TestMoveKeepsClaim(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, b *bubble, earlier conf.Lease) conf.Lease{
		"address": func(t *testing.T, b *bubble, l conf.Lease) conf.Lease {
			req := shows(l)
			req.AgentIP = netip.MustParseAddr("10.0.0.11")
			return b.registered(req)
		},
		"bridges": func(t *testing.T, b *bubble, l conf.Lease) conf.Lease {
			req := shows(l)
			req.Bridges = []conf.Half{conf.Mesos}
			return b.registered(req)
		},
		"superseded": func(t *testing.T, b *bubble, l conf.Lease) conf.Lease {
			time.Sleep(15 * time.Minute) // it counts as gone, and others get leases
			b.register("successor", l.AgentIP.String())
			return l
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, earlier, later := contested(t)
				changed := change(t, b, earlier)
				kept(t, later, b.show(later))
				if name != "superseded" {
					b.waits(shows(changed), "was granted to agent later (10.0.0.2)")
				}
			})
		})
	}
}

func (b *bubble) registered(req api.RegisterRequest) conf.Lease {
	b.t.Helper()
	l, err := b.Register(b.t.Context(), req)
	if err != nil {
		b.t.Fatal(err)
	}
	return l
}

// A lease that is shown has one family less in more further blocks than one
// transaction writes.
func TestAdoptInsteadOfManyHalfBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t)
		b := bubbleOf(t, coordinator.Options{Store: s}, `{
			"vtep_subnet": "44.128.0.0/20", "vtep_mac_oui": "70:B3:D5:00:00:00",
			"overlays": [
				{"name": "a", "subnet": "9.0.0.0/8", "prefix": 24, "subnet6": "fd01:a::/64", "prefix6": 80, "blocks_per_agent": 64},
				{"name": "b", "subnet": "10.0.0.0/8", "prefix": 24, "subnet6": "fd01:b::/64", "prefix6": 80, "blocks_per_agent": 64}]}`)
		req := request("a", "172.16.0.1")
		req.Want = map[string]int{"a": 64, "b": 64}
		l := b.registered(req)
		// As a cluster without identities believes it: a later lease.
		l.Epoch, l.Signed = l.Epoch+1000, nil
		for i := range l.Grants {
			if n := len(l.Grants[i].Blocks); n != 63 {
				t.Fatalf("%d further blocks", n)
			}
			for j := range l.Grants[i].Blocks {
				l.Grants[i].Blocks[j].Subnet6 = netip.Prefix{}
			}
		}
		text, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		l.Signed = &conf.SignedLease{Lease: string(text)}
		got := b.show(l)
		kept(t, l, got)
		sameLease(t, "renewed", got, b.show(got))
		var want, have []string
		for _, g := range got.Grants {
			for _, block := range g.All() {
				for _, p := range block.Prefixes() {
					want = append(want, fmt.Sprintf("subnet/%s/%s", g.Overlay.Name, p))
				}
			}
		}
		kvs, _, err := s.List(t.Context(), "subnet/")
		if err != nil {
			t.Fatal(err)
		}
		for _, kv := range kvs {
			have = append(have, kv.Key)
		}
		slices.Sort(want)
		slices.Sort(have)
		if !slices.Equal(want, have) {
			t.Errorf("%d keys are in the store, want %d", len(have), len(want))
		}
	})
}

// A host registers while a network is applied that has its address in an overlay.
func TestRangeComesWhileRegistering(t *testing.T) {
	s := &hooked{Store: newStore(t), key: "agents/a"}
	n := start(t, s, seedNetwork)
	next := parseNetwork(t, seedNetwork)
	next.Overlays = append(next.Overlays, conf.Overlay{Name: "late", Subnet: netip.MustParsePrefix("172.20.0.0/16"), Prefix: 24})
	s.call = func() {
		if _, err := n.ApplyNetwork(t.Context(), next, 0); err != nil {
			t.Error(err)
		}
	}
	_, err := n.Register(t.Context(), request("a", "172.20.0.5"))
	refused(t, err, http.StatusBadRequest, "172.20.0.5 lies in overlay late", "--agent-ip")
	if agents := n.Agents(); len(agents) != 0 {
		t.Errorf("%d agents are leased", len(agents))
	}
	n.register(t, request("a", "172.16.0.5"))
}

// slowWitness is a Witness on a disk that does not answer.
type slowWitness struct{ answers chan struct{} }

func (w slowWitness) Highest(string) uint64 { return 0 }
func (w slowWitness) Note(string, uint64)   { <-w.answers }

// Nobody waits for the witness.
func TestSlowWitness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := slowWitness{make(chan struct{})}
		b := bubbleWith(t, coordinator.Options{Store: newStore(t), Adopt: coordinator.Adopt{Witness: w}})
		done := make(chan struct{})
		go func() {
			defer close(done)
			b.register("a", "10.0.0.1")
			b.Alive()
			b.Agents()
		}()
		select {
		case <-done:
		case <-time.After(time.Minute):
			t.Error("a registration waits for the witness")
		}
		close(w.answers)
		<-done
	})
}
