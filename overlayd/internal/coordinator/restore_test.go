package coordinator_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// The store is put back as it was some time ago, and by and by gets revisions
// that agents heard of before, with other content. Who has heard of them from the
// coordinator that is gone does not take them for the same.
func TestRestoredStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	n := start(t, s, seedNetwork)
	n.register(t, request("a", "10.0.0.1"))
	n.stop()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}

	s = openStore(t, path)
	n = start(t, s, seedNetwork)
	n.register(t, request("lost", "10.0.0.2"))
	w := n.watch(t, "a", 0)
	e := w.next(t)
	known := api.Known{Revision: e.Revision, Run: e.Run}
	w.stop()
	n.stop()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(path, before, 0o600); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, path)
	n = start(t, s, seedNetwork)
	n.register(t, request("b", "10.0.0.3"))
	n.register(t, request("c", "10.0.0.4"))
	w = n.watchFrom(t, "a", known)
	if e := w.next(t); !e.Snapshot || e.Revision < known.Revision || len(e.Put) != 3 {
		t.Fatalf("%+v, want a snapshot of all that are there, which is later than %+v", e, known)
	} else {
		known = api.Known{Revision: e.Revision, Run: e.Run}
	}
	w.stop()

	// Who has heard of this run gets what it missed, and so does everybody after
	// a mere restart.
	n.register(t, request("d", "10.0.0.5"))
	w = n.watchFrom(t, "a", known)
	if e = w.next(t); len(e.Put) == 0 {
		e = w.next(t) // a heartbeat came first
	}
	if e.Snapshot || !slices.Contains(peerIDs(e), "d") {
		t.Errorf("%+v, want what was missed", e)
	}
	known = api.Known{Revision: e.Revision, Run: e.Run}
	w.stop()
	n.stop()
	n = start(t, s, seedNetwork)
	w = n.watchFrom(t, "a", known)
	if e := w.next(t); e.Snapshot || len(e.Put)+len(e.Delete) > 0 {
		t.Errorf("%+v after a restart, want nothing new", e)
	}
}
