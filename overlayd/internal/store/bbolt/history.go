package bbolt

import (
	"slices"
	"strings"
	"sync"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// maxHistory bounds the memory that remembered transactions take, in bytes.
const maxHistory = 32 << 20

// maxRead is how many changes a watcher takes at a time.
const maxRead = 256

// change is one transaction as watchers see it. It never changes once made.
type change struct {
	rev    uint64
	events []store.Event
}

// withPrefix returns the events whose key begins with prefix.
func (c change) withPrefix(prefix string) []store.Event {
	match := func(e store.Event) bool { return strings.HasPrefix(e.Key, prefix) }
	for i, e := range c.events {
		if match(e) {
			continue
		}
		out := append([]store.Event(nil), c.events[:i]...)
		for _, e := range c.events[i+1:] {
			if match(e) {
				out = append(out, e)
			}
		}
		return out
	}
	return c.events
}

// size is roughly what a change takes in memory.
func (c change) size() int {
	n := 64
	for _, e := range c.events {
		n += 96 + len(e.Key) + len(e.Value)
	}
	return n
}

// history remembers the latest transactions for watchers. Each watcher reads
// at its own pace; nothing is queued for it.
type history struct {
	mu        sync.Mutex
	changes   []change // consecutive revisions
	size      int
	forgotten uint64        // revision of the latest change not remembered
	more      chan struct{} // closed at the next change
	closed    error
}

func newHistory(revision uint64) *history {
	return &history{forgotten: revision, more: make(chan struct{})}
}

func (h *history) add(changes []change) {
	if len(changes) == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed != nil {
		return
	}
	h.changes = append(h.changes, changes...)
	for _, c := range changes {
		h.size += c.size()
	}
	drop := 0
	for h.size > maxHistory && drop < len(h.changes)-1 {
		h.size -= h.changes[drop].size()
		h.forgotten = h.changes[drop].rev
		drop++
	}
	clear(h.changes[:drop])
	h.changes = h.changes[drop:]
	close(h.more)
	h.more = make(chan struct{})
}

// since returns the first changes after a revision, and a channel that is closed
// when there are more than are remembered now.
func (h *history) since(after uint64) ([]change, <-chan struct{}, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed != nil:
		return nil, nil, h.closed
	case after < h.forgotten:
		return nil, nil, store.ErrCompacted
	}
	skip := min(after-h.forgotten, uint64(len(h.changes)))
	until := min(skip+maxRead, uint64(len(h.changes)))
	return slices.Clone(h.changes[skip:until]), h.more, nil
}

func (h *history) close(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed != nil {
		return
	}
	h.closed = err
	h.changes = nil
	close(h.more)
}
