// Package storetest is the contract of store.Store as a test. Every
// implementation passes the same one.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// Run checks the contract. open returns an empty store; the test closes it.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	tests := []struct {
		name string
		run  func(t *testing.T, s store.Store)
	}{
		{"Revisions", testRevisions},
		{"ConflictWritesNothing", testConflict},
		{"CheckOnly", testCheckOnly},
		{"DeleteAndRecreate", testRecreate},
		{"ListOrderAndPrefix", testList},
		{"BadTransaction", testBad},
		{"WatchOrder", testWatchOrder},
		{"WatchPrefix", testWatchPrefix},
		{"WatchFromOldRevision", testWatchOld},
		{"WatchFromFutureRevision", testWatchFuture},
		{"WatchFnError", testWatchFnError},
		{"WatchSlow", testWatchSlow},
		{"CompareAndSwap", testCompareAndSwap},
		{"OneWinner", testOneWinner},
		{"ContextDone", testContextDone},
		{"Close", testClose},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t)
			defer s.Close()
			tt.run(t, s)
		})
	}
}

func put(key, value string) store.Op { return store.Op{Key: key, Value: []byte(value)} }
func del(key string) store.Op        { return store.Op{Key: key, Delete: true} }

func mustCommit(t *testing.T, s store.Store, txn store.Txn) uint64 {
	t.Helper()
	rev, err := s.Commit(t.Context(), txn)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func mustPut(t *testing.T, s store.Store, ops ...store.Op) uint64 {
	t.Helper()
	return mustCommit(t, s, store.Txn{Then: ops})
}

func mustList(t *testing.T, s store.Store, prefix string) ([]store.KV, uint64) {
	t.Helper()
	kvs, rev, err := s.List(t.Context(), prefix)
	if err != nil {
		t.Fatal(err)
	}
	return kvs, rev
}

// wantList compares keys, values and both revisions.
func wantList(t *testing.T, s store.Store, prefix string, want ...store.KV) {
	t.Helper()
	got, _ := mustList(t, s, prefix)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("list %q (-want +got):\n%s", prefix, diff)
	}
}

func kv(key, value string, create, mod uint64) store.KV {
	return store.KV{Key: key, Value: []byte(value), Create: create, Mod: mod}
}

func testRevisions(t *testing.T, s store.Store) {
	wantList(t, s, "")
	_, r0 := mustList(t, s, "")
	r1 := mustPut(t, s, put("a", "1"), put("b", "1"))
	r2 := mustPut(t, s, put("a", "2"))
	r3 := mustPut(t, s, put("c", ""))
	if r0 >= r1 || r1 >= r2 || r2 >= r3 {
		t.Fatalf("revisions do not grow: %d %d %d %d", r0, r1, r2, r3)
	}
	got, rev := mustList(t, s, "")
	for i := range got {
		if got[i].Key == "c" && len(got[i].Value) == 0 {
			got[i].Value = []byte{} // nil or empty, both will do
		}
	}
	want := []store.KV{kv("a", "2", r1, r2), kv("b", "1", r1, r1), kv("c", "", r3, r3)}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("list (-want +got):\n%s", diff)
	}
	if rev != r3 {
		t.Errorf("the list is true at %d, want %d", rev, r3)
	}
}

func testConflict(t *testing.T, s store.Store) {
	r1 := mustPut(t, s, put("a", "1"), put("b", "1"))
	for name, cond := range map[string]store.Cond{
		"other revision": {Key: "a", Mod: r1 + 1},
		"must not exist": {Key: "a"},
		"must exist":     {Key: "c", Mod: r1},
	} {
		rev, err := s.Commit(t.Context(), store.Txn{
			If:   []store.Cond{{Key: "b", Mod: r1}, cond},
			Then: []store.Op{put("b", "2"), put("c", "2"), del("a")},
		})
		if !errors.Is(err, store.ErrConflict) {
			t.Errorf("%s: revision %d, error %v, want ErrConflict", name, rev, err)
		}
	}
	wantList(t, s, "", kv("a", "1", r1, r1), kv("b", "1", r1, r1))
	if _, rev := mustList(t, s, ""); rev != r1 {
		t.Errorf("a conflict moved the revision from %d to %d", r1, rev)
	}
	r2 := mustCommit(t, s, store.Txn{
		If:   []store.Cond{{Key: "b", Mod: r1}, {Key: "a", Mod: r1}, {Key: "c"}},
		Then: []store.Op{put("b", "2"), put("c", "2"), del("a")},
	})
	wantList(t, s, "", kv("b", "2", r1, r2), kv("c", "2", r2, r2))
}

