package agent

import (
	"context"
	"errors"
	"time"

	"overlayd.internal/overlay/overlayd/internal/datapath"
)

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
	report, peersOnly := l.program(ctx, resync)
	if !peersOnly && l.hear() {
		// Nearly always the first round: peers came while the host was set up.
		// They are not to wait for the files, and whoever finds the host ready
		// finds them.
		more, _ := l.program(ctx, false)
		more.Changed += report.Changed
		report, expected = more, true
	}
	if ctx.Err() != nil {
		return // a round cut short says nothing
	}
	l.agent.peers.Store(int64(l.dp.Peers()))
	lost := l.claims.lost
	if peersOnly && l.settled && !l.failing && report.Err == nil && len(report.Overlays) == 0 && lost == l.lost {
		return // the document does not tell of peers
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
	l.failing = l.logFailures()
	l.settled = l.settled || !l.failing

	// Runtimes must not find an overlay before its plugins can, and who waits
	// for readiness must find both.
	state, notReady := l.write()
	var err error
	if !l.behind {
		err = l.runtimes.Sync(ctx, l.held.AgentOverlays(nil))
		l.logOnce("files of the container runtimes", err)
	}
	if l.agent.docker != nil && l.report.MTU != 0 {
		l.agent.docker.Set(l.held.AgentOverlays(nil), l.report.MTU)
	}
	l.serve(state, notReady)
	l.tellStatus(false)
	l.plan(l.failing || l.behind || err != nil)
}

// hear takes in an event of the watch if one waits, and reports whether it
// brought anything to apply.
func (l *loop) hear() bool {
	select {
	case p := <-l.peersIn:
		l.peersChanged(p)
	default:
	}
	apply := l.apply.isSet()
	l.apply.clear()
	return apply
}

// program makes the kernel what it should be. peersOnly says that only peers
// had to be looked at.
func (l *loop) program(ctx context.Context, resync bool) (report datapath.Report, peersOnly bool) {
	l.claims.setOwn(l.held.Lease, l.ip)
	cfg := desired(l.held.Lease, l.ip)
	// The peers are written now and then: who was killed may have forgotten one
	// that containers talk to.
	cfg.Partial = !l.caughtUp
	set, gone := l.claims.changes()
	if report, ok := l.dp.Update(ctx, cfg, set, gone, resync); ok {
		return report, !resync
	}
	cfg.Peers = l.claims.all()
	return l.dp.Set(ctx, cfg, resync), false
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
