package coordinator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/attached"
)

// What happens in the cluster, for those who follow it: GET /v1/events. Every
// coordinator has events of its own, of all that its view and its book show.

const (
	// settle is how long an agent has to be gone before that is an event: one that
	// goes to another coordinator is not. Who was said to be gone is back at once.
	settle = 2 * time.Second
	// gatherEvents is how long events are gathered for one write.
	gatherEvents = 50 * time.Millisecond
)

// agentEventLocked tells of an agent's record. was or is may be nil.
func (c *Coordinator) agentEventLocked(was, is *agent) {
	switch {
	case is == nil && was == nil:
	case is == nil:
		c.book.Forget(was.id)
		c.announce.forget(was.id)
		c.events.Add(agentEvent(api.EventAgentGone, was.id, was.IP, "the lease of agent %s at %s was given back", was.id, was.IP))
	case was == nil:
		c.askToReportLocked(is.id) // where it follows already, what was known is forgotten
		c.events.Add(agentEvent(api.EventAgentJoined, is.id, is.IP, "agent %s at %s has got a lease", is.id, is.IP))
	case is.Superseded != "" && was.Superseded == "":
		c.book.Forget(is.id)
		c.events.Add(agentEvent(api.EventAgentChanged, is.id, is.IP, "agent %s now has the address %s of agent %s", is.Superseded, is.IP, is.id))
	case is.IP != was.IP:
		c.events.Add(agentEvent(api.EventAgentChanged, is.id, is.IP, "agent %s has moved from %s to %s", is.id, was.IP, is.IP))
	case is.SecondIP != was.SecondIP && is.SecondIP.IsValid():
		c.events.Add(agentEvent(api.EventAgentChanged, is.id, is.IP, "agent %s at %s is at %s as well", is.id, is.IP, is.SecondIP))
	case is.SecondIP != was.SecondIP:
		c.events.Add(agentEvent(api.EventAgentChanged, is.id, is.IP, "agent %s at %s is no longer at %s as well", is.id, is.IP, was.SecondIP))
	case is.mod != was.mod:
		c.events.Add(agentEvent(api.EventAgentChanged, is.id, is.IP, "the lease of agent %s at %s has changed", is.id, is.IP))
	}
}

func agentEvent(kind api.EventKind, id string, ip netip.Addr, format string, args ...any) api.Event {
	return api.Event{Kind: kind, AgentID: id, AgentIP: ip, Text: fmt.Sprintf(format, args...)}
}

// overlayEvents tells of a configuration that has changed.
func (c *Coordinator) overlayEvents(was, is conf.Network) {
	add := func(name, text string) {
		c.events.Add(api.Event{Kind: api.EventOverlayChanged, Overlay: name, Text: "overlay " + name + " " + text})
	}
	for _, o := range is.Overlays {
		before, ok := was.Overlay(o.Name)
		switch {
		case !ok:
			add(o.Name, "was added")
		case string(encode(before)) != string(encode(o)):
			add(o.Name, "was changed")
		}
	}
	for _, o := range was.Overlays {
		if _, ok := is.Overlay(o.Name); !ok {
			add(o.Name, "was removed")
		}
	}
}

