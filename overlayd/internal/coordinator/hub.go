package coordinator

import (
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
// each of N streams gets four events a second instead of N.
const (
	minWindow = 5 * time.Millisecond
	maxWindow = 250 * time.Millisecond

	// maxRemembered bounds the events kept for streams that are behind or
	// reconnect, in bytes: changes of 30,000 agents. For who is further behind see
	// missed.go.
	maxRemembered = 4 << 20
)

// hub holds what was published. A stream reads it at its own pace; nothing is
// queued for it.
type hub struct {
	mu     sync.Mutex
	deltas []*message
	size   int
	first  uint64        // the deltas begin after this revision
	more   chan struct{} // closed at the next delta

	// What those who are behind the deltas get; see missed.go.
	missedMu sync.Mutex // held while one is made, so that one is enough
	snapshot *message
	recent   *catchUp

	packers sync.Pool     // of *flate.Writer
	turns   chan struct{} // has a token for every large message under way
}

func newHub(revision uint64) *hub {
	return &hub{first: revision, more: make(chan struct{}), turns: make(chan struct{}, maxTurns)}
}

func (h *hub) add(d *message) {
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

// next returns the delta that follows a revision, nil if there is none yet, and
// a channel that is closed when there are more; ok is false when it is no longer
// remembered. One at a time: a slow stream keeps nothing alive but what it is
// writing.
func (h *hub) next(revision uint64) (d *message, more <-chan struct{}, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if revision < h.first {
		return nil, nil, false
	}
	if i := h.afterLocked(revision); i < len(h.deltas) {
		d = h.deltas[i]
	}
	return d, h.more, true
}

// since returns the size of the deltas after a revision; ok is false when they
// are no longer remembered.
func (h *hub) since(revision uint64) (size int, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if revision < h.first {
		return 0, false
	}
	for _, d := range h.deltas[h.afterLocked(revision):] {
		size += len(d.data)
	}
	return size, true
}

func (h *hub) afterLocked(revision uint64) int {
	return sort.Search(len(h.deltas), func(i int) bool { return h.deltas[i].to > revision })
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
		// A window without a change halves it: the changes of a storm come in
		// bursts, as the disk lets them.
		for window := minWindow / 2; ; {
			if c.flush() {
				window = min(2*window, maxWindow)
			} else if window /= 2; window < minWindow {
				break
			}
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
	changed, whole := c.changed, c.retell
	if len(changed) == 0 && !whole {
		c.mu.Unlock()
		return false
	}
	c.changed, c.retell = map[string]struct{}{}, false
	c.flushing = true
	if whole {
		c.mu.Unlock()
		c.hub.add(c.makeSnapshot())
		c.endFlush()
		return true
	}
	e := api.PeerEvent{Revision: c.view.rev, Run: c.view.runs.at(c.view.rev)}
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
	c.hub.add(&message{to: e.Revision, run: e.Run, data: encodeLine(e)})
	c.endFlush()
	return true
}

func (c *Coordinator) endFlush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flushing = false
}

func (c *Coordinator) peers(agents []*agent) []conf.Peer {
	n, base := c.network(), c.epochBase.Load()
	peers := make([]conf.Peer, 0, len(agents))
	for _, a := range agents {
		peers = append(peers, peerOf(n, a, base))
	}
	return peers
}

// published returns the revision up to which everything has been published, and
// its run; 0 when something is about to be.
func (c *Coordinator) published() (revision uint64, run string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.changed) > 0 || c.retell || c.flushing {
		return 0, ""
	}
	return c.view.rev, c.view.runs.at(c.view.rev)
}
