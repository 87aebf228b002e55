package pki

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// What tokens may be.
const (
	DefaultTTL = 24 * time.Hour
	maxTTL     = 365 * 24 * time.Hour
	maxUses    = 100_000
	// keepToken is how long a token that can no longer be used is listed.
	keepToken = 7 * 24 * time.Hour
)

// tokenRecord is what is stored of a token.
type tokenRecord struct {
	Hash       []byte    `json:"hash"` // of the secret
	Role       Role      `json:"role"`
	AgentID    string    `json:"agent_id,omitempty"` // that alone may join; empty: any that has not joined yet
	Created    time.Time `json:"created"`
	Expires    time.Time `json:"expires"`
	Uses       int       `json:"uses"`
	Left       int       `json:"left"`
	ClusterKey []byte    `json:"cluster_key,omitempty"` // sealed with the secret; of role coordinator alone
	Taker      string    `json:"taker,omitempty"`       // random, of the coordinator that used it last
}

// usable says why a token cannot be used, whoever has it.
func (t tokenRecord) usable(now time.Time) error {
	switch {
	case !now.Before(t.Expires):
		return fmt.Errorf("the token expired at %s; make a new one (overlayctl token create)", t.Expires.UTC().Format(time.RFC3339))
	case t.Left < 1:
		return fmt.Errorf("the token has been used as often as it may be (%d); make a new one (overlayctl token create)", t.Uses)
	}
	return nil
}

// errGuess: the token is none, whatever it looks like.
var errGuess = errors.New("the token is not one of this cluster, or it was revoked; make a new one (overlayctl token create)")

// checkToken returns the record of a token that is good. Whether one with that id
// exists does not show in how long it takes.
func checkToken(t Token, kv store.KV, now time.Time) (record tokenRecord, err error) {
	record.Hash = make([]byte, len(t.hash()))
	if kv.Mod != 0 {
		if err := json.Unmarshal(kv.Value, &record); err != nil {
			return record, fmt.Errorf("read token %s: %w", t.ID, err)
		}
	}
	if subtle.ConstantTimeCompare(record.Hash, t.hash()) != 1 || kv.Mod == 0 {
		return record, errGuess
	}
	return record, record.usable(now)
}

// CreateToken makes a token. What it returns is nowhere else.
func (r *Registry) CreateToken(ctx context.Context, req api.TokenRequest) (api.TokenCreated, error) {
	role, err := ParseRole(string(req.Role))
	ttl := time.Duration(req.TTLSeconds) * time.Second
	switch {
	case err != nil:
		return api.TokenCreated{}, serve.Refuse(http.StatusBadRequest, "%v", err)
	case req.TTLSeconds < 1 || req.TTLSeconds > int64(maxTTL/time.Second):
		return api.TokenCreated{}, serve.Refuse(http.StatusBadRequest, "ttl of %d s: want 1 s to %s", req.TTLSeconds, maxTTL)
	case req.Uses < 1 || req.Uses > maxUses:
		return api.TokenCreated{}, serve.Refuse(http.StatusBadRequest, "uses %d: want 1 to %d", req.Uses, maxUses)
	case req.AgentID != "" && role != RoleAgent:
		return api.TokenCreated{}, serve.Refuse(http.StatusBadRequest, "a token for one agent id has role agent, not %s", role)
	case req.AgentID != "" && CheckName(req.AgentID) != nil:
		return api.TokenCreated{}, serve.Refuse(http.StatusBadRequest, "agent id: %v", CheckName(req.AgentID))
	}
	now := r.o.Now().UTC().Truncate(time.Second)
	t := newToken(r.pin())
	record := tokenRecord{Hash: t.hash(), Role: role, AgentID: req.AgentID, Created: now, Expires: now.Add(ttl), Uses: req.Uses, Left: req.Uses}
	if role == RoleCoordinator {
		if record.ClusterKey, err = seal(derive(t.Secret, sealToken), sealToken, r.key); err != nil {
			return api.TokenCreated{}, fmt.Errorf("create a token: %w", err)
		}
	}
	value, err := json.Marshal(record)
	if err != nil {
		return api.TokenCreated{}, fmt.Errorf("create a token: %w", err)
	}
	txn := store.Txn{If: []store.Cond{{Key: keyToken(t.ID)}}, Then: []store.Op{{Key: keyToken(t.ID), Value: value}}}
	old, err := r.oldTokens(ctx, now)
	if err != nil {
		return api.TokenCreated{}, fmt.Errorf("create a token: %w", err)
	}
	txn.Then = append(txn.Then, old...)
	if _, err := r.o.Store.Commit(ctx, txn); err != nil {
		return api.TokenCreated{}, fmt.Errorf("create a token: %w", err)
	}
	r.o.Log.Info("token created", logkey.Token, t.ID, logkey.Role, role, logkey.Uses, req.Uses, logkey.Expires, record.Expires)
	return api.TokenCreated{Token: t.String(), ID: t.ID, Role: string(role), Expires: record.Expires}, nil
}

// oldTokens deletes, a few at a time, those that nobody can use any more.
func (r *Registry) oldTokens(ctx context.Context, now time.Time) (ops []store.Op, err error) {
	kvs, _, err := r.o.Store.List(ctx, prefixToken)
	for _, kv := range kvs {
		var t tokenRecord
		if json.Unmarshal(kv.Value, &t) == nil && now.After(t.Expires.Add(keepToken)) && len(ops) < 50 {
			ops = append(ops, store.Op{Key: kv.Key, Delete: true})
		}
	}
	return ops, err
}

// Tokens lists the tokens, without their secrets, oldest first.
func (r *Registry) Tokens(ctx context.Context) ([]api.TokenInfo, error) {
	kvs, _, err := r.o.Store.List(ctx, prefixToken)
	if err != nil {
		return nil, fmt.Errorf("list the tokens: %w", err)
	}
	out := []api.TokenInfo{}
	for _, kv := range kvs {
		var t tokenRecord
		if err := json.Unmarshal(kv.Value, &t); err != nil {
			return nil, fmt.Errorf("list the tokens: %s: %w", kv.Key, err)
		}
		out = append(out, api.TokenInfo{
			ID: strings.TrimPrefix(kv.Key, prefixToken), Role: string(t.Role), AgentID: t.AgentID,
			Created: t.Created, Expires: t.Expires, Uses: t.Uses, Left: t.Left,
		})
	}
	slices.SortStableFunc(out, func(a, b api.TokenInfo) int { return a.Created.Compare(b.Created) })
	return out, nil
}

// RevokeToken has nobody join with a token any more. It takes the token's id, or
// the whole token.
func (r *Registry) RevokeToken(ctx context.Context, id string) error {
	if t, err := ParseToken(id); err == nil {
		id = t.ID
	}
	for first := true; ; first = false {
		kv, err := r.read(ctx, keyToken(id))
		switch {
		case err != nil:
			return fmt.Errorf("revoke a token: %w", err)
		case kv.Mod == 0 && !first:
			return nil // the answer was lost, or somebody else was faster
		case kv.Mod == 0:
			return serve.Refuse(http.StatusNotFound, "there is no token %.80q; overlayctl token list shows the ids", id)
		}
		_, err = r.o.Store.Commit(ctx, store.Txn{If: []store.Cond{{Key: kv.Key, Mod: kv.Mod}}, Then: []store.Op{{Key: kv.Key, Delete: true}}})
		switch {
		case err == nil:
			r.o.Log.Info("token revoked", logkey.Token, id)
			return nil
		case !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrUnknown):
			return fmt.Errorf("revoke a token: %w", err)
		case ctx.Err() != nil:
			return ctx.Err()
		}
	}
}
