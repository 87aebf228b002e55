package agent

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"overlayd.internal/overlay/overlayd/internal/audit/doctor"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// examiner has doctor look at the host now and then, at what the agent neither
// repairs nor reports by itself, so that the coordinator and its page know (ADR 0034).
type examiner struct {
	runDir, stateDir string
	timing           timing
	log              *slog.Logger
	found            *atomic.Pointer[[]string]
	changed          func() // does not block
}

// maxFindings is how many are told of one host.
const maxFindings = 10

func (a *Agent) newExaminer(log *slog.Logger) *examiner {
	return &examiner{
		runDir: a.opts.RunDir, stateDir: a.opts.StateDir, timing: a.timing, log: log, found: &a.findings,
		changed: func() { kick(a.told) },
	}
}

// run looks until ctx is done. After a start it waits: hosts of a cluster start
// together, and are busy then.
func (e *examiner) run(ctx context.Context) error {
	pause := e.timing.examineFirst
	for {
		t := time.NewTimer(pause + rand.N(pause/4+1))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		found, err := doctor.Examine(ctx, doctor.Options{RunDir: e.runDir, StateDir: e.stateDir, Beside: true})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			e.log.Debug("cannot examine the host", logkey.Err, err)
			pause = e.timing.examine
			continue
		}
		pause = e.timing.examine
		if len(found) > 0 {
			pause = e.timing.examineAgain // somebody may be at work on it
		}
		e.tell(found)
	}
}

// tell keeps what was found, as the coordinator is told it.
func (e *examiner) tell(found []doctor.Finding) {
	lines := []string{}
	for _, f := range found {
		lines = append(lines, "doctor: "+string(f.Severity)+": "+f.What)
	}
	slices.Sort(lines) // errors come first
	lines = lines[:min(len(lines), maxFindings)]
	if was := e.found.Load(); was != nil && slices.Equal(*was, lines) || was == nil && len(lines) == 0 {
		return
	}
	e.found.Store(&lines)
	e.changed()
}
