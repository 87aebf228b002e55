package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/datapath"
	"overlayd.internal/overlay/overlayd/internal/runtimes"
)

// loop owns everything the agent knows. All its methods run on its goroutine;
// recall runs before it starts.
type loop struct {
	agent    *Agent
	opts     Options
	timing   timing
	id       string
	boot     boot
	log      *slog.Logger
	files    *files
	dp       *datapath.Datapath
	runtimes *runtimes.Files

	registrar *registrar
	reporter  *reporter
	group     *errgroup.Group // of the goroutines of Run
	peersIn   chan peerChange
	watches   int                // generation of the last watcher
	stopWatch context.CancelFunc // of the watcher; nil: there is none

	// What is known.
	ip        netip.Addr
	held      *heldLease    // nil: none
	stored    time.Duration // when the lease ends (as boot.expires) by what is on disk
	peers     map[string]conf.Peer
	revision  uint64 // of the peers
	caughtUp  bool   // the coordinator has told, since the start, what we missed
	clusterID string // of the peers
	refusal   string // why the last registration failed; "" if it did not
	online    bool   // registered since the start

	// What became of it.
	report   datapath.Report
	applied  bool // report is of the lease we hold
	attempts int  // rounds since the lease changed, until all was well
	settled  bool // all was well since the lease changed
	lost     string
	expired  bool
	seen     map[string]string // last text of each problem that is logged once
	reported map[string]conf.OverlayStatus

	// What is published.
	document []byte // in state.json; nil: nothing of ours
	state    conf.State

	apply  *deadline // send the difference to the kernel
	resync *deadline // compare with the kernel
	save   *deadline // write the peers
	retry  backoff
	last   time.Time // of the last resync
	stir   bool      // the kernel announced a change since
}

// loopParts are what Run opened for the loop.
type loopParts struct {
	id     string
	bootID string
	log    *slog.Logger
	files  *files
	dp     *datapath.Datapath
	group  *errgroup.Group
}

func (a *Agent) newLoop(p loopParts) *loop {
	o := a.opts
	l := &loop{
		agent: a, opts: o, timing: a.timing, id: p.id, log: p.log, files: p.files, dp: p.dp, group: p.group,
		boot:     boot{id: p.bootID, now: ipam.Boottime},
		runtimes: o.runtimeFiles(p.log),
		peersIn:  make(chan peerChange),
		ip:       o.IP,
		peers:    map[string]conf.Peer{},
		seen:     map[string]string{},
		apply:    newDeadline(), resync: newDeadline(), save: newDeadline(),
		retry: backoff{min: a.timing.retryMin, max: a.timing.resync},
	}
	l.registrar = &registrar{
		ask:    o.Coordinator.Register,
		find:   l.findIP,
		req:    api.RegisterRequest{AgentID: p.id, Bridges: o.Bridges, Version: o.Version},
		boot:   l.boot,
		timing: a.timing,
		kick:   make(chan struct{}, 1),
		out:    make(chan outcome),
	}
	l.reporter = &reporter{
		send:   o.Coordinator.Report,
		timing: a.timing, log: p.log,
		in:       make(chan api.StatusReport, 1),
		register: l.registrar.kick,
	}
	return l
}

// findIP is the agent IP for the next registration: the one the operator gave
// or the one that is right now.
func (l *loop) findIP(ctx context.Context) (netip.Addr, error) {
	if l.opts.IP.IsValid() {
		return l.opts.IP, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, l.timing.findIP, fmt.Errorf("not found in %s", l.timing.findIP))
	defer cancel()
	return agentIP(ctx, l.opts.CoordinatorURLs)
}

// recall reads what earlier runs of the agent stored.
func (l *loop) recall() {
	l.recallDocument()
	if s, ok := l.files.loadLease(l.id); ok {
		s.Lease.Bridges = l.opts.Bridges
		l.held = &heldLease{Lease: s.Lease, renewed: l.boot.adopt(s.Renewed, s.Lease.Term())}
		l.stored = l.expires()
		if s.Renewed.BootID != l.boot.id {
			l.saveLease() // so that a restart does not count from a later moment
		}
		if !l.ip.IsValid() {
			l.ip = s.Lease.AgentIP
		}
		if p, ok := l.files.loadPeers(l.id, s.Lease.ClusterID); ok {
			l.revision, l.clusterID = p.Revision, p.ClusterID
			for _, peer := range p.Peers {
				l.peers[peer.AgentID] = peer
			}
		}
		l.log.Info("lease and peers recalled; applying them until the coordinator answers", "epoch", s.Lease.Epoch, "peers", len(l.peers))
	}
	l.publish()
}

