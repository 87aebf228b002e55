package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/crashpoint"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// What problems of the loop are about.
const (
	storeLeaseProblem = "storing the lease"
	storePeersProblem = "storing the peers"

	storeInstanceProblem = "storing the instance"

	directoriesProblem = "directories"
	publishProblem     = "publishing"
	filesProblem       = "files of the container runtimes"
	followProblem      = "following the peers"
	stoppedProblem     = "rules of others"
	fastProblem        = "fast path"
	hostProblem        = "host"
	overlayProblem     = "overlay " // and its name
	reportProblem      = "reporting to the coordinator"
	watchProblem       = "watching the published document"
)

// setIP sets the agent IP that the VTEP sends from.
func (l *loop) setIP(ip netip.Addr) {
	l.lease.ip = ip
	l.lease.current.Store(&ip)
}

// hold makes lease the one that is held; nil: none.
func (l *loop) hold(lease *heldLease) {
	l.lease.held = lease
	shown := &conf.Lease{}
	if lease != nil {
		shown = &lease.Lease
	}
	l.lease.shown.Store(shown)
}

// goHome looks, now and then, whether the coordinator that is this agent's own
// is there again, and moves back to it. It returns nil when ctx is done.
func (l *loop) goHome(ctx context.Context) error {
	for pause(ctx, jitter(l.timing.home)) {
		if l.opts.Coordinator.Return(ctx) {
			kick(l.atHome)
		}
	}
	return nil
}

// recall reads what earlier runs of the agent stored.
func (l *loop) recall() {
	l.recallDocument()
	if s, ok := l.files.loadLease(l.id); ok {
		s.Lease.Bridges = l.opts.Bridges
		l.hold(&heldLease{Lease: s.Lease, renewed: l.boot.adopt(s.Renewed, s.Lease.Term()), returned: s.Returned})
		l.lease.left = s.Left
		l.lease.stored = l.expires()
		l.lease.listening = s.Lease.Direct
		if s.Renewed.BootID != l.boot.id {
			l.saveLease() // so that a restart does not count from a later moment
		}
		if !l.lease.ip.IsValid() {
			l.setIP(s.Lease.AgentIP)
		}
		l.recallPeers(s.Lease.ClusterID)
		l.log.Info("lease and peers recalled; applying them until the coordinator answers",
			logkey.Epoch, s.Lease.Epoch, logkey.Peers, len(l.peers.claims.peers))
	}
	l.publish()
}

// checkIP finds out whether the agent IP changed while the agent was away. It
// does not wait for name servers: the registrar finds out, too. An address that
// this host still has stays until the coordinator has accepted another one.
func (l *loop) checkIP(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, l.timing.firstIP)
	defer cancel()
	if ip, err := l.findIP(ctx); err == nil && ip != l.lease.ip && !onHost(l.lease.ip) {
		l.log.Info("agent IP changed while the agent was away", logkey.From, l.lease.ip, logkey.To, ip)
		l.setIP(ip)
	}
}

