// Package coordinator leases VTEP addresses and agent subnets to agents, tells
// every agent about its peers, and serves the state of the cluster.
//
// Everything that must survive is in a store.Store. A grant is one transaction
// whose conditions say that nobody has what it gives out, so any number of
// coordinators may share one store without a leader. Beside the store a
// coordinator keeps a view of it in memory, which follows the store's changes;
// whatever is answered was durable and in the view before.
package coordinator

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/attached"
	"overlayd.internal/overlay/overlayd/internal/events"
	"overlayd.internal/overlay/overlayd/internal/logging"
	"overlayd.internal/overlay/overlayd/internal/pki"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// DefaultTerm is how long a lease holds without being renewed.
const DefaultTerm = 24 * time.Hour

// Options are the parts a Coordinator is made of.
type Options struct {
	// Network is what this coordinator's file says, valid, as clusterfile.Load
	// returns it. It becomes that of a store that has none; what is served is always
	// that of the store.
	Network conf.Network
	// Unedited: the file says what it said when this coordinator read it last, or
	// nobody knows. Then what differs from the store is not applied but said.
	Unedited bool
	Store    store.Store // stays the caller's to close, after Run has ended
	Term     time.Duration
	Log      *slog.Logger
	Version  string
	Networks []netip.Prefix // of this host; no agent has the address of one, or its broadcast address
	Shared   bool           // other coordinators may use the same store

	Adopt Adopt

	Identity    *pki.Registry // nil: nobody has to say who it is
	StatePublic bool          // anybody may read the state of the cluster
	PagePublic  bool          // anybody may see the page, and read what it reads

	LogLevel *logging.Level // nil: it cannot be changed
	// URLs are where the other coordinators on the store reach this one, and
	// PeerClient is how it asks them; nil: as nobody.
	URLs       []string
	PeerClient *http.Client
}

// Coordinator is safe for concurrent use.
type Coordinator struct {
	served   atomic.Pointer[network]
	store    store.Store
	term     time.Duration
	log      *slog.Logger
	version  string
	shared   bool
	started  time.Time
	networks []netip.Prefix

	identity                *pki.Registry // nil: insecure
	statePublic, pagePublic bool

	logLevel *logging.Level

	counts *counts
	pace   pace
	body   time.Duration // how long a request may take to come; tests in this package shorten it

	clusterID  string
	clockBase  int64         // see beat.Clock
	firstRev   uint64        // of the view at the start
	epochBase  atomic.Uint64 // see transfer.Cluster
	adopt      Adopt
	adopting   chan struct{} // has a token when there may be an adoption to end
	advanced   chan struct{} // has a token when the view may be newer than what was witnessed
	run        string        // the run that this start began
	hub        *hub
	encoded    encodedState
	stopped    chan struct{} // closed when Run has ended
	book       *attached.Book
	events     *events.Ring
	unpackers  sync.Pool     // of *gzip.Reader
	reportTurn chan struct{} // has a token while a report is worked on
	asking     chan struct{} // has a token when unheard may not be empty
	joining    atomic.Int64  // registrations that are worked on
	urls       []string
	peerClient *http.Client

	mu        sync.Mutex // guards what follows
	view      *view
	file      conf.Network // what the configuration file says
	kept      []string     // overlays that it removes, see finishFile
	waiters   waiters
	presence  map[string]*presence     // by agent id
	takenOver map[netip.Addr]time.Time // addresses that went to who spoke from them
	moves     map[string]struct{}      // agents that came or went and are not written down
	moved     chan struct{}            // has a token when moves may not be empty
	changed   map[string]struct{}      // agents whose peers have not been told yet
	retell    bool                     // every stream is to be told all peers
	partial   bool                     // snapshots that were told may lack some
	flushing  bool                     // a flush is between reading changed and publishing
	running   bool
	others    map[string]*other // coordinators at work, by run
	beaten    chan struct{}     // has a token when somebody has begun to beat
	followers sync.WaitGroup    // of the others
	ordered   []attached.Ref    // agents as searches go through them; nil: not made yet
	announce  announcements
	unheard   map[string]struct{} // agents that are to be asked what they have attached
	surveys   surveys
	failed    error         // of the last write to the store; nil: it was written
	dirty     chan struct{} // has a token when changed may not be empty
}

