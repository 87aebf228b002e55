package coordinator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// pace is how fast a reader must be: it has timeout, and one second more for
// every rate bytes, to take a message. It bounds what slow readers keep in
// memory. Tests in this package shorten it.
type pace struct {
	timeout time.Duration
	rate    int
}

var defaultPace = pace{timeout: 30 * time.Second, rate: 32 << 10}

// allows is how long taking so many bytes may last.
func (p pace) allows(bytes int) time.Duration {
	return p.timeout + time.Duration(bytes)*time.Second/time.Duration(p.rate)
}

const (
	// Large messages go out a few at a time, so that a thousand agents that
	// want a snapshot do not keep the processors from those that want a lease.
	// Who has not taken his within maxTurn is slow, and costs no time: then the
	// next may begin.
	largeMessage = 128 << 10
	maxTurns     = 4
	maxTurn      = 5 * time.Millisecond
)

// serveWatch streams peers: GET /v1/watch?agent=ID&revision=N&run=R. A stream holds
// no queue; a slow one catches up with deltas or, if those are forgotten, with
// the newest state. It ends when ended is closed.
func (c *Coordinator) serveWatch(w http.ResponseWriter, r *http.Request, ended <-chan struct{}) error {
	id := r.URL.Query().Get("agent")
	if err := checkAgentID(id); err != nil {
		return err
	}
	known := api.Known{Run: r.URL.Query().Get("run"), Instance: r.URL.Query().Get("instance")}
	if s := r.URL.Query().Get("revision"); s != "" {
		var err error
		if known.Revision, err = strconv.ParseUint(s, 10, 64); err != nil {
			return refuse(http.StatusBadRequest, "revision %.80q: want a number, 0 for a snapshot", s)
		}
	}
	if err := c.reach(r.Context(), known.Revision); err != nil {
		return err
	}
	watch, err := c.beginWatch(id, known)
	if err != nil {
		return err
	}
	defer c.endWatch(id, watch)

	w.Header().Set("Content-Type", "application/x-ndjson")
	// A proxy that collects an answer, or packs it, holds events back.
	w.Header().Set("Cache-Control", "no-store, no-transform")
	w.Header().Set("X-Accel-Buffering", "no")
	// The connection ends with the stream, so there is no need for chunks: each
	// would be three writes to the connection, and wake the reader three times.
	w.Header().Set("Transfer-Encoding", "identity")
	s := &stream{c: c, w: w, ctx: r.Context(), flush: http.NewResponseController(w), revision: known.Revision, run: watch.run}
	if watch.ahead {
		s.revision = 0
	}
	w.Header().Set("Vary", "Accept-Encoding")
	if s.gzip = takesGzip(r.Header); s.gzip {
		w.Header().Set("Content-Encoding", "gzip")
		if _, err := io.WriteString(w, gzipHeader); err != nil {
			return nil
		}
	}
	if s.sync() == nil { // the agent learns at once that it is connected
		s.follow(watch, ended)
	}
	return nil // the status line is out; whatever happens now ends the stream
}

// maxBehind is how long a stream waits for this coordinator to know what another
// one has told already.
const maxBehind = 3 * time.Second

// reach waits until the view has a revision that another coordinator has told, if
// the store has it.
func (c *Coordinator) reach(ctx context.Context, revision uint64) error {
	c.mu.Lock()
	behind := revision > c.view.rev
	c.mu.Unlock()
	if !behind {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, maxBehind)
	defer cancel()
	_, rev, err := c.store.List(ctx, keyRuns)
	if err != nil {
		return fmt.Errorf("find out whether revision %d is in the store: %w", revision, err)
	}
	if revision > rev {
		return nil // told from a store that is no longer
	}
	return c.await(ctx, revision)
}

// beginWatch connects a stream to its agent.
func (c *Coordinator) beginWatch(id string, known api.Known) (*watch, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.view.agents[id]
	if a == nil {
		return nil, unknownAgent(id)
	}
	if !c.running {
		return nil, refuse(http.StatusServiceUnavailable, "%v", errStopping)
	}
	p := c.presenceLocked(id)
	// A revision that the view has not reached, or that belongs to another run
	// here, comes from a store that is no longer: it was put back as it was before.
	revision := known.Revision
	ahead := revision > c.view.rev || known.Run != "" && known.Run != c.view.runs.at(revision)
	w := &watch{instance: known.Instance, ip: a.IP, wake: make(chan struct{}, 1), ahead: ahead, run: c.view.runs.at(revision)}
	if ahead && p.told != a.mod { // the agent may have moved since what the store says
		w.ip = netip.Addr{}
	}
	if p.watches == nil {
		p.watches = map[*watch]struct{}{}
	}
	p.watches[w] = struct{}{}
	c.noteSeenLocked(id)
	c.announce.lookLater(id)
	if known.Instance != "" && !c.book.Knows(id, known.Instance) {
		c.askToReportLocked(id)
	}
	// Its lease, or the configuration, may have changed while it was away, or in
	// a store that is no longer.
	stale := ahead || revision > 0 && (a.mod > revision || c.view.network.mod > revision)
	switch {
	case p.told != a.mod && (stale || a.Superseded != ""):
		w.ask()
	case p.told == a.mod && p.toldNetwork != c.view.network.mod:
		w.ask() // the configuration changed since it registered
	}
	return w, nil
}

