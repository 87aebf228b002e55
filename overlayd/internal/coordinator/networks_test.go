package coordinator_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// networkOf is a configuration with these overlays.
func networkOf(overlays ...string) string {
	return `{"vtep_subnet": "44.128.0.0/20", "vtep_mac_oui": "70:B3:D5:00:00:00", "overlays": [` + strings.Join(overlays, ", ") + `]}`
}

const (
	overlayOne = `{"name": "one", "subnet": "9.0.0.0/8", "prefix": 24}`
	overlayTwo = `{"name": "two", "subnet": "10.0.0.0/16", "prefix": 24}`
)

// granted are the overlays of a lease with what it has of them.
func granted(l conf.Lease) string {
	var out []string
	for _, g := range l.Grants {
		out = append(out, strings.ReplaceAll(fmt.Sprintf("%s %s %s", g.Overlay.Name, g.Subnet, g.Subnet6), " invalid Prefix", ""))
	}
	return strings.Join(out, ", ")
}

// Two coordinators on one store whose files differ: as soon as the second has
// begun, nothing is granted from the configuration of the first any more, by
// whichever of the two.
func TestTwoFiles(t *testing.T) {
	s := newStore(t)
	a := start(t, s, networkOf(overlayOne))
	before := a.register(t, nth(0))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	began := make(chan struct{})
	for worker := range 8 {
		wg.Go(func() {
			for i := worker; i < 1600; i += 8 {
				select {
				case <-stop:
					return
				default:
				}
				changed := false
				select {
				case <-began:
					changed = true
				default:
				}
				lease, err := a.client.Register(t.Context(), nth(1000+i))
				if err != nil {
					t.Error(err)
					return
				}
				if changed && len(lease.Grants) != 2 {
					t.Errorf("agent %d got %q after the other coordinator had begun with two overlays", i, granted(lease))
				}
			}
		})
	}
	b := start(t, s, networkOf(overlayOne, overlayTwo))
	close(began)
	for i := range 100 {
		a.register(t, nth(2*i))
		b.register(t, nth(2*i+1))
	}
	close(stop)
	wg.Wait()
	eventually(t, "both know the same agents", func() bool { return len(a.Agents()) == len(b.Agents()) })
	for _, n := range []*node{a, b} {
		if got := len(n.Overlays()); got != 2 {
			t.Errorf("%d overlays are listed, want 2", got)
		}
		var leases []conf.Lease
		for _, agent := range n.Agents() {
			leases = append(leases, agent.Lease)
		}
		for i := range leases { // who came before has the second when it registers next
			leases[i].Grants = leases[i].Grants[:1]
		}
		oneEach(t, leases)
	}
	if got := granted(a.register(t, nth(0))); got == granted(before) || !strings.HasPrefix(got, granted(before)+", two 10.0.") {
		t.Errorf("who was there before has %q, before that %q", got, granted(before))
	}
}

// oneEach checks that no two leases have the same subnet.
func oneEach(t testing.TB, leases []conf.Lease) {
	t.Helper()
	owner := map[string]string{}
	for _, l := range leases {
		for _, g := range l.Grants {
			if other, taken := owner[g.Subnet.String()]; taken {
				t.Errorf("%s is leased to %s and to %s", g.Subnet, other, l.AgentID)
			}
			owner[g.Subnet.String()] = l.AgentID
		}
	}
}

// gate is a store that holds the next transaction that writes an agent's record
// until it is opened.
type gate struct {
	store.Store
	once    sync.Once
	held    chan struct{}
	release chan struct{}
}

func (g *gate) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	for _, op := range txn.Then {
		if strings.HasPrefix(op.Key, "agents/") {
			g.once.Do(func() {
				close(g.held)
				<-g.release
			})
		}
	}
	return g.Store.Commit(ctx, txn)
}

// A grant that was planned before another coordinator changed the configuration
// and is written after it does not happen as it was planned.
func TestGrantFromReplacedNetwork(t *testing.T) {
	s := newStore(t)
	g := &gate{Store: s, held: make(chan struct{}), release: make(chan struct{})}
	a := start(t, g, networkOf(overlayOne, overlayTwo))
	leased := make(chan conf.Lease, 1)
	go func() {
		lease, err := a.client.Register(t.Context(), nth(1))
		if err != nil {
			t.Error(err)
		}
		leased <- lease
	}()
	<-g.held
	b := start(t, s, networkOf(strings.Replace(overlayOne, `"prefix": 24`, `"prefix": 26`, 1)))
	other := b.register(t, nth(2))
	close(g.release)
	lease := <-leased
	if got := granted(other); got != "one 9.0.0.0/26" {
		t.Errorf("the second coordinator granted %q", got)
	}
	if got := granted(lease); got != "one 9.0.0.64/26" {
		t.Errorf("the first coordinator granted %q, want one of the configuration that is stored", got)
	}
	for _, kv := range stored(t, s) {
		if strings.HasPrefix(kv, "subnet/two") || strings.HasPrefix(kv, "subnet/one/9.0.0.0/24") {
			t.Errorf("%s was granted from the replaced configuration", kv)
		}
	}
}

// A file that nobody has edited since this coordinator read it last changes
// nothing, and an edited one removes nothing that hosts have set up.
func TestFileAtStart(t *testing.T) {
	s := newStore(t)
	n := start(t, s, networkOf(overlayOne, overlayTwo))
	n.register(t, nth(0))
	if err := n.client.Report(t.Context(), api.StatusReport{AgentID: nth(0).AgentID, Overlays: map[string]conf.OverlayStatus{
		"one": {Status: conf.StatusOK}, "two": {Status: conf.StatusFailed, Error: "not here"},
	}}); err != nil {
		t.Fatal(err)
	}
	n.stop()
	names := func(network string, unedited bool) string {
		t.Helper()
		c, err := coordinator.New(t.Context(), coordinator.Options{
			Network: parseNetwork(t, network), Unedited: unedited, Store: s, Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, o := range c.State().Network.Overlays {
			out = append(out, o.Name)
		}
		return strings.Join(out, " ")
	}
	const three = `{"name": "three", "subnet": "11.0.0.0/8", "prefix": 24}`
	for _, tt := range []struct {
		network  string
		unedited bool
		want     string
	}{
		{networkOf(overlayTwo), true, "one two"},
		{networkOf(overlayOne), true, "one two"},
		{networkOf(three), true, "one two"},
		{networkOf(three), false, "three one"}, // nobody has set up the second
		{networkOf(three, overlayOne), false, "three one"},
		{networkOf(overlayOne), false, "one"},
	} {
		if got := names(tt.network, tt.unedited); got != tt.want {
			t.Errorf("with %s, not edited: %v: served is %s, want %s", tt.network, tt.unedited, got, tt.want)
		}
	}
	// The range of what stays cannot go to another.
	_, err := coordinator.New(t.Context(), coordinator.Options{
		Network: parseNetwork(t, networkOf(`{"name": "other", "subnet": "9.128.0.0/9", "prefix": 24}`)), Store: s, Log: slog.New(slog.DiscardHandler),
	})
	if !errors.Is(err, coordinator.ErrMisfit) || !strings.Contains(err.Error(), "overlay one") {
		t.Errorf("a range of an overlay that stays was given to another: %v", err)
	}
}
