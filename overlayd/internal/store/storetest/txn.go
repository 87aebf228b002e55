package storetest

import (
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/overlayd/internal/store"
)

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

func testPrefixCondition(t *testing.T, s store.Store) {
	r1 := mustPut(t, s, put("a/1", "1"), put("b", "1"))
	r2 := mustPut(t, s, put("a/2", "1"))
	holds := func(prefix string, after uint64) bool {
		t.Helper()
		_, err := s.Commit(t.Context(), store.Txn{If: []store.Cond{{Key: prefix, Mod: after, Prefix: true}}})
		if err != nil && !errors.Is(err, store.ErrConflict) {
			t.Fatal(err)
		}
		return err == nil
	}
	for _, tt := range []struct {
		prefix string
		after  uint64
		want   bool
	}{
		{"a/", r2, true}, {"a/", r2 + 5, true}, {"a/", r1, false}, {"a/1", r1, true}, {"a", r1, false}, {"b", r1, true}, {"b", r1 - 1, false}, {"none/", 1, true},
	} {
		if got := holds(tt.prefix, tt.after); got != tt.want {
			t.Errorf("nothing under %q after %d of %d and %d: %v, want %v", tt.prefix, tt.after, r1, r2, got, tt.want)
		}
	}
	_, err := s.Commit(t.Context(), store.Txn{If: []store.Cond{{Key: "a/", Mod: r1, Prefix: true}}, Then: []store.Op{put("b", "2")}})
	if !errors.Is(err, store.ErrConflict) {
		t.Errorf("error %v, want ErrConflict", err)
	}
	wantList(t, s, "b", kv("b", "1", r1, r1))
	r3 := mustCommit(t, s, store.Txn{If: []store.Cond{{Key: "a/", Mod: r2, Prefix: true}}, Then: []store.Op{put("b", "2"), del("a/2")}})
	if !holds("a/", r1) || !holds("b", r3) {
		t.Error("a key that was deleted counts")
	}
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
		"too many":      many(store.MaxOps + 1),
	} {
		if rev, err := s.Commit(t.Context(), store.Txn{Then: ops}); err == nil {
			t.Errorf("%s: accepted as revision %d", name, rev)
		}
	}
	wantList(t, s, "")
}

func many(n int) []store.Op {
	var ops []store.Op
	for i := range n {
		ops = append(ops, put(fmt.Sprint("k", i), "v"))
	}
	return ops
}

// As many conditions and operations as are promised are one transaction.
func testLarge(t *testing.T, s store.Store) {
	ops := many(store.MaxOps)
	txn := store.Txn{Then: ops}
	for _, op := range ops {
		txn.If = append(txn.If, store.Cond{Key: op.Key})
	}
	rev := mustCommit(t, s, txn)
	kvs, _ := mustList(t, s, "")
	for _, kv := range kvs {
		if kv.Mod != rev {
			t.Errorf("key %s has revision %d, want %d", kv.Key, kv.Mod, rev)
		}
	}
	if len(kvs) != store.MaxOps {
		t.Errorf("%d keys, want %d", len(kvs), store.MaxOps)
	}
}

func testReady(t *testing.T, s store.Store) {
	mustPut(t, s, put("a", "1"))
	if err := s.Ready(t.Context()); err != nil {
		t.Errorf("not ready: %v", err)
	}
}
