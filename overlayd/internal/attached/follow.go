package attached

import (
	"maps"
	"slices"
	"sync"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// Follower learns which agents have reported here, from the beginning. It holds
// their names alone: one that is slow gets the newest of each.
type Follower struct {
	book  *Book
	mu    sync.Mutex
	dirty map[string]struct{}
	wake  chan struct{} // has a token when dirty may not be empty
}

// Follow begins to follow; Close ends it.
func (b *Book) Follow() *Follower {
	f := &Follower{book: b, dirty: map[string]struct{}{}, wake: make(chan struct{}, 1)}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.followers[f] = struct{}{}
	for id, a := range b.agents {
		if a.source == "" {
			f.mark(id)
		}
	}
	return f
}

// Close ends the following.
func (f *Follower) Close() {
	f.book.mu.Lock()
	defer f.book.mu.Unlock()
	delete(f.book.followers, f)
}

func (f *Follower) mark(id string) {
	f.mu.Lock()
	f.dirty[id] = struct{}{}
	f.mu.Unlock()
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// Changed has a token when there is something to take.
func (f *Follower) Changed() <-chan struct{} { return f.wake }

// Take returns the agents that have reported since the last call.
func (f *Follower) Take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	ids := slices.Collect(maps.Keys(f.dirty))
	clear(f.dirty)
	return ids
}

// Report is everything that an agent has told here; ok is false where it has told
// it elsewhere, or nothing.
func (b *Book) Report(id string) (r api.AttachmentReport, ok bool) {
	a := b.get(id)
	if a == nil || a.source != "" {
		return r, false
	}
	r = api.AttachmentReport{AgentID: id, Instance: a.instance, Sequence: a.sequence, Snapshot: true}
	r.Put = slices.Collect(a.attachments())
	r.Usage = slices.Collect(a.usages())
	if a.problems != nil {
		r.Problems = &a.problems
	}
	r.Host = a.host
	return r, true
}
