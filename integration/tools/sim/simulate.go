package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// patience bounds every wait for the coordinator.
const patience = 5 * time.Minute

// sim is a simulation on its way.
type sim struct {
	config
	*Report
	coord    *coordinator
	lines    *lines
	big      chan struct{}
	leases   []peer     // by agent, as first granted
	watchers []*watcher // those of before the storm, then the joiners
	follow   sync.WaitGroup
	unfollow func() // ends all streams

	reports [][]byte     // of the containers, packed, by agent; nil: there are none
	again   atomic.Int64 // how often one was sent once more
	mu      sync.Mutex
	unheard []int // agents that have a lease and have not reported; mu
	joined  bool  // all have a lease; mu
}

// simulate goes through all parts.
func simulate(ctx context.Context, c config) (r *Report, err error) {
	if c.dir == "" {
		if c.dir, err = os.MkdirTemp("", "overlay-sim-"); err != nil {
			return nil, err
		}
		defer os.RemoveAll(c.dir)
	}
	r = &Report{}
	if !c.only {
		whole := c
		whole.containers, whole.tls, whole.reuse = 0, false, false
		err := oneRun(ctx, whole, func(ctx, followers context.Context, s *sim) error {
			s.Report = r
			return s.all(ctx, followers)
		})
		if err != nil {
			return nil, err
		}
	}
	if c.containers > 0 {
		if err := compareReports(ctx, c, r); err != nil {
			return nil, err
		}
	}
	return r, compareStorms(ctx, c, r)
}

// oneRun has something happen to one coordinator. Those who follow have a context of
// their own.
func oneRun(ctx context.Context, c config, parts func(ctx, followers context.Context, s *sim) error) (err error) {
	s := &sim{config: c, Report: &Report{}, lines: newLines(), big: make(chan struct{}, 256), leases: make([]peer, c.agents)}
	if err := s.packReports(); err != nil {
		return err
	}
	if s.coord, err = startCoordinator(ctx, c.overlayd, c.dir, c.tls); err != nil {
		return err
	}
	defer func() { s.coord.kill() }()
	// A coordinator that dies on its own is found out by whoever talks to it.
	ctx, cancel := context.WithCancel(ctx)
	defer s.follow.Wait()
	defer cancel()
	followers, stop := context.WithCancel(ctx)
	defer stop()
	s.unfollow = func() { stop(); s.follow.Wait() }
	return parts(ctx, followers, s)
}

