// Package datapath turns the wanted end state of a host's overlays into kernel
// objects: VTEP, bridges, addresses, routes, neighbours, FDB entries, sysctls
// and firewall rules.
//
// The caller states what should be (Wanted); package kernel reads what is,
// package plan decides the difference (pure), package kernel applies it. The
// same path serves first start, one more peer, a flushed firewall and an upgrade.
// Everything of ours is recognised by package mark, and nothing else is touched.
package datapath

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/antispoof"
	"overlayd.internal/overlay/internal/firewall/firewalld"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/datapath/kernel"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// The wanted state's words are those of package plan.
type (
	Host    = plan.Wanted
	VTEP    = plan.VTEP
	Bridge  = plan.Bridge
	Overlay = plan.Overlay
	Direct  = plan.Direct
)

// Overhead is what VXLAN adds to a packet between agent IPs of the family of a.
func Overhead(a netip.Addr) int { return plan.Overhead(a) }

// Wanted is what Apply is to make of the host.
type Wanted struct {
	Host // must not be changed afterwards
	// Resync: the kernel is read, whatever the last Apply left behind. Without it
	// only the difference is sent, where Apply can tell it.
	Resync bool
	// Changes is for a caller who knows which peers changed since the last Apply;
	// then Peers is not looked at. It makes Apply cost what changed.
	Changes *Changes
}

// Changes are peers that changed.
type Changes struct {
	Set  []conf.Peer        // new or another
	Gone []string           // agent ids of those that are no more
	All  func() []conf.Peer // every peer, for when they have to be compared with the kernel
}

// Report says what could not be had. The datapath goes on past every failure,
// so that one overlay that cannot be configured does not stop the others.
type Report struct {
	MTU       int              // of VTEP, bridges and container interfaces; 0: the kernel could not be read
	Overlays  map[string]error // by name; absent: fine
	Refused   []string         // of these the overlays that are not set up at all, so that nobody else may either
	Err       error            // what concerns the whole host
	Changed   int              // kernel objects added, changed or removed
	PeersOnly bool             // only peers had to be looked at
	Notices   []string         // what somebody should look at, though overlays work without it
	Stopped   []string         // which rules of others stop packets of the overlays
	// Left is how many containers are on bridges that are not wanted, by overlay; nil:
	// nobody looked.
	Left map[string]int
	// Routes are the largest ranges outside of the overlays that routes of others lead
	// to, as when the kernel was read last.
	Routes []netip.Prefix
	// Drift is what of Changed others had done, where nothing new was asked for.
	Drift Drift
}

// Datapath programs one network namespace: that of the thread which called New.
// Apply and Changes have to be called in the same one; in a daemon that stays in
// the namespace it was started in, this is so. It is safe for concurrent use.
type Datapath struct {
	log     *slog.Logger
	onRules func() // may be nil

	mu     sync.Mutex // guards what follows
	kernel *kernel.Kernel
	rules  rules
	memory memory
	// sources checks what containers send; unchecked: the kernel cannot.
	sources   antispoof.Table
	unchecked bool
	firewalld *firewalld.Keeper // nil: it is told nothing

	news    chan struct{} // capacity 1: what works beside Apply has something new for it
	warned  warned
	others  *others
	routes  []netip.Prefix // see Report
	settled *settled       // what the last Apply of everything came to; nil: there was none
	drift   *drift         // of the Apply under way
}

// New opens what is needed to talk to the kernel. It changes nothing.
func New(log *slog.Logger) (*Datapath, error) {
	k, err := kernel.Open()
	if err != nil {
		return nil, err
	}
	news := make(chan struct{}, 1)
	others, err := newOthers(news)
	if err != nil {
		k.Close()
		return nil, err
	}
	return &Datapath{log: log, kernel: k, news: news, others: others}, nil
}

// Close closes the sockets. What was programmed stays and goes on forwarding.
func (d *Datapath) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.others.close()
	d.rules.close()
	return d.kernel.Close()
}

