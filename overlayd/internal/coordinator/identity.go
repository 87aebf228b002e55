package coordinator

import (
	"net/http"
	"net/netip"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/pki"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// identityRoutes are about tokens, certificates and CAs.
func (c *Coordinator) identityRoutes() []route {
	return []route{
		{http.MethodPost, api.PathJoin, public, secured(c, c.serveJoin)},
		{http.MethodPost, api.PathRenew, member, secured(c, c.serveRenew)},
		{http.MethodGet, api.PathWhoami, member, c.serveWhoami},
		{http.MethodGet, api.PathTokens, reader, secured(c, c.serveTokens)},
		{http.MethodPost, api.PathTokens, operator, secured(c, c.serveTokenCreate)},
		{http.MethodPost, api.PathTokensRevoke, operator, secured(c, c.serveTokenRevoke)},
		{http.MethodPost, api.PathAgentsRevoke, operator, secured(c, c.serveAgentsRevoke)},
		{http.MethodGet, api.PathCA, reader, secured(c, c.serveCA)},
		{http.MethodPost, api.PathCARotate, operator, secured(c, c.serveCARotate)},
	}
}

// secured serves where there are identities, and says so where there are none.
func secured(c *Coordinator, h serve.Handler) serve.Handler {
	if c.identity != nil {
		return h
	}
	return func(http.ResponseWriter, *http.Request) error {
		return refuse(http.StatusConflict, "this coordinator runs with --insecure: there are no tokens and no certificates, and whoever reaches it may join without; start it without --insecure to have identities")
	}
}

func (c *Coordinator) serveJoin(w http.ResponseWriter, r *http.Request) error {
	var req api.JoinRequest
	if err := serve.ReadJSON(w, r, &req); err != nil {
		return err
	}
	var from netip.Addr
	if p, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		from = p.Addr().Unmap()
	}
	granted, err := c.identity.Join(r.Context(), req, askerOf(r).cert, from)
	if err != nil {
		return err
	}
	serve.WriteJSON(w, http.StatusOK, granted)
	return nil
}

func (c *Coordinator) serveRenew(w http.ResponseWriter, r *http.Request) error {
	var req api.RenewRequest
	if err := serve.ReadJSON(w, r, &req); err != nil {
		return err
	}
	if askerOf(r).who.Role == "" {
		return refuse(http.StatusBadRequest, "there is nothing to renew: the request came without a certificate")
	}
	granted, err := c.identity.Renew(r.Context(), askerOf(r).who, req)
	if err != nil {
		return err
	}
	serve.WriteJSON(w, http.StatusOK, granted)
	return nil
}

func (c *Coordinator) serveWhoami(w http.ResponseWriter, r *http.Request) error {
	from := askerOf(r)
	me := api.Whoami{Role: string(from.who.Role), Name: from.who.Name}
	if from.local {
		me.Role, me.Name = string(pki.RoleOperator), "root of this host"
	}
	if from.cert != nil {
		me.Expires = from.cert.NotAfter
	}
	serve.WriteJSON(w, http.StatusOK, me)
	return nil
}

func (c *Coordinator) serveTokens(w http.ResponseWriter, r *http.Request) error {
	tokens, err := c.identity.Tokens(r.Context())
	if err != nil {
		return err
	}
	serve.WriteJSON(w, http.StatusOK, tokens)
	return nil
}

func (c *Coordinator) serveTokenCreate(w http.ResponseWriter, r *http.Request) error {
	var req api.TokenRequest
	if err := serve.ReadJSON(w, r, &req); err != nil {
		return err
	}
	created, err := c.identity.CreateToken(r.Context(), req)
	if err != nil {
		return err
	}
	serve.WriteJSON(w, http.StatusOK, created)
	return nil
}

func (c *Coordinator) serveTokenRevoke(w http.ResponseWriter, r *http.Request) error {
	var req api.TokenRevoke
	if err := serve.ReadJSON(w, r, &req); err != nil {
		return err
	}
	if err := c.identity.RevokeToken(r.Context(), req.ID); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (c *Coordinator) serveAgentsRevoke(w http.ResponseWriter, r *http.Request) error {
	var req api.RevokeRequest
	if err := serve.ReadJSON(w, r, &req); err != nil {
		return err
	}
	if len(req.Agents) == 0 {
		return refuse(http.StatusBadRequest, `no agent is named; want {"agents": ["<agent id>", ...]}`)
	}
	ids, err := c.idsOf(req.Agents)
	if err != nil {
		return err
	}
	if err := c.identity.Revoke(r.Context(), pki.RoleAgent, ids); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// idsOf are the ids of agents that are named by id or by address. An id that nobody has
// a lease under may be that of a certificate all the same; an address is none.
func (c *Coordinator) idsOf(names []string) ([]string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ids := make([]string, len(names))
	for i, name := range names {
		ids[i] = name
		ip, err := netip.ParseAddr(name)
		if _, known := c.view.agents[name]; known || err != nil {
			continue
		}
		ids[i], ip = "", ip.Unmap()
		for id, a := range c.view.agents {
			if a.Superseded == "" && (a.IP == ip || a.SecondIP == ip) {
				ids[i] = id
			}
		}
		if ids[i] == "" {
			return nil, refuse(http.StatusNotFound, "no agent has the address %s; nothing was revoked; overlayctl agents shows the ids", ip)
		}
	}
	return ids, nil
}

func (c *Coordinator) serveCA(w http.ResponseWriter, _ *http.Request) error {
	serve.WriteJSON(w, http.StatusOK, c.identity.CAs())
	return nil
}

func (c *Coordinator) serveCARotate(w http.ResponseWriter, r *http.Request) error {
	var req api.RotateRequest
	if err := serve.ReadJSON(w, r, &req); err != nil {
		return err
	}
	change := c.identity.Rotate
	if req.Retire {
		change = c.identity.Retire
	}
	if err := change(r.Context()); err != nil {
		return err
	}
	return c.serveCA(w, r)
}
