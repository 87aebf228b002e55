// Package storetest is the contract of store.Store as a test. Every
// implementation passes the same one.
package storetest

import (
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
		{"PrefixCondition", testPrefixCondition},
		{"DeleteAndRecreate", testRecreate},
		{"ListOrderAndPrefix", testList},
		{"BadTransaction", testBad},
		{"LargeTransaction", testLarge},
		{"Ready", testReady},
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
