package coordinator_test

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/transfer"
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

// A store that was written half, by a copy that the disk had no room for, is not taken
// for the beginning of a new cluster: its agents would be strangers there, and what
// others hold would be granted again.
func TestStoreWrittenHalf(t *testing.T) {
	from := newStore(t)
	n := start(t, from, seedNetwork)
	for i := range 60 {
		n.register(t, nth(i))
	}
	n.stop()
	content, err := transfer.Read(t.Context(), from)
	if err != nil {
		t.Fatal(err)
	}
	to := newStore(t)
	full := &fullAfter{Store: to, room: 2}
	if err := content.Copy(t.Context(), full, time.Now()); !errors.Is(err, errFull) {
		t.Fatalf("copy: %v", err)
	}
	for name, adopt := range map[string]string{"as a new cluster": "", "as the one that it was": content.Cluster.ID} {
		_, err := coordinator.New(t.Context(), coordinator.Options{
			Network: parseNetwork(t, seedNetwork), Store: to, Log: slog.New(slog.DiscardHandler), Adopt: coordinator.Adopt{Cluster: adopt},
		})
		if err == nil || !strings.Contains(err.Error(), "not finished") {
			t.Errorf("%s: %v, want that the copy was not finished", name, err)
		}
	}
	if kvs, _, err := to.List(t.Context(), transfer.KeyCluster); err != nil || len(kvs) > 0 {
		t.Errorf("a cluster was made of it: %v, %v", kvs, err)
	}
}

// fullAfter has room for some transactions.
type fullAfter struct {
	store.Store
	room int
}

func (f *fullAfter) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	if f.room--; f.room < 0 {
		return 0, errFull
	}
	return f.Store.Commit(ctx, txn)
}