// recallDocument looks at the published document of an earlier run. It stays,
// so that containers can be attached before there is a lease again, unless it
// is of another agent.
func (l *loop) recallDocument() {
	b, err := os.ReadFile(l.files.state())
	if err != nil {
		return // there is none, or publish will meet the same error
	}
	if err := json.Unmarshal(b, &l.state); err != nil || l.state.AgentID != l.id {
		l.log.Warn("the published document of an earlier run is not this agent's; removed", "path", l.files.state())
		os.Remove(l.files.state())
		l.state = conf.State{}
		return
	}
	l.document = b
}

// run is the control loop. It returns nil when ctx is done.
func (l *loop) run(ctx context.Context, changes <-chan struct{}) error {
	defer func() {
		if l.save.isSet() {
			l.savePeers()
		}
	}()
	if l.held != nil {
		l.checkIP(ctx)
		l.reconcile(ctx, true)
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case o := <-l.registrar.out:
			l.registered(ctx, o)
		case p := <-l.peersIn:
			l.peersChanged(p)
		case _, ok := <-changes:
			if !ok {
				changes = nil
				continue
			}
			l.kernelChanged()
		case <-l.apply.timer.C:
			l.reconcile(ctx, false)
		case <-l.resync.timer.C:
			l.resync.clear()
			l.maintain(ctx)
		case <-l.save.timer.C:
			l.save.clear()
			l.savePeers()
		}
	}
}

// checkIP finds out whether the agent IP changed while the agent was away. It
// does not wait for name servers: the registrar finds out, too.
func (l *loop) checkIP(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, l.timing.firstIP)
	defer cancel()
	if ip, err := l.findIP(ctx); err == nil && ip != l.ip {
		l.log.Info("agent IP changed while the agent was away", "from", l.ip, "to", ip)
		l.ip = ip
	}
}

// maintain is the slow round: whatever has to be looked at now and then even
// though nothing was heard of it has its place here.
func (l *loop) maintain(ctx context.Context) {
	if l.stir && !l.opts.IP.IsValid() {
		kick(l.registrar.kick) // the agent IP may be another one now
	}
	l.stir = false
	if b, err := os.ReadFile(l.files.state()); err != nil || !bytes.Equal(b, l.document) {
		l.document = nil // somebody changed or removed it
	}
	l.reconcile(ctx, true)
	l.checkTerm()
}

// registered takes in what came of a registration.
func (l *loop) registered(ctx context.Context, o outcome) {
	moved := o.ip.IsValid() && o.ip != l.ip
	if moved {
		if l.ip.IsValid() {
			l.log.Info("agent IP changed", "from", l.ip, "to", o.ip)
		}
		l.ip = o.ip
	}
	if o.err != nil {
		l.registrationFailed(o.err)
		if moved {
			if l.unfollow() {
				// As long as the old address is connected the coordinator takes
				// the new one for another host with a copied agent id.
				kick(l.registrar.kick)
			}
			l.reconcile(ctx, false)
		}
		return
	}
	if l.refusal != "" {
		l.log.Info("registered again")
	}
	l.refusal = ""
	delete(l.seen, "registration")
	l.online = true

	o.lease.Bridges = l.opts.Bridges
	changed := l.held == nil || !sameLease(l.held.Lease, o.lease)
	before := l.held
	l.held = &heldLease{Lease: o.lease, renewed: o.sent}
	if changed {
		l.leaseChanged(before)
	}
	if changed || l.expires()-l.stored >= noticeable(l.held.Term()) {
		l.saveLease()
	}
	if l.stopWatch == nil || l.clusterID != o.lease.ClusterID {
		l.follow(ctx)
	}
	switch {
	case changed || moved || !l.applied:
		l.reconcile(ctx, false)
	default:
		l.publish()
	}
	l.checkTerm()
}

