package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/crashpoint"
	"overlayd.internal/overlay/overlayd/internal/datapath"
)

// kernelChanged plans a repair: soon, but not at full speed against somebody
// who undoes it each time. What takes several steps, as a reload of firewalld
// does, is not to wait for the second repair.
func (l *loop) kernelChanged() {
	l.outcome.kernelEvents = true
	l.resync.in(max(l.timing.kernel, l.outcome.repairs.wait(time.Now())))
}

// reconcile makes kernel, document and files what they should be, and plans
// when to look again.
func (l *loop) reconcile(ctx context.Context, resync bool) {
	if l.lease.held == nil || l.lease.unconfirmed {
		return
	}
	expected := l.apply.isSet() // something new is to be applied
	l.apply.clear()
	report := l.program(ctx, resync)
	peersOnly := report.PeersOnly
	if again := l.drained(report); !peersOnly && l.takePeerEvent() || again {
		// Nearly always the first round: peers came while the host was set up.
		// They are not to wait for the files, and whoever finds the host ready
		// finds them.
		more := l.program(ctx, false)
		l.drained(more)
		more.Changed += report.Changed
		more.Drift = report.Drift
		report, expected = more, true
	}
	if ctx.Err() != nil {
		return // a round cut short says nothing
	}
	l.agent.peers.Store(int64(l.dp.Peers()))
	o := &l.outcome
	lost := l.peers.claims.lost
	if peersOnly && o.healthy && !o.failing && report.Err == nil && len(report.Overlays) == 0 && lost == o.lost {
		return // the document does not tell of peers
	}
	if resync {
		o.repairs.take(time.Now())
		if o.healthy && !expected {
			l.drift.take(report.Drift, time.Now())
		}
	}
	l.takeReport(report, lost)
	crashpoint.At("lease-programmed")
	l.offer()
	crashpoint.At("lease-published")
}

// takeReport takes in what came of a round of the datapath.
func (l *loop) takeReport(report datapath.Report, lost string) {
	o := &l.outcome
	if !o.healthy {
		o.attempts++
	}
	if report.MTU == 0 {
		report.MTU = o.report.MTU // the kernel could not be read
	}
	if o.report.MTU != report.MTU && o.report.MTU != 0 {
		kick(l.registrar.kick) // the others have to know
	}
	o.report, o.applied = report, true
	if lost != o.lost && lost != "" {
		kick(l.registrar.kick)
	}
	o.lost = lost
	o.failing = l.reportFailures()
	var stopped error
	if len(report.Stopped) > 0 {
		stopped = errors.New(strings.Join(report.Stopped, "; "))
	}
	l.problems.Report(stoppedProblem, stopped)
	o.healthy = o.healthy || !o.failing
	l.logPhase()
}

// offer tells plugins, runtimes and coordinator what there is. Runtimes must not
// find an overlay before its plugins can; their files are written on another
// goroutine, and until then the host is not ready.
func (l *loop) offer() {
	state := l.write()
	if l.published.err == nil {
		overlays := withoutStatus(state.Overlays)
		l.runtimes.Set(l.withFiles())
		if l.agent.docker != nil && l.outcome.report.MTU != 0 {
			l.agent.docker.Set(l.allowed(overlays), l.outcome.report.MTU)
		}
	}
	l.serve(state)
	l.showRoom(state.Overlays)
	l.reportStatus(false)
	l.plan(l.outcome.failing || l.published.err != nil)
}

// allowed leaves out the overlays that the datapath refuses: a network of Docker
// comes with a bridge, which would cut the host off all the same.
func (l *loop) allowed(overlays []conf.AgentOverlay) []conf.AgentOverlay {
	return slices.DeleteFunc(slices.Clone(overlays), func(o conf.AgentOverlay) bool {
		return slices.Contains(l.outcome.report.Refused, o.Info.Name)
	})
}

// takePeerEvent takes in an event of the watch if one waits, and reports whether
// it brought anything to apply.
func (l *loop) takePeerEvent() bool {
	select {
	case p := <-l.peers.in:
		l.peersChanged(p)
	default:
	}
	apply := l.apply.isSet()
	l.apply.clear()
	return apply
}

// program makes the kernel what it should be.
func (l *loop) program(ctx context.Context, resync bool) (report datapath.Report) {
	defer func(began time.Time) { l.agent.counts.reconciled(began, report) }(time.Now())
	claims := l.peers.claims
	claims.setOwn(l.lease.held.inUse(), l.lease.ip)
	set, gone := claims.changes()
	cfg := desired(l.effective(), l.lease.ip)
	cfg.Withdrawn = l.withdrawn()
	cfg.Direct = l.routing()
	cfg.Seeking = l.opts.seeksSecond() && !cfg.VTEP.Second.IsValid()
	// The peers are written now and then: who was killed may have forgotten one
	// that containers talk to.
	cfg.Partial = !l.peers.complete
	w := datapath.Wanted{
		Host: cfg, Resync: resync,
		Changes: &datapath.Changes{Set: set, Gone: gone, All: claims.all},
	}
	report = l.dp.Apply(ctx, w)
	l.problems.Report(fastProblem, l.agent.fast.Follow(ctx, w, report))
	return report
}

// plan sets the time of the next look at the kernel.
func (l *loop) plan(failed bool) {
	if failed {
		l.resync.in(l.outcome.retry.next())
		return
	}
	l.outcome.retry.reset()
	if len(l.outcome.left) > 0 && len(l.withdrawn()) > 0 {
		l.resync.in(l.timing.drain)
		return
	}
	l.resync.in(jitter(l.timing.resync))
}

// reportFailures takes in the datapath's report and says whether anything
// failed.
func (l *loop) reportFailures() bool {
	r := l.outcome.report
	failed := r.Err != nil
	l.problems.Report(hostProblem, r.Err)
	for _, g := range l.effective().Grants {
		err := r.Overlays[g.Overlay.Name]
		failed = failed || err != nil
		if err == nil && g.Error != "" {
			err = errors.New(g.Error)
		}
		l.problems.Report(overlayProblem+g.Overlay.Name, err)
	}
	return failed
}
