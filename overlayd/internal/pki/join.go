package pki

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// joinAttempts bounds how often a join is tried again because another coordinator
// changed the token or the identity in between.
const joinAttempts = 64

// Join exchanges a token for a certificate. presented is the certificate that
// came with the connection, or nil: one of the same name proves that it is the
// same host or person who comes back.
func (r *Registry) Join(ctx context.Context, req api.JoinRequest, presented *x509.Certificate, from netip.Addr) (api.JoinResponse, error) {
	if wait := r.guesses.wait(from, r.o.Now()); wait > 0 {
		return api.JoinResponse{}, serve.Refuse(http.StatusTooManyRequests,
			"too many tokens that were none came from %s; the next one is looked at in %s", from, wait.Round(time.Second))
	}
	token, err := ParseToken(req.Token)
	if err != nil {
		r.guesses.wrong(from, r.o.Now())
		return api.JoinResponse{}, serve.Refuse(http.StatusUnauthorized, "%v", err)
	}
	key, err := requestedKey(req.CSR)
	if err != nil {
		return api.JoinResponse{}, serve.Refuse(http.StatusBadRequest, "certificate request: %v", err)
	}
	if err := CheckName(req.Name); err != nil {
		return api.JoinResponse{}, serve.Refuse(http.StatusBadRequest, "%v", err)
	}
	who, err := r.admit(ctx, token, req, keyHash(key), presented)
	if errors.Is(err, errGuess) {
		r.guesses.wrong(from, r.o.Now())
		r.o.Log.Warn("join with a token that is none", logkey.Token, token.ID, logkey.Remote, from.String())
		return api.JoinResponse{}, serve.Refuse(http.StatusUnauthorized, "%v", err)
	} else if err != nil {
		return api.JoinResponse{}, err
	}
	r.o.Log.Info("joined", logkey.Role, who.Role, logkey.Name, who.Name, logkey.Token, token.ID, logkey.Remote, from.String())
	return r.certify(who, key)
}

// admit takes one use of the token and writes the identity, in one transaction.
func (r *Registry) admit(ctx context.Context, token Token, req api.JoinRequest, key []byte, presented *x509.Certificate) (Identity, error) {
	r.joining.Lock()
	defer r.joining.Unlock()
	who := Identity{Domain: r.Domain(), Name: req.Name, Instance: random(8)}
	for range joinAttempts {
		kv, err := r.read(ctx, keyToken(token.ID))
		if err != nil {
			return who, fmt.Errorf("join: %w", err)
		}
		record, err := checkToken(token, kv, r.o.Now())
		if !errors.Is(err, errGuess) {
			instance, again, readErr := r.joinedBefore(ctx, record.Role, req.Name, token.ID, key)
			if readErr != nil || again {
				who.Role, who.Instance = record.Role, instance
				return who, readErr
			}
		}
		switch {
		case errors.Is(err, errGuess):
			return who, err
		case err != nil:
			return who, serve.Refuse(http.StatusForbidden, "%v", err)
		case record.Role == RoleCoordinator:
			return who, serve.Refuse(http.StatusForbidden, "the token is for a coordinator: start it with overlayd coordinator --join-token, on the same store")
		case record.AgentID != "" && record.AgentID != req.Name:
			return who, serve.Refuse(http.StatusForbidden, "the token is for agent id %s alone, and this host is %s", record.AgentID, req.Name)
		}
		who.Role = record.Role
		id, err := r.read(ctx, keyIdentity(who.Role, who.Name))
		if err == nil {
			err = r.free(id, who, record, presented)
		}
		if err != nil {
			return who, err
		}
		record.Left--
		joined := identityRecord{Instance: who.Instance, Joined: r.o.Now().UTC().Truncate(time.Second), Token: token.ID, Key: key}
		txn := store.Txn{
			If:   []store.Cond{{Key: id.Key, Mod: id.Mod}, {Key: kv.Key, Mod: kv.Mod}},
			Then: []store.Op{{Key: keyIdentity(who.Role, who.Name), Value: mustEncode(joined)}, {Key: kv.Key, Value: mustEncode(record)}},
		}
		txn.If[0].Key = txn.Then[0].Key
		rev, err := r.o.Store.Commit(ctx, txn)
		if err == nil {
			r.apply(store.Event{KV: store.KV{Key: txn.Then[0].Key, Value: txn.Then[0].Value, Mod: rev}})
			return who, nil
		}
		if done, readErr := r.wroteIdentity(ctx, err, txn.Then[0].Key, who.Instance); done || readErr != nil {
			return who, readErr
		}
	}
	return who, serve.Refuse(http.StatusServiceUnavailable, "join: the store changed %d times in between; try again", joinAttempts)
}

// joinedBefore reports whether the same key has joined with the same token
// already, and did not hear of it. That takes no further use of the token.
func (r *Registry) joinedBefore(ctx context.Context, role Role, name, token string, key []byte) (instance string, again bool, err error) {
	kv, err := r.read(ctx, keyIdentity(role, name))
	if err != nil || kv.Mod == 0 {
		return "", false, err
	}
	var record identityRecord
	if err := json.Unmarshal(kv.Value, &record); err != nil {
		return "", false, fmt.Errorf("read identity %s %s: %w", role, name, err)
	}
	return record.Instance, record.Revoked.IsZero() && record.Token == token && bytes.Equal(record.Key, key), nil
}

// keyHash names a public key.
func keyHash(key any) []byte {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil // checkKey has let none through that cannot be encoded
	}
	h := sha256.Sum256(der)
	return h[:]
}