// registrationFailed logs a failure when its kind changes: an error of the
// network names a port that is another one each time.
func (l *loop) registrationFailed(err error) {
	kind := "unreachable"
	var e *api.Error
	if errors.As(err, &e) {
		kind = e.Message
	}
	defer l.checkTerm()
	if !l.once("registration", kind) {
		return
	}
	l.refusal = err.Error()
	if l.held == nil {
		l.log.Warn("no lease: registration failed; trying again", "err", err)
	} else {
		l.log.Warn("lease not renewed; going on with it and trying again", "err", err, "left", l.left().Round(time.Second))
	}
	l.publish()
}

// leaseChanged logs the difference and starts counting anew.
func (l *loop) leaseChanged(before *heldLease) {
	l.attempts, l.settled, l.applied, l.reported = 0, false, false, nil
	l.retry.reset()
	log := l.log.With("epoch", l.held.Epoch, "vtep", l.held.VTEP.IP, "vtep6", l.held.VTEP.IP6)
	if before == nil {
		log.Info("lease granted")
		return
	}
	if before.ClusterID != l.held.ClusterID {
		log.Warn("the coordinator is of another cluster than before", "from", before.ClusterID, "to", l.held.ClusterID)
	}
	if before.ClusterID == l.held.ClusterID && before.Epoch > l.held.Epoch {
		log.Warn("the epoch went back; was the coordinator's store restored from an old copy?", "before", before.Epoch)
	}
	log.Info("lease changed", "before", before.Epoch)
	has := func(g conf.Grant) bool {
		return slices.ContainsFunc(l.held.Grants, func(h conf.Grant) bool { return h.Overlay.Name == g.Overlay.Name })
	}
	for _, g := range before.Grants {
		if !has(g) {
			log.Warn("overlay is no longer served; its bridges and files are removed", "overlay", g.Overlay.Name)
		}
	}
}

// checkTerm logs, once, that the lease has ended for want of renewal.
func (l *loop) checkTerm() {
	expired := l.held != nil && l.left() <= 0
	if expired && !l.expired {
		l.log.Error("lease could not be renewed in time: no new containers until the coordinator answers; the others go on", "err", l.refusal)
	}
	l.expired = expired
}

// expires is the CLOCK_BOOTTIME until which the lease holds.
func (l *loop) expires() time.Duration { return l.boot.expires(l.held.renewed, l.held.Term()) }

// left is how long that is from now.
func (l *loop) left() time.Duration { return l.expires() - l.boot.now() }

func sameLease(a, b conf.Lease) bool {
	x, err1 := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}

// follow watches the peers, from the revision we know them at if they are of
// the same cluster.
func (l *loop) follow(ctx context.Context) {
	l.unfollow()
	if l.clusterID != l.held.ClusterID {
		l.clusterID, l.revision = l.held.ClusterID, 0
	}
	l.watches++
	w := &watcher{
		watch: l.opts.Coordinator.Watch, id: l.id, generation: l.watches, revision: l.revision,
		timing: l.timing, log: l.log, register: l.registrar.kick, out: l.peersIn,
	}
	ctx, l.stopWatch = context.WithCancel(ctx)
	l.group.Go(func() error { return w.run(ctx) })
}

// unfollow ends the watch and reports whether there was one.
func (l *loop) unfollow() bool {
	if l.stopWatch == nil {
		return false
	}
	l.stopWatch()
	l.stopWatch = nil
	return true
}

// peersChanged takes in an event of the watch.
func (l *loop) peersChanged(c peerChange) {
	if l.stopWatch == nil || c.generation != l.watches {
		return // of a watch that was ended
	}
	if c.connected {
		l.log.Info("following the peers", "revision", c.event.Revision)
		l.tellStatus(true) // the coordinator may have been restarted
		if !l.caughtUp {
			l.caughtUp = true
			l.apply.in(l.timing.coalesce)
		}
	}
	if e := c.event; e.Revision > 0 && e.Revision != l.revision {
		l.revision = e.Revision
		l.save.in(l.timing.resync) // no hurry: an older revision only costs a longer answer
	}
	if l.patch(c.event) {
		l.save.in(l.timing.savePeers)
		l.apply.in(l.timing.coalesce)
	}
}