// all goes through all parts but the comparison.
func (s *sim) all(ctx, followers context.Context) error {
	empty, err := s.coord.status("VmRSS")
	if err != nil {
		return err
	}
	for _, part := range []struct {
		name string
		run  func() error
	}{
		{"early", func() error { return s.early(ctx, followers) }},
		{"storm", func() error { return s.storm(ctx, followers) }},
		{"cold", func() error { return s.coldStarts(ctx) }},
		{"renewal", func() error { return s.renewal(ctx) }},
		{"restart", func() error { return s.restart(ctx) }},
		{"idle", func() error { s.unfollow(); return s.rest(ctx, empty) }},
	} {
		s.part = part.name
		if err := part.run(); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return nil
}

// newWatcher returns the kth watcher, for an agent.
func (s *sim) newWatcher(k, agent int) *watcher {
	return &watcher{
		agent: agent, gzip: k*37%100 >= s.plain, coord: s.coord, lines: s.lines, big: s.big,
		known: make([]int32, s.agents),
	}
}

// each calls fn for the agents from..to, each over a connection of its own, or with
// -reuse over as many connections as there are at a time, as behind a proxy. The nth
// wants it to happen n-from parts of over after the beginning.
func (s *sim) each(ctx context.Context, from, to int, over time.Duration, fn func(c *conn, n int, wanted time.Time) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	next.Store(int64(from))
	began := time.Now()
	one := func(held **conn, n int) error {
		wanted := began.Add(over * time.Duration(n-from) / time.Duration(to-from))
		select {
		case <-time.After(time.Until(wanted)):
		case <-ctx.Done():
			return nil
		}
		if *held == nil {
			c, err := s.coord.dial(ctx, n, 1<<10)
			if err != nil {
				return err
			}
			*held = c
		}
		err := fn(*held, n, wanted)
		if !s.reuse || err != nil {
			(*held).Close()
			*held = nil
		}
		return err
	}
	var workers sync.WaitGroup
	for range s.conns {
		workers.Go(func() {
			var held *conn
			for n := int(next.Add(1)) - 1; n < to && ctx.Err() == nil; n = int(next.Add(1)) - 1 {
				if err := one(&held, n); err != nil {
					cancel(err)
				}
			}
			if held != nil {
				held.Close()
			}
		})
	}
	workers.Wait()
	return context.Cause(ctx)
}

// until waits until ok holds for every watcher.
func (s *sim) until(ctx context.Context, what string, watchers []*watcher, mayBreak bool, ok func(*watcher) bool) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		missing := 0
		for _, w := range watchers {
			w.mu.Lock()
			err, fine := w.err, ok(w)
			w.mu.Unlock()
			if err != nil && !mayBreak {
				return fmt.Errorf("a stream broke: %w", err)
			}
			if !fine {
				missing++
			}
		}
		if missing == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d watchers: %s: %w", missing, len(watchers), what, context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// checkPeers compares what watchers know with what was leased to agents 0..n,
// entry by entry.
func (s *sim) checkPeers(watchers []*watcher, n int) error {
	want := make([]int32, s.agents)
	for i, p := range s.leases[:n] {
		want[i] = s.lines.version(p)
	}
	for _, w := range watchers {
		w.mu.Lock()
		same := slices.Equal(w.known, want)
		w.mu.Unlock()
		if !same {
			return fmt.Errorf("%s knows other peers than were leased", agentID(w.agent))
		}
	}
	return nil
}

// totals adds up what watchers have received.
func totals(watchers []*watcher) []tally {
	list := make([]tally, len(watchers))
	for i, w := range watchers {
		w.mu.Lock()
		list[i] = w.tally
		w.mu.Unlock()
	}
	return list
}

// latest is when the last of the watchers came to know what it knows.
func latest(watchers []*watcher) (last time.Time) {
	for _, w := range watchers {
		w.mu.Lock()
		if w.since.After(last) {
			last = w.since
		}
		w.mu.Unlock()
	}
	return last
}

// early registers the agents that follow the peers from before the storm.
func (s *sim) early(ctx, followers context.Context) error {
	err := s.each(ctx, 0, s.config.watchers, 0, func(c *conn, n int, _ time.Time) (err error) {
		if s.leases[n], err = c.register(n); err != nil {
			return err
		}
		s.reportLater(n)
		return c.report(n)
	})
	if err != nil {
		return err
	}
	for n := range s.config.watchers {
		w := s.newWatcher(n, n)
		s.watchers = append(s.watchers, w)
		s.follow.Go(func() { w.run(followers) })
	}
	if err := s.until(ctx, "know each other", s.watchers, false, func(w *watcher) bool { return w.count == s.config.watchers }); err != nil {
		return err
	}
	return s.checkPeers(s.watchers, s.config.watchers)
}

// Rows of how long a storm takes, and of the memory that it takes.
const (
	untilLeased = "until all have a lease"
	peakMemory  = "peak memory of the coordinator"
)

// storm registers all others.
func (s *sim) storm(ctx, followers context.Context) error {
	from, n := s.config.watchers, s.agents-s.config.watchers
	joiners := map[int]*watcher{}
	for k := range s.joiners {
		agent := from + k*n/s.joiners
		joiners[agent] = s.newWatcher(k, agent)
	}
	before := totals(s.watchers)
	cpu, err := s.coord.cpu()
	if err != nil {
		return err
	}
	own, err := cpuOf(os.Getpid())
	if err != nil {
		return err
	}
	waits, asked := make([]float64, n), make([]float64, n)
	began := time.Now()
	leased := make([]float64, n)
	err = s.each(ctx, from, s.agents, s.over, func(c *conn, n int, wanted time.Time) (err error) {
		sent := time.Now()
		if s.leases[n], err = c.register(n); err != nil {
			return err
		}
		leased[n-from] = time.Since(began).Seconds()
		waits[n-from], asked[n-from] = time.Since(wanted).Seconds(), 1000*time.Since(sent).Seconds()
		if w := joiners[n]; w != nil {
			s.follow.Go(func() { w.run(followers) })
		}
		s.reportLater(n)
		return c.report(n)
	})
	if err != nil {
		return err
	}
	ended := time.Now()
	early := s.watchers
	for _, w := range joiners {
		s.watchers = append(s.watchers, w)
	}
	if err := s.until(ctx, "know everybody", s.watchers, false, func(w *watcher) bool { return w.count == s.agents }); err != nil {
		return err
	}
	known := latest(s.watchers).Sub(ended)
	cpuAfter, err1 := s.coord.cpu()
	ownAfter, err2 := cpuOf(os.Getpid())
	peak, err3 := s.coord.status("VmHWM")
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	if err := s.checkPeers(s.watchers, s.agents); err != nil {
		return err
	}
	took := s.add(untilLeased, "s", slices.Max(leased)).P50
	longest := s.add("wait of an agent, from when it wants its lease", "s", waits...).Max
	answer := s.add("answer to a registration, from when it is sent", "ms", asked...).Max
	s.add("last registration until every watcher knows everybody", "s", max(0, known.Seconds()))
	s.add(peakMemory, "MiB", peak)
	s.add("peak memory per agent", "KiB", 1024*peak/float64(s.agents))
	s.add("CPU of the coordinator", "s", cpuAfter-cpu)
	s.add("CPU of the simulator", "s", ownAfter-own)
	var messages, plain, packed []float64
	for i, t := range totals(early) {
		t = t.minus(before[i])
		messages = append(messages, float64(t.messages))
		if early[i].gzip {
			packed = append(packed, float64(t.bytes)/1e6)
		} else {
			plain = append(plain, float64(t.bytes)/1e6)
		}
	}
	most := s.add("messages to one watcher", "", messages...).Max
	s.add("bytes to one watcher, plain", "MB", plain...)
	s.add("bytes to one watcher, gzip", "MB", packed...)
	s.atMost("all have a lease (s)", took, 120)
	s.atMost("longest wait of an agent, all at the same moment (s)", longest, 10)
	s.atMost("longest answer to a registration (s)", answer/1000, 10)
	s.atMost("peak memory of the coordinator (MiB)", peak, 2048)
	// Four windows a second are published while agents keep joining.
	s.atMost("messages to one watcher", most, 20+8*(took+known.Seconds()))
	s.atMost("addresses or subnets with two holders", float64(s.shared()), 0)
	return nil
}

// shared counts VTEPs and subnets that two leases have.
func (s *sim) shared() int {
	taken, twice := map[string]bool{}, 0
	for _, l := range s.leases {
		for _, what := range []string{l.vtep, l.mac, l.subnets} {
			if taken[what] {
				twice++
			}
			taken[what] = true
		}
	}
	return twice
}

// coldStarts has agents follow the peers that know none of them.
func (s *sim) coldStarts(ctx context.Context) error {
	if s.cold == 0 {
		return nil
	}
	for _, packed := range []bool{false, true} {
		how := map[bool]string{false: "plain", true: "gzip"}[packed]
		var list []*watcher
		for k := range s.cold {
			w := s.newWatcher(0, s.agents-1-k)
			w.gzip = packed
			list = append(list, w)
		}
		cpu, err := s.coord.cpu()
		if err != nil {
			return err
		}
		took, err := s.coldStart(ctx, list)
		if err != nil {
			return err
		}
		after, err := s.coord.cpu()
		if err != nil {
			return err
		}
		n := float64(s.cold)
		var bytes, messages float64
		for _, t := range totals(list) {
			bytes += float64(t.bytes) / n
			messages += float64(t.messages) / n
		}
		s.add(how+": everybody known, from connecting", "ms", took...)
		s.add(how+": messages", "", messages)
		s.add(how+": bytes", "MB", bytes/1e6)
		s.add(how+": bytes per peer", "", bytes/float64(s.agents))
		s.add(how+": CPU of the coordinator per watcher", "ms", 1000*(after-cpu)/n)
		s.add(fmt.Sprintf("%s: full mesh of %d, bytes", how, s.agents), "GB", bytes*float64(s.agents)/1e9)
		s.add(fmt.Sprintf("%s: full mesh of %d, CPU of the coordinator", how, s.agents), "s", (after-cpu)/n*float64(s.agents))
	}
	return nil
}

// coldStart returns how long each of the watchers took, in ms.
func (s *sim) coldStart(ctx context.Context, list []*watcher) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	began := time.Now()
	for _, w := range list {
		group.Go(func() { w.run(ctx) })
	}
	if err := s.until(ctx, "know everybody", list, false, func(w *watcher) bool { return w.count == s.agents }); err != nil {
		return nil, err
	}
	if err := s.checkPeers(list, s.agents); err != nil {
		return nil, err
	}
	var took []float64
	for _, w := range list {
		w.mu.Lock()
		took = append(took, 1000*w.since.Sub(began).Seconds())
		w.mu.Unlock()
	}
	return took, nil
}

