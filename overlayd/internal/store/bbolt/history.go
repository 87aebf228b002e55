package bbolt

import (
	"math"
	"slices"
	"strings"
	"sync"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// What transactions that are remembered take in memory is bounded, in bytes: by
// maxHistory where a watcher has not taken them yet, and by keptHistory where all
// have. Watchers keep up, so in a storm of transactions that is what it comes to.
const (
	maxHistory  = 32 << 20
	keptHistory = 1 << 20
)

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
	watchers  map[*watcher]struct{}
	// awaited are the prefixes of watchers that fell behind and are reading the store.
	// Until they are back, what comes is kept as for one that takes nothing: else a
	// store that is written all the time would be read again and again.
	awaited map[string]struct{}
	closed  error
}

// watcher is somebody who reads the history. Its revision is the last one that it
// has taken; history.mu guards it.
type watcher struct{ rev uint64 }

func newHistory(revision uint64) *history {
	return &history{forgotten: revision, more: make(chan struct{}), watchers: map[*watcher]struct{}{}, awaited: map[string]struct{}{}}
}

// begin is a watcher of a prefix that has taken everything up to a revision; end says
// that it takes no more.
func (h *history) begin(prefix string, after uint64) *watcher {
	h.mu.Lock()
	defer h.mu.Unlock()
	w := &watcher{rev: after}
	h.watchers[w] = struct{}{}
	if after >= h.forgotten {
		delete(h.awaited, prefix)
	}
	return w
}

// behind says that a watcher of a prefix has missed something, and will be back.
func (h *history) behind(prefix string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.awaited[prefix] = struct{}{}
}

func (h *history) end(w *watcher) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.watchers, w)
	h.forgetLocked()
}

// took notes what a watcher has taken.
func (h *history) took(w *watcher, rev uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	w.rev = rev
	h.forgetLocked()
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
	h.forgetLocked()
	close(h.more)
	h.more = make(chan struct{})
}

// forgetLocked drops the oldest changes. A watcher that waits for changes which are
// forgotten already keeps nothing.
func (h *history) forgetLocked() {
	taken := uint64(math.MaxUint64) // by everybody
	for w := range h.watchers {
		if w.rev >= h.forgotten {
			taken = min(taken, w.rev)
		}
	}
	drop := 0
	for drop < len(h.changes)-1 && (h.size > maxHistory || h.size > keptHistory && len(h.awaited) == 0 && h.changes[drop].rev <= taken) {
		h.size -= h.changes[drop].size()
		h.forgotten = h.changes[drop].rev
		drop++
	}
	clear(h.changes[:drop])
	h.changes = h.changes[drop:]
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
