package coordinator_test

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
)

// Agents that were superseded or are long gone are given back, and nobody who is
// there or was lately.
func TestPrune(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		b.register("gone", "10.0.0.1")
		b.register("old", "10.0.0.2")
		b.register("here", "10.0.0.3")
		_, disconnect := b.connect("here")
		defer disconnect()
		time.Sleep(70 * time.Minute)
		b.register("new", "10.0.0.2") // supersedes old
		b.register("lately", "10.0.0.4")
		ids := func(agents []api.Agent, err error) (ids []string) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range agents {
				ids = append(ids, a.AgentID)
			}
			return ids
		}
		hour := api.PruneRequest{NotSeenSeconds: 3600, DryRun: true}
		if got := ids(b.Prune(t.Context(), hour)); len(got) != 2 || got[0] != "gone" || got[1] != "old" {
			t.Errorf("would prune %v, want gone and old", got)
		}
		if got := len(b.Agents()); got != 5 {
			t.Errorf("a dry run left %d agents", got)
		}
		// Longer than a time.Duration holds, and by that an hour.
		if got := ids(b.Prune(t.Context(), api.PruneRequest{NotSeenSeconds: 18_446_747_674, DryRun: true})); len(got) != 1 || got[0] != "old" {
			t.Errorf("of six centuries it would prune %v, want old", got)
		}
		hour.DryRun = false
		ids(b.Prune(t.Context(), hour))
		if got := ids(b.Agents(), nil); len(got) != 3 {
			t.Errorf("left are %v", got)
		}
		_, err := b.Prune(t.Context(), api.PruneRequest{NotSeenSeconds: 60})
		refused(t, err, http.StatusBadRequest, "want 3600 at least")
		_, err = b.Prune(t.Context(), api.PruneRequest{NotSeenSeconds: -18_446_740_000})
		refused(t, err, http.StatusBadRequest, "want 3600 at least")
	})
}

// Who was superseded, or has not been seen for three terms, is counted and listed.
func TestGoneAgents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := bubbleWith(t, coordinator.Options{Store: newStore(t), Term: time.Hour})
		b.register("gone", "10.0.0.1")
		b.register("old", "10.0.0.2")
		time.Sleep(150 * time.Minute)
		b.register("new", "10.0.0.2") // supersedes old
		b.register("here", "10.0.0.3")
		_, disconnect := b.connect("here")
		defer disconnect()
		look := func(words ...string) {
			t.Helper()
			w := httptest.NewRecorder()
			b.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, api.PathMetrics, nil))
			for _, want := range words {
				if !strings.Contains(w.Body.String(), want+"\n") {
					t.Errorf("metrics do not say %q", want)
				}
			}
		}
		look("overlay_coordinator_agents_superseded 1", "overlay_coordinator_agents_gone 0", "overlay_coordinator_agents 3", "overlay_coordinator_adopting_seconds 0")
		time.Sleep(40 * time.Minute) // three terms since gone was seen
		look("overlay_coordinator_agents_superseded 1", "overlay_coordinator_agents_gone 1")
		for _, a := range b.Agents() {
			if a.Gone != (a.AgentID == "gone" || a.AgentID == "old") {
				t.Errorf("agent %s, last seen %s: gone %t", a.AgentID, a.LastSeen, a.Gone)
			}
		}
	})
}

// Two hosts that exchanged their addresses are accepted at once, and keep their
// leases, when each speaks from its new address.
func TestExchangedAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		register := func(id, instance, ip, source string) (uint64, error) {
			req := request(id, ip)
			req.Instance, req.Source = instance, netip.MustParseAddr(source)
			lease, err := b.Register(t.Context(), req)
			return lease.Epoch, err
		}
		for id, ip := range map[string]string{"a": "10.0.0.1", "b": "10.0.0.2"} {
			if _, err := register(id, "i-"+id, ip, ip); err != nil {
				t.Fatal(err)
			}
			_, disconnect := b.connect(id + "&instance=i-" + id)
			defer disconnect()
		}
		_, err := register("a", "i-a", "10.0.0.2", "10.9.9.9") // through a NAT nobody can tell
		refused(t, err, http.StatusConflict, "belongs to agent b")
		if _, err := register("a", "i-a", "10.0.0.2", "10.0.0.2"); err != nil {
			t.Fatal(err)
		}
		if _, err := register("b", "i-b", "10.0.0.1", "10.0.0.1"); err != nil {
			t.Fatal(err)
		}
		for _, agent := range b.Agents() {
			if agent.Superseded != "" {
				t.Errorf("%s is superseded", agent.AgentID)
			}
		}
		// Two that speak from one address do not take it from each other for ever.
		_, err = register("b", "i-b", "10.0.0.2", "10.0.0.2")
		refused(t, err, http.StatusConflict, "belongs to agent a")
	})
}
