package agent

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit"
	"overlayd.internal/overlay/overlayd/internal/dirwatch"
	"overlayd.internal/overlay/overlayd/internal/problems"
	"overlayd.internal/overlay/overlayd/internal/runtimes/docker"
)

// maxChanges bounds one report: one million bytes are what a coordinator takes.
const maxChanges = 4000

// inventory tells the coordinator what is attached on this host and how full the
// halves are. It looks when the address stores have changed, reports what is
// different from what was accepted, and everything where that is not known.
type inventory struct {
	send   func(context.Context, api.AttachmentReport) (int, error)
	state  func() (conf.State, []string)                                       // that is published, and what is wrong
	routes func() []netip.Prefix                                               // see datapath.Report
	docker func() (known map[netip.Addr]docker.Container, asked time.Duration) // nil: no Docker
	runDir string
	id     string
	own    string // instance
	timing timing
	counts *counts

	problems *problems.Set
	watched  *dirwatch.Watch
	begun    chan struct{} // capacity 1: the coordinator asks
	renamed  chan struct{} // capacity 1: docker has become another
	told     chan struct{} // capacity 1: doctor has found something else

	files    map[string]fileMark // of the stores that were read
	seen     content
	accepted content
	sequence uint64
	whole    bool // the next report is everything
	unnamed  bool // something was left out until Docker says what it is
	first    time.Time
}

// content is what a host has. Its parts are never changed.
type content struct {
	put      map[string]api.Attachment
	usage    map[halfKey]api.HalfUsage
	problems []string
	host     api.Host
}

type halfKey struct {
	overlay string
	half    conf.Half
}

// fileMark tells whether a store has been written since.
type fileMark struct {
	size     int64
	modified time.Time
	young    bool // it was looked at so soon that a later write may show the same time
}

func (a *Agent) newInventory(id, instance string, log *slog.Logger) *inventory {
	v := &inventory{
		send: a.opts.Coordinator.ReportAttachments, state: a.reported, routes: a.routes, runDir: a.opts.RunDir, id: id, own: instance, timing: a.timing, counts: a.counts,
		problems: problems.New(log), watched: dirwatch.New(), begun: make(chan struct{}, 1), renamed: a.containers, told: a.told, whole: true,
	}
	if a.docker != nil {
		v.docker = a.docker.Containers
	}
	return v
}

// reported is the published state, and what is wrong on this host.
func (a *Agent) reported() (conf.State, []string) {
	state := a.served.Load().state
	wrong := slices.Concat(state.Problems, state.Notices)
	for _, o := range state.Overlays {
		if o.State != nil && o.State.Status == conf.StatusFailed {
			wrong = append(wrong, "overlay "+o.Info.Name+": "+o.State.Error)
		}
	}
	if found := a.findings.Load(); found != nil {
		wrong = append(wrong, *found...)
	}
	return state, wrong
}

// routes are the ranges that routes of others lead to.
func (a *Agent) routes() []netip.Prefix { return a.served.Load().routes }

// hostOf is what is to be said of the host.
func (v *inventory) hostOf(state conf.State) api.Host {
	h := api.Host{MTU: state.MTU, Datapath: state.Datapath.Taken, Routes: v.routes()}
	if state.Drift != nil {
		for _, c := range state.Drift.Counts {
			h.Drift += c.Objects
		}
	}
	return h
}

// run waits until the coordinator asks, and then reports until ctx is done.
func (v *inventory) run(ctx context.Context) error {
	defer v.watched.Close()
	select {
	case <-ctx.Done():
		return nil
	case <-v.begun:
	}
	v.first = time.Now()
	retry := backoff{min: v.timing.backoffMin, max: v.timing.backoffMax}
	tick := time.NewTicker(v.timing.files)
	defer tick.Stop()
	due, probe, retrying := time.After(0), true, false
	var least <-chan time.Time // until then nothing is looked at
	look := true
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-v.begun:
			if due == nil || retrying {
				due, retrying = time.After(0), false
			}
			probe = true
		case <-v.watched.Events():
			look = true
		case <-v.told:
			look = true
		case <-v.renamed:
			look = true
			clear(v.files) // the stores are as they were
		case <-tick.C:
			look = true // what cools gets free without a change
			clear(v.files)
		case <-least:
			least = nil
		case <-due:
			due, look = nil, true
		}
		if due != nil || least != nil || !look {
			continue
		}
		look = false
		began := time.Now()
		changed := v.look(ctx)
		// A look costs more the more is attached, and a host attaches many at once. On a
		// busy host it is long for other reasons, and others wait for what it says.
		least = time.After(max(v.timing.report, min(50*time.Since(began), v.timing.reportMost)))
		if v.unnamed {
			look = true
			clear(v.files)
		}
		if !changed && !probe || v.unnamed && v.whole && time.Since(v.first) < namePatience {
			continue
		}
		if err := v.report(ctx, probe); err != nil {
			due, retrying = time.After(max(retry.next(), v.patience(err))), true
			continue
		}
		probe = false
		retry.reset()
	}
}

// patience is how long a refusal is to be left alone: a coordinator of an earlier
// version knows nothing of these reports.
func (v *inventory) patience(err error) time.Duration {
	var e *api.Error
	if errors.As(err, &e) && (e.Code == http.StatusNotFound || e.Code == http.StatusBadRequest) {
		return v.timing.backoffMax
	}
	return 0
}

