package coordinator

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sort"
	"sync"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// Peers go out as events that are encoded once and shared by every stream. The
// first change is sent at once. Those that follow within a window are sent
// together, and while they keep coming the window grows: when N agents join,
// each of N streams gets a few dozen events instead of N.
const (
	minWindow = 5 * time.Millisecond
	maxWindow = 250 * time.Millisecond

	// maxRemembered bounds the events kept for streams that are behind or
	// reconnect, in bytes. Who is further behind gets a snapshot.
	maxRemembered = 8 << 20
)

// delta is one encoded event: all that changed up to a revision since the one
// before it.
type delta struct {
	to   uint64
	data []byte
}

// hub holds what was published. A stream reads it at its own pace; nothing is
// queued for it.
type hub struct {
	mu     sync.Mutex
	deltas []delta
	size   int
	first  uint64        // the deltas begin after this revision
	more   chan struct{} // closed at the next delta

	snapshotMu sync.Mutex // held while a snapshot is made, so that one is enough
	snapshot   delta
}

func newHub(revision uint64) *hub {
	return &hub{first: revision, more: make(chan struct{})}
}

func (h *hub) add(d delta) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deltas = append(h.deltas, d)
	h.size += len(d.data)
	drop := 0
	for h.size > maxRemembered && drop < len(h.deltas)-1 {
		h.size -= len(h.deltas[drop].data)
		h.first = h.deltas[drop].to
		drop++
	}
	h.deltas = slices.Delete(h.deltas, 0, drop)
	close(h.more)
	h.more = make(chan struct{})
}

// since returns the deltas after a revision, their size, and a channel that is
// closed when there are more; ok is false when they are no longer remembered.
func (h *hub) since(revision uint64) (deltas []delta, size int, more <-chan struct{}, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if revision < h.first {
		return nil, 0, nil, false
	}
	i := sort.Search(len(h.deltas), func(i int) bool { return h.deltas[i].to > revision })
	deltas = slices.Clone(h.deltas[i:])
	for _, d := range deltas {
		size += len(d.data)
	}
	return deltas, size, h.more, true
}

// publish turns changes into deltas until ctx ends.
func (c *Coordinator) publish(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-c.dirty:
		case <-ctx.Done():
			return
		}
		for window := minWindow; c.flush(); window = min(2*window, maxWindow) {
			timer.Reset(window)
			select {
			case <-timer.C:
			case <-ctx.Done():
				return
			}
		}
	}
}

// flush publishes the agents that have changed and reports whether there were any.
func (c *Coordinator) flush() bool {
	c.mu.Lock()
	changed := c.changed
	if len(changed) == 0 {
		c.mu.Unlock()
		return false
	}
	c.changed = map[string]struct{}{}
	c.flushing = true
	e := api.PeerEvent{Revision: c.view.rev}
	var put []*agent
	for _, id := range slices.Sorted(maps.Keys(changed)) {
		if a := c.view.agents[id]; a != nil && a.Superseded == "" {
			put = append(put, a)
		} else {
			e.Delete = append(e.Delete, id)
		}
	}
	c.mu.Unlock()

	e.Put = c.peers(put)
	c.hub.add(delta{e.Revision, encodeLine(e)})

	c.mu.Lock()
	c.flushing = false
	c.mu.Unlock()
	return true
}

func (c *Coordinator) peers(agents []*agent) []conf.Peer {
	peers := make([]conf.Peer, 0, len(agents))
	for _, a := range agents {
		peers = append(peers, c.lease(a, nil).Peer())
	}
	return peers
}

func encodeLine(e api.PeerEvent) []byte { return append(encode(e), '\n') }

// snapshot returns an encoded event with every peer. One that was made before
// will do as long as the deltas since then are few compared to it.
func (c *Coordinator) snapshot() delta {
	c.hub.snapshotMu.Lock()
	defer c.hub.snapshotMu.Unlock()
	last := c.hub.snapshot
	if last.data != nil {
		if _, size, _, ok := c.hub.since(last.to); ok && size <= len(last.data)/4 {
			return last
		}
	}
	c.mu.Lock()
	revision := c.view.rev
	agents := make([]*agent, 0, len(c.view.agents))
	for _, a := range c.view.agents {
		if a.Superseded == "" {
			agents = append(agents, a)
		}
	}
	c.mu.Unlock()
	slices.SortFunc(agents, func(a, b *agent) int { return cmp.Compare(a.create, b.create) })
	c.hub.snapshot = delta{revision, encodeLine(api.PeerEvent{Revision: revision, Snapshot: true, Put: c.peers(agents)})}
	return c.hub.snapshot
}

// settled returns the revision up to which everything has been published; 0 when
// something is about to be.
func (c *Coordinator) settled() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.changed) > 0 || c.flushing {
		return 0
	}
	return c.view.rev
}
