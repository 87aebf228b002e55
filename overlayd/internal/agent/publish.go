package agent

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// recallDocument looks at the published document of an earlier run. It stays,
// so that containers can be attached before there is a lease again, unless it
// is of another agent.
func (l *loop) recallDocument() {
	b, err := conf.ReadRegular(l.files.state(), conf.MaxStateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var state conf.State
	if err == nil {
		err = json.Unmarshal(b, &state)
	}
	if err == nil && state.AgentID == l.id {
		l.published.document, l.published.state = b, state
		l.dp.Formerly(toldSources(state))
		l.agent.fast.Recall(state.Datapath)
		return
	}
	l.log.Warn("the published document of an earlier run is not this agent's; removed", logkey.Path, l.files.state(), logkey.Err, err)
	os.Remove(l.files.state()) // what cannot be removed publishing fails at, and says so
}

// toldSources are those that the run which published a document told firewalld of:
// where it took packets without VXLAN, the ranges of overlays and VTEP addresses of
// the family of its agent IP. Of the others an administrator may have made sources.
func toldSources(s conf.State) (out []netip.Prefix) {
	if s.Datapath.Routing != conf.RoutingDirect {
		return nil
	}
	for _, o := range s.Overlays {
		out = append(out, valid(o.Info.Subnet, o.Info.Subnet6, o.Backend.VXLAN.VTEPIP.Masked(), o.Backend.VXLAN.VTEPIP6.Masked())...)
	}
	return slices.DeleteFunc(out, func(p netip.Prefix) bool { return p.Addr().Is6() != s.IP.Is6() })
}

// runDirChanged plans a look at the document: soon, but not at full speed
// against somebody who changes it each time. Our own attempts to write it are
// changes, too.
func (l *loop) runDirChanged() {
	l.look.in(max(l.timing.coalesce, l.timing.lookPause-time.Since(l.published.lookedAt)))
}

// checkDocument puts the published document back if somebody changed or removed
// it.
func (l *loop) checkDocument() {
	l.published.lookedAt = time.Now()
	l.look.clear()
	l.look.in(l.timing.files)
	l.keepDirs()
	l.problems.Report(watchProblem, errors.Join(l.watched.AddNames(l.opts.RunDir), l.watched.AddFile(l.files.state())))
	if l.published.document == nil && l.published.err == nil {
		return // nothing of ours was published yet
	}
	changed := l.readDocument()
	l.publish() // Docker's problems may be others, too
	if changed && l.published.err == nil {
		l.offer()
	}
}

// readDocument compares the document with the one that was published and reports
// whether it is another.
func (l *loop) readDocument() (changed bool) {
	b, err := conf.ReadRegular(l.files.state(), conf.MaxStateFile)
	if err == nil && bytes.Equal(b, l.published.document) {
		return false
	}
	l.published.document = nil
	return true
}

// filesWritten takes in what came of the files of the runtimes.
func (l *loop) filesWritten(err error) {
	l.published.written++
	l.problems.Report(filesProblem, err)
	l.publish()
}

// status is what has become of each overlay.
func (l *loop) status() map[string]conf.OverlayStatus {
	out := map[string]conf.OverlayStatus{}
	if l.lease.held == nil {
		return out
	}
	r := l.outcome.report
	for _, g := range l.effective().Grants {
		s := conf.OverlayStatus{Status: conf.StatusOK}
		err := errors.Join(r.Overlays[g.Overlay.Name], r.Err)
		switch {
		case g.Error != "":
			s = conf.OverlayStatus{Status: conf.StatusFailed, Error: g.Error}
		case err != nil:
			s = conf.OverlayStatus{Status: conf.StatusFailed, Error: err.Error()}
		case !l.outcome.applied:
			s.Status = conf.StatusConfiguring
		}
		out[g.Overlay.Name] = s
	}
	return out
}

// reportStatus reports to the coordinator what it does not have yet, or, if
// again, everything.
func (l *loop) reportStatus(again bool) {
	if !l.lease.online || !l.outcome.applied {
		return
	}
	s := l.status()
	if !again && maps.Equal(s, l.outcome.reported) {
		return
	}
	l.outcome.reported = s
	replace(l.reporter.in, api.StatusReport{AgentID: l.id, Overlays: s})
}

// publish brings document and readiness up to date.
func (l *loop) publish() { l.serve(l.write()) }

// write composes the document and writes it if the content differs. Nothing is
// written before a lease has been applied: a container attached then would hang
// on a bridge that is not there.
func (l *loop) write() conf.State {
	state := l.compose()
	if l.lease.held == nil || !l.outcome.applied && (l.lease.conflict == "" || l.published.document == nil) {
		return state
	}
	document := mustMarshal(state)
	var err error
	if !bytes.Equal(document, l.published.document) {
		if err = conf.WriteFile(l.files.state(), document, 0o644, ""); err == nil {
			l.published.document, l.published.state = document, state
		}
	}
	l.published.err = err
	l.problems.Report(publishProblem, err)
	return state
}

// compose puts the document together.
func (l *loop) compose() conf.State {
	state := conf.State{
		AgentID: l.id, BootID: l.boot.id, ConfigurationAttempts: l.outcome.attempts,
		CoolingSeconds: int(l.opts.Cooling / time.Second), Coordinators: l.opts.CoordinatorURLs, Datapath: l.agent.fast.State(),
		Directories: conf.Directories{CNIBin: l.opts.CNIBinDirs, CNIConf: l.opts.CNIConfDir, State: l.opts.StateDir},
		Drift:       l.drift.state,
		IP:          l.lease.ip, MTU: l.outcome.report.MTU, Version: l.opts.Version,
		Lease: conf.LeaseState{Error: l.lease.refusal, Lost: l.lost()},
	}
	state.Datapath.Routing = l.opts.Routing
	held := l.lease.held
	if held == nil {
		state.Lease.Lost = "there is no lease yet"
		return state
	}
	expires := int64(l.expires())
	if p := l.published.state; p.BootID == l.boot.id && p.Lease.Epoch == held.Epoch {
		expires = later(p.Lease.ExpiresBoottime, expires, held.Term())
	}
	state.SecondIP = held.SecondBeside(l.lease.ip)
	state.Lease.Epoch, state.Lease.ExpiresBoottime = held.Epoch, expires
	state.Overlays = l.effective().AgentOverlays(l.status())
	state.Room = l.hasRoom()
	l.problems.Report(followProblem, l.notFollowing())
	state.Problems, state.Notices = l.hostProblems(), slices.Concat(l.outcome.report.Notices, l.lease.kept, secondRefused(held.Lease))
	return state
}

// secondRefused says that the coordinator did not take the second agent IP.
func secondRefused(l conf.Lease) []string {
	if l.SecondError == "" {
		return nil
	}
	return []string{"the second agent IP of this host is not used: " + l.SecondError}
}

// hostProblems are those that stand nowhere else in the document, and cost more
// than a few seconds.
func (l *loop) hostProblems() []string {
	out := slices.DeleteFunc(l.problems.Lines(), func(line string) bool {
		return strings.HasPrefix(line, overlayProblem) || strings.HasPrefix(line, hostProblem+":") ||
			strings.HasPrefix(line, publishProblem+":") || strings.HasPrefix(line, watchProblem+":")
	})
	if l.agent.docker != nil {
		out = append(out, l.agent.docker.Problems()...)
	}
	return out
}

// notReady says why new containers cannot be attached, as far as the clock has
// no say in it, or nothing.
func (l *loop) notReady() string {
	files, following := l.problems.Text(filesProblem), l.problems.Text(followProblem)
	switch {
	case l.lease.held == nil:
		return "no lease yet: " + cmp.Or(l.lease.refusal, "waiting for the coordinator")
	case l.lost() != "":
		return "the lease is lost: " + l.lost()
	case !l.outcome.applied:
		return "the lease is being applied"
	case l.outcome.report.Err != nil:
		return "the host cannot be configured: " + l.outcome.report.Err.Error()
	case l.published.err != nil:
		return "the state cannot be published: " + l.published.err.Error()
	case l.published.written == 0:
		return "the files of the container runtimes are being written"
	case files != "":
		return filesProblem + ": " + files
	case l.peers.position.Revision == 0 && following != "":
		return followProblem + ": " + following
	}
	return l.failedOverlays()
}

// failedOverlays names those that have no subnet on this host, or that could not be
// set up, as far as containers are to be attached here at all.
func (l *loop) failedOverlays() string {
	if len(l.lease.held.Bridges) == 0 {
		return ""
	}
	var failed []string
	for name, s := range l.status() {
		if s.Status == conf.StatusFailed {
			what := overlayProblem + name
			failed = append(failed, what+": "+strings.TrimPrefix(s.Error, what+": "))
		}
	}
	slices.Sort(failed)
	return strings.Join(failed, "; ")
}

// serve has HTTP show the document.
func (l *loop) serve(state conf.State) {
	l.agent.served.Store(&served{
		document: mustMarshal(state), state: state, routes: l.outcome.report.Routes, notReady: l.notReady(), late: cmp.Or(l.lease.refusal, "the coordinator did not answer"),
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

// withoutStatus is for those who only want to know what is leased.
func withoutStatus(overlays []conf.AgentOverlay) []conf.AgentOverlay {
	out := make([]conf.AgentOverlay, len(overlays))
	for i, o := range overlays {
		o.State = nil
		out[i] = o
	}
	return out
}
