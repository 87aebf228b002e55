package pki_test

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/pki"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/bbolt"
)

// meddled is a real store where something happens when a token is used.
type meddled struct {
	store.Store
	use func(commit func() (uint64, error)) (uint64, error)
}

func (m *meddled) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	commit := func() (uint64, error) { return m.Store.Commit(ctx, txn) }
	if strings.HasPrefix(txn.Then[0].Key, "pki/tokens/") && m.use != nil {
		use := m.use
		m.use = nil
		return use(commit)
	}
	return commit()
}

// lossy is a real store whose next answer is lost.
type lossy struct {
	store.Store
	lost bool
}

func (l *lossy) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	rev, err := l.Store.Commit(ctx, txn)
	if l.lost {
		l.lost = false
		return 0, errors.Join(store.ErrUnknown, err)
	}
	return rev, err
}

// What was carried out, and of which nobody knows, is not done a second time, and counts
// as done.
func TestLostAnswers(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	file, err := bbolt.Open(filepath.Join(t.TempDir(), "coordinator.db"), log)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	s := &lossy{Store: file}
	r, err := pki.Open(t.Context(), pki.Options{Store: s, Dir: t.TempDir(), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	token, err := r.CreateToken(t.Context(), api.TokenRequest{Role: "agent", Uses: 1, TTLSeconds: 60})
	if err != nil {
		t.Fatal(err)
	}
	s.lost = true
	if err := r.RevokeToken(t.Context(), token.ID); err != nil {
		t.Errorf("revoke a token: %v", err)
	}
	if err := r.RevokeToken(t.Context(), token.ID); err == nil {
		t.Error("a token that is not there was revoked")
	}
	cert := joined(t, r, "revoked")
	s.lost = true
	if err := r.Revoke(t.Context(), pki.RoleAgent, []string{"revoked"}); err != nil {
		t.Errorf("revoke an identity: %v", err)
	}
	if _, err := r.Identify(cert); err == nil {
		t.Error("a revoked agent is accepted here")
	}
	s.lost = true
	if err := r.Rotate(t.Context()); err != nil {
		t.Errorf("rotate: %v", err)
	}
	if cas := r.CAs(); len(cas) != 2 || !cas[1].Issues || cas[0].Fingerprint == cas[1].Fingerprint || !cas[1].Until.IsZero() {
		t.Errorf("after one rotation the CAs are %+v", cas)
	}
}

// Two coordinators want the last use of a token: the one that does not get it gets
// nothing of the cluster, whatever it hears of the store.
func TestLastUseOfACoordinatorsToken(t *testing.T) {
	var errCut = errors.New("cut off")
	for name, tt := range map[string]struct {
		meddle func(commit func() (uint64, error), other func()) (uint64, error)
		joins  bool
	}{
		"alone": {func(commit func() (uint64, error), _ func()) (uint64, error) { return commit() }, true},
		"the other one is faster": {func(commit func() (uint64, error), other func()) (uint64, error) {
			other()
			return commit()
		}, false},
		"the answer is lost": {func(commit func() (uint64, error), _ func()) (uint64, error) {
			_, err := commit()
			return 0, errors.Join(store.ErrUnknown, err)
		}, true},
		"the question is lost, and the other one uses it": {func(_ func() (uint64, error), other func()) (uint64, error) {
			other()
			return 0, store.ErrUnknown
		}, false},
		"the store takes nothing": {func(func() (uint64, error), func()) (uint64, error) { return 0, errCut }, false},
	} {
		t.Run(name, func(t *testing.T) {
			log := slog.New(slog.DiscardHandler)
			file, err := bbolt.Open(filepath.Join(t.TempDir(), "coordinator.db"), log)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			first, err := pki.Open(t.Context(), pki.Options{Store: file, Dir: t.TempDir(), Log: log})
			if err != nil {
				t.Fatal(err)
			}
			token, err := first.CreateToken(t.Context(), api.TokenRequest{Role: "coordinator", Uses: 1, TTLSeconds: 60})
			if err != nil {
				t.Fatal(err)
			}
			join := func(s store.Store, dir string) error {
				_, err := pki.Open(t.Context(), pki.Options{Store: s, Dir: dir, JoinToken: token.Token, Log: log})
				_, there := os.Stat(filepath.Join(dir, "cluster.key"))
				if joined := err == nil; joined != (there == nil) || there != nil && !errors.Is(there, fs.ErrNotExist) {
					t.Errorf("joined: %v, key: %v", err, there)
				}
				return err
			}
			other := func() {
				if err := join(file, t.TempDir()); err != nil {
					t.Errorf("the other one: %v", err)
				}
			}
			s := &meddled{Store: file, use: func(commit func() (uint64, error)) (uint64, error) { return tt.meddle(commit, other) }}
			if err := join(s, t.TempDir()); (err == nil) != tt.joins {
				t.Errorf("joined: %v", err)
			}
		})
	}
}
