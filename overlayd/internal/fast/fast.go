// Package fast decides whether a host's overlay traffic takes the fast path or
// only the kernel's own way, and changes between the two while it flows. It adds
// to what the datapath makes and never takes its place: without it everything
// works, slower.
package fast

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/fastpath"
	"overlayd.internal/overlay/overlayd/internal/datapath"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// Mode is what the operator wants.
type Mode string

// The modes.
const (
	Auto   Mode = "auto"   // the fast path where the host suits it
	Kernel Mode = "kernel" // never
	EBPF   Mode = "ebpf"   // wherever the programs can be loaded
)

// ParseMode reads a mode.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case Auto, Kernel, EBPF:
		return m, nil
	}
	return "", fmt.Errorf("%q: want auto, kernel or ebpf", s)
}

// The times between two looks at whether the host suits the fast path.
const (
	slowLook = 30 * time.Second
	fastLook = time.Second
	// rulesLook is that of looks because of rules that others changed. Some do so all
	// the time, and a look asks a few programs.
	rulesLook = 5 * time.Second
)

// Path is the fast path of this host as far as the agent is concerned. It is
// safe for concurrent use.
type Path struct {
	mode    Mode
	log     *slog.Logger
	kick    chan struct{}
	rules   chan struct{} // rules of others are not what they were
	changed chan struct{}
	// patience is how long a look at the host waits for peers.
	patience time.Duration

	mu     sync.Mutex // guards what follows
	wanted *fastpath.Wanted
	peers  map[string]conf.Peer // of wanted, by agent id
	path   *fastpath.Path       // nil: traffic goes the kernel's way
	state  conf.DatapathState
	left   bool // what an earlier process attached is detached
	// partial: peers are still to come; waiting: the look waits for them.
	partial, waiting bool
}

// New makes a path that does nothing before Run.
func New(mode Mode, log *slog.Logger) *Path {
	p := &Path{
		mode: mode, log: log, kick: make(chan struct{}, 1), rules: make(chan struct{}, 1), changed: make(chan struct{}, 1), patience: fastLook, peers: map[string]conf.Peer{},
		state: conf.DatapathState{Mode: string(mode), Taken: string(Kernel)},
	}
	if mode != Kernel {
		p.state.Reason = conf.NotLookedAt
	}
	return p
}

// Changed receives when State is another.
func (p *Path) Changed() <-chan struct{} { return p.changed }

// State is which way traffic takes, and why.
func (p *Path) State() conf.DatapathState {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state
}

// Recall takes in what an earlier process published: until the first look its
// programs go on.
func (p *Path) Recall(s conf.DatapathState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wanted == nil && s.Mode == p.state.Mode {
		s.Routing = p.state.Routing // which is not ours to say
		p.state = s
	}
}

// Follow brings the fast path along after the datapath has made of the host what
// w wants, as far as r says. The error is Apply's.
//
// While peers are still to come, a look at the host waits for them, but not for long:
// the programs of firewalls that it asks, and the loading of our own, would take the
// processors from what routes the peers.
func (p *Path) Follow(ctx context.Context, w datapath.Wanted, r datapath.Report) error {
	p.arrive(w.Partial)
	if r.PeersOnly && !w.Resync && w.Changes != nil {
		return p.Update(w.Changes.Set, w.Changes.Gone)
	}
	if w.Changes != nil {
		w.Peers = w.Changes.All()
	}
	to := fastpath.Wanted{Local: w.VTEP.Local, VTEPMAC: w.VTEP.MAC, Peers: w.Peers, Send: w.Direct.Send, Take: w.Direct.Take, Withdrawn: w.Withdrawn}
	for _, o := range w.Overlays {
		to.Overlays = append(to.Overlays, fastpath.Overlay{Name: o.Name, Subnets: o.Subnets})
	}
	return p.Apply(ctx, to, true)
}

// arrive notes whether peers are still to come.
func (p *Path) arrive(partial bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.partial = partial
	if p.waiting && !partial {
		p.waiting = false
		kick(p.kick)
	}
}

// wake has the host looked at: at once, or when the peers have come.
func (p *Path) wake() {
	switch {
	case !p.partial:
		kick(p.kick)
	case !p.waiting:
		p.waiting = true
		time.AfterFunc(p.patience, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.waiting = false
			kick(p.kick)
		})
	}
}

// Apply says what the host is to be like. With resync it is compared with what
// there is. The error says what goes the kernel's way because of it.
func (p *Path) Apply(ctx context.Context, w fastpath.Wanted, resync bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wanted == nil || resync {
		p.wake()
	}
	p.peers = make(map[string]conf.Peer, len(w.Peers))
	for _, peer := range w.Peers {
		p.peers[peer.AgentID] = peer
	}
	p.wanted = &w
	if p.path == nil {
		return nil
	}
	return p.path.Apply(ctx, w, resync)
}

