package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// silence ends a stream on which nothing was heard, as in an agent.
const silence = 30 * time.Second

// readBuffer has room for most of what is published at a time, or the simulator
// would spend its time in small reads.
const readBuffer = 256 << 10

// bigLine is from where on a line's memory is rationed.
const bigLine = 1 << 20

// watcher is an agent that follows the peers.
type watcher struct {
	agent int
	gzip  bool
	coord *coordinator
	lines *lines
	big   chan struct{} // a token for every long line that may be in memory

	mu       sync.Mutex
	known    []int32 // by agent: version of the peer; 0: not known
	count    int
	revision uint64
	since    time.Time // when the last peers came
	heard    int       // the stream on which something was heard last
	tally
	err error // why a stream ended that nobody had ended
}

// tally is what a watcher has received.
type tally struct {
	streams, messages, snapshots, heartbeats, asked int
	bytes, plain                                    int64 // as sent, and decompressed
}

func (t tally) minus(u tally) tally {
	return tally{t.streams - u.streams, t.messages - u.messages, t.snapshots - u.snapshots,
		t.heartbeats - u.heartbeats, t.asked - u.asked, t.bytes - u.bytes, t.plain - u.plain}
}

// run follows the peers, and connects again when the stream breaks, until ctx
// ends.
func (w *watcher) run(ctx context.Context) {
	for ctx.Err() == nil {
		err := w.stream(ctx)
		if ctx.Err() != nil {
			return
		}
		w.mu.Lock()
		w.err = err
		w.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// stream follows one connection until it breaks.
func (w *watcher) stream(ctx context.Context) error {
	c, err := w.coord.dial(ctx, w.agent, 4<<10)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	w.mu.Lock()
	revision := w.revision
	w.mu.Unlock()
	accept := ""
	if w.gzip {
		accept = "Accept-Encoding: gzip\r\n"
	}
	if err := c.SetDeadline(time.Now().Add(silence)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(c, "GET /v1/watch?agent=%s&revision=%d HTTP/1.1\r\nHost: %s\r\n%s\r\n", agentID(w.agent), revision, c.addr, accept); err != nil {
		return err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		return fmt.Errorf("watch of %s: %s: %s", agentID(w.agent), resp.Status, b)
	}
	w.mu.Lock()
	w.streams++
	w.mu.Unlock()
	if packed := resp.Header.Get("Content-Encoding") == "gzip"; packed != w.gzip {
		return fmt.Errorf("watch of %s: compressed %t, asked for %t", agentID(w.agent), packed, w.gzip)
	}
	if w.gzip {
		return w.readPacked(c, resp.Body)
	}
	return w.read(c, bufio.NewReaderSize(resp.Body, readBuffer))
}

// read takes in one line after the other.
func (w *watcher) read(c *conn, r *bufio.Reader) error {
	var seen int64
	for {
		b, done, err := w.line(c, r)
		if err != nil {
			return err
		}
		e, err := w.lines.read(b)
		length := len(b)
		done()
		if err != nil {
			return err
		}
		w.mu.Lock()
		w.bytes += c.got - seen
		w.plain += int64(length)
		w.take(e)
		w.mu.Unlock()
		seen = c.got
	}
}

// line returns the next line; done has to be called when it has been read.
func (w *watcher) line(c *conn, r *bufio.Reader) (b []byte, done func(), err error) {
	done = func() {}
	for {
		if err := c.SetReadDeadline(time.Now().Add(silence)); err != nil {
			return nil, nil, err
		}
		part, err := r.ReadSlice('\n')
		if err == nil && len(b) == 0 {
			return part, done, nil
		}
		if len(b) < bigLine && len(b)+len(part) >= bigLine {
			w.big <- struct{}{}
			done = func() { <-w.big }
		}
		b = append(b, part...)
		switch {
		case err == nil:
			return b, done, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			done()
			return nil, nil, err
		}
	}
}

// take applies an event.
func (w *watcher) take(e *event) {
	w.heard = w.streams
	w.revision = max(w.revision, e.revision)
	if e.register {
		w.asked++
	}
	if !e.snapshot && len(e.put)+len(e.deleted) == 0 {
		w.heartbeats++
		return
	}
	w.messages++
	if e.snapshot {
		w.snapshots++
		clear(w.known)
		w.count = 0
	}
	for _, n := range e.deleted {
		w.set(entry{int32(n), 0})
	}
	for _, p := range e.put {
		w.set(p)
	}
	w.since = time.Now()
}

func (w *watcher) set(e entry) {
	if old := w.known[e.agent]; old == 0 && e.version != 0 {
		w.count++
	} else if old != 0 && e.version == 0 {
		w.count--
	}
	w.known[e.agent] = e.version
}

// eachIdle opens streams that know everything up to a revision, and leaves them
// alone. They must begin without a snapshot: then a line is short.
func (s *sim) eachIdle(ctx context.Context, revision uint64, streams []*conn) error {
	var next atomic.Int64
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var group sync.WaitGroup
	for range s.conns {
		group.Go(func() {
			for n := int(next.Add(1)) - 1; n < len(streams) && ctx.Err() == nil; n = int(next.Add(1)) - 1 {
				c, err := s.openIdle(ctx, n, revision)
				if err != nil {
					cancel(err)
					return
				}
				streams[n] = c
			}
		})
	}
	group.Wait()
	return context.Cause(ctx)
}

func (s *sim) openIdle(ctx context.Context, n int, revision uint64) (*conn, error) {
	c, err := s.coord.dial(ctx, n, 4<<10)
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(silence)); err != nil {
		return c, err
	}
	if _, err := fmt.Fprintf(c, "GET /v1/watch?agent=%s&revision=%d HTTP/1.1\r\nHost: %s\r\nAccept-Encoding: gzip\r\n\r\n", agentID(n), revision, c.addr); err != nil {
		return c, err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return c, err
	}
	if resp.StatusCode != http.StatusOK {
		return c, fmt.Errorf("watch of %s: %s", agentID(n), resp.Status)
	}
	_, err = resp.Body.Read(make([]byte, 1))
	return c, err
}
