package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
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
	claims    *claims       // of the peers
	known     api.Known     // of the peers
	caughtUp  bool          // the coordinator has told, since the start, what we missed
	clusterID string        // of the peers
	refusal   string        // why the last registration failed; "" if it did not
	online    bool          // registered since the start

	// What became of it.
	report   datapath.Report
	applied  bool // report is of the lease we hold
	attempts int  // rounds since the lease changed, until all was well
	settled  bool // all was well since the lease changed
	failing  bool // something failed in the last round
	lost     string
	expired  bool
	seen     map[string]string // last text of each problem that is logged once
	reported map[string]conf.OverlayStatus

	// What is published.
	document []byte // in state.json; nil: nothing of ours
	behind   bool   // what is to be published could not be written
	putBack  bool   // the state directory has to be filled again
	state    conf.State

	apply  *deadline // send the difference to the kernel
	catch  *deadline // by then we have caught up
	resync *deadline // compare with the kernel
	save   *deadline // write the peers
	tidy   *deadline // give back memory
	saving bool      // they are being written
	saved  chan error
	retry  backoff
	last   time.Time // of the last resync

	appliedAt time.Time     // when peers that changed were last applied
	applyTook time.Duration // and how long that took
	stir      bool          // the kernel announced a change since
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
		claims:   newClaims(),
		seen:     map[string]string{},
		apply:    newDeadline(), catch: newDeadline(), resync: newDeadline(), save: newDeadline(), tidy: newDeadline(),
		saved: make(chan error, 1),
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
			l.known, l.clusterID = api.Known{Revision: p.Revision, Run: p.Run}, p.ClusterID
			for _, peer := range p.Peers {
				l.claims.put(peer)
			}
		}
		l.log.Info("lease and peers recalled; applying them until the coordinator answers", "epoch", s.Lease.Epoch, "peers", len(l.claims.peers))
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
	defer l.flushPeers()
	l.tidy.in(l.timing.tidy)
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
		case <-l.agent.firewall:
			l.kernelChanged()
		case <-l.apply.timer.C:
			l.applyPeers(ctx)
		case <-l.catch.timer.C:
			l.catch.clear()
			l.caughtUp = true
			l.applyPeers(ctx)
		case <-l.resync.timer.C:
			l.resync.clear()
			l.maintain(ctx)
		case <-l.save.timer.C:
			l.save.clear()
			l.savePeers()
		case err := <-l.saved:
			l.peersSaved(err)
		case <-l.tidy.timer.C:
			l.tidy.clear()
			l.giveBack()
		}
	}
}

// checkIP finds out whether the agent IP changed while the agent was away. It
// does not wait for name servers: the registrar finds out, too. An address that
// this host still has stays until the coordinator has answered another one.
func (l *loop) checkIP(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, l.timing.firstIP)
	defer cancel()
	if ip, err := l.findIP(ctx); err == nil && ip != l.ip && !onHost(l.ip) {
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
	l.keepDirs()
	if b, err := os.ReadFile(l.files.state()); err != nil || !bytes.Equal(b, l.document) {
		l.document = nil // somebody changed or removed it
	}
	l.reconcile(ctx, true)
	l.checkTerm()
}

// keepDirs makes directories anew that somebody removed while we run, and puts
// back what belongs into the one that survives a reboot: without it this host
// would be another at the next start, with other subnets. A single file is not
// put back; who removes the agent id of a copied host means it.
func (l *loop) keepDirs() {
	var errs []error
	if l.files.run.removed() {
		errs = append(errs, l.files.run.open())
	}
	if l.files.store.removed() {
		l.putBack = true
		errs = append(errs, l.files.store.open())
	}
	err := errors.Join(errs...)
	if l.putBack && err == nil {
		if err = conf.WriteFile(l.files.id(), []byte(l.id+"\n"), 0o600, ""); err == nil {
			l.putBack = false
			l.log.Warn("somebody removed the state directory; put back", "path", l.files.store.path)
			l.save.in(0)
			if l.held != nil {
				l.stored = 0 // if it cannot be stored now, then with the next renewal
				l.saveLease()
			}
		}
	}
	l.logOnce("directories", err)
}

// registered takes in what came of a registration.
func (l *loop) registered(ctx context.Context, o outcome) {
	moved := o.ip.IsValid() && o.ip != l.ip && (answered(o.err) || !onHost(l.ip))
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

func (l *loop) saveLease() {
	err := conf.WriteJSON(l.files.lease(), savedLease{Lease: l.held.Lease, Renewed: l.held.renewed}, 0o600)
	l.logOnce("storing the lease", err)
	if err == nil {
		l.stored = l.expires()
	}
}