// patch applies an event to the peers and reports whether it changed any.
func (l *loop) patch(e api.PeerEvent) bool {
	set, removed := 0, 0
	gone := e.Delete
	if e.Snapshot {
		now := map[string]bool{}
		for _, p := range e.Put {
			now[p.AgentID] = true
		}
		for id := range l.peers {
			if !now[id] {
				gone = append(gone, id)
			}
		}
	}
	for _, id := range gone {
		if _, ok := l.peers[id]; ok {
			delete(l.peers, id)
			removed++
			l.log.Debug("peer gone", "peer", id)
		}
	}
	for _, p := range e.Put {
		old, known := l.peers[p.AgentID]
		if known && samePeer(old, p) {
			continue
		}
		l.peers[p.AgentID] = p
		set++
		l.log.Debug("peer", "peer", p.AgentID, "ip", p.AgentIP, "epoch", p.Epoch)
	}
	if set+removed == 0 {
		return false
	}
	l.log.Info("peers changed", "set", set, "gone", removed, "peers", len(l.peers))
	return true
}

// kernelChanged plans a repair: soon, but not at full speed against somebody
// who undoes it each time.
func (l *loop) kernelChanged() {
	l.stir = true
	if time.Since(l.last) < l.timing.kernelPause {
		l.resync.in(l.timing.kernelPause)
		return
	}
	l.resync.in(l.timing.kernel)
}

// reconcile makes kernel, document and files what they should be, and plans
// when to look again.
func (l *loop) reconcile(ctx context.Context, resync bool) {
	if l.held == nil {
		return
	}
	expected := l.apply.isSet() // something new is to be applied
	l.apply.clear()
	cfg, lost := desired(l.held.Lease, l.ip, l.peers)
	// The peers are written now and then: who was killed may have forgotten one
	// that containers talk to.
	cfg.Partial = !l.caughtUp
	report := l.dp.Set(ctx, cfg, resync)
	if ctx.Err() != nil {
		return // a round cut short says nothing
	}
	if resync {
		l.last = time.Now()
		if l.settled && !expected && report.Changed > 0 {
			l.log.Info("kernel state repaired", "objects", report.Changed)
		}
	}
	if !l.settled {
		l.attempts++
	}
	if report.MTU == 0 {
		report.MTU = l.report.MTU // the kernel could not be read
	}
	l.report, l.applied = report, true
	if lost != l.lost && lost != "" {
		l.log.Error("lease lost: no new containers", "reason", lost)
		kick(l.registrar.kick)
	}
	l.lost = lost
	failed := l.logFailures()
	l.settled = l.settled || !failed

	// Runtimes must not find an overlay before its plugins can, and who waits
	// for readiness must find both.
	state, notReady := l.write()
	err := l.runtimes.Sync(ctx, l.held.AgentOverlays(nil))
	l.logOnce("files of the container runtimes", err)
	l.serve(state, notReady)
	l.tellStatus(false)
	l.plan(failed || err != nil)
}

// plan sets the time of the next look at the kernel.
func (l *loop) plan(failed bool) {
	if failed {
		l.resync.in(l.retry.next())
		return
	}
	l.retry.reset()
	l.resync.in(jitter(l.timing.resync))
}

// logFailures logs what changed in the datapath's report and says whether
// anything failed.
func (l *loop) logFailures() bool {
	failed := l.report.Err != nil
	l.logOnce("host", l.report.Err)
	for _, g := range l.held.Grants {
		err := l.report.Overlays[g.Overlay.Name]
		failed = failed || err != nil
		if err == nil && g.Error != "" {
			err = errors.New(g.Error)
		}
		l.logOnce("overlay "+g.Overlay.Name, err)
	}
	return failed
}

// logOnce logs a problem when it begins or becomes another, and its end.
func (l *loop) logOnce(what string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if !l.once(what, text) {
		return
	}
	if err == nil {
		l.log.Info("works again", "what", what)
		return
	}
	l.log.Warn("does not work; trying again", "what", what, "err", err)
}

// once reports whether the text of a problem is another than the last time.
func (l *loop) once(what, text string) bool {
	if l.seen[what] == text {
		return false
	}
	l.seen[what] = text
	return true
}

