package pki

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/bbolt"
)

func openRegistry(t *testing.T, log slog.Handler) *Registry {
	t.Helper()
	s, err := bbolt.Open(filepath.Join(t.TempDir(), "coordinator.db"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	r, err := Open(t.Context(), Options{Store: s, Dir: t.TempDir(), Log: slog.New(log)})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// One goroutine follows the store and is still reading a rotation when another one
// retires the CAs before: what is newer stays in force.
func TestRetireWhileARotationIsRead(t *testing.T) {
	r := openRegistry(t, slog.DiscardHandler)
	var many []*root
	for range 300 { // takes a while to read
		next, err := newRoot("x", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		many = append(many, next)
	}
	rotated, err := encodeRoots(r.key, many)
	if err != nil {
		t.Fatal(err)
	}
	retired, err := encodeRoots(r.key, many[299:])
	if err != nil {
		t.Fatal(err)
	}
	event := func(text []byte, mod uint64) store.Event {
		return store.Event{KV: store.KV{Key: keyRoots, Value: text, Mod: mod}}
	}
	reading, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		close(reading)
		r.apply(event(rotated, 1000))
	}()
	<-reading
	r.apply(event(retired, 1001))
	<-done
	if n := len(r.CAs()); n != 1 {
		t.Errorf("%d CAs are trusted, want the one that was left", n)
	}
	text, err := os.ReadFile(filepath.Join(r.o.Dir, rootsFile))
	if err != nil || string(text) != string(retired) {
		t.Errorf("the copy in the file is of before: %v", err)
	}
}

// A copy that cannot be written keeps nobody from retiring a CA, and is written when it
// can be.
func TestRetireWithoutACopy(t *testing.T) {
	var log strings.Builder
	r := openRegistry(t, slog.NewTextHandler(&log, nil))
	path := filepath.Join(r.o.Dir, rootsFile)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(path, "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	a := r.auth.Load()
	key := must(newKey())
	who := Identity{Role: RoleAgent, Name: "a", Domain: a.domain}
	member := &Peer{registry: r, who: who, cert: must(a.issue(who, key.Public(), nil, time.Now(), time.Hour))}
	if r.stillAccepted(member) != nil {
		t.Fatal("the certificate is not accepted")
	}
	if err := r.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.Retire(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(r.CAs()) != 1 || r.stillAccepted(member) == nil {
		t.Errorf("%d CAs; the certificate of the one before is accepted", len(r.CAs()))
	}
	if text := log.String(); strings.Contains(text, "the one before goes on") || !strings.Contains(text, "keep a copy of the CA") {
		t.Errorf("log: %s", text)
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := r.saveRoots(); err != nil {
		t.Fatal(err)
	}
	if _, err := decodeRoots(r.key, must(os.ReadFile(path))); err != nil {
		t.Error(err)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
