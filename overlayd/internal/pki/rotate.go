package pki

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// Rotate makes a new CA, which issues from now on. The one before is trusted
// until its last certificate has ended.
func (r *Registry) Rotate(ctx context.Context) error {
	if r.o.OperatorDir != "" {
		return serve.Refuse(http.StatusConflict, "the CA is the one in %s; put another one there and restart the coordinator: certificates of both are valid in between", r.o.OperatorDir)
	}
	next, err := newRoot(domainOf(r.key), r.o.Now())
	if err != nil {
		return err
	}
	return r.rotateTo(ctx, next)
}

func (r *Registry) rotateTo(ctx context.Context, next *root) error {
	return r.changeRoots(ctx, func(roots []*root) ([]*root, error) {
		if roots[len(roots)-1].cert.Equal(next.cert) {
			return roots, nil // written before, and nobody knew
		}
		before := *roots[len(roots)-1]
		before.until = r.o.Now().Add(overlap)
		return append(roots[:len(roots)-1], &before, next), next.follow(&before, r.o.Now())
	})
}

// Retire stops trusting every CA but the one that issues: whoever has not renewed
// since the rotation has to join again.
func (r *Registry) Retire(ctx context.Context) error {
	return r.changeRoots(ctx, func(roots []*root) ([]*root, error) { return roots[len(roots)-1:], nil })
}

// dropOld ends the trust in CAs whose time is over.
func (r *Registry) dropOld(ctx context.Context) error {
	over := func(old *root) bool { return !old.until.IsZero() && r.o.Now().After(old.until) }
	if !slices.ContainsFunc(r.auth.Load().roots, over) {
		return nil
	}
	return r.changeRoots(ctx, func(roots []*root) ([]*root, error) { return slices.DeleteFunc(roots, over), nil })
}

// changeRoots writes what change makes of the roots, and has it in force here
// when it returns.
func (r *Registry) changeRoots(ctx context.Context, change func([]*root) ([]*root, error)) error {
	for {
		kv, err := r.read(ctx, keyRoots)
		if err != nil {
			return fmt.Errorf("read the store: %w", err)
		}
		roots, err := decodeRoots(r.key, kv.Value)
		if err != nil {
			return err
		}
		if roots, err = change(roots); err != nil {
			return err
		}
		text, err := encodeRoots(r.key, roots)
		if err != nil {
			return err
		}
		rev, err := r.o.Store.Commit(ctx, store.Txn{If: []store.Cond{{Key: keyRoots, Mod: kv.Mod}}, Then: []store.Op{{Key: keyRoots, Value: text}}})
		switch {
		case err == nil:
			r.apply(store.Event{KV: store.KV{Key: keyRoots, Value: text, Mod: rev}})
			return nil
		case !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrUnknown):
			return fmt.Errorf("write the CA: %w", err)
		case ctx.Err() != nil:
			return ctx.Err()
		}
	}
}

// Pin is the hash by which tokens made now know the CA.
func (r *Registry) pin() [sha256.Size]byte { return pinOf(r.auth.Load().issuer().cert) }

// Bundle names the CAs that are trusted.
func (r *Registry) Bundle() string { return r.auth.Load().bundle }

// CAs lists those that are trusted, the one that issues last.
func (r *Registry) CAs() (out []api.CA) {
	a := r.auth.Load()
	for _, root := range a.roots {
		out = append(out, api.CA{
			Fingerprint: fingerprint(root.cert), Subject: root.cert.Subject.CommonName, Issues: root == a.issuer(),
			NotAfter: root.cert.NotAfter, Until: root.until, Certificate: string(encodeCerts(root.cert)),
		})
	}
	return out
}