// renew has every agent ask once more, and returns how long each waited for its
// answer, in ms, and how many were told something else than before.
func (s *sim) renew(ctx context.Context, report bool) (waits []float64, changed int64, err error) {
	waits = make([]float64, s.agents)
	var other atomic.Int64
	err = s.each(ctx, 0, s.agents, 0, func(c *conn, n int, _ time.Time) error {
		sent := time.Now()
		lease, err := c.register(n)
		if err != nil {
			return err
		}
		waits[n] = 1000 * time.Since(sent).Seconds()
		if lease != s.leases[n] {
			other.Add(1)
		}
		if report {
			return c.report(n)
		}
		return nil
	})
	return waits, other.Load(), err
}

// renewal has every agent renew its lease and repeat its report.
func (s *sim) renewal(ctx context.Context) error {
	before, err := s.coord.stored()
	if err != nil {
		return err
	}
	messages := 0
	for _, t := range totals(s.watchers) {
		messages -= t.messages
	}
	cpu, err := s.coord.cpu()
	if err != nil {
		return err
	}
	began := time.Now()
	waits, changed, err := s.renew(ctx, true)
	if err != nil {
		return err
	}
	took := time.Since(began).Seconds()
	cpuAfter, err := s.coord.cpu()
	if err != nil {
		return err
	}
	after, err := s.coord.stored()
	if err != nil {
		return err
	}
	for _, t := range totals(s.watchers) {
		messages += t.messages
	}
	s.add("all renewed and reported once more", "s", took)
	s.add("answer to a renewal, from when it is sent", "ms", waits...)
	s.add("CPU of the coordinator per renewal and report", "us", 1e6*(cpuAfter-cpu)/float64(s.agents))
	s.add("bytes written to disk", "", after.written-before.written)
	s.atMost("renewals that changed a lease", float64(changed), 0)
	s.atMost("bytes written by renewals", after.written-before.written, 0)
	touched := 0.0
	if after.size != before.size || !after.changed.Equal(before.changed) {
		touched = 1
	}
	s.atMost("store files that renewals have touched", touched, 0)
	s.atMost("messages to watchers for renewals", float64(messages), 0)
	return nil
}