// Update is Apply for a caller who knows which peers changed.
func (p *Path) Update(set []conf.Peer, gone []string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, peer := range set {
		p.peers[peer.AgentID] = peer
	}
	for _, id := range gone {
		delete(p.peers, id)
	}
	if p.path == nil {
		return nil
	}
	return p.path.Update(set, gone)
}

// Traffic is what crossed hosts since the fast path was taken, by overlay;
// nothing where it is not.
func (p *Path) Traffic() (map[string]fastpath.Traffic, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.path == nil {
		return nil, nil
	}
	return p.path.Traffic()
}

// RulesChanged has the host looked at soon, because rules of others changed, which
// what takes the fast path may have to obey. It does not wait.
func (p *Path) RulesChanged() { kick(p.rules) }

// Run looks at the host now and then until ctx is done. What is attached then
// goes on.
func (p *Path) Run(ctx context.Context) error {
	if p.mode == Kernel {
		p.leave("")
		<-ctx.Done()
		return nil
	}
	watching := make(chan struct{})
	close(watching)
	defer func() { <-watching }()
	defer p.close()
	timer := time.NewTimer(slowLook)
	defer timer.Stop()
	var last time.Time
	due := time.Now().Add(slowLook)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.rules:
			// Another change does not put off what the first one asked for.
			if in := max(fastLook, time.Until(last.Add(rulesLook))); in < time.Until(due) && !p.awaited() {
				due = time.Now().Add(in)
				timer.Reset(in)
			}
			continue
		case <-p.kick:
		case <-timer.C:
		}
		p.look(ctx, &watching)
		last = time.Now()
		due = last.Add(slowLook)
		timer.Reset(slowLook)
		select { // not at full speed while the host is being changed
		case <-ctx.Done():
			return nil
		case <-time.After(fastLook):
		}
	}
}

// awaited reports whether a look waits for peers.
func (p *Path) awaited() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waiting
}

// look decides, and changes over where the decision is another. watching is
// closed when the last path is no longer watched.
func (p *Path) look(ctx context.Context, watching *chan struct{}) {
	w, ok := p.snapshot()
	if !ok {
		return // there is no lease; what an earlier process attached goes on
	}
	reason := ""
	if p.mode == Auto {
		var err error
		if reason, err = fastpath.Unsuitable(ctx, w); err != nil {
			reason = "cannot find out whether the host suits it: " + err.Error()
		}
	}
	if ctx.Err() != nil {
		return
	}
	if reason != "" {
		p.leave(reason)
		return
	}
	path, err := p.take(ctx)
	if err != nil {
		p.leave(err.Error())
		return
	}
	if path == nil {
		return // taken already
	}
	<-*watching
	done := make(chan struct{})
	*watching = done
	go func() {
		defer close(done)
		if err := path.Watch(ctx); err != nil {
			p.log.Warn("cannot watch container interfaces for the fast path", logkey.Err, err)
		}
	}()
}

// snapshot is what is wanted at present.
func (p *Path) snapshot() (fastpath.Wanted, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wanted == nil {
		return fastpath.Wanted{}, false
	}
	w := *p.wanted
	w.Peers = slices.Collect(maps.Values(p.peers))
	return w, true
}

// take attaches the programs, if they are not. Nobody else sets the path, and who
// tells of peers does not wait while the kernel verifies the programs.
func (p *Path) take(ctx context.Context) (*fastpath.Path, error) {
	if p.taken() {
		return nil, nil
	}
	path, err := fastpath.New(p.log)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	w := *p.wanted
	w.Peers = slices.Collect(maps.Values(p.peers))
	if err := path.Apply(ctx, w, true); err != nil {
		p.left = false // some of it may be attached, and nobody would tell it of changes
		return nil, errors.Join(err, path.Close())
	}
	p.path = path
	p.set(EBPF, "")
	return path, nil
}

func (p *Path) taken() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.path != nil
}

// leave detaches the programs, also those of an earlier process.
func (p *Path) leave(reason string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.path != nil || !p.left {
		p.left = true
		if _, err := fastpath.Leave(); err != nil {
			p.log.Warn("cannot detach the fast path", logkey.Err, err)
		}
	}
	if p.path != nil {
		p.path.Close()
		p.path = nil
	}
	p.set(Kernel, reason)
}

// set notes a decision and tells of it when it is another.
func (p *Path) set(taken Mode, reason string) {
	now := conf.DatapathState{Mode: string(p.mode), Taken: string(taken), Reason: reason}
	if now == p.state {
		return
	}
	p.state = now
	p.log.Info("datapath chosen", logkey.Datapath, taken, logkey.Reason, reason)
	kick(p.changed)
}

func (p *Path) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.path != nil {
		p.path.Close()
		p.path = nil
	}
}

// kick wakes whoever receives from c.
func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