// New reads the store and checks that what is leased fits the configuration.
// When it does not, the error names the overlay and says what to do. New writes
// the cluster's id, once, the configuration, where there is none or the file was
// edited, and a new run.
func New(ctx context.Context, o Options) (*Coordinator, error) {
	if o.Term == 0 {
		o.Term = DefaultTerm
	}
	if o.Term < time.Second {
		return nil, fmt.Errorf("lease term %s is too short, want at least 1s", o.Term)
	}
	counts := newCounts(o.Version)
	c := &Coordinator{
		file: o.Network, counts: counts, store: store.Timed(o.Store, counts.storeTook), term: o.Term, log: o.Log,
		version: o.Version, shared: o.Shared, networks: o.Networks,
		started:  time.Now(),
		logLevel: o.LogLevel,
		identity: o.Identity, statePublic: o.StatePublic, pagePublic: o.PagePublic,
		run:      rand.Text(),
		pace:     defaultPace,
		body:     serve.BodyTimeout,
		stopped:  make(chan struct{}),
		book:     attached.New(),
		events:   events.New(time.Now),
		announce: newAnnouncements(),
		urls:     o.URLs, peerClient: o.PeerClient,
		others: map[string]*other{}, surveys: newSurveys(),
		beaten:     make(chan struct{}, 1),
		reportTurn: make(chan struct{}, 1),
		asking:     make(chan struct{}, 1), unheard: map[string]struct{}{},
		presence:  map[string]*presence{},
		takenOver: map[netip.Addr]time.Time{},
		moves:     map[string]struct{}{},
		moved:     make(chan struct{}, 1),
		changed:   map[string]struct{}{},
		dirty:     make(chan struct{}, 1),
		adopt:     o.Adopt.withDefaults(),
		adopting:  make(chan struct{}, 1),
		advanced:  make(chan struct{}, 1),
	}
	edited := !o.Unedited
	for {
		v, err := c.load(ctx)
		if err != nil {
			return nil, err
		}
		c.clockBase = max(c.clockBase, v.cluster.Clock)
		for _, b := range v.beats {
			c.clockBase = max(c.clockBase, b.Clock)
		}
		written, err := c.introduce(ctx, v, &edited)
		if errors.Is(err, ErrMisfit) {
			return nil, err
		} else if err != nil {
			return nil, fmt.Errorf("write the configuration to the store: %w", err)
		}
		if !written {
			c.view = v
			c.served.Store(v.network)
			break
		}
	}
	c.clusterID = c.view.cluster.ID
	c.epochBase.Store(c.view.cluster.EpochBase)
	c.partial = c.view.cluster.Adopting != 0
	c.firstRev = c.view.rev
	c.hub = newHub(c.view.rev)
	c.logFileDiffersLocked()
	c.logUnconfigured()
	return c, nil
}

// load lists the store into a new view and refuses what does not fit.
func (c *Coordinator) load(ctx context.Context) (*view, error) {
	kvs, rev, err := c.store.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("read the store: %w", err)
	}
	n, err := storedNetwork(kvs)
	if err != nil {
		return nil, fmt.Errorf("read the store: %w", err)
	}
	if n == nil {
		n = newNetwork(c.file, 0)
	}
	if writtenHalf(kvs) {
		return nil, errors.New("the store holds something, and not the cluster that it is of: a copy or a restore to it is under way, or was not finished; " +
			"if none is, empty it (move the file away, or delete the keys of the prefix) and run overlayctl store copy or restore again")
	}
	v := newView(n)
	v.rev = rev
	var misfits []*misfit
	for _, kv := range kvs {
		if kv.Key == keyNetwork {
			continue // first of all
		}
		_, err := v.apply(store.Event{KV: kv})
		var m *misfit
		if errors.As(err, &m) {
			misfits = append(misfits, m)
		} else if err != nil {
			return nil, fmt.Errorf("read the store: %w", err)
		}
	}
	return v, explain(n.Network, n.Network, misfits, nil)
}

// introduce writes the cluster's id, the network and this run where the view has
// not got them, and what the file says if it was edited, and reports whether it did.
func (c *Coordinator) introduce(ctx context.Context, v *view, edited *bool) (written bool, err error) {
	var txn store.Txn
	if cluster, changed := c.begin(v); changed {
		txn.If = append(txn.If, store.Cond{Key: keyCluster, Mod: v.clusterMod})
		txn.Then = append(txn.Then, store.Op{Key: keyCluster, Value: encode(cluster)})
	}
	if v.network.mod == 0 || *edited && !c.sameAsFile(v.network.Network) {
		next, err := c.firstNetwork(v)
		if err != nil {
			return false, err
		}
		if v.network.mod == 0 || !sameNetwork(v.network.Network, next) {
			txn.If = append(txn.If, store.Cond{Key: keyNetwork, Mod: v.network.mod})
			txn.Then = append(txn.Then, store.Op{Key: keyNetwork, Value: encodeNetwork(next, v.network.takenDown...)})
		}
	}
	if v.deletedMod == 0 { // nobody knows whether, and when, something was deleted before
		txn.If = append(txn.If, store.Cond{Key: keyDeleted})
		txn.Then = append(txn.Then, store.Op{Key: keyDeleted})
	}
	needed := len(txn.Then) > 0
	if !v.runs.has(c.run) {
		txn.If = append(txn.If, store.Cond{Key: keyRuns, Mod: v.runsMod})
		txn.Then = append(txn.Then, store.Op{Key: keyRuns, Value: encode(v.runs.with(run{ID: c.run}))}, c.beatOp())
	}
	if len(txn.Then) == 0 {
		return false, nil
	}
	_, err = c.store.Commit(ctx, txn)
	if err != nil && !needed && !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrUnknown) && ctx.Err() == nil {
		// A store that takes no writes can still be served from.
		c.log.Warn("the store takes no writes; agents that go on elsewhere get whole snapshots", "err", err)
		c.failed = err
		v.runs = v.runs.with(run{ID: c.run, Began: v.rev + 1})
		return false, nil
	}
	if errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrUnknown) {
		return true, nil // load shows what is there now
	}
	*edited = false // whoever changes it from now on does so on purpose
	return true, err
}