// wroteIdentity finds out whether a transaction that did not succeed was written
// all the same. The error is one that ends the join.
func (r *Registry) wroteIdentity(ctx context.Context, err error, key, instance string) (bool, error) {
	switch {
	case errors.Is(err, store.ErrConflict):
		return false, ctx.Err()
	case !errors.Is(err, store.ErrUnknown):
		return false, fmt.Errorf("join: %w", err)
	}
	kv, err := r.read(ctx, key)
	var record identityRecord
	if err == nil && kv.Mod != 0 {
		err = json.Unmarshal(kv.Value, &record)
	}
	if err != nil {
		return false, fmt.Errorf("join: %w", err)
	}
	if record.Instance == instance {
		r.apply(store.Event{KV: kv})
		return true, nil
	}
	return false, ctx.Err()
}

// free says why a name cannot be had: somebody else has it. It can when the
// bearer proves to be the one who has it, when it was revoked before the token was
// made, and with a token that was made for it.
func (r *Registry) free(kv store.KV, who Identity, token tokenRecord, presented *x509.Certificate) error {
	if kv.Mod == 0 {
		return nil
	}
	var record identityRecord
	if err := json.Unmarshal(kv.Value, &record); err != nil {
		return fmt.Errorf("read identity %s: %w", who, err)
	}
	switch {
	case token.Created.Before(record.Revoked):
		return serve.Refuse(http.StatusForbidden, "%s was revoked at %s, and the token is older; if that was a mistake, make a new token (overlayctl token create)",
			who, record.Revoked.UTC().Format(time.RFC3339))
	case token.AgentID != "", !record.Revoked.IsZero(), r.same(presented, who, record):
		return nil
	}
	return serve.Refuse(http.StatusConflict, "%s has joined already, at %s, and this host does not have its key; give this host another agent id, "+
		"or, if the key is lost, make a token for it (overlayctl token create --agent-id %s) or revoke it first (overlayctl agents revoke %s)",
		who, record.Joined.UTC().Format(time.RFC3339), who.Name, who.Name)
}

// same reports whether a certificate, which may have expired, is that of the
// identity's record.
func (r *Registry) same(cert *x509.Certificate, who Identity, record identityRecord) bool {
	if cert == nil {
		return false
	}
	at := r.o.Now()
	if at.After(cert.NotAfter) {
		at = cert.NotAfter
	}
	had, err := r.auth.Load().verify(cert, at)
	return err == nil && had.Role == who.Role && had.Name == who.Name && had.Instance == record.Instance
}

// Renew gives an identity another certificate, for another key.
func (r *Registry) Renew(_ context.Context, who Identity, req api.RenewRequest) (api.JoinResponse, error) {
	key, err := requestedKey(req.CSR)
	if err != nil {
		return api.JoinResponse{}, serve.Refuse(http.StatusBadRequest, "certificate request: %v", err)
	}
	return r.certify(who, key)
}

func (r *Registry) certify(who Identity, key any) (api.JoinResponse, error) {
	a := r.auth.Load()
	cert, err := a.issue(who, key, nil, r.o.Now(), r.o.Life)
	if err != nil {
		return api.JoinResponse{}, serve.Refuse(http.StatusBadRequest, "%v", err)
	}
	return api.JoinResponse{Role: string(who.Role), Name: who.Name, Certificate: string(encodeCerts(cert)), CA: string(encodeCerts(a.certs()...))}, nil
}

// requestedKey is the public key of a certificate request whose sender has the
// private one. Nothing else of the request counts.
func requestedKey(text string) (any, error) {
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) > 0 {
		return nil, errors.New("want one in PEM form")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	// The key first: anybody may ask, and the signature of an RSA key as large as a
	// request takes minutes to check.
	if err := checkKey(csr.PublicKey); err != nil {
		return nil, err
	}
	return csr.PublicKey, csr.CheckSignature()
}

// Revoke ends identities of a role: their certificates are refused from now on,
// and their connections closed, at every coordinator. A name that never joined is
// an error, and then nothing is revoked.
func (r *Registry) Revoke(ctx context.Context, role Role, names []string) error {
	for _, name := range names {
		if err := CheckName(name); err != nil {
			return serve.Refuse(http.StatusBadRequest, "%v; nothing was revoked", err)
		}
	}
	for _, name := range names {
		if err := r.revoke(ctx, role, name); err != nil {
			return fmt.Errorf("revoke %s %s: %w", role, name, err)
		}
	}
	return nil
}

func (r *Registry) revoke(ctx context.Context, role Role, name string) error {
	key := keyIdentity(role, name)
	for {
		kv, err := r.read(ctx, key)
		if err != nil {
			return err
		}
		record := identityRecord{Joined: r.o.Now().UTC().Truncate(time.Second)}
		if kv.Mod != 0 { // without a record its certificates count all the same
			if err := json.Unmarshal(kv.Value, &record); err != nil {
				return err
			}
		}
		if !record.Revoked.IsZero() { // perhaps by us, and the answer was lost
			r.apply(store.Event{KV: kv})
			return nil
		}
		record.Revoked = r.o.Now().UTC().Truncate(time.Second)
		value := mustEncode(record)
		rev, err := r.o.Store.Commit(ctx, store.Txn{If: []store.Cond{{Key: key, Mod: kv.Mod}}, Then: []store.Op{{Key: key, Value: value}}})
		switch {
		case err == nil:
			r.apply(store.Event{KV: store.KV{Key: key, Value: value, Mod: rev}})
			r.o.Log.Info("identity revoked", logkey.Role, role, logkey.Name, name)
			return nil
		case !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrUnknown):
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		}
	}
}

func mustEncode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err)) // plain data of ours; cannot fail
	}
	return b
}
