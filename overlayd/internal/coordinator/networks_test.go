package coordinator_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

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
	// Room for all of the 1,800, however fast they come.
	b := start(t, s, networkOf(overlayOne, `{"name": "two", "subnet": "10.0.0.0/12", "prefix": 24}`))
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
	if got := granted(a.register(t, nth(0))); got == granted(before) || !strings.HasPrefix(got, granted(before)+", two 10.") {
		t.Errorf("who was there before has %q, before that %q", got, granted(before))
	}
}

// A coordinator beside a far busier one on the same store: the lowest free blocks that
// it knows of are being taken there, every time it looks. It grants all the same.
func TestBesideABusierOne(t *testing.T) {
	s := newStore(t)
	busy, calm := start(t, s, networkOf(overlayOne)), start(t, s, networkOf(overlayOne))
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	for worker := range 16 {
		wg.Go(func() {
			for i := 1000 + worker; i < 4000; i += 16 {
				if _, err := busy.client.Register(ctx, nth(i)); err != nil {
					if ctx.Err() == nil {
						t.Error(err)
					}
					return
				}
			}
		})
	}
	var leases []conf.Lease
	for i := range 100 {
		leases = append(leases, calm.register(t, nth(i)))
	}
	stop()
	wg.Wait()
	oneEach(t, leases)
	eventually(t, "both know the same agents", func() bool { return len(busy.Agents()) == len(calm.Agents()) })
	taken := map[string]bool{}
	for _, a := range calm.Agents() {
		taken[a.Lease.Grants[0].Subnet.String()] = true
	}
	var lowest string // in a gap that was left, or the next of all
	for i := 0; lowest == "" || taken[lowest]; i++ {
		lowest = fmt.Sprintf("9.%d.%d.0/24", i/256, i%256)
	}
	if got := calm.register(t, nth(5000)).Grants[0].Subnet.String(); got != lowest {
		t.Errorf("with nobody beside it an agent got %s, want the lowest free %s", got, lowest)
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

// gate is a store that holds the next transaction that writes a key that begins with
// on until it is opened.
type gate struct {
	store.Store
	once    sync.Once
	held    chan struct{}
	release chan struct{}
	on      string
}

func (g *gate) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	for _, op := range txn.Then {
		if strings.HasPrefix(op.Key, g.on) {
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
	g := &gate{Store: s, held: make(chan struct{}), release: make(chan struct{}), on: "agents/"}
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
		{networkOf(three), false, "three one two"}, // one that failed may still have containers
		{networkOf(three, overlayOne), false, "three one two"},
		{networkOf(overlayOne), false, "one two"},
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

// What is stored and no record has, as a coordinator of an earlier version leaves it
// behind, keeps nobody from a lease after the network has changed.
func TestOrphansAreNotGranted(t *testing.T) {
	s := newStore(t)
	n := start(t, s, networkOf(overlayOne))
	n.register(t, nth(0))
	for _, key := range []string{"subnet/one/9.0.1.0/24", "subnet/one/9.0.2.0/24", "vtep/44.128.0.2"} {
		if _, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: key, Value: []byte(nth(0).AgentID)}}}); err != nil {
			t.Fatal(err)
		}
	}
	n.mustApply(t, networkOf(overlayOne, overlayTwo))
	lease := n.register(t, nth(1))
	if got := lease.Grants[0].Subnet.String(); got != "9.0.3.0/24" || lease.VTEP.IP.Addr().String() != "44.128.0.3" {
		t.Errorf("the agent got %s and VTEP %s, want what nobody has", got, lease.VTEP.IP)
	}
}

// What an edited file no longer has goes when the hosts have told that nothing is
// attached there, and stays where something is.
func TestFileIsFinished(t *testing.T) {
	for name, containers := range map[string]int{"empty": 0, "in use": 2} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			n := start(t, s, networkOf(overlayOne, overlayTwo))
			req := nth(0)
			req.Instance = "only"
			n.register(t, req)
			n.attach(t, req, map[string]int{"one": 0, "two": 0})
			n.stop()
			var log said
			n = startLogging(t, s, networkOf(overlayOne), slog.NewTextHandler(&log, nil))
			served := func() int { return len(n.State().Network.Overlays) }
			if served() != 2 {
				t.Fatal("the overlay went before its hosts had told what is attached")
			}
			n.attach(t, req, map[string]int{"one": 0, "two": containers})
			if containers == 0 {
				eventually(t, "the overlay is gone", func() bool { return served() == 1 })
				return
			}
			eventually(t, "it is said why the overlay stays", func() bool { return log.has("2 on 172.16.0.1") })
			if served() != 2 {
				t.Error("the overlay went with containers attached")
			}
		})
	}
}

