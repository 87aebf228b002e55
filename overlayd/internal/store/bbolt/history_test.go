package bbolt

import (
	"context"
	"errors"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// writer writes so many bytes, in transactions of one size, and returns the last revision.
func writer(t *testing.T, s *Store) func(bytes int) (rev uint64) {
	value := make([]byte, store.MaxValue)
	return func(bytes int) (rev uint64) {
		t.Helper()
		for range bytes/store.MaxValue + 2 {
			var err error
			if rev, err = s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: "k", Value: value}}}); err != nil {
				t.Fatal(err)
			}
		}
		return rev
	}
}

// remembered is how many bytes the history takes.
func remembered(s *Store) int {
	s.history.mu.Lock()
	defer s.history.mu.Unlock()
	return s.history.size
}

// TestForgetsOldHistory: what a watcher has not taken is kept up to a bound, what
// everybody has taken is not.
func TestForgetsOldHistory(t *testing.T) {
	s := mustOpen(t, filepath.Join(t.TempDir(), "store.db"))
	write := writer(t, s)
	slow, went := make(chan struct{}), make(chan error, 1)
	arrived := make(chan struct{}, 1)
	var last atomic.Uint64
	ctx, stop := context.WithCancel(t.Context())
	go func() {
		went <- s.Watch(ctx, "", 0, func(rev uint64, _ []store.Event) error {
			select {
			case arrived <- struct{}{}:
			default:
			}
			<-slow
			last.Store(rev)
			return nil
		})
	}()
	write(0)
	<-arrived
	write(4 * keptHistory)
	if n := remembered(s); n < 4*keptHistory {
		t.Errorf("%d bytes are remembered for a watcher that has not taken them, want more than %d", n, 4*keptHistory)
	}
	close(slow)
	write(0)
	for end := time.Now().Add(time.Minute); remembered(s) > keptHistory+2*store.MaxValue; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d bytes are remembered though every watcher has taken them, up to revision %d", remembered(s), last.Load())
		}
	}
	stop()
	if err := <-went; !errors.Is(err, context.Canceled) {
		t.Errorf("the watch ended: %v", err)
	}
	err := s.Watch(t.Context(), "", 0, func(uint64, []store.Event) error { return nil })
	if !errors.Is(err, store.ErrCompacted) {
		t.Errorf("error %v, want ErrCompacted", err)
	}

	held := s.history.begin("", s.history.forgotten) // takes nothing
	write(maxHistory / 2)
	if n := remembered(s); n < maxHistory/2 {
		t.Errorf("%d bytes are remembered for a watcher that takes nothing, want more than %d", n, maxHistory/2)
	}
	write(maxHistory / 2) // now it has missed some, and need not get the others
	if n := remembered(s); n > maxHistory+2*store.MaxValue {
		t.Errorf("%d bytes are remembered for a watcher that takes nothing, want %d at most", n, maxHistory)
	}
	s.history.end(held)
	if n := remembered(s); n > keptHistory+2*store.MaxValue {
		t.Errorf("%d bytes are remembered for nobody", n)
	}
}

// TestReadAnew: who has fallen behind reads the store, and goes on from there. What is
// written while it reads is remembered for it, also where others have taken that, or a
// store that is written all the time would be read for ever.
func TestReadAnew(t *testing.T) {
	s := mustOpen(t, filepath.Join(t.TempDir(), "store.db"))
	write := writer(t, s)
	enough := errors.New("enough")
	take := func(prefix string, after, until uint64) error {
		return s.Watch(t.Context(), prefix, after, func(rev uint64, _ []store.Event) error {
			if rev == until {
				return enough
			}
			return nil
		})
	}
	write(2 * keptHistory)
	if err := take("", 0, 1); !errors.Is(err, store.ErrCompacted) {
		t.Fatalf("watch of what is forgotten: %v", err)
	}
	_, read, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	last := write(4 * keptHistory)
	if err := take("k", last-1, last); !errors.Is(err, enough) { // another watcher, which is up to date
		t.Fatal(err)
	}
	last = write(4 * keptHistory)
	if err := take("", read, last); !errors.Is(err, enough) {
		t.Errorf("a watch that begins where the store was read: %v", err)
	}
	if n := remembered(s); n > keptHistory+2*store.MaxValue {
		t.Errorf("%d bytes are remembered though everybody has taken them, want %d at most", n, keptHistory)
	}
}
