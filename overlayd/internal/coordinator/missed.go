package coordinator

import (
	"cmp"
	"slices"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// A stream that is behind the remembered deltas, or new, gets one message that
// takes it to the present. It is made from the view, which has the revision of
// every peer, and shared by all who miss the same.

// catchUp is a message for all who know everything up to some revision from
// first up to, and not including, until: nothing has changed in between.
type catchUp struct {
	first, until uint64
	*message
}

// missed returns a message with everything that a stream misses which knows
// the peers up to a revision. A message that was made before will do as long as
// the deltas since then are few compared to it.
func (c *Coordinator) missed(revision uint64) *message {
	h := c.hub
	h.missedMu.Lock()
	defer h.missedMu.Unlock()
	if r := h.recent; r != nil && r.first <= revision && revision < r.until && c.fresh(r.message, minCatchUp) {
		return r.message
	}
	if r := c.changedSince(revision); r != nil {
		h.recent = r
		return r.message
	}
	if h.snapshot == nil || !c.fresh(h.snapshot, 0) {
		h.snapshot = c.makeSnapshot()
	}
	return h.snapshot
}

// minCatchUp is how many bytes of deltas are no reason to make a message anew.
const minCatchUp = 64 << 10

// fresh reports whether a message still serves: what follows it is remembered,
// and little compared to it, or to least.
func (c *Coordinator) fresh(m *message, least int) bool {
	size, ok := c.hub.since(m.to)
	return ok && size <= max(len(m.data)/4, least)
}

// maxChanged is which part of the peers may have changed for it to be cheaper
// to tell a few streams these than to tell all streams the same snapshot.
const maxChanged = 8

// changedSince tells what has changed since a revision; nil when that is not
// known, or so much that the snapshot that everybody shares is better.
func (c *Coordinator) changedSince(revision uint64) *catchUp {
	c.mu.Lock()
	if revision == 0 || revision < c.view.floor() || revision > c.view.rev {
		c.mu.Unlock()
		return nil
	}
	to, run := c.view.rev, c.view.runs.at(c.view.rev)
	r := &catchUp{until: to + 1}
	var changed []*agent
	for _, a := range c.view.agents {
		if a.mod <= revision {
			r.first = max(r.first, a.mod)
			continue
		}
		r.until = min(r.until, a.mod)
		changed = append(changed, a)
	}
	many := len(changed) > len(c.view.agents)/maxChanged
	r.first = max(r.first, c.view.floor())
	c.mu.Unlock()
	if many {
		return nil
	}
	slices.SortFunc(changed, func(a, b *agent) int { return cmp.Compare(a.mod, b.mod) })
	e := api.PeerEvent{Revision: to, Run: run}
	var put []*agent
	for _, a := range changed {
		if a.Superseded == "" {
			put = append(put, a)
		} else {
			e.Delete = append(e.Delete, a.id)
		}
	}
	e.Put = c.peers(put)
	r.message = &message{to: to, run: run, data: encodeLine(e)}
	return r
}

// makeSnapshot tells every peer.
func (c *Coordinator) makeSnapshot() *message {
	c.mu.Lock()
	revision, run, partial := c.view.rev, c.view.runs.at(c.view.rev), c.adoptingLocked() > 0
	agents := make([]*agent, 0, len(c.view.agents))
	for _, a := range c.view.agents {
		if a.Superseded == "" {
			agents = append(agents, a)
		}
	}
	c.mu.Unlock()
	slices.SortFunc(agents, func(a, b *agent) int { return cmp.Compare(a.create, b.create) })
	return &message{to: revision, run: run, data: encodeLine(api.PeerEvent{Revision: revision, Run: run, Snapshot: true, Partial: partial, Put: c.peers(agents)})}
}