func testCheckOnly(t *testing.T, s store.Store) {
	r1 := mustPut(t, s, put("a", "1"))
	if rev := mustCommit(t, s, store.Txn{If: []store.Cond{{Key: "a", Mod: r1}}}); rev != r1 {
		t.Errorf("revision %d of a transaction that only checks, want %d", rev, r1)
	}
	if _, err := s.Commit(t.Context(), store.Txn{If: []store.Cond{{Key: "a"}}}); !errors.Is(err, store.ErrConflict) {
		t.Errorf("error %v, want ErrConflict", err)
	}
	wantList(t, s, "", kv("a", "1", r1, r1))
}

func testRecreate(t *testing.T, s store.Store) {
	r1 := mustPut(t, s, put("a", "1"))
	r2 := mustPut(t, s, del("a"))
	wantList(t, s, "")
	if _, err := s.Commit(t.Context(), store.Txn{If: []store.Cond{{Key: "a", Mod: r1}}}); !errors.Is(err, store.ErrConflict) {
		t.Errorf("a deleted key still has its revision: %v", err)
	}
	mustPut(t, s, del("a"), del("never")) // deleting what is not there is fine
	r3 := mustCommit(t, s, store.Txn{If: []store.Cond{{Key: "a"}}, Then: []store.Op{put("a", "2")}})
	if r3 <= r2 {
		t.Errorf("revision %d after %d", r3, r2)
	}
	wantList(t, s, "", kv("a", "2", r3, r3))
}

func testList(t *testing.T, s store.Store) {
	keys := []string{"b/2", "b/10", "a", "b0", "b/", "b", "c/\xff", "b/1"}
	var ops []store.Op
	for _, k := range keys {
		ops = append(ops, put(k, k))
	}
	mustPut(t, s, ops...)
	for prefix, want := range map[string][]string{
		"":     {"a", "b", "b/", "b/1", "b/10", "b/2", "b0", "c/\xff"},
		"b":    {"b", "b/", "b/1", "b/10", "b/2", "b0"},
		"b/":   {"b/", "b/1", "b/10", "b/2"},
		"b/1":  {"b/1", "b/10"},
		"c/":   {"c/\xff"},
		"none": nil,
	} {
		kvs, _ := mustList(t, s, prefix)
		var got []string
		for _, kv := range kvs {
			got = append(got, kv.Key)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("list %q (-want +got):\n%s", prefix, diff)
		}
	}
}

func testBad(t *testing.T, s store.Store) {
	for name, ops := range map[string][]store.Op{
		"empty key":     {put("fine", "1"), put("", "1")},
		"written twice": {put("a", "1"), put("a", "2")},
	} {
		if rev, err := s.Commit(t.Context(), store.Txn{Then: ops}); err == nil {
			t.Errorf("%s: accepted as revision %d", name, rev)
		}
	}
	wantList(t, s, "")
}

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