// restart kills the coordinator, starts it, and has every agent come back.
func (s *sim) restart(ctx context.Context) error {
	before := totals(s.watchers)
	began := time.Now()
	s.coord.kill()
	if err := s.coord.start(ctx); err != nil {
		return err
	}
	ready := time.Since(began).Seconds()
	waits, changed, err := s.renew(ctx, true)
	if err != nil {
		return err
	}
	took := time.Since(began).Seconds()
	err = s.until(ctx, "follow again", s.watchers, true, func(w *watcher) bool {
		return w.heard > 1 && w.heard == w.streams && w.count == s.agents
	})
	if err != nil {
		return err
	}
	back := time.Since(began).Seconds()
	if err := s.checkPeers(s.watchers, s.agents); err != nil {
		return err
	}
	peak, err := s.coord.status("VmHWM")
	if err != nil {
		return err
	}
	var snapshots, bytes float64
	for i, t := range totals(s.watchers) {
		t = t.minus(before[i])
		snapshots += float64(t.snapshots)
		bytes += float64(t.bytes)
	}
	s.add("killed until ready again", "s", ready)
	s.add("killed until all have renewed", "s", took)
	s.add("killed until all watchers are followed again", "s", back)
	s.add("answer to a renewal, from when it is sent", "ms", waits...)
	s.add("snapshots sent again, of all watchers", "%", 100*snapshots/float64(len(s.watchers)))
	s.add("bytes to a watcher that comes back", "kB", bytes/float64(len(s.watchers))/1e3)
	s.add("peak memory of the coordinator", "MiB", peak)
	s.atMost("leases that differ after the restart", float64(changed), 0)
	return nil
}

// rest looks at a coordinator that has all leases and nothing to do, and then
// at one whose agents follow the peers.
func (s *sim) rest(ctx context.Context, empty float64) error {
	s.coord.kill()
	if err := s.coord.start(ctx); err != nil {
		return err
	}
	loaded, err := s.coord.status("VmRSS")
	if err != nil {
		return err
	}
	s.add("memory of the coordinator with all leases", "MiB", loaded)
	s.add("memory per agent", "KiB", 1024*(loaded-empty)/float64(s.agents))
	if s.idle == 0 {
		return nil
	}
	var revision uint64
	for _, w := range s.watchers {
		revision = max(revision, w.revision)
	}
	streams := make([]*conn, s.idle)
	defer func() {
		for _, c := range streams {
			if c != nil {
				c.Close()
			}
		}
	}()
	err = s.eachIdle(ctx, revision, streams)
	if err != nil {
		return err
	}
	watched, err := s.coord.status("VmRSS")
	if err != nil {
		return err
	}
	perWatcher := 1024 * (watched - loaded) / float64(s.idle)
	s.add(fmt.Sprintf("memory of the coordinator with %d watchers", s.idle), "MiB", watched)
	s.add("memory per watcher", "KiB", perWatcher)
	s.add(fmt.Sprintf("full mesh of %d, memory", s.agents), "MiB", loaded+perWatcher*float64(s.agents)/1024)

	if s.window == 0 {
		return nil
	}
	cpu, err := s.coord.cpu()
	if err != nil {
		return err
	}
	select {
	case <-time.After(s.window):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	after, err := s.coord.cpu()
	if err != nil {
		return err
	}
	s.add(fmt.Sprintf("CPU of the coordinator with %d idle watchers", s.idle), "% of a core", 100*(after-cpu)/s.window.Seconds())
	return nil
}
