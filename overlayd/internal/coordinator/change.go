package coordinator

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/clusterfile"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// change is a change of the network: what comes after what is served.
type change struct {
	next     func(now conf.Network) (conf.Network, error)
	revision uint64 // that it was planned for; 0: any
	takeDown string // overlay that goes although containers are attached
}

// changeNetwork makes a change, in one transaction that depends on the network that
// it was planned for. It returns when this coordinator serves the new one. A
// refusal is an *api.Error and has changed nothing.
func (c *Coordinator) changeNetwork(ctx context.Context, ch change) (api.NetworkPlan, error) {
	for attempt := range maxAttempts {
		p, txn, viewRev, err := c.planChange(ch)
		if err != nil || len(p.Changes) == 0 {
			return p, err
		}
		err = c.commit(ctx, txn)
		if err == nil {
			p.Revision, p.Applied = c.network().mod, true
			for _, change := range p.Changes {
				c.log.Info("the cluster configuration was changed", "overlay", change.Overlay, "what", change.What)
			}
			return p, nil
		} else if !errors.Is(err, store.ErrConflict) {
			return p, fmt.Errorf("change the cluster configuration: %w", err)
		}
		if err := c.catchUp(ctx, txn, viewRev, attempt); err != nil {
			return p, fmt.Errorf("change the cluster configuration: %w", err)
		}
	}
	return api.NetworkPlan{}, refuse(http.StatusServiceUnavailable, "the store changed %d times in between; try again", maxAttempts)
}

// planChange makes the transaction.
func (c *Coordinator) planChange(ch change) (p api.NetworkPlan, txn store.Txn, viewRev uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.view.network
	if ch.revision != 0 && ch.revision != now.mod {
		return p, txn, 0, &api.Error{Code: http.StatusConflict, Kind: api.KindNetworkChanged, Message: fmt.Sprintf(
			"the cluster configuration was changed since this was planned (revision %d, now %d); nothing was changed; plan again", ch.revision, now.mod)}
	}
	next, err := ch.next(now.Network)
	if err != nil {
		return p, txn, 0, err
	}
	p = c.planNetworkLocked(next, ch.takeDown)
	if p.Refused != nil {
		return p, txn, 0, &api.Error{Code: http.StatusConflict, Kind: api.KindRefused, Message: "nothing was changed: " + strings.Join(p.Refused, "; and ")}
	}
	txn.If = []store.Cond{{Key: keyNetwork, Mod: now.mod}}
	if moves(now.Network, next) {
		// What was leased since this view must fit as well.
		for _, prefix := range []string{prefixSubnet, prefixVTEP, prefixVTEP6} {
			txn.If = append(txn.If, store.Cond{Key: prefix, Mod: c.view.rev, Prefix: true})
		}
	}
	takenDown := now.takenDown
	if ch.takeDown != "" {
		takenDown = append(slices.Clip(takenDown), ch.takeDown)
	}
	txn.Then = []store.Op{{Key: keyNetwork, Value: encodeNetwork(next, takenDown...)}}
	return p, txn, c.view.rev, nil
}

// moves reports whether something that fits into one network may not fit into
// another: a range that is no part of the new one, or a range of VTEPs that goes.
func moves(was, next conf.Network) bool {
	if a, b := was.VTEPPool6(), next.VTEPPool6(); a.IsValid() && b.IsValid() && (b.Bits() > a.Bits() || !b.Contains(a.Addr())) {
		return true
	}
	if was.VTEPSubnet.IsValid() && !next.VTEPSubnet.IsValid() || was.VTEPSubnet6.IsValid() && !next.VTEPSubnet6.IsValid() {
		return true // who has an address of one alone keeps it from going
	}
	for _, r := range ranges(was) {
		i := slices.IndexFunc(ranges(next), func(n configuredRange) bool { return n.of == r.of && n.key == r.key })
		if i < 0 {
			continue // it goes, and its leases are kept
		}
		n := ranges(next)[i]
		if n.bits != r.bits || n.prefix.Bits() > r.prefix.Bits() || !n.prefix.Contains(r.prefix.Addr()) {
			return true
		}
	}
	return false
}

// withDrains is a network with the overlays drained that are now. Files do not tell.
func withDrains(n, now conf.Network) conf.Network {
	n.Overlays = slices.Clone(n.Overlays)
	for i := range n.Overlays {
		was, _ := now.Overlay(n.Overlays[i].Name)
		n.Overlays[i].Draining = was.Draining
	}
	return n
}

// PlanNetwork says what a configuration would change.
func (c *Coordinator) PlanNetwork(n conf.Network) api.NetworkPlan {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.planNetworkLocked(withDrains(n, c.view.network.Network), "")
}

// ApplyNetwork makes a configuration the cluster's, that of the given revision if it
// is not 0.
func (c *Coordinator) ApplyNetwork(ctx context.Context, n conf.Network, revision uint64) (api.NetworkPlan, error) {
	return c.changeNetwork(ctx, change{revision: revision, next: func(now conf.Network) (conf.Network, error) { return withDrains(n, now), nil }})
}

