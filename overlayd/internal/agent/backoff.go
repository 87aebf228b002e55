package agent

import (
	"math/rand/v2"
	"time"
)

// backoff spreads retries: each pause is anything up to a ceiling that doubles,
// so that a thousand agents that lost one coordinator do not come back at once.
type backoff struct {
	min, max time.Duration
	failed   int
}

func (b *backoff) reset() { b.failed = 0 }

// next is the pause before the next attempt.
func (b *backoff) next() time.Duration {
	ceiling := b.max
	if b.failed < 32 && b.min<<b.failed < b.max {
		ceiling = b.min << b.failed
	}
	b.failed++
	return rand.N(ceiling) + 1
}

// jitter is d, give or take a fifth.
func jitter(d time.Duration) time.Duration { return d - d/5 + rand.N(2*d/5+1) }

// deadline is a timer that keeps the earliest time it was asked for.
type deadline struct {
	timer *time.Timer
	at    time.Time // zero: not set
}

func newDeadline() *deadline {
	d := &deadline{timer: time.NewTimer(time.Hour)}
	d.timer.Stop()
	return d
}

// in makes the deadline fire after delay, or when it was to fire anyway if
// that is earlier.
func (d *deadline) in(delay time.Duration) {
	at := time.Now().Add(delay)
	if d.isSet() && !at.Before(d.at) {
		return
	}
	d.at = at
	d.timer.Reset(delay)
}

// isSet reports whether the deadline is still to come.
func (d *deadline) isSet() bool { return !d.at.IsZero() }

// clear forgets the deadline; whoever received from its timer calls it.
func (d *deadline) clear() {
	d.timer.Stop()
	d.at = time.Time{}
}

// replace puts v into a channel of capacity 1 in place of what nobody has
// taken yet. There must be no other sender.
func replace[T any](ch chan T, v T) {
	select {
	case <-ch:
	default:
	}
	ch <- v
}

// kick wakes whoever waits on a channel of capacity 1; kicks that come
// together are one.
func kick(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// allowance lets a few things happen at once, and in the long run one a pause.
type allowance struct {
	most  int
	pause time.Duration
	spent time.Duration // of most pauses
	at    time.Time     // when spent was right
}

// wait is how long until the next may happen.
func (a *allowance) wait(now time.Time) time.Duration {
	a.pass(now)
	return max(0, a.spent-time.Duration(a.most-1)*a.pause)
}

// take is called when one happens.
func (a *allowance) take(now time.Time) {
	a.pass(now)
	a.spent = min(a.spent+a.pause, time.Duration(a.most)*a.pause)
}

func (a *allowance) pass(now time.Time) {
	a.spent = max(0, a.spent-now.Sub(a.at))
	a.at = now
}