func (n *node) apply(t testing.TB, network string) (api.NetworkPlan, error) {
	t.Helper()
	return n.client.OverlaysApply(t.Context(), api.ConfigRequest{Config: network})
}

func (n *node) mustApply(t testing.TB, network string) api.NetworkPlan {
	t.Helper()
	p, err := n.apply(t, network)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// changes are the changes of a plan, a line each.
func changes(p api.NetworkPlan) string {
	var out []string
	for _, c := range p.Changes {
		out = append(out, strings.TrimSpace(c.Overlay+" "+c.What))
	}
	return strings.Join(out, "\n")
}

// Every change that may be made while traffic flows reaches agents that watch, at
// this coordinator and at another one on the same store.
func TestApply(t *testing.T) {
	s := newStore(t)
	a := start(t, s, networkOf(overlayOne))
	b := start(t, s, networkOf(overlayOne))
	a.register(t, nth(1))
	b.register(t, nth(2))
	streams := []*stream{a.watch(t, nth(1).AgentID, 0), b.watch(t, nth(2).AgentID, 0)}
	peers := []map[string]conf.Peer{{}, {}}
	const two, dual = overlayTwo, `{"name": "one", "subnet": "8.0.0.0/7", "prefix": 24, "subnet6": "fd01:b::/64", "prefix6": 80}`
	for _, tt := range []struct{ network, changes, first, peer string }{
		{networkOf(overlayOne, two), "two added, with 10.0.0.0/16", "one 9.0.0.0/24, two 10.0.0.0/24", "[9.0.0.0/24 10.0.0.0/24]"},
		{networkOf(strings.Replace(overlayOne, "9.0.0.0/8", "8.0.0.0/7", 1), two), "one subnet 9.0.0.0/8 -> 8.0.0.0/7", "one 9.0.0.0/24, two 10.0.0.0/24", "[9.0.0.0/24 10.0.0.0/24]"},
		{strings.Replace(networkOf(dual, two), `"overlays"`, `"vtep_subnet6": "fd01:a::/64", "overlays"`, 1),
			"vtep_subnet6 (none) -> fd01:a::/64\none subnet6 (none) -> fd01:b::/64", "one 9.0.0.0/24 fd01:b::/80, two 10.0.0.0/24", "[9.0.0.0/24 fd01:b::/80 10.0.0.0/24]"},
		{strings.Replace(networkOf(strings.Replace(dual, "}", `, "isolation": "none", "antispoof": false}`, 1), strings.Replace(two, "}", `, "enabled": false, "allow": ["one"]}`, 1)), `"overlays"`, `"vtep_subnet6": "fd01:a::/64", "reclaim": "never", "overlays"`, 1),
			"reclaim (none) -> never\none isolation (none) -> none\none antispoof (none) -> false\ntwo enabled (none) -> false\ntwo allow (none) -> one", "one 9.0.0.0/24 fd01:b::/80, two 10.0.0.0/24", "[9.0.0.0/24 fd01:b::/80 10.0.0.0/24]"},
		{strings.Replace(networkOf(dual), `"overlays"`, `"vtep_subnet6": "fd01:a::/64", "overlays"`, 1),
			"reclaim never -> (none)\none isolation none -> (none)\none antispoof false -> (none)\ntwo removed", "one 9.0.0.0/24 fd01:b::/80", "[9.0.0.0/24 fd01:b::/80]"},
	} {
		plan, err := b.client.OverlaysPlan(t.Context(), api.ConfigRequest{Config: tt.network})
		if err != nil || plan.Applied || plan.Refused != nil {
			t.Fatalf("plan %+v, error %v", plan, err)
		}
		applied, err := b.client.OverlaysApply(t.Context(), api.ConfigRequest{Config: tt.network, Revision: plan.Revision})
		if err != nil || !applied.Applied || applied.Revision <= plan.Revision {
			t.Fatalf("applied %+v, error %v", applied, err)
		}
		for _, p := range []api.NetworkPlan{plan, applied} {
			if diff := cmp.Diff(tt.changes, changes(p)); diff != "" {
				t.Errorf("changes (-want +got):\n%s", diff)
			}
		}
		for i, n := range []*node{a, b} {
			for asked := false; !asked; {
				e := streams[i].next(t)
				asked = e.Register
				take(peers[i], e)
			}
			if got := granted(n.register(t, nth(1+i))); i == 0 && got != tt.first {
				t.Errorf("after %q the agent has %s, want %s", tt.changes, got, tt.first)
			}
		}
		streams[1].follow(t, peers[1], func() bool { return fmt.Sprint(peers[1][nth(1).AgentID].Subnets) == tt.peer })
		streams[0].follow(t, peers[0], func() bool { return len(peers[0][nth(2).AgentID].Subnets) == strings.Count(tt.peer, " ")+1 })
		again, err := a.client.OverlaysPlan(t.Context(), api.ConfigRequest{Config: tt.network})
		if err != nil || len(again.Changes) != 0 {
			t.Errorf("planned once more: %+v, error %v", again, err)
		}
	}
}

// take applies an event to a set of peers.
func take(peers map[string]conf.Peer, e api.PeerEvent) {
	if e.Snapshot {
		clear(peers)
	}
	for _, p := range e.Put {
		peers[p.AgentID] = p
	}
	for _, id := range e.Delete {
		delete(peers, id)
	}
}

// attach has an agent that is registered say that it has set up overlays and what
// containers it has there.
func (n *node) attach(t testing.TB, req api.RegisterRequest, containers map[string]int) {
	t.Helper()
	status := api.StatusReport{AgentID: req.AgentID, Overlays: map[string]conf.OverlayStatus{}}
	report := api.AttachmentReport{AgentID: req.AgentID, Instance: req.Instance, Sequence: 1, Snapshot: true}
	for overlay, count := range containers {
		status.Overlays[overlay] = conf.OverlayStatus{Status: conf.StatusOK}
		for i := range count {
			report.Put = append(report.Put, api.Attachment{Network: overlay, ID: fmt.Sprintf("c%d", i), IfName: "eth0", Overlay: overlay, Half: conf.Mesos})
		}
	}
	if err := n.client.Report(t.Context(), status); err != nil {
		t.Fatal(err)
	}
	if err := n.TakeAttachments(report); err != nil {
		t.Fatal(err)
	}
}

// What would take something from under containers is refused, with the reason and
// the way, and nothing is stored.
func TestChangeRefused(t *testing.T) {
	s := newStore(t)
	n := start(t, s, networkOf(overlayOne, overlayTwo))
	req := nth(1)
	req.Instance = "first"
	n.register(t, req)
	n.attach(t, req, map[string]int{"one": 0, "two": 3})
	unknown := n.register(t, nth(2))
	before := storedNetworkText(t, s)
	moved := strings.Replace(overlayOne, "9.0.0.0/8", "11.0.0.0/8", 1)
	for _, tt := range []struct {
		name, network string
		words         []string
	}{
		{"subnet under leases", networkOf(moved, overlayTwo), []string{"overlay one: subnet 11.0.0.0/8 with prefix 24", "9.0.0.0/24 by agent agent-1", "another name", "overlayctl overlays drain one"}},
		{"prefix under leases", networkOf(strings.Replace(overlayOne, `"prefix": 24`, `"prefix": 25`, 1), overlayTwo), []string{"prefix 25", "put back"}},
		{"halves under leases", networkOf(strings.Replace(overlayOne, "}", `, "halves": "shared"}`, 1), overlayTwo), []string{"the halves of overlay one cannot be changed from split to shared while hosts have subnets of it, which are 2", "another overlay with halves: shared", "overlayctl overlays drain one"}},
		{"removed under containers", networkOf(overlayOne), []string{"overlay two is to go while containers are attached: 3 on 172.16.0.2 (agent agent-1)", "overlayctl overlays drain two", "remove two --force"}},
		{"renamed", networkOf(overlayOne, strings.Replace(overlayTwo, "two", "three", 1)), []string{"overlay three: subnet 10.0.0.0/16", "overlay two"}},
		{"range of hosts", networkOf(overlayOne, overlayTwo, `{"name": "three", "subnet": "172.16.0.0/16", "prefix": 24}`), []string{"overlay three: subnet 172.16.0.0/16 holds the addresses of hosts", "172.16.0.2 (agent agent-1)", "choose another range"}},
	} {
		plan, err := n.client.OverlaysPlan(t.Context(), api.ConfigRequest{Config: tt.network})
		if err != nil {
			t.Fatal(err)
		}
		_, err = n.apply(t, tt.network)
		refused(t, err, http.StatusConflict, tt.words...)
		for _, w := range tt.words {
			if !strings.Contains(strings.Join(plan.Refused, "\n"), w) {
				t.Errorf("%s: the plan does not say %q: %q", tt.name, w, plan.Refused)
			}
		}
	}
	if err := n.client.Report(t.Context(), api.StatusReport{AgentID: unknown.AgentID, Overlays: map[string]conf.OverlayStatus{"one": {Status: conf.StatusOK}}}); err != nil {
		t.Fatal(err)
	}
	_, err := n.client.OverlayRemove(t.Context(), api.OverlayRequest{Name: "one"})
	refused(t, err, http.StatusConflict, "have not told whether containers are attached: 172.16.0.3 (agent agent-2)", "--force")
	_, err = n.client.OverlayRemove(t.Context(), api.OverlayRequest{Name: "none"})
	refused(t, err, http.StatusNotFound, `no overlay "none"`)
	_, err = n.client.OverlaysApply(t.Context(), api.ConfigRequest{Config: networkOf(overlayOne, overlayTwo), Revision: 99999})
	refused(t, err, http.StatusConflict, "changed since this was planned")

	_, err = n.apply(t, `{"vtep_subnet": "44.128.0.0/20", "overlays": [{"name": "bridge", "subnet": "9.0.0.0/8", "prefix": 4}], "colour": 1}`)
	refused(t, err, http.StatusUnprocessableEntity)
	var bad *api.Error
	if errors.As(err, &bad); bad.Kind != api.KindBadConfig || len(bad.Problems) < 4 {
		t.Errorf("kind %q, problems %q", bad.Kind, bad.Problems)
	}
	for _, path := range []string{"vtep_mac_oui: ", "overlays[0].name: ", "overlays[0].prefix: ", "colour: "} {
		if !slices.ContainsFunc(bad.Problems, func(p string) bool { return strings.HasPrefix(p, path) }) {
			t.Errorf("no problem of %s in %q", path, bad.Problems)
		}
	}
	if after := storedNetworkText(t, s); after != before {
		t.Errorf("what was refused is stored: %s, before %s", after, before)
	}

	// The containers have gone, or somebody takes the network from under them.
	p, err := n.client.OverlayRemove(t.Context(), api.OverlayRequest{Name: "two", Force: true})
	if err != nil || !p.Applied || changes(p) != "two removed" || p.Changes[0].Containers != 3 || p.Changes[0].Hosts != 2 {
		t.Errorf("%+v, error %v", p, err)
	}
	if lease := n.register(t, req); fmt.Sprint(lease.TakenDown) != "[two]" || granted(lease) != "one 9.0.0.0/24" {
		t.Errorf("after a removal by force: taken down %s, granted %s", lease.TakenDown, granted(lease))
	}
	_, err = n.client.OverlayRemove(t.Context(), api.OverlayRequest{Name: "one", Force: true})
	refused(t, err, http.StatusConflict, "is the only one")
	n.mustApply(t, networkOf(overlayOne, overlayTwo))
	if lease := n.register(t, req); lease.TakenDown != nil || granted(lease) != "one 9.0.0.0/24, two 10.0.0.0/24" {
		t.Errorf("back again: taken down %s, granted %s", lease.TakenDown, granted(lease))
	}
}

func storedNetworkText(t testing.TB, s store.Store) string {
	t.Helper()
	kvs, _, err := s.List(t.Context(), "network")
	if err != nil || len(kvs) != 1 {
		t.Fatal(kvs, err)
	}
	return fmt.Sprint(kvs[0].Mod, string(kvs[0].Value))
}

// A plan names routes of hosts into ranges that are new, whatever else it says.
func TestPlanOverlaps(t *testing.T) {
	n := start(t, newStore(t), networkOf(overlayOne))
	for i := range 2 {
		req := nth(i)
		req.Instance = "first"
		n.register(t, req)
		routes := []netip.Prefix{netip.MustParsePrefix("10.0.4.0/22"), netip.MustParsePrefix("9.0.0.0/24"), netip.MustParsePrefix("12.0.0.0/8")}
		report := api.AttachmentReport{AgentID: req.AgentID, Instance: req.Instance, Sequence: 1, Snapshot: true, Host: &api.Host{MTU: 1450, Routes: routes[i:]}}
		if err := n.TakeAttachments(report); err != nil {
			t.Fatal(err)
		}
	}
	plan, err := n.client.OverlaysPlan(t.Context(), api.ConfigRequest{Config: networkOf(overlayOne, overlayTwo, `{"name": "three", "subnet": "12.1.0.0/16", "prefix": 24}`)})
	if err != nil || plan.Refused != nil {
		t.Fatalf("refused %q, error %v", plan.Refused, err)
	}
	var got []string
	for _, o := range plan.Overlaps {
		got = append(got, fmt.Sprint(o.Overlay, " ", o.Range, " ", o.AgentID, " ", o.Route))
	}
	want := []string{"two 10.0.0.0/16 agent-0 10.0.4.0/22", "three 12.1.0.0/16 agent-0 12.0.0.0/8", "three 12.1.0.0/16 agent-1 12.0.0.0/8"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("overlaps (-want +got):\n%s", diff)
	}
}

// A drained overlay is told to agents as such, stays drained whatever file is applied
// and however coordinators start, and shows what is left.
func TestDrain(t *testing.T) {
	s := newStore(t)
	n := start(t, s, networkOf(overlayOne, strings.Replace(overlayTwo, "}", `, "allow": ["one"]}`, 1)))
	req := nth(1)
	req.Instance = "first"
	n.register(t, req)
	n.attach(t, req, map[string]int{"one": 2, "two": 0})
	if p, err := n.client.OverlayDrain(t.Context(), "one", false); err != nil || changes(p) != "one drained" || p.Changes[0].Containers != 2 {
		t.Fatalf("%+v, error %v", p, err)
	}
	draining := func(n *node) string {
		t.Helper()
		var out []string
		for _, g := range n.register(t, req).Grants {
			out = append(out, fmt.Sprint(g.Overlay.Name, " ", g.Overlay.Draining))
		}
		return strings.Join(out, ", ")
	}
	if got := draining(n); got != "one true, two false" {
		t.Errorf("granted: %s", got)
	}
	overlays, err := n.client.Overlays(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if o := overlays[0]; !o.Draining || o.Containers != 2 || len(o.Hosts) != 1 || o.Hosts[0].Containers != 2 || o.FileDiffers != "" {
		t.Errorf("listed as %+v", o)
	}
	n.mustApply(t, networkOf(overlayOne, overlayTwo))
	if got := draining(n); got != "one true, two false" {
		t.Errorf("after a file was applied: %s", got)
	}
	n.stop()
	again := start(t, s, networkOf(overlayOne, strings.Replace(overlayTwo, "}", `, "allow": ["one"]}`, 1)))
	if got := draining(again); got != "one true, two false" {
		t.Errorf("after a start with an edited file: %s", got)
	}
	again.attach(t, req, map[string]int{"one": 0, "two": 1})
	if p, err := again.client.OverlayRemove(t.Context(), api.OverlayRequest{Name: "one"}); err != nil || changes(p) != "one removed\ntwo allow one -> (none)" {
		t.Errorf("%+v, error %v", p, err)
	}
	if p, err := again.client.OverlayDrain(t.Context(), "two", true); err != nil || p.Applied || len(p.Changes) != 0 {
		t.Errorf("%+v, error %v", p, err)
	}
	overlays, err = again.client.Overlays(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(overlays) != 2 || overlays[0].FileDiffers != "the file differs" || overlays[1].Name != "one" || overlays[1].FileDiffers != "in the file alone, not applied" || overlays[1].Leases != 1 {
		t.Errorf("listed: %+v", overlays)
	}
}

// A range that shrinks while a coordinator grants from it: what was granted in the
// last moment is seen, and the change refused.
func TestShrinkWhileGranting(t *testing.T) {
	s := newStore(t)
	a := start(t, s, networkOf(overlayOne))
	g := &gate{Store: s, held: make(chan struct{}), release: make(chan struct{}), on: "network"}
	b := start(t, g, networkOf(overlayOne))
	done := make(chan error, 1)
	go func() {
		_, err := b.apply(t, networkOf(strings.Replace(overlayOne, "9.0.0.0/8", "9.0.0.0/23", 1)))
		done <- err
	}()
	<-g.held
	for i := range 3 {
		a.register(t, nth(i))
	}
	close(g.release)
	refused(t, <-done, http.StatusConflict, "9.0.2.0/24 by agent agent-2")
	b.mustApply(t, networkOf(strings.Replace(overlayOne, "9.0.0.0/8", "9.0.0.0/22", 1)))
}