// noteChange tells what a report has brought. Of the first report of an agent only
// that is news which is younger than this coordinator.
func (c *Coordinator) noteChange(id string, change attached.Change) {
	c.mu.Lock()
	a := c.view.agents[id]
	c.mu.Unlock()
	if a == nil { // it was deleted meanwhile
		c.book.Forget(id)
		return
	}
	about := func(kind api.EventKind, overlay string, half conf.Half, format string, args ...any) api.Event {
		e := agentEvent(kind, id, a.IP, format, args...)
		e.Overlay, e.Half = overlay, half
		return e
	}
	container := func(kind api.EventKind, x api.Attachment, what string) {
		e := about(kind, x.Overlay, x.Half, "container %s %s overlay %s on host %s: %s", titleOf(x), what, x.Overlay, a.IP, join(x.Addresses))
		e.Container, e.Addresses = x.ID, x.Addresses
		c.events.Add(e)
	}
	for _, x := range change.Detached {
		container(api.EventContainerDetached, x, "was detached from")
	}
	for _, x := range change.Attached {
		if !change.First || x.Since >= c.started.Unix() {
			container(api.EventContainerAttached, x, "was attached to")
		}
	}
	for _, u := range change.Levels {
		kind := map[api.Level]api.EventKind{api.LevelOK: api.EventAddressesOK, api.LevelWarning: api.EventAddressesWarning, api.LevelFull: api.EventAddressesFull}[u.Level()]
		c.events.Add(about(kind, u.Overlay, u.Half, "the %s of overlay %s on host %s %s: %d of %d used, %d cooling", u.Half.PoolText(), u.Overlay, a.IP,
			map[api.Level]string{api.LevelOK: "has room again", api.LevelWarning: "is nearly full", api.LevelFull: "is full"}[u.Level()], u.Used, u.Total, u.Cooling))
	}
	for _, p := range change.Begun {
		c.events.Add(about(api.EventProblemBegun, "", "", "host %s: %s", a.IP, p))
	}
	for _, p := range change.Ended {
		c.events.Add(about(api.EventProblemEnded, "", "", "host %s, no longer: %s", a.IP, p))
	}
}

// titleOf is how people call a container.
func titleOf(a api.Attachment) string {
	id := a.ID[:min(len(a.ID), 12)]
	if a.Name != "" {
		return a.Name + " (" + id + ")"
	}
	return id
}

func join(addrs []netip.Addr) string {
	var out []string
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return strings.Join(out, ", ")
}

// announcements are about who is connected. Coordinator.mu guards them.
type announcements struct {
	gone map[string]struct{}  // agents that were said to be
	due  map[string]time.Time // when to look at agents that came or went
	dead map[string]bool      // coordinators that count as such
	wake chan struct{}        // has a token when due may not be empty
}

func newAnnouncements() announcements {
	return announcements{gone: map[string]struct{}{}, due: map[string]time.Time{}, dead: map[string]bool{}, wake: make(chan struct{}, 1)}
}

func (a announcements) forget(id string) {
	delete(a.gone, id)
	delete(a.due, id)
}

// lookLater has it found out in a moment whether an agent has gone, and at once
// whether one that has is back.
func (a announcements) lookLater(id string) {
	a.due[id] = time.Now().Add(settle)
	if _, gone := a.gone[id]; gone {
		a.due[id] = time.Now()
	}
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// announcePresence tells of agents that come and go until ctx ends. After a start
// all of them count as connected, for as long as they may take to come back.
func (c *Coordinator) announcePresence(ctx context.Context) {
	back := time.NewTimer(returning)
	defer back.Stop()
	var died <-chan time.Time // another coordinator may have
	if c.shared {
		tick := time.NewTicker(beatShared)
		defer tick.Stop()
		died = tick.C
	}
	var look <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-back.C:
			c.mu.Lock()
			for id := range c.view.agents {
				c.announce.lookLater(id)
			}
			c.mu.Unlock()
			continue
		case <-died:
			c.lookAtDead()
			continue
		case <-c.announce.wake:
		case <-look:
		}
		look = nil
		if c.announceDue() {
			look = time.After(settle / 4)
		}
	}
}

// lookAtDead looks at the agents of coordinators that have died, or have come to
// life again.
func (c *Coordinator) lookAtDead() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for run := range c.view.beats {
		dead := run != c.run && c.deadLocked(run)
		if dead == c.announce.dead[run] {
			continue
		}
		c.announce.dead[run] = dead
		for id, s := range c.view.seen {
			if s.By == run {
				c.announce.lookLater(id)
			}
		}
	}
	maps.DeleteFunc(c.announce.dead, func(run string, _ bool) bool { _, ok := c.view.beats[run]; return !ok })
}