// Drain has nothing new attached to an overlay, or with undo allows it again.
func (c *Coordinator) Drain(ctx context.Context, name string, undo bool) (api.NetworkPlan, error) {
	return c.changeNetwork(ctx, change{next: func(now conf.Network) (conf.Network, error) {
		i, err := overlayIndex(now, name)
		if err != nil {
			return now, err
		}
		now.Overlays = slices.Clone(now.Overlays)
		now.Overlays[i].Draining = !undo
		return now, nil
	}})
}

// Remove takes an overlay out of the configuration, and out of the lists of overlays
// that may be reached.
func (c *Coordinator) Remove(ctx context.Context, name string, force bool) (api.NetworkPlan, error) {
	takeDown := ""
	if force {
		takeDown = name
	}
	return c.changeNetwork(ctx, change{takeDown: takeDown, next: func(now conf.Network) (conf.Network, error) {
		i, err := overlayIndex(now, name)
		if err != nil {
			return now, err
		}
		if len(now.Overlays) == 1 {
			return now, refuse(http.StatusConflict, "overlay %s is the only one, and a cluster needs one; add another first (overlayctl overlays apply)", name)
		}
		now.Overlays = slices.Delete(slices.Clone(now.Overlays), i, i+1)
		for i := range now.Overlays {
			o := &now.Overlays[i]
			if o.Allow = slices.DeleteFunc(slices.Clone(o.Allow), func(n string) bool { return n == name }); len(o.Allow) == 0 {
				o.Allow = nil
			}
		}
		return now, nil
	}})
}

func overlayIndex(n conf.Network, name string) (int, error) {
	i := slices.IndexFunc(n.Overlays, func(o conf.Overlay) bool { return o.Name == name })
	if i < 0 {
		return i, refuse(http.StatusNotFound, "there is no overlay %.80q; overlayctl overlays list names them", name)
	}
	return i, nil
}

// readNetwork reads a configuration that a request carries.
func readNetwork(text string) (conf.Network, error) {
	n, problems, err := clusterfile.Load(strings.NewReader(text))
	if err != nil {
		problems = []conf.Problem{{Text: err.Error()}}
	}
	if len(problems) == 0 {
		return n, nil
	}
	refusal := &api.Error{Code: http.StatusUnprocessableEntity, Kind: api.KindBadConfig}
	for _, p := range problems {
		refusal.Problems = append(refusal.Problems, p.String())
	}
	refusal.Message = "the configuration is not valid, nothing was changed: " + strings.Join(refusal.Problems, "; ")
	return n, refusal
}

func (c *Coordinator) servePlan(w http.ResponseWriter, r *http.Request) error {
	var req api.ConfigRequest
	if err := serve.ReadJSON(w, r, &req); err != nil {
		return err
	}
	n, err := readNetwork(req.Config)
	if err != nil {
		return err
	}
	serve.WriteJSON(w, http.StatusOK, c.PlanNetwork(n))
	return nil
}

func (c *Coordinator) serveApply(w http.ResponseWriter, r *http.Request) error {
	var req api.ConfigRequest
	if err := serve.ReadJSON(w, r, &req); err != nil {
		return err
	}
	n, err := readNetwork(req.Config)
	if err != nil {
		return err
	}
	return answerPlan(w)(c.ApplyNetwork(r.Context(), n, req.Revision))
}

// overlayChange serves a change of the overlay that the request names.
func overlayChange(change func(context.Context, api.OverlayRequest) (api.NetworkPlan, error)) serve.Handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		var req api.OverlayRequest
		if err := serve.ReadJSON(w, r, &req); err != nil {
			return err
		}
		return answerPlan(w)(change(r.Context(), req))
	}
}

func answerPlan(w http.ResponseWriter) func(api.NetworkPlan, error) error {
	return func(p api.NetworkPlan, err error) error {
		if err == nil {
			serve.WriteJSON(w, http.StatusOK, p)
		}
		return err
	}
}

// networkRoutes are those that change the configuration of the cluster.
func (c *Coordinator) networkRoutes() []route {
	drain := func(undo bool) serve.Handler {
		return overlayChange(func(ctx context.Context, r api.OverlayRequest) (api.NetworkPlan, error) {
			return c.Drain(ctx, r.Name, undo)
		})
	}
	remove := overlayChange(func(ctx context.Context, r api.OverlayRequest) (api.NetworkPlan, error) {
		return c.Remove(ctx, r.Name, r.Force)
	})
	return []route{
		{http.MethodGet, api.PathOverlays, reader, c.serveOverlays},
		{http.MethodPost, api.PathOverlaysPlan, operator, c.servePlan},
		{http.MethodPost, api.PathOverlaysApply, operator, c.serveApply},
		{http.MethodPost, api.PathOverlaysDrain, operator, drain(false)},
		{http.MethodPost, api.PathOverlaysUndrain, operator, drain(true)},
		{http.MethodPost, api.PathOverlaysRemove, operator, remove},
	}
}
