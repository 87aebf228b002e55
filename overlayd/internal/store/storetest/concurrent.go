package storetest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/store"
)

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
