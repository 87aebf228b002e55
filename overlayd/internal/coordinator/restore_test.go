package coordinator_test

import (
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"overlayd.internal/overlay/conf"
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

// Who got or changed a lease after the copy was made that is put back registers
// again, although the store says that nothing has changed since: it would be told
// of at its old address, and what it got would be given to others.
func TestRestoredLease(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	n := start(t, s, seedNetwork)
	n.register(t, request("a", "10.0.0.1"))
	n.register(t, request("b", "10.0.0.2"))
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
	n.register(t, request("a", "10.0.0.9"))
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
	n = start(t, openStore(t, path), seedNetwork)
	w = n.watchFrom(t, "a", known)
	if e := w.next(t); !e.Snapshot {
		t.Fatalf("%+v, want a snapshot", e)
	}
	if e := w.next(t); !e.Register {
		t.Fatalf("%+v, want a question to register", e)
	}
	n.register(t, request("a", "10.0.0.9")) // with the stream open, as agents do
	w.follow(t, map[string]conf.Peer{}, func() bool { return n.State().Agents[0].IP.String() == "10.0.0.9" })
	_, err = n.client.Register(t.Context(), request("a", "10.0.0.8"))
	refused(t, err, http.StatusConflict, "agent id a is in use")
	w.stop()
}
