package api

import (
	"context"
	"net/http"
)

// TokenCreate makes a token.
func (c *Client) TokenCreate(ctx context.Context, req TokenRequest) (created TokenCreated, err error) {
	err = c.do(ctx, http.MethodPost, PathTokens, req, &created)
	return created, err
}

// Tokens lists the tokens, without their secrets.
func (c *Client) Tokens(ctx context.Context) (tokens []TokenInfo, err error) {
	err = c.do(ctx, http.MethodGet, PathTokens, nil, &tokens)
	return tokens, err
}

// TokenRevoke ends a token, named by its id.
func (c *Client) TokenRevoke(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodPost, PathTokensRevoke, TokenRevoke{ID: id}, nil)
}

// AgentsRevoke has the certificates of agents refused from now on.
func (c *Client) AgentsRevoke(ctx context.Context, ids []string) error {
	return c.do(ctx, http.MethodPost, PathAgentsRevoke, RevokeRequest{Agents: ids}, nil)
}

// CAs lists the CAs that are trusted.
func (c *Client) CAs(ctx context.Context) (cas []CA, err error) {
	err = c.do(ctx, http.MethodGet, PathCA, nil, &cas)
	return cas, err
}

// CARotate makes a new CA, or ends the trust in the old ones.
func (c *Client) CARotate(ctx context.Context, req RotateRequest) (cas []CA, err error) {
	err = c.do(ctx, http.MethodPost, PathCARotate, req, &cas)
	return cas, err
}

// Whoami asks who the coordinator takes the client for.
func (c *Client) Whoami(ctx context.Context) (me Whoami, err error) {
	err = c.do(ctx, http.MethodGet, PathWhoami, nil, &me)
	return me, err
}