// OnRules has f called, from Changes on, when the kernel tells that rules of others or
// of the administrator may have changed. f must not wait.
func (d *Datapath) OnRules(f func()) { d.onRules = f }

// Changes announces that somebody else changed or removed something of ours; see
// kernel.Watch.
func (d *Datapath) Changes(ctx context.Context) <-chan struct{} {
	concerns := func(m rtnl.Message) bool {
		if d.onRules != nil && isOthersRule(m) {
			d.onRules()
		}
		return concernsFirewall(m)
	}
	return d.kernel.Watch(ctx, d.log, kernel.Rules{Concerns: concerns, Unchecked: unchecked, Altered: d.rulesAltered, News: d.news})
}

// Peers is how many other hosts are forwarded to.
func (d *Datapath) Peers() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.kernel.Expected.Peers()
}

// Inspect reads the kernel of the calling thread's namespace and plans what
// Apply would do there, without doing it.
func Inspect(want Host) (*plan.Plan, error) {
	k, err := kernel.Open()
	if err != nil {
		return nil, err
	}
	defer k.Close()
	have, err := k.Read(want, nil)
	if err != nil {
		return nil, err
	}
	return plan.Make(want, have), nil
}

// Apply makes the host what is wanted. It costs what changed, where the last
// Apply left behind something to rely on; else the kernel is read and everything
// compared with it.
func (d *Datapath) Apply(ctx context.Context, w Wanted) Report {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drift = d.drifts(w)
	r := d.applyLocked(ctx, w)
	if d.drift != nil {
		r.Drift = d.drift.Drift
	}
	return r
}

func (d *Datapath) applyLocked(ctx context.Context, w Wanted) Report {
	if r, ok := d.byDifference(ctx, w); ok {
		return r
	}
	if w.Changes != nil {
		w.Peers = w.Changes.All()
	}
	r, err := d.whole(ctx, w.Host)
	if errors.Is(err, rtnl.ErrOverrun) {
		// The kernel knows what it did; ask it.
		again, _ := d.whole(ctx, w.Host)
		again.Changed += r.Changed
		return again
	}
	return r
}

// byDifference puts changed peers into the place of what they were and, with
// Resync, looks at the kernel. ok is false when the kernel has to be read and
// planned for as a whole.
func (d *Datapath) byDifference(ctx context.Context, w Wanted) (r Report, ok bool) {
	m := &d.memory
	if m.trust < remarked || !plan.SameHost(m.asked, w.Host) {
		return Report{}, false
	}
	var old, now []conf.Peer
	if w.Changes != nil {
		old, now = m.changes(w.Changes.Set, w.Changes.Gone)
	} else {
		old, now = m.difference(w.Peers)
	}
	if !w.Resync {
		return d.setPeers(ctx, old, now)
	}
	if len(old)+len(now) > 0 {
		if r, ok = d.setPeers(ctx, old, now); !ok {
			return Report{}, false
		}
	}
	if m.trust != exact {
		return Report{}, false
	}
	looked, ok := d.look(ctx, w.Host)
	looked.Changed += r.Changed
	return looked, ok
}

// whole reads the kernel, plans and applies. The error, which is in the report
// as well, says that it had to stop on the way.
func (d *Datapath) whole(ctx context.Context, w Host) (Report, error) {
	d.memory.trust = nothing
	have, err := d.kernel.Read(w, nil)
	if err != nil {
		return newReport(nil, 0, 0, err), err
	}
	return d.carryOut(ctx, w, plan.Make(w, have), have, byID(w.Peers))
}