// watch has changes of the address stores wake the inventory. There is no
// directory before the first container.
func (v *inventory) watch() {
	_ = v.watched.AddNames(v.runDir) // the ticker sees what it does not
	if dir := filepath.Join(v.runDir, conf.IPAMDir); isDir(dir) {
		_ = v.watched.Add(dir)
	}
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

// look reads what there is and reports whether that is another than was accepted.
func (v *inventory) look(ctx context.Context) (changed bool) {
	v.watch()
	state, wrong := v.state()
	now := content{put: v.seen.put, usage: v.seen.usage, problems: wrong, host: v.hostOf(state)}
	if v.written() || v.seen.put == nil {
		v.counts.reads.Add(1)
		stores, err := audit.ReadAttached(ctx, v.runDir, state)
		if ctx.Err() != nil {
			return false
		}
		v.problems.Report("reading the address stores", err)
		if err != nil {
			v.files = nil
		}
		now = v.compose(stores, wrong, err != nil)
		now.host = v.hostOf(state)
	}
	v.seen = now
	return v.whole || !reflect.DeepEqual(now, v.accepted)
}

// written reports whether a store, or the published state, may have changed since
// it was read. To open a store is an event of its directory, too, also without a change.
func (v *inventory) written() (changed bool) {
	files, _ := filepath.Glob(filepath.Join(v.runDir, conf.IPAMDir, "*.db")) // the pattern is well formed
	marks := map[string]fileMark{}
	for _, path := range append(files, filepath.Join(v.runDir, conf.StateFile)) {
		st, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return true
		}
		m := fileMark{st.Size(), st.ModTime(), time.Since(st.ModTime()).Abs() < clockTick}
		if was, ok := v.files[path]; !ok || was.young || was.size != m.size || !was.modified.Equal(m.modified) {
			changed = true
		}
		marks[path] = m
	}
	changed = changed || len(marks) != len(v.files)
	v.files = marks
	return changed
}

// clockTick is longer than the step of the clock that files are stamped with.
const clockTick = 20 * time.Millisecond

// compose makes the content of what the stores have. What a store that could not
// be read has stays as it was.
func (v *inventory) compose(stores map[string]audit.Store, wrong []string, partly bool) content {
	now := content{put: map[string]api.Attachment{}, usage: map[halfKey]api.HalfUsage{}, problems: wrong}
	v.unnamed = false
	for overlay, s := range stores {
		for _, r := range s.Records {
			v.put(now.put, overlay, r)
		}
		for _, u := range audit.HalfUsages(s.Usage) {
			now.usage[halfKey{u.Overlay, u.Half}] = u
		}
	}
	v.keepTimes(now.put)
	if partly {
		for key, a := range v.seen.put {
			if _, read := stores[a.Overlay]; !read {
				now.put[key] = a
			}
		}
		for key, u := range v.seen.usage {
			if _, read := stores[u.Overlay]; !read {
				now.usage[key] = u
			}
		}
	}
	return now
}

// report tells what is new until all of it was accepted. A report of which nobody
// knows whether it arrived is followed by everything.
func (v *inventory) report(ctx context.Context, probe bool) error {
	for key := range v.accepted.usage {
		if _, ok := v.seen.usage[key]; !ok {
			v.whole = true // there is no way to say it in a change
		}
	}
	for {
		r, next := v.compare()
		if r.Sequence == v.sequence && !probe {
			return nil
		}
		probe = false
		_, err := v.send(ctx, r)
		v.counts.reported(err)
		if isKind(err, api.KindSnapshotWanted) && !r.Snapshot {
			v.whole, v.accepted = true, content{}
			continue
		}
		if ctx.Err() == nil {
			v.problems.Report("telling the coordinator of the containers", withoutPorts(err))
		}
		if err != nil {
			v.whole, v.accepted, v.sequence = true, content{}, r.Sequence
			return err
		}
		v.whole, v.accepted, v.sequence = false, next, r.Sequence
	}
}

// compare makes the next report, and what will have been told when it was
// accepted. Without a change its sequence is that of the report before.
func (v *inventory) compare() (r api.AttachmentReport, next content) {
	r = api.AttachmentReport{AgentID: v.id, Instance: v.own, Sequence: v.sequence, Snapshot: v.whole}
	next = content{put: maps.Clone(v.accepted.put), usage: v.seen.usage, problems: v.seen.problems, host: v.seen.host}
	if v.whole || next.put == nil {
		next.put = map[string]api.Attachment{}
	}
	for key := range next.put {
		if _, ok := v.seen.put[key]; !ok {
			r.Delete = append(r.Delete, key)
			delete(next.put, key)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(v.seen.put)) {
		a := v.seen.put[key]
		if was, ok := next.put[key]; ok && reflect.DeepEqual(was, a) {
			continue
		}
		if len(r.Put) == maxChanges {
			break // the next report has the rest
		}
		r.Put = append(r.Put, a)
		next.put[key] = a
	}
	for key, u := range v.seen.usage {
		if was, ok := v.accepted.usage[key]; v.whole || !ok || was != u {
			r.Usage = append(r.Usage, u)
		}
	}
	slices.SortFunc(r.Usage, func(a, b api.HalfUsage) int {
		return cmp.Or(strings.Compare(a.Overlay, b.Overlay), strings.Compare(string(a.Half), string(b.Half)))
	})
	if v.whole || !slices.Equal(v.seen.problems, v.accepted.problems) {
		problems := append([]string{}, v.seen.problems...)
		r.Problems = &problems
	}
	if v.whole || !reflect.DeepEqual(v.seen.host, v.accepted.host) {
		host := v.seen.host
		r.Host = &host
	}
	if v.whole || r.Host != nil || len(r.Put) > 0 || len(r.Delete) > 0 || len(r.Usage) > 0 || r.Problems != nil {
		r.Sequence++
	}
	return r, next
}
