package pki

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// Keys of the store.
const (
	prefixPKI      = "pki/"
	keyRoots       = prefixPKI + "roots"       // []storedRoot
	prefixToken    = prefixPKI + "tokens/"     // <token id> -> tokenRecord
	prefixIdentity = prefixPKI + "identities/" // <role>/<name> -> identityRecord
)

func keyToken(id string) string { return prefixToken + id }
func keyIdentity(role Role, name string) string {
	return prefixIdentity + string(role) + "/" + name
}

// identityRecord is what is stored of an identity. Where there is none, as in a
// store that was lost, the certificate alone counts.
type identityRecord struct {
	Instance string    `json:"instance"` // whose certificates are accepted
	Joined   time.Time `json:"joined"`
	Token    string    `json:"token"`         // id
	Key      []byte    `json:"key,omitempty"` // hash of the public key that joined
	Revoked  time.Time `json:"revoked,omitzero"`
}

// Options are the parts a Registry is made of.
type Options struct {
	Store       store.Store // stays the caller's to close, after Run has ended
	Dir         string      // of the keys of this coordinator; made if it is not there
	OperatorDir string      // where the operator's CA lies; empty: we make one
	JoinToken   string      // of role coordinator; needed where Dir has no cluster key
	Names       []string    // by which clients reach this coordinator, beside the addresses they connect to
	Life        time.Duration
	Log         *slog.Logger
	Now         func() time.Time
}

// Registry is a coordinator's side of identity. It is safe for concurrent use.
type Registry struct {
	o       Options
	key     []byte // of the cluster
	auth    atomic.Pointer[authority]
	server  serverCert
	guesses guesses
	joining sync.Mutex // joins with one token would only conflict
	conns   connections

	rootsMu  sync.Mutex
	rootsMod uint64 // revision of what is in auth
	unsaved  []byte // of it, while there is no copy in a file

	mu         sync.RWMutex
	rev        uint64 // of the store
	identities map[string]storedIdentity
}

type storedIdentity struct {
	mod uint64
	identityRecord
}

// Open reads the CA from the store and the files, and makes one where there is
// none.
func Open(ctx context.Context, o Options) (*Registry, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Life == 0 {
		o.Life = DefaultLife
	}
	r := &Registry{o: o, identities: map[string]storedIdentity{}, conns: newConnections()}
	if err := r.begin(ctx); err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	if err := r.load(ctx); err != nil {
		return nil, fmt.Errorf("identity: read the store: %w", err)
	}
	return r, nil
}

// Domain names the cluster in certificates.
func (r *Registry) Domain() string { return r.auth.Load().domain }

func (r *Registry) load(ctx context.Context) error {
	kvs, rev, err := r.o.Store.List(ctx, prefixPKI)
	if err != nil {
		return err
	}
	there := make(map[string]bool, len(kvs))
	for _, kv := range kvs {
		there[kv.Key] = true
		r.apply(store.Event{KV: kv})
	}
	// Last, so that what was revoked stays refused meanwhile.
	r.mu.Lock()
	for key, known := range r.identities {
		if !there[key] && known.mod <= rev {
			delete(r.identities, key)
		}
	}
	r.rev = rev
	r.mu.Unlock()
	return nil
}

// Run follows what the other coordinators do, until ctx ends; then it returns nil.
func (r *Registry) Run(ctx context.Context) error {
	go r.housekeeping(ctx)
	for {
		r.mu.RLock()
		after := r.rev
		r.mu.RUnlock()
		err := r.o.Store.Watch(ctx, prefixPKI, after, func(rev uint64, events []store.Event) error {
			for _, e := range events {
				r.apply(e)
			}
			r.mu.Lock()
			r.rev = rev
			r.mu.Unlock()
			return nil
		})
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, store.ErrCompacted) {
			return fmt.Errorf("identity: follow the store: %w", err)
		}
		if err := r.load(ctx); err != nil {
			return fmt.Errorf("identity: read the store: %w", err)
		}
		r.conns.check(r.stillAccepted)
	}
}

func (r *Registry) housekeeping(ctx context.Context) {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		if err := r.saveRoots(); err != nil {
			r.o.Log.Debug("trying again", logkey.Err, err)
		}
		if err := r.dropOld(ctx); err != nil && ctx.Err() == nil {
			r.o.Log.Warn("cannot end the trust in an old CA; trying again", logkey.Err, err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// apply takes over one change of the store. What it already knows, or something
// newer, it leaves alone.
func (r *Registry) apply(e store.Event) {
	switch {
	case e.Key == keyRoots && !e.Delete:
		taken, err := r.setRoots(r.key, e.KV)
		switch {
		case err != nil && !taken:
			r.o.Log.Error("the CA in the store cannot be used; the one before goes on", logkey.Err, err)
		case err != nil:
			r.o.Log.Warn("trying again", logkey.Err, err)
		}
		if taken {
			r.conns.check(r.stillAccepted)
		}
	case strings.HasPrefix(e.Key, prefixIdentity):
		var record identityRecord
		if !e.Delete {
			if err := json.Unmarshal(e.Value, &record); err != nil {
				r.o.Log.Error("stored identity cannot be read", logkey.Key, e.Key, logkey.Err, err)
				return
			}
		}
		r.mu.Lock()
		newer := e.Mod > r.identities[e.Key].mod
		if newer && e.Delete {
			delete(r.identities, e.Key)
		} else if newer {
			r.identities[e.Key] = storedIdentity{mod: e.Mod, identityRecord: record}
		}
		r.mu.Unlock()
		if newer {
			role, name, _ := strings.Cut(strings.TrimPrefix(e.Key, prefixIdentity), "/")
			r.conns.checkOne(Role(role), name, r.stillAccepted)
		}
	}
}

// read returns one key; a zero Mod means that it does not exist.
func (r *Registry) read(ctx context.Context, key string) (store.KV, error) {
	kvs, _, err := r.o.Store.List(ctx, key)
	if err != nil {
		return store.KV{}, err
	}
	if len(kvs) > 0 && kvs[0].Key == key { // the first in byte order
		return kvs[0], nil
	}
	return store.KV{}, nil
}

// Identify says who a client's certificate is of. The error is a *Refused.
func (r *Registry) Identify(cert *x509.Certificate) (Identity, error) {
	who, err := r.auth.Load().verify(cert, r.o.Now())
	if err != nil {
		return Identity{}, err
	}
	return who, r.accepted(who)
}

// accepted asks the record of an identity whose certificate is good.
func (r *Registry) accepted(who Identity) error {
	r.mu.RLock()
	record, there := r.identities[keyIdentity(who.Role, who.Name)]
	r.mu.RUnlock()
	switch {
	case !there:
		return nil
	case !record.Revoked.IsZero():
		return &Refused{ReasonRevoked, fmt.Sprintf("the identity of %s was revoked at %s; if that was a mistake, join again with a new token (overlayctl token create)",
			who, record.Revoked.UTC().Format(time.RFC3339))}
	case record.Instance != who.Instance:
		return &Refused{ReasonReplaced, fmt.Sprintf("another host joined as %s at %s, and this certificate is older; give this host its own agent id, or join again with a new token",
			who, record.Joined.UTC().Format(time.RFC3339))}
	}
	return nil
}