// ClusterID identifies the cluster for ever.
func (c *Coordinator) ClusterID() string { return c.clusterID }

// Run follows the store and publishes peers until ctx ends, and then returns
// nil. Another error means that the coordinator can no longer serve. Run is
// called once; registrations and watches need it.
func (c *Coordinator) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var others sync.WaitGroup
	others.Go(func() { c.publish(ctx) })
	others.Go(func() { c.keepPresence(ctx) })
	others.Go(func() { c.announcePresence(ctx) })
	others.Go(func() { c.endAdoptions(ctx) })
	others.Go(func() { c.noteEpochs(ctx) })
	others.Go(func() { c.finishFile(ctx) })
	others.Go(func() { c.followOthers(ctx) })
	others.Go(func() { c.askForReports(ctx) })
	defer func() {
		cancel()
		others.Wait()
		c.setRunning(false)
		close(c.stopped)
	}()
	c.setRunning(true)
	for {
		c.mu.Lock()
		after := c.view.rev
		c.mu.Unlock()
		err := c.store.Watch(ctx, "", after, c.applyAll)
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, store.ErrCompacted) {
			return fmt.Errorf("follow the store: %w", err)
		}
		c.log.Warn("fell behind the store, reading it anew", "revision", after)
		if err := c.reload(ctx); err != nil {
			return fmt.Errorf("read the store: %w", err)
		}
	}
}

func (c *Coordinator) setRunning(running bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running = running
}

// applyAll takes one transaction of the store into the view.
func (c *Coordinator) applyAll(rev uint64, events []store.Event) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.view.network
	for _, e := range events {
		was := c.view.agents[strings.TrimPrefix(e.Key, prefixAgent)]
		id, err := c.view.apply(e)
		if err != nil {
			c.log.Error("stored key cannot be used", "err", err)
		}
		if id != "" {
			c.agentChangedLocked(id)
			c.agentEventLocked(was, c.view.agents[id])
		}
		if id, ok := strings.CutPrefix(e.Key, prefixSeen); ok {
			c.seenChangedLocked(id)
		}
		if e.Key == keyCluster {
			c.clusterChangedLocked()
		}
		if run, ok := strings.CutPrefix(e.Key, prefixCoordinator); ok {
			c.heardLocked(run)
		}
	}
	if c.view.network != old {
		c.networkChangedLocked(old)
	}
	c.advanceLocked(rev)
	return nil
}

// agentChangedLocked has an agent's peers told, and the agent itself.
func (c *Coordinator) agentChangedLocked(id string) {
	c.ordered = nil
	c.changed[id] = struct{}{}
	c.tellSoon()
	a, p := c.view.agents[id], c.presence[id]
	if p == nil {
		return
	}
	if p.registering == 0 && (a == nil || a.mod != p.told) {
		p.askToRegister()
	}
	if a == nil && p.registering == 0 && len(p.watches) == 0 {
		delete(c.presence, id)
	}
}

// tellSoon has what is changed published.
func (c *Coordinator) tellSoon() {
	select {
	case c.dirty <- struct{}{}:
	default:
	}
}

func (c *Coordinator) advanceLocked(rev uint64) {
	c.view.rev = rev
	select {
	case c.advanced <- struct{}{}:
	default:
	}
	c.waiters.release(rev)
}

// reload replaces the view by what the store has now.
func (c *Coordinator) reload(ctx context.Context) error {
	kvs, rev, err := c.store.List(ctx, "")
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.view
	n, err := storedNetwork(kvs)
	if err != nil || n == nil {
		c.log.Error("the store has no configuration that can be used; going on with the one of before", "err", err)
		n = old.network
	} else if n.mod == old.network.mod {
		n = old.network
	}
	v := newView(n)
	for _, claim := range old.claims {
		claim.stored = false
	}
	v.carryClaims(old.claims)
	for _, kv := range kvs {
		if kv.Key == keyNetwork {
			continue // first of all
		}
		if _, err := v.apply(store.Event{KV: kv}); err != nil {
			c.log.Error("stored key cannot be used", "err", err)
		}
	}
	c.view = v
	if n != old.network {
		c.networkChangedLocked(old.network)
	}
	c.clusterChangedLocked()
	c.seenAnewLocked(old)
	for id, a := range v.agents {
		if was := old.agents[id]; was == nil || was.mod != a.mod {
			c.agentChangedLocked(id)
			c.agentEventLocked(was, a)
		}
	}
	for id, was := range old.agents {
		if v.agents[id] == nil {
			c.agentChangedLocked(id)
			c.agentEventLocked(was, nil)
		}
	}
	c.advanceLocked(rev)
	return nil
}
