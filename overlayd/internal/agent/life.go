package agent

import (
	"cmp"

	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// phase is where the lease of this host is in its life:
//
//	         registered, or recalled from the state directory
//	no lease ------------------------------------------------> recalled
//	                                        programmed |          ^
//	                                                   v          | lease changed
//	                                                applied ------+
//	                                 nothing failed |             |
//	                                                v             |
//	                                             healthy ---------+
//
//	recalled, applied, healthy -- term ends ---------> expired -- renewed --> back
//	recalled, applied, healthy -- granted elsewhere, or our identity in use elsewhere -> lost -- accepted --> back
//
// Containers are attached in applied and healthy. In expired and lost nothing is
// taken down: those that are there go on.
type phase string

const (
	noLease  phase = "no lease"
	recalled phase = "recalled"
	applied  phase = "applied"
	healthy  phase = "healthy"
	expired  phase = "expired"
	lost     phase = "lost"
)

// phase derives the phase from what the loop knows, so that it cannot differ
// from it.
func (l *loop) phase() phase {
	switch {
	case l.lease.held == nil:
		return noLease
	case l.lost() != "":
		return lost
	case l.left() <= 0:
		return expired
	case !l.outcome.applied:
		return recalled
	case !l.outcome.healthy:
		return applied
	}
	return healthy
}

// lost says why the lease no longer holds, or nothing.
func (l *loop) lost() string { return cmp.Or(l.lease.conflict, l.outcome.lost) }

// logPhase logs that attaching ends, or may begin again.
func (l *loop) logPhase() {
	now := l.phase()
	before := l.lease.phase
	if now == before {
		return
	}
	l.lease.phase = now
	switch {
	case now == expired:
		l.log.Error("lease expired: no new containers until the coordinator answers; the others go on",
			logkey.Reason, cmp.Or(l.lease.refusal, "the coordinator did not answer"))
	case now == lost:
		l.log.Error("lease lost: no new containers", logkey.Reason, l.lost())
	case before == expired || before == lost:
		l.log.Info("lease holds again", logkey.Epoch, l.lease.held.Epoch)
	}
}
