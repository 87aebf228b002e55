package agent

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

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
		CoolingSeconds: int(l.opts.Cooling / time.Second), Coordinators: l.opts.CoordinatorURLs,
		IP: l.ip, MTU: l.report.MTU, Version: l.opts.Version,
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
	l.behind = err != nil
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
		document: mustMarshal(state), state: state, notReady: notReady, late: cmp.Or(l.refusal, "the coordinator did not answer"),
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