// registered takes in what came of a registration.
func (l *loop) registered(ctx context.Context, r registration) {
	l.agent.counts.registration(r.err)
	if r.err != nil {
		l.registrationFailed(ctx, r)
		return
	}
	moved := l.moveTo(r.ip)
	if l.lease.refusal != "" {
		l.log.Info("registered again")
	}
	l.lease.refusal, l.lease.online = "", true
	clear(l.lease.causes.last)
	l.lease.conflict, l.lease.unconfirmed = "", false

	r.lease.Bridges = l.opts.Bridges
	if l.lease.listening && !r.lease.Direct {
		l.direct.in(l.timing.direct) // the peers hear of it now
	}
	before := l.lease.held
	l.keepHalves(before, &r.lease)
	changed := before == nil || !sameLease(before.Lease, r.lease)
	signed := before == nil || !reflect.DeepEqual(before.Signed, r.lease.Signed)
	l.hold(&heldLease{Lease: r.lease, renewed: r.sent, returned: stillReturned(before, r.lease)})
	l.takeAnswer(r)
	if changed {
		crashpoint.At("lease-received")
		l.leaseChanged(before)
		l.withdraw(before)
	}
	if changed || signed || l.expires()-l.lease.stored >= worthStoring(l.lease.held.Term()) {
		l.saveLease()
	}
	if changed {
		crashpoint.At("lease-stored")
	}
	if moved || l.peers.stop == nil || l.peers.clusterID != r.lease.ClusterID {
		l.follow(ctx)
	}
	l.expectPeers()
	switch {
	case changed || moved || !l.outcome.applied:
		l.reconcile(ctx, false)
	default:
		l.publish()
	}
	l.logPhase()
	// Not before: the kernel is not to wait for the disk, which has the instance beside
	// the one before until then.
	l.problems.Report(storeInstanceProblem, l.instance.accepted())
}

// moveTo makes ip the agent IP and reports whether it was another one before.
func (l *loop) moveTo(ip netip.Addr) bool {
	if !ip.IsValid() || ip == l.lease.ip {
		return false
	}
	if l.lease.ip.IsValid() {
		l.log.Info("agent IP changed", logkey.From, l.lease.ip, logkey.To, ip)
	}
	l.setIP(ip)
	return true
}

// registrationFailed takes in why. Another address than before is used only
// where nobody refused it and this host no longer has the one of before, from
// which nothing could be sent any more.
func (l *loop) registrationFailed(ctx context.Context, r registration) {
	l.logRegistration(r)
	moved := r.ip.IsValid() && r.ip != l.lease.ip
	gone := moved && !onHost(l.lease.ip)
	inUse := isKind(r.err, api.KindIDInUse)
	switch {
	case !answered(r.err):
		if gone {
			l.unfollow()
			l.moveTo(r.ip)
			l.reconcile(ctx, false)
		}
	case !moved:
		l.setConflict(inUse, r.err)
	case l.unfollow():
		// As long as the old address is connected the coordinator takes the
		// new one for another host with a copied agent id.
		l.lease.refusedAt = time.Now()
		kick(l.registrar.kick)
	case time.Since(l.lease.refusedAt) < l.timing.follow:
		kick(l.registrar.kick) // it may not have met the end of the stream yet
	case gone:
		l.setConflict(inUse, r.err)
	default:
		l.lease.rejected.Store(&rejection{ip: r.ip, until: time.Now().Add(l.timing.resync)})
		kick(l.registrar.kick)
	}
	if l.lease.unconfirmed && !inUse {
		l.lease.unconfirmed = false
		l.reconcile(ctx, true)
	}
	l.logPhase()
}

// setConflict takes in that another host has our identity. Then this one may be
// the copy, and the addresses are the other's: no more containers at once. Only
// an accepted registration ends it; a coordinator that cannot answer now knows
// nothing about it.
func (l *loop) setConflict(inUse bool, err error) {
	if !inUse || l.lease.conflict == err.Error() {
		return
	}
	l.lease.conflict = err.Error()
	l.publish()
}

// rejection is an address of this host that the coordinator did not accept.
type rejection struct {
	ip    netip.Addr
	until time.Time // not asked for again before that while there is another
}

// findIP is the agent IP for the next registration: the one the operator gave,
// or the one that is right now. Where none can be found, or the coordinator did
// not accept it, the present one stays as long as the host has it.
func (l *loop) findIP(ctx context.Context) (netip.Addr, error) {
	if l.opts.IP.IsValid() {
		if err := checkGivenIP(l.opts.IP); err != nil {
			return netip.Addr{}, fmt.Errorf("agent IP: %w", err)
		}
		return l.opts.IP, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, l.timing.findIP, fmt.Errorf("not found in %s", l.timing.findIP))
	defer cancel()
	current := *l.lease.current.Load()
	ip, err := agentIP(ctx, l.opts.CoordinatorURLs, current)
	if ip == current {
		return ip, err
	}
	r := l.lease.rejected.Load()
	refused := r != nil && r.ip == ip && time.Now().Before(r.until)
	if (err != nil || refused) && current.IsValid() && onHost(current) {
		return current, nil
	}
	return ip, err
}

