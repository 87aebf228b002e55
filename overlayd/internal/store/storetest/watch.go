package storetest

import (
	"context"
	"errors"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// watcher runs a Watch in the background.
type watcher struct {
	seen chan seen
	done chan error
	stop context.CancelFunc
}

type seen struct {
	Rev    uint64
	Events []store.Event
}

func watch(t *testing.T, s store.Store, prefix string, after uint64) *watcher {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	w := &watcher{seen: make(chan seen), done: make(chan error, 1), stop: stop}
	go func() {
		w.done <- s.Watch(ctx, prefix, after, func(rev uint64, events []store.Event) error {
			select {
			case w.seen <- seen{rev, events}:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	t.Cleanup(func() {
		stop()
		select {
		case <-w.done:
		case <-time.After(patience):
			t.Error("watch does not end with its context")
		}
	})
	return w
}

func (w *watcher) next(t *testing.T) seen {
	t.Helper()
	select {
	case got := <-w.seen:
		return got
	case err := <-w.done:
		w.done <- err
		t.Fatalf("watch ended: %v", err)
	case <-time.After(patience):
		t.Fatal("no event")
	}
	return seen{}
}

func putEvent(key, value string, create, mod uint64) store.Event {
	return store.Event{KV: kv(key, value, create, mod)}
}

func delEvent(key string, mod uint64) store.Event {
	return store.Event{KV: store.KV{Key: key, Mod: mod}, Delete: true}
}

func (w *watcher) want(t *testing.T, rev uint64, events ...store.Event) {
	t.Helper()
	if diff := cmp.Diff(seen{rev, events}, w.next(t)); diff != "" {
		t.Fatalf("watch (-want +got):\n%s", diff)
	}
}

func testWatchOrder(t *testing.T, s store.Store) {
	_, r0 := mustList(t, s, "")
	early := watch(t, s, "", r0)
	r1 := mustPut(t, s, put("a", "1"))
	early.want(t, r1, putEvent("a", "1", r1, r1)) // sees a commit made after it began
	r2 := mustPut(t, s, put("a", "2"), put("b", "1"))
	r3 := mustPut(t, s, del("a"))
	late := watch(t, s, "", r1)
	for _, w := range []*watcher{early, late} {
		got := w.next(t)
		// The order inside a transaction is free.
		if len(got.Events) == 2 && got.Events[0].Key == "b" {
			got.Events = []store.Event{got.Events[1], got.Events[0]}
		}
		if diff := cmp.Diff(seen{r2, []store.Event{putEvent("a", "2", r1, r2), putEvent("b", "1", r2, r2)}}, got); diff != "" {
			t.Fatalf("watch (-want +got):\n%s", diff)
		}
		w.want(t, r3, delEvent("a", r3))
	}
	r4 := mustPut(t, s, put("end", ""))
	if got := early.next(t); got.Rev != r4 {
		t.Errorf("revision %d, want %d: something came twice", got.Rev, r4)
	}
}

func testWatchPrefix(t *testing.T, s store.Store) {
	_, r0 := mustList(t, s, "")
	w := watch(t, s, "a/", r0)
	mustPut(t, s, put("b", "1"))
	r2 := mustPut(t, s, put("a/1", "1"), put("b", "2"), put("a", "1"))
	mustPut(t, s, del("b"))
	r4 := mustPut(t, s, put("b", "3"), del("a/1"))
	w.want(t, r2, putEvent("a/1", "1", r2, r2))
	w.want(t, r4, delEvent("a/1", r4))
}

func testWatchOld(t *testing.T, s store.Store) {
	_, r0 := mustList(t, s, "")
	var revs []uint64
	for i := range 500 {
		revs = append(revs, mustPut(t, s, put("k", strconv.Itoa(i))))
	}
	for _, from := range []int{-1, 0, 249, 498} {
		after := r0
		if from >= 0 {
			after = revs[from]
		}
		w := watch(t, s, "", after)
		for i := from + 1; i < len(revs); i++ {
			w.want(t, revs[i], putEvent("k", strconv.Itoa(i), revs[0], revs[i]))
		}
	}
}

func testWatchFuture(t *testing.T, s store.Store) {
	r1 := mustPut(t, s, put("a", "1"))
	w := watch(t, s, "", r1+1)
	r2 := mustPut(t, s, put("a", "2"))
	r3 := mustPut(t, s, put("a", "3"))
	if r2 == r1+1 { // revisions of other keys may lie between
		w.want(t, r3, putEvent("a", "3", r1, r3))
	}
}

func testWatchFnError(t *testing.T, s store.Store) {
	_, r0 := mustList(t, s, "")
	mustPut(t, s, put("a", "1"))
	mustPut(t, s, put("a", "2"))
	enough := errors.New("enough")
	calls := 0
	err := s.Watch(t.Context(), "", r0, func(uint64, []store.Event) error {
		calls++
		return enough
	})
	if !errors.Is(err, enough) || calls != 1 {
		t.Errorf("%d calls, error %v", calls, err)
	}
}