// status is what has become of each overlay.
func (l *loop) status() map[string]conf.OverlayStatus {
	out := map[string]conf.OverlayStatus{}
	if l.held == nil {
		return out
	}
	for _, g := range l.held.Grants {
		s := conf.OverlayStatus{Status: conf.StatusOK}
		err := errors.Join(l.report.Overlays[g.Overlay.Name], l.report.Err)
		switch {
		case g.Error != "":
			s = conf.OverlayStatus{Status: conf.StatusFailed, Error: g.Error}
		case err != nil:
			s = conf.OverlayStatus{Status: conf.StatusFailed, Error: err.Error()}
		case !l.applied:
			s.Status = conf.StatusConfiguring
		}
		out[g.Overlay.Name] = s
	}
	return out
}

// tellStatus reports to the coordinator what it does not know yet, or, if
// again, everything.
func (l *loop) tellStatus(again bool) {
	if !l.online || !l.applied {
		return
	}
	s := l.status()
	if !again && maps.Equal(s, l.reported) {
		return
	}
	l.reported = s
	replace(l.reporter.in, api.StatusReport{AgentID: l.id, Overlays: s})
}

// publish brings document and readiness up to date.
func (l *loop) publish() { l.serve(l.write()) }

// write composes the document and writes it if the content differs. Nothing is
// written before a lease has been applied. notReady says why new containers
// cannot be attached, as far as the clock has no say in it.
func (l *loop) write() (state conf.State, notReady string) {
	state = conf.State{
		AgentID: l.id, BootID: l.boot.id, ConfigurationAttempts: l.attempts,
		CoolingSeconds: int(l.opts.Cooling / time.Second),
		IP:             l.ip, MTU: l.report.MTU, Version: l.opts.Version,
		Lease: conf.LeaseState{Error: l.refusal, Lost: l.lost},
	}
	if l.held == nil {
		state.Lease.Lost = "there is no lease yet"
		return state, "no lease yet: " + cmp.Or(l.refusal, "waiting for the coordinator")
	}
	expires := int64(l.expires())
	if l.state.BootID == l.boot.id && l.state.Lease.Epoch == l.held.Epoch {
		expires = later(l.state.Lease.ExpiresBoottime, expires, l.held.Term())
	}
	state.Lease.Epoch, state.Lease.ExpiresBoottime = l.held.Epoch, expires
	state.Overlays = l.held.AgentOverlays(l.status())
	if !l.applied {
		// Not before the kernel has it: a container attached now would hang on
		// a bridge that is not there.
		return state, "the lease is being applied"
	}

	document := mustMarshal(state)
	var err error
	if !bytes.Equal(document, l.document) {
		if err = conf.WriteFile(l.files.state(), document, 0o644, ""); err == nil {
			l.document, l.state = document, state
		}
	}
	l.logOnce("publishing", err)
	switch {
	case l.lost != "":
		notReady = "the lease is lost: " + l.lost
	case l.report.Err != nil:
		notReady = "the host cannot be configured: " + l.report.Err.Error()
	case err != nil:
		notReady = "the state cannot be published: " + err.Error()
	}
	return state, notReady
}

// serve has HTTP show the document.
func (l *loop) serve(state conf.State, notReady string) {
	l.agent.served.Store(&served{
		document: mustMarshal(state), notReady: notReady, late: cmp.Or(l.refusal, "the coordinator did not answer"),
		expires: time.Duration(state.Lease.ExpiresBoottime), now: l.boot.now,
	})
}

// mustMarshal is for values that always have a JSON form.
func mustMarshal(s conf.State) []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic(fmt.Sprintf("marshal the published document: %v", err))
	}
	return append(b, '\n')
}

func (l *loop) saveLease() {
	err := conf.WriteJSON(l.files.lease(), savedLease{Lease: l.held.Lease, Renewed: l.held.renewed}, 0o600)
	l.logOnce("storing the lease", err)
	if err == nil {
		l.stored = l.expires()
	}
}

func (l *loop) savePeers() {
	s := savedPeers{AgentID: l.id, ClusterID: l.clusterID, Revision: l.revision}
	for _, id := range slices.Sorted(maps.Keys(l.peers)) {
		s.Peers = append(s.Peers, l.peers[id])
	}
	err := conf.WriteJSON(l.files.peers(), s, 0o600)
	l.logOnce("storing the peers", err)
	if err != nil {
		l.save.in(l.timing.resync)
	}
}
