package coordinator

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// Coordinators on one store follow each other: each agent reports to one of them,
// which tells the others all that it has; see docs/adr/0041. So every one answers
// for the whole cluster from its own memory. Who the others are, and where, is in
// their beats.

const (
	// gatherReports is how long reports are gathered for one write.
	gatherReports = 100 * time.Millisecond
	// followAgain is the pause after a stream of another coordinator has ended.
	followAgain = time.Second
)

// other is another coordinator that is at work.
type other struct {
	urls     []string
	complete bool // all that it has is here, and what comes is followed
	replaced bool // others answer at all its addresses: it was started again
	stop     context.CancelFunc
}

// name is how the other one is called where it cannot be reached.
func (o *other) name(run string) string {
	if len(o.urls) > 0 {
		return o.urls[0]
	}
	return "run " + run + ", of an earlier version"
}

// followOthers follows whoever beats until ctx ends.
func (c *Coordinator) followOthers(ctx context.Context) {
	if !c.shared {
		return
	}
	tick := time.NewTicker(beatShared) // for those that no longer beat
	defer tick.Stop()
	for {
		c.mu.Lock()
		c.meetOthersLocked(ctx)
		c.mu.Unlock()
		select {
		case <-tick.C:
		case <-c.beaten:
		case <-ctx.Done():
			c.followers.Wait()
			return
		}
	}
}

// heardLocked takes in that a coordinator has beaten.
func (c *Coordinator) heardLocked(run string) {
	if run == c.run || c.others[run] != nil {
		return
	}
	select {
	case c.beaten <- struct{}{}:
	default:
	}
}

// meetOthersLocked begins to follow those that are new, and ends it with those
// that are dead.
func (c *Coordinator) meetOthersLocked(ctx context.Context) {
	for run, b := range c.view.beats {
		if c.others[run] != nil || run == c.run || c.deadLocked(run) {
			continue
		}
		o := &other{urls: b.URLs, stop: func() {}}
		c.others[run] = o
		if len(o.urls) == 0 {
			continue
		}
		var one context.Context
		one, o.stop = context.WithCancel(ctx)
		c.followers.Go(func() { c.followOther(one, run, o) })
	}
	for run, o := range c.others {
		if _, there := c.view.beats[run]; !there || c.deadLocked(run) {
			o.stop()
			delete(c.others, run)
		}
	}
}

// incomplete names the coordinators whose agents' reports may be missing here.
func (c *Coordinator) incomplete() (names []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for run, o := range c.others {
		if !o.complete && !o.replaced {
			names = append(names, o.name(run))
		}
	}
	slices.Sort(names)
	return names
}

// followOther follows one other coordinator until ctx ends.
func (c *Coordinator) followOther(ctx context.Context, run string, o *other) {
	said := false
	for {
		replaced := 0
		for _, url := range o.urls {
			err := c.followAt(ctx, url, run, o)
			if errors.Is(err, errAnother) {
				replaced++
			}
			c.mu.Lock()
			o.replaced = replaced == len(o.urls)
			was := o.complete
			o.complete = false
			c.mu.Unlock()
			if ctx.Err() != nil {
				return
			}
			if was {
				said = false
			}
			if !said && !errors.Is(err, errAnother) {
				c.log.Warn("another coordinator is not followed; what its agents report is missing here; trying again", "url", url, "err", err)
				said = true
			}
		}
		select {
		case <-time.After(followAgain):
		case <-ctx.Done():
			return
		}
	}
}

// errAnother: an address of one host may be that of another one elsewhere.
var errAnother = errors.New("it is not the coordinator that has named this address")

func (c *Coordinator) followAt(ctx context.Context, url, run string, o *other) error {
	client, err := api.NewClient([]string{url}, c.peerClient)
	if err != nil {
		return err
	}
	return client.Attachments(ctx, func(line api.AttachmentLine) error {
		switch {
		case line.Run != "":
			if line.Run != run {
				return errAnother
			}
		case line.Complete:
			c.mu.Lock()
			o.complete = true
			c.mu.Unlock()
			c.log.Info("another coordinator is followed", "url", url)
		case line.Report != nil:
			return c.copyReport(ctx, run, *line.Report, line.Revision)
		}
		return nil
	})
}

// copyReport takes in what another coordinator was told, once the view has what
// that one knew then.
func (c *Coordinator) copyReport(ctx context.Context, run string, r api.AttachmentReport, revision uint64) error {
	wait, cancel := context.WithTimeout(ctx, maxBehind)
	defer cancel()
	if err := c.await(wait, revision); err != nil {
		return err
	}
	c.mu.Lock()
	current := c.view.statuses[r.AgentID].decode().Instance
	c.mu.Unlock()
	change, err := c.book.Copy(r, run, current)
	if err != nil {
		return err
	}
	c.noteChange(r.AgentID, change)
	return nil
}

// serveReports streams what agents have reported here: GET /v1/attachments. Of each
// agent it is all, and when it changes all again, the newest only.
func (c *Coordinator) serveReports(w http.ResponseWriter, r *http.Request, ended <-chan struct{}) error {
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Cache-Control", "no-store, no-transform")
	w.Header().Set("Vary", "Accept-Encoding")
	s := &stream{c: c, w: w, ctx: r.Context(), flush: http.NewResponseController(w)}
	var out io.Writer = w
	flush := func() error { return s.sync() }
	if takesGzip(r.Header) {
		w.Header().Set("Content-Encoding", "gzip")
		packed := gzip.NewWriter(w)
		out, flush = packed, func() error { return errors.Join(packed.Flush(), s.sync()) }
	}
	lines := json.NewEncoder(out)
	write := func(line api.AttachmentLine) error {
		if err := s.deadline(0); err != nil {
			return err
		}
		return lines.Encode(line)
	}
	f := c.book.Follow()
	defer f.Close()
	if write(api.AttachmentLine{Run: c.run}) != nil {
		return nil // whatever happens from here on ends the stream
	}
	heartbeat := time.NewTicker(api.HeartbeatInterval)
	defer heartbeat.Stop()
	for first := true; ; first = false {
		ids := f.Take()
		c.mu.Lock()
		revision := c.view.rev
		c.mu.Unlock()
		for _, id := range ids {
			report, ok := c.book.Report(id)
			if ok && write(api.AttachmentLine{Revision: revision, Report: &report}) != nil {
				return nil
			}
		}
		if len(ids) == 0 || first {
			if write(api.AttachmentLine{Complete: first}) != nil {
				return nil
			}
		}
		if flush() != nil || s.pause(gatherReports, ended) != nil {
			return nil
		}
		select {
		case <-f.Changed():
		case <-heartbeat.C:
		case <-r.Context().Done():
			return nil
		case <-c.stopped:
			return nil
		case <-ended:
			return nil
		}
	}
}