// look is whole for the nearly only case: the kernel has every entry that it
// should and no other. Then reading is enough, and whatever has to be done
// concerns the host or its devices. ok is false when it is another case.
func (d *Datapath) look(ctx context.Context, w Host) (r Report, ok bool) {
	if d.moved() {
		return Report{}, false
	}
	w.Peers = nil
	entries := d.kernel.Expected.Entries // which nobody changes while we are locked
	have, err := d.kernel.Read(w, &entries)
	if err != nil || !have.Compare.Equal() {
		return Report{}, false
	}
	if d.narrowed(have) {
		return Report{}, false
	}
	have.Ways, have.PathMTU = d.memory.possible.Ways, d.memory.possible.PathMTU
	p := plan.ForLook(w, have, entries)
	known := &d.memory.possible
	if p.Fresh[conf.VTEPName] || p.Fresh[mark.SecondVTEP] || p.MTU != d.memory.mtu || p.Wanted.SecondMTU != known.SecondMTU || !plan.SameHost(p.Wanted, *known) || p.TouchedBy(have.Foreign) {
		return Report{}, false
	}
	d.memory.trust = nothing
	r, err = d.carryOut(ctx, w, p, have, d.memory.peers)
	return r, !errors.Is(err, rtnl.ErrOverrun)
}

// carryOut makes what is planned and remembers it. The error is as in whole.
func (d *Datapath) carryOut(ctx context.Context, w Host, p *plan.Plan, have *plan.State, peers map[string]conf.Peer) (Report, error) {
	d.warned.warn(d.log, p, w.VTEP.MTU)
	// The firewall comes first, so that isolation is there before traffic is.
	var failed []plan.Problem
	round := d.firewalldRound()
	changed, err := d.setRules(ctx, p, have, peers)
	if err != nil {
		round = 0
		failed = append(failed, plan.Problem{Err: err})
	}
	n, err := d.checkSources(p, have)
	changed += n
	if err != nil {
		failed = append(failed, plan.Problem{Err: err})
	}
	stopped := d.others.look(p.Wanted)
	n, err = d.passFirewalld(p.Wanted, have, round)
	changed += n
	d.drift.add(driftFirewalld, n, "zone of firewalld")
	if err != nil {
		failed = append(failed, plan.Problem{Err: err})
	}
	index := map[string]int{}
	for name, l := range have.Links {
		index[name] = l.Index
	}
	d.kernel.Expected.Before(p, have)
	result, err := d.kernel.Apply(ctx, p.Ops, index, d.drift.done(p))
	d.kernel.Expected.After(p, have, result.Index)
	if err := d.rules.finish(); err != nil {
		failed = append(failed, plan.Problem{Err: err})
	}

	changed += result.Changed
	failed = append(failed, result.Failed...)
	if changed > 0 {
		d.log.Info("datapath changed", "objects", changed, "peers", len(peers), "mtu", p.MTU)
	}
	second := secondNotices(result.Second)
	d.warned.second = sayNew(d.log, d.warned.second, second)
	if err == nil && len(failed) == 0 {
		d.memory.remember(w, p, have, peers, result.Index, second)
	}
	problems := append(p.Problems, failed...)
	d.settle(w, p.MTU, peers, problems)
	r := newReport(problems, p.MTU, changed, err)
	r.Refused, r.Notices, r.Stopped, r.Left = p.Refused, slices.Concat(p.Notices, second), stopped, p.Left
	d.routes = largest(have.Elsewhere)
	r.Routes = d.routes
	return r, err
}

