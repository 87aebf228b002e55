// Package events keeps what has happened in the cluster lately, for those who
// follow it.
package events

import (
	"sync"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// Remembered is how many events are kept.
const Remembered = 1000

// Ring has the latest events. Whoever follows reads it at its own pace: nothing is
// queued for anybody, and nobody is waited for. It is safe for concurrent use.
type Ring struct {
	now func() time.Time

	mu     sync.Mutex
	events []api.Event // in order; the oldest is at first once all places are taken
	first  int
	last   int64         // id of the newest, also of those that are forgotten
	lost   int64         // id of the newest that is forgotten
	more   chan struct{} // closed at the next event; nil: nobody waits
}

// New makes an empty ring.
func New(now func() time.Time) *Ring { return &Ring{now: now} }

// Add appends an event, and gives it id and time.
func (r *Ring) Add(e api.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	r.last = max(r.last+1, now.UnixMicro())
	e.ID, e.Time = r.last, now.UTC()
	if len(r.events) < Remembered {
		r.events = append(r.events, e)
	} else {
		r.lost = r.events[r.first].ID
		r.events[r.first] = e
		r.first = (r.first + 1) % Remembered
	}
	if r.more != nil {
		close(r.more)
		r.more = nil
	}
}

// After returns the events after an id, a channel that is closed when there are
// more, and whether some have been forgotten in between.
func (r *Ring) After(id int64) (events []api.Event, more <-chan struct{}, missed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.events {
		if e := r.events[(r.first+i)%len(r.events)]; e.ID > id {
			events = append(events, e)
		}
	}
	if r.more == nil {
		r.more = make(chan struct{})
	}
	return events, r.more, id < r.lost
}

// Last is the id of the newest event, 0 if there was none.
func (r *Ring) Last() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last
}