// logRegistration publishes why a registration failed, and logs it when that is
// another cause.
func (l *loop) logRegistration(r registration) {
	err, text := r.err, l.lease.causes.wording(r.err)
	if isKind(err, api.KindOtherCluster) && l.lease.held != nil {
		text += "; this host stays with its cluster. To move it on purpose, stop the agent, run overlayd agent teardown, and start it again"
	}
	another := l.lease.causes.met(l.lease.causes.of(err), time.Now())
	if text == l.lease.refusal {
		return
	}
	l.lease.refusal = text
	switch {
	case !another:
	case l.lease.held == nil:
		l.log.Warn("no lease: registration failed; trying again", logkey.Err, err)
	default:
		l.log.Warn("lease not renewed; going on with it and trying again", logkey.Err, err, logkey.Left, l.left().Round(time.Second))
	}
	l.publish()
}

// leaseChanged logs the difference and starts counting anew.
func (l *loop) leaseChanged(before *heldLease) {
	held := l.lease.held
	o := &l.outcome
	o.attempts, o.healthy, o.applied, o.reported = 0, false, false, nil
	o.retry.reset()
	log := l.log.With(logkey.Epoch, held.Epoch, logkey.VTEP, held.VTEP.IP, logkey.VTEP6, held.VTEP.IP6)
	if held.SecondError != "" && (before == nil || before.SecondError != held.SecondError) {
		log.Warn("second agent IP not used", logkey.Reason, held.SecondError)
	}
	if before == nil {
		log.Info("lease granted")
		return
	}
	if before.ClusterID != held.ClusterID {
		log.Warn("the coordinator is of another cluster than before", logkey.From, before.ClusterID, logkey.To, held.ClusterID)
	} else if before.Epoch > held.Epoch {
		log.Warn("the epoch went back; was the coordinator's store restored from an old copy?", logkey.Before, before.Epoch)
	}
	log.Info("lease changed", logkey.Before, before.Epoch)
	if before.SecondIP != held.SecondIP {
		log.Info("second agent IP changed", logkey.From, before.SecondIP, logkey.To, held.SecondIP)
	}
	for _, g := range before.Grants {
		served := slices.ContainsFunc(held.Grants, func(h conf.Grant) bool { return h.Overlay.Name == g.Overlay.Name })
		if !served {
			log.Warn("overlay is no longer served; its bridges and files are removed", logkey.Overlay, g.Overlay.Name)
			l.problems.Forget(func(what string) bool { return what == overlayProblem+g.Overlay.Name })
		}
	}
}

// expires is the CLOCK_BOOTTIME until which the lease holds.
func (l *loop) expires() time.Duration {
	return l.boot.expires(l.lease.held.renewed, l.lease.held.Term())
}

// left is how long that is from now.
func (l *loop) left() time.Duration { return l.expires() - l.boot.now() }

// sameLease leaves out how it was signed.
func sameLease(a, b conf.Lease) bool {
	a.Signed, b.Signed = nil, nil
	x, err1 := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}

func (l *loop) saveLease() {
	held := l.lease.held
	err := conf.WriteJSON(l.files.lease(), savedLease{Lease: held.Lease, Renewed: held.renewed, Left: l.lease.left, Returned: held.returned}, 0o600)
	l.problems.Report(storeLeaseProblem, err)
	if err == nil {
		l.lease.stored = l.expires()
	}
}

// answered reports whether the coordinator was reached, whatever it said.
func answered(err error) bool { return err == nil || errors.As(err, new(*api.Error)) }
