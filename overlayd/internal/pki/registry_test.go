package pki_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync/atomic"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/pki"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/bbolt"
)

// compacted is a real store that has forgotten its history.
type compacted struct {
	store.Store
	watches atomic.Int64
}

var errEnough = errors.New("enough")

func (c *compacted) Watch(context.Context, string, uint64, func(uint64, []store.Event) error) error {
	if c.watches.Add(1) > 1 {
		return errEnough
	}
	return store.ErrCompacted
}

// onError calls a function when an error is logged.
type onError struct {
	slog.Handler
	call func()
}

func (h onError) Enabled(context.Context, slog.Level) bool { return true }

func (h onError) Handle(_ context.Context, r slog.Record) error {
	if r.Level == slog.LevelError {
		h.call()
	}
	return nil
}

// Who is revoked is refused also while the store is read anew.
func TestRevokedWhileReading(t *testing.T) {
	file, err := bbolt.Open(filepath.Join(t.TempDir(), "coordinator.db"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	asked := func() {}
	log := slog.New(onError{slog.DiscardHandler, func() { asked() }})
	r, err := pki.Open(t.Context(), pki.Options{Store: &compacted{Store: file}, Dir: t.TempDir(), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	cert := joined(t, r, "revoked")
	if err := r.Revoke(t.Context(), pki.RoleAgent, []string{"revoked"}); err != nil {
		t.Fatal(err)
	}
	// One that cannot be read comes before it.
	if _, err := file.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: "pki/identities/agent/a", Value: []byte("?")}}}); err != nil {
		t.Fatal(err)
	}
	times := 0
	asked = func() {
		times++
		if _, err := r.Identify(cert); err == nil {
			t.Error("a revoked agent was accepted")
		}
	}
	if err := r.Run(t.Context()); !errors.Is(err, errEnough) || times != 1 {
		t.Errorf("run: %v; the store was read anew %d times", err, times)
	}
	if _, err := r.Identify(cert); err == nil {
		t.Error("a revoked agent was accepted afterwards")
	}
}

// joined is the certificate of an agent that has joined.
func joined(t *testing.T, r *pki.Registry, name string) *x509.Certificate {
	t.Helper()
	token, err := r.CreateToken(t.Context(), api.TokenRequest{Role: "agent", Uses: 1, TTLSeconds: 60})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	granted, err := r.Join(t.Context(), api.JoinRequest{Token: token.Token, Name: name, CSR: csr}, nil, netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(granted.Certificate))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