// announceDue looks at the agents whose time has come, and reports whether there
// are others.
func (c *Coordinator) announceDue() (more bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for id, at := range c.announce.due {
		if now.Before(at) {
			continue
		}
		delete(c.announce.due, id)
		a := c.view.agents[id]
		if a == nil || a.Superseded != "" {
			continue
		}
		_, connected := c.lastHeardLocked(id)
		_, gone := c.announce.gone[id]
		switch {
		case connected && gone:
			delete(c.announce.gone, id)
			c.events.Add(agentEvent(api.EventAgentConnected, id, a.IP, "agent %s at %s is connected again", id, a.IP))
		case !connected && !gone:
			c.announce.gone[id] = struct{}{}
			c.events.Add(agentEvent(api.EventAgentDisconnected, id, a.IP, "agent %s at %s is no longer connected", id, a.IP))
		}
	}
	return len(c.announce.due) > 0
}

// serveEvents streams events: GET /v1/events?after=ID&follow=false. Without an id, in the query
// or as Last-Event-ID, it begins with the next one; with 0 with all that are
// remembered. Who falls behind what is remembered is cut off, and may come again.
// With follow=false it ends where nothing more is known.
func (c *Coordinator) serveEvents(w http.ResponseWriter, r *http.Request, ended <-chan struct{}) error {
	after := c.events.Last()
	for _, s := range [...]string{r.URL.Query().Get("after"), r.Header.Get("Last-Event-ID")} {
		if s == "" {
			continue
		}
		var err error
		if after, err = strconv.ParseInt(s, 10, 64); err != nil || after < 0 {
			return refuse(http.StatusBadRequest, "after %.80q: want the id of an event, or 0 for all that are remembered", s)
		}
	}
	// An id is a time by the clock of who gave it, which may be ahead: another
	// coordinator's, or this one's before it was set back. Nothing would come until then.
	after = min(after, c.events.Last())
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store, no-transform")
	w.Header().Set("X-Accel-Buffering", "no")
	s := &stream{c: c, w: w, ctx: r.Context(), flush: http.NewResponseController(w)}
	if s.text("retry: 2000\n\n") != nil {
		return nil
	}
	first := true
	heartbeat := time.NewTicker(api.HeartbeatInterval)
	defer heartbeat.Stop()
	for {
		list, more, missed := c.events.After(after)
		if missed && !first {
			return nil
		}
		first = false
		for part := range slices.Chunk(list, 100) {
			var b strings.Builder
			for _, e := range part {
				fmt.Fprintf(&b, "id: %d\nevent: %s\ndata: %s\n\n", e.ID, e.Kind, encode(e))
				after = e.ID
			}
			if s.text(b.String()) != nil {
				return nil // the status line is out; whatever happens now ends the stream
			}
		}
		if r.URL.Query().Get("follow") == "false" {
			return nil
		}
		select {
		case <-more:
			if s.pause(gatherEvents, ended) != nil {
				return nil
			}
		case <-heartbeat.C:
			if s.text(": alive\n\n") != nil {
				return nil
			}
		case <-r.Context().Done():
			return nil
		case <-c.stopped:
			return nil
		case <-ended:
			return nil
		}
	}
}

// text writes at once.
func (s *stream) text(text string) error {
	if err := s.deadline(len(text)); err != nil {
		return err
	}
	if _, err := io.WriteString(s.w, text); err != nil {
		return err
	}
	return s.sync()
}

// errEnded: the stream is to end.
var errEnded = errors.New("the stream has ended")

func (s *stream) pause(d time.Duration, ended <-chan struct{}) error {
	select {
	case <-time.After(d):
		return nil
	case <-s.ctx.Done():
	case <-s.c.stopped:
	case <-ended:
	}
	return errEnded
}
