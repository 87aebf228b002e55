package api

import (
	"context"
	"net/http"
	"net/netip"
)

// Paths of the coordinator that change the configuration of the cluster.
const (
	PathOverlaysPlan    = "/v1/overlays/plan"    // POST ConfigRequest -> NetworkPlan
	PathOverlaysApply   = "/v1/overlays/apply"   // POST ConfigRequest -> NetworkPlan
	PathOverlaysDrain   = "/v1/overlays/drain"   // POST OverlayRequest -> NetworkPlan
	PathOverlaysUndrain = "/v1/overlays/undrain" // POST OverlayRequest -> NetworkPlan
	PathOverlaysRemove  = "/v1/overlays/remove"  // POST OverlayRequest -> NetworkPlan
)

// Kinds of errors of these.
const (
	// KindBadConfig: the text is no valid configuration; Error.Problems says why.
	KindBadConfig = "bad_configuration"
	// KindRefused: what is leased or attached forbids the change.
	KindRefused = "change_refused"
	// KindNetworkChanged: the configuration is no longer the one that the plan was
	// made for.
	KindNetworkChanged = "network_changed"
)

// ConfigRequest carries a cluster configuration as it stands in a file.
type ConfigRequest struct {
	Config string `json:"config"`
	// Revision is that of the plan that is to be applied; 0: of whatever is there.
	Revision uint64 `json:"revision,omitempty"`
}

// OverlayRequest names an overlay. Force removes it although containers are, or may
// be, attached.
type OverlayRequest struct {
	Name  string `json:"name"`
	Force bool   `json:"force,omitempty"`
}

// NetworkPlan is what a change of the configuration does.
type NetworkPlan struct {
	Revision uint64          `json:"revision"` // of the configuration that is changed or, once applied, of the new one
	Applied  bool            `json:"applied"`
	Changes  []NetworkChange `json:"changes"`
	Refused  []string        `json:"refused,omitempty"` // why it cannot be applied, and what to do
	Notes    []string        `json:"notes,omitempty"`
	Capacity []PoolChange    `json:"capacity"`
	Overlaps []RouteOverlap  `json:"overlaps,omitempty"`
}

// NetworkChange is one difference, and whom it concerns.
type NetworkChange struct {
	Overlay    string `json:"overlay,omitempty"` // empty: of the whole network
	What       string `json:"what"`
	Effect     string `json:"effect"`
	Hosts      int    `json:"hosts"`      // whose lease changes
	Containers int    `json:"containers"` // attached there, as far as is known
}

// PoolChange is how large a pool is before and after. A family that comes or goes
// has one of both.
type PoolChange struct {
	Overlay string    `json:"overlay,omitempty"` // empty: of VTEP addresses
	Key     string    `json:"key"`               // of the configuration
	From    *Capacity `json:"from,omitempty"`
	To      *Capacity `json:"to,omitempty"`
}

// Capacity is what a pool holds.
type Capacity struct {
	Range netip.Prefix `json:"range"`
	Pool
	PerHalf uint64 `json:"containers_per_half,omitempty"` // of each agent; of overlays
	Shared  bool   `json:"halves_shared,omitempty"`       // PerHalf is that of both halves together
}

// RouteOverlap is a route of a host, of somebody else, that leads into a range that
// the plan makes the cluster's.
type RouteOverlap struct {
	Overlay string       `json:"overlay,omitempty"`
	Range   netip.Prefix `json:"range"`
	AgentID string       `json:"agent_id"`
	AgentIP netip.Addr   `json:"agent_ip"`
	Route   netip.Prefix `json:"route"`
}

// OverlaysPlan says what a configuration would change.
func (c *Client) OverlaysPlan(ctx context.Context, req ConfigRequest) (plan NetworkPlan, err error) {
	err = c.do(ctx, http.MethodPost, PathOverlaysPlan, req, &plan)
	return plan, err
}

// OverlaysApply makes a configuration the cluster's.
func (c *Client) OverlaysApply(ctx context.Context, req ConfigRequest) (plan NetworkPlan, err error) {
	err = c.do(ctx, http.MethodPost, PathOverlaysApply, req, &plan)
	return plan, err
}

// OverlayDrain ends, or with undo allows again, new attachments to an overlay.
func (c *Client) OverlayDrain(ctx context.Context, name string, undo bool) (plan NetworkPlan, err error) {
	path := PathOverlaysDrain
	if undo {
		path = PathOverlaysUndrain
	}
	err = c.do(ctx, http.MethodPost, path, OverlayRequest{Name: name}, &plan)
	return plan, err
}

// OverlayRemove takes an overlay out of the configuration.
func (c *Client) OverlayRemove(ctx context.Context, req OverlayRequest) (plan NetworkPlan, err error) {
	err = c.do(ctx, http.MethodPost, PathOverlaysRemove, req, &plan)
	return plan, err
}