// A watcher that does not read neither holds up a commit nor misses one.
func testWatchSlow(t *testing.T, s store.Store) {
	_, r0 := mustList(t, s, "")
	w := watch(t, s, "", r0)
	const n = 2000
	var last uint64
	var wg sync.WaitGroup
	for g := range 10 {
		wg.Go(func() {
			for i := range n / 10 {
				if _, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{put(fmt.Sprintf("%d/%d", g, i), "v")}}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for range n {
		got := w.next(t)
		if got.Rev <= last {
			t.Fatalf("revision %d after %d", got.Rev, last)
		}
		last = got.Rev
	}
	if _, rev := mustList(t, s, ""); rev != last {
		t.Errorf("the last event has revision %d, the store %d", last, rev)
	}
}

// Fifty goroutines increment one counter by compare-and-swap.
func testCompareAndSwap(t *testing.T, s store.Store) {
	mustPut(t, s, put("n", "0"))
	const workers, each = 50, 4
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for done := 0; done < each; {
				kvs, _, err := s.List(t.Context(), "n")
				if err != nil || len(kvs) != 1 {
					t.Errorf("list: %v %v", kvs, err)
					return
				}
				n, _ := strconv.Atoi(string(kvs[0].Value))
				_, err = s.Commit(t.Context(), store.Txn{
					If:   []store.Cond{{Key: "n", Mod: kvs[0].Mod}},
					Then: []store.Op{put("n", strconv.Itoa(n+1))},
				})
				switch {
				case err == nil:
					done++
				case !errors.Is(err, store.ErrConflict):
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	kvs, _ := mustList(t, s, "n")
	if got := string(kvs[0].Value); got != strconv.Itoa(workers*each) {
		t.Errorf("counter is %s, want %d", got, workers*each)
	}
}

// Of many that claim the same absent key, one gets it; the others, whose
// transactions run at the same moment, write nothing.
func testOneWinner(t *testing.T, s store.Store) {
	for round := range 20 {
		key := fmt.Sprintf("claim/%d", round)
		var mu sync.Mutex
		winners := map[uint64]string{}
		var wg sync.WaitGroup
		for g := range 20 {
			wg.Go(func() {
				me := strconv.Itoa(g)
				rev, err := s.Commit(t.Context(), store.Txn{
					If:   []store.Cond{{Key: key}},
					Then: []store.Op{put(key, me), put("of/"+key+"/"+me, "")},
				})
				switch {
				case err == nil:
					mu.Lock()
					winners[rev] = me
					mu.Unlock()
				case !errors.Is(err, store.ErrConflict):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		kvs, _ := mustList(t, s, key)
		if len(winners) != 1 || len(kvs) != 1 || winners[kvs[0].Mod] != string(kvs[0].Value) {
			t.Fatalf("round %d: winners %v, stored %v", round, winners, kvs)
		}
		if traces, _ := mustList(t, s, "of/"+key+"/"); len(traces) != 1 {
			t.Fatalf("round %d: losers wrote: %v", round, traces)
		}
	}
}

func testContextDone(t *testing.T, s store.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Commit(ctx, store.Txn{Then: []store.Op{put("a", "1")}}); !errors.Is(err, context.Canceled) {
		t.Errorf("commit: %v, want context canceled", err)
	} else if kvs, _ := mustList(t, s, ""); len(kvs) > 0 && !errors.Is(err, store.ErrUnknown) {
		t.Errorf("commit said that nothing was written, but %v was", kvs)
	}
	if _, _, err := s.List(ctx, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("list: %v, want context canceled", err)
	}
	_, rev := mustList(t, s, "")
	if err := s.Watch(ctx, "", rev, func(uint64, []store.Event) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("watch: %v, want context canceled", err)
	}
}

func testClose(t *testing.T, s store.Store) {
	rev := mustPut(t, s, put("a", "1"))
	ended := make(chan error, 1)
	go func() {
		ended <- s.Watch(context.Background(), "", rev, func(uint64, []store.Event) error { return nil })
	}()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			for {
				if _, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{put("a", "2")}}); err != nil {
					return
				}
			}
		})
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait() // every commit in progress ends
	select {
	case err := <-ended:
		if err == nil {
			t.Error("watch ended without an error")
		}
	case <-time.After(patience):
		t.Error("watch did not end")
	}
	if _, _, err := s.List(t.Context(), ""); err == nil {
		t.Error("list on a closed store: no error")
	}
	if err := s.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}
