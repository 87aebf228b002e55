package coordinator_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// An agent that moves between two coordinators on one store, or comes back after
// either was restarted, is told what has changed and not everything.
func TestStreamMoves(t *testing.T) {
	s := newStore(t)
	a := start(t, s, seedNetwork)
	known(t, a, 20)
	w := a.watch(t, nth(0).AgentID, 0)
	w.next(t)
	at := w.last
	w.stop()
	b := start(t, s, seedNetwork)
	moves := func(to *node, newcomer int) {
		t.Helper()
		a.register(t, nth(newcomer))
		w := to.watchFrom(t, nth(0).AgentID, at)
		defer w.stop()
		for {
			e := w.next(t)
			if e.Snapshot {
				t.Fatalf("newcomer %d: a snapshot of %d peers", newcomer, len(e.Put))
			}
			at = w.last
			if slices.Contains(peerIDs(e), nth(newcomer).AgentID) {
				return
			}
		}
	}
	moves(b, 20)
	moves(a, 21)
	b.stop()
	b = start(t, s, seedNetwork)
	moves(b, 22)
	moves(a, 23)
	moves(b, 24)
}

// The store is put back as it was before, a coordinator starts on it, and once
// more, and only then an agent comes back that heard of what is no longer.
func TestRestoredAndRestarted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	n := start(t, s, seedNetwork)
	known(t, n, 20)
	n.stop()
	s.Close()
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s = openStore(t, path)
	n = start(t, s, seedNetwork)
	n.register(t, request("lost", "10.0.0.2"))
	w := n.watch(t, nth(0).AgentID, 0)
	w.next(t)
	at := w.last
	w.stop()
	n.stop()
	s.Close()

	if err := os.WriteFile(path, before, 0o600); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, path)
	for i := range 3 { // each start, and what it leases, is a revision that was another before
		n = start(t, s, seedNetwork)
		n.register(t, nth(30+i))
		n.stop()
	}
	n = start(t, s, seedNetwork)
	w = n.watchFrom(t, nth(0).AgentID, at)
	if e := w.next(t); !e.Snapshot || slices.Contains(peerIDs(e), "lost") {
		t.Errorf("%+v from %+v, want a snapshot", e, at)
	}
}

// Somebody who told no run is believed, as before there were any.
func TestStreamWithoutRun(t *testing.T) {
	s := newStore(t)
	n := start(t, s, seedNetwork)
	revision := known(t, n, 20)
	n.register(t, nth(20))
	w := n.watchFrom(t, nth(0).AgentID, api.Known{Revision: revision})
	e := w.next(t)
	if len(e.Put) == 0 {
		e = w.next(t) // a heartbeat came first
	}
	if e.Snapshot || e.Run == "" || !slices.Contains(peerIDs(e), nth(20).AgentID) {
		t.Errorf("%+v, want the newcomer", e)
	}
}