// setPeers is Apply for the case that only peers changed since the last one. ok
// is false when it is not so simple; then the kernel has to be read.
func (d *Datapath) setPeers(ctx context.Context, old, now []conf.Peer) (r Report, ok bool) {
	m := &d.memory
	if len(m.possible.Overlays) == 0 && (len(m.peers) == 0 || len(m.peers)+len(now) == len(old)) {
		return Report{}, false // with the first peer come rules, and with the last they go
	}
	if m.noVTEP || m.refusesSecond(old) || m.refusesSecond(now) || !d.rules.knowsAfar(old, now) || !d.locate(old, now) {
		return Report{}, false
	}
	var p *plan.Plan
	prepare := func() bool {
		var had plan.Entries
		if p, had, ok = plan.ForPeers(m.possible, old, now); !ok || p.TouchedBy(m.foreign) || p.Takes(d.kernel.Expected.Entries, had) {
			return false
		}
		d.kernel.Expected.Update(had, p.Entries)
		return true
	}
	var failed []plan.Problem
	letIn := func() {
		if err := d.rules.change(ctx, m.possible, old, now); err != nil {
			failed = append(failed, plan.Problem{Err: err})
		}
	}
	program := func() (kernel.Result, error) { return d.kernel.Apply(ctx, p.Ops, m.index, nil) }
	result, ok, err := inTurn(prepare, letIn, program, len(now) < many)
	if !ok {
		return Report{}, false // reading it, the rules are set to what they should be as well
	}
	if result.Changed > 0 {
		d.log.Debug("peers changed", "objects", result.Changed)
	}
	if errors.Is(err, rtnl.ErrOverrun) {
		m.trust = nothing // ask the kernel what it did
		return Report{}, false
	}
	failed = append(failed, result.Failed...)
	if err != nil || len(failed)+len(result.Second) > 0 {
		m.trust = nothing
	}
	m.replace(old, now)
	r = newReport(append(slices.Clip(m.problems), failed...), m.mtu, result.Changed, err)
	r.PeersOnly, r.Refused, r.Notices, r.Stopped, r.Routes = true, m.refused, slices.Concat(m.notices, secondNotices(result.Second)), d.others.known(), d.routes
	return r, true
}

// many is from how many peers on they are let in beside being routed to.
const many = 500

// inTurn lets peers in before they are sent to, so that no answer of theirs is lost.
// Of as many as come when a host starts, with whom nobody talks yet, all are routed
// to sooner when they are let in while that is planned and done. Neither has need of
// the calling thread's namespace. What cannot be prepared is not programmed.
func inTurn[T any](prepare func() bool, letIn func(), program func() (T, error), first bool) (result T, ok bool, err error) {
	if first {
		if !prepare() {
			return result, false, nil
		}
		letIn()
		result, err = program()
		return result, true, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if ok = prepare(); ok {
			result, err = program()
		}
	}()
	letIn()
	<-done
	return result, ok, err
}

// secondNotices are what the kernel refused at the second VXLAN device.
func secondNotices(errs []error) (out []string) {
	for _, err := range errs[:min(len(errs), maxReported)] {
		out = append(out, fmt.Sprintf("hosts of the other underlay family are not reached as they should be: %v", err))
	}
	return out
}

// maxRoutes bounds Report.Routes.
const maxRoutes = 32

// largest are the largest of some ranges, of each family half of them at most.
func largest(ranges map[netip.Prefix]struct{}) (out []netip.Prefix) {
	var families [2][]netip.Prefix
	for p := range ranges {
		i := 0
		if p.Addr().Is6() {
			i = 1
		}
		families[i] = append(families[i], p)
	}
	for _, f := range families {
		slices.SortFunc(f, func(a, b netip.Prefix) int {
			return cmp.Or(cmp.Compare(a.Bits(), b.Bits()), a.Addr().Compare(b.Addr()))
		})
		out = append(out, f[:min(len(f), maxRoutes/2)]...)
	}
	return out
}

// maxReported is how many failures of one overlay are reported in full.
// Thousands of peers tend to fail for one reason.
const maxReported = 8

func newReport(problems []plan.Problem, mtu, changed int, err error) Report {
	r := Report{MTU: mtu, Changed: changed}
	by := map[string][]error{}
	for _, p := range problems {
		by[p.Overlay] = append(by[p.Overlay], p.Err)
	}
	for overlay, errs := range by {
		if n := len(errs) - maxReported; n > 0 {
			errs = append(errs[:maxReported:maxReported], fmt.Errorf("and %d more", n))
		}
		joined := errors.Join(errs...)
		if overlay == "" {
			err = errors.Join(joined, err)
			continue
		}
		if r.Overlays == nil {
			r.Overlays = map[string]error{}
		}
		r.Overlays[overlay] = joined
	}
	r.Err = err
	return r
}
