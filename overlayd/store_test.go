package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// A store that was lost, emptied or swapped is no new cluster: the state
// directory remembers which one was served.
func TestLostStore(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "coordinator.db")
	log := slog.New(slog.DiscardHandler)
	begin := func(cluster string) {
		t.Helper()
		var f storeFlags
		s, _, err := f.open(t.Context(), dir, log)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if cluster != "" {
			if _, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: "cluster", Value: []byte(`{"id": "` + cluster + `"}`)}}}); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.remember(dir, "one", "hash"); err != nil {
			t.Fatal(err)
		}
	}
	begin("one")
	begin("") // the same again
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	refuses := func(what string, words ...string) {
		t.Helper()
		var f storeFlags
		s, _, err := f.open(t.Context(), dir, log)
		if err == nil {
			s.Close()
			t.Fatalf("%s: it starts", what)
		}
		for _, w := range append(words, "overlayctl restore", "cluster.json") {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v does not say %q", what, err, w)
			}
		}
	}
	os.Remove(path)
	refuses("missing", "holds no cluster", "served cluster one")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refuses("empty", "holds no cluster")
	os.Remove(path)
	other := t.TempDir()
	var f storeFlags
	s, _, err := f.open(t.Context(), other, log)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: "cluster", Value: []byte(`{"id": "two"}`)}}}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if err := os.Rename(filepath.Join(other, "coordinator.db"), path); err != nil {
		t.Fatal(err)
	}
	refuses("swapped", "holds cluster two", "served cluster one")
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	begin("")
	os.Remove(path)
	os.Remove(filepath.Join(dir, clusterFile)) // on purpose
	begin("new")
}