func (c *Coordinator) endWatch(id string, w *watch) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.presence[id]
	delete(p.watches, w)
	if len(p.watches) > 0 {
		return
	}
	c.missOrdersLocked(id, w.orders)
	p.seen = time.Now() // it was here until now
	c.noteSeenLocked(id)
	c.announce.lookLater(id)
	if c.view.agents[id] == nil && p.registering == 0 {
		delete(c.presence, id)
	}
}

// takeAsks are the events that ask the agent for something, once: to register, to
// report, and to look at something.
func (c *Coordinator) takeAsks(w *watch) (asks []api.PeerEvent) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if w.register || w.report {
		asks = append(asks, api.PeerEvent{Register: w.register, Report: w.report})
	}
	for _, o := range w.orders {
		asks = append(asks, api.PeerEvent{Survey: o})
	}
	w.register, w.report, w.orders = false, false, nil
	return asks
}

// notSent puts back what the agent may not have got, because its connection ended.
func (c *Coordinator) notSent(w *watch, asks []api.PeerEvent) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range asks {
		if e.Survey != nil {
			w.orders = append(w.orders, e.Survey)
		}
	}
}

// stream is one watch being written.
type stream struct {
	c        *Coordinator
	w        http.ResponseWriter
	ctx      context.Context // of the request
	flush    *http.ResponseController
	gzip     bool
	revision uint64 // of the last message written
	run      string // of that revision
}

// follow writes until the agent goes, the coordinator stops, or a write fails.
func (s *stream) follow(w *watch, ended <-chan struct{}) {
	heartbeat := time.NewTimer(api.HeartbeatInterval)
	defer heartbeat.Stop()
	due := true // a heartbeat; one at once tells who is up to date that it is
	// News go to all streams at one moment, and when a coordinator has died they begin
	// so. Heartbeats that went on together from there would hold up, each time, whoever
	// wants a lease; so the first one after that comes earlier, each at a time of its own.
	together := true
	for {
		published, run := s.c.published() // before news, so that nothing up to it is missed
		news, more, err := s.news()
		asks := s.c.takeAsks(w)
		if published >= s.revision {
			s.revision, s.run = published, run
		}
		if news || len(asks) > 0 {
			together = true
		} else if due {
			asks = append(asks, api.PeerEvent{}) // a heartbeat
		}
		for _, e := range asks {
			if err != nil {
				break
			}
			e.Revision, e.Run = s.revision, s.run
			news, err = true, s.write(&message{to: s.revision, data: encodeLine(e)})
		}
		if err == nil && news {
			due = false
			silence := api.HeartbeatInterval
			if together {
				silence -= rand.N(api.HeartbeatInterval / 2)
			}
			heartbeat.Reset(silence)
			err = s.flush.Flush() // in the time that the message has
		}
		if err != nil {
			s.c.notSent(w, asks)
			return // the agent will be back
		}
		select {
		case <-more:
		case <-w.wake:
		case <-heartbeat.C:
			due, together = true, false
		case <-s.ctx.Done():
			return
		case <-s.c.stopped:
			return
		case <-ended:
			return
		}
	}
}

// news writes what was published since the last message, and returns a channel
// that is closed when there is more.
func (s *stream) news() (written bool, more <-chan struct{}, err error) {
	for {
		d, more, ok := s.c.hub.next(s.revision)
		if !ok || s.revision == 0 {
			d = s.c.missed(s.revision)
		} else if d == nil {
			return written, more, nil
		}
		if err := s.write(d); err != nil {
			return true, nil, err
		}
		s.revision, s.run, written = d.to, d.run, true
	}
}

func (s *stream) write(m *message) error {
	data := m.data
	if s.gzip {
		data = m.gzipped(s.c.hub)
	}
	if len(data) >= largeMessage {
		done, err := s.turn()
		if err != nil {
			return err
		}
		defer done()
	}
	if err := s.deadline(len(data)); err != nil {
		return err
	}
	_, err := s.w.Write(data)
	return err
}

// turn waits until a large message may go out; done says that it has.
func (s *stream) turn() (done func(), err error) {
	turns := s.c.hub.turns
	select {
	case turns <- struct{}{}:
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	case <-s.c.stopped:
		return nil, errStopping
	}
	release := sync.OnceFunc(func() { <-turns })
	timer := time.AfterFunc(maxTurn, release)
	return func() { timer.Stop(); release() }, nil
}

func (s *stream) sync() error {
	if err := s.deadline(0); err != nil {
		return err
	}
	return s.flush.Flush()
}

// deadline allows for so many bytes to be taken.
func (s *stream) deadline(bytes int) error {
	err := s.flush.SetWriteDeadline(time.Now().Add(s.c.pace.allows(bytes)))
	if errors.Is(err, http.ErrNotSupported) {
		return nil // a recorder in place of a connection
	}
	return err
}
