package coordinator

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/allocate"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// lease is what an agent gets to see: what it holds of the configured overlays.
// missing says, by overlay name, why something that is configured is not held;
// an overlay that is neither held nor missing does not appear.
func (c *Coordinator) lease(a *agent, missing map[string]string) conf.Lease {
	return c.leaseOf(c.network(), a, missing)
}

// leaseOf is lease as it is under a network.
func (c *Coordinator) leaseOf(n *network, a *agent, missing map[string]string) conf.Lease {
	l := conf.Lease{
		ClusterID:   c.clusterID,
		AgentID:     a.id,
		AgentIP:     a.IP,
		Epoch:       c.epochBase.Load() + a.mod,
		TermSeconds: int(c.term.Seconds()),
		Bridges:     append([]conf.Half{}, a.Bridges...),
		Underlay:    a.Underlay,
		TakenDown:   n.takenDown,
		VTEP:        n.vtepOf(&a.record),
	}
	for i := range n.Overlays {
		o := &n.Overlays[i]
		h, why := a.held(o.Name), missing[o.Name]
		first, further := h.granted(o)
		if first.Subnet.IsValid() || first.Subnet6.IsValid() || why != "" {
			l.Grants = append(l.Grants, conf.Grant{Overlay: *o, Subnet: first.Subnet, Subnet6: first.Subnet6, Blocks: further, Error: why})
		}
	}
	return l
}

// vtepOf is the VTEP of a record, as its agent and all others are told of it: with the
// addresses of the families that are configured.
func (n *network) vtepOf(r *record) conf.VTEP {
	v := conf.VTEP{MAC: conf.VTEPMAC(n.oui, r.macOf()), MTU: n.VTEPMTU}
	if n.VTEPSubnet.IsValid() && r.VTEP.IsValid() {
		v.IP = netip.PrefixFrom(r.VTEP, n.VTEPSubnet.Bits())
	}
	if n.VTEPSubnet6.IsValid() && r.VTEP6.IsValid() {
		v.IP6 = netip.PrefixFrom(r.VTEP6, n.VTEPSubnet6.Bits())
	}
	return v
}

// withheld reports whether the agent gets nothing of an overlay because it would make
// two bridges where the halves share one.
func withheld(req *api.RegisterRequest, o *conf.Overlay) bool { return o.Shared() && !req.SharedHalves }

// leaseFor is lease for the agent that asks, without what is withheld from it.
func (c *Coordinator) leaseFor(n *network, req *api.RegisterRequest, a *agent, missing map[string]string) conf.Lease {
	l := c.leaseOf(n, a, missing)
	if n.withholds(req) {
		withhold(n, req, &l)
	}
	if !req.SharedHalves {
		inFlags(&l)
	}
	return l
}

// inFlags says isolation by true and false: the build of 2026-11-23, which knows no
// shared halves either, cannot read a lease that has a word there.
func inFlags(l *conf.Lease) {
	for i := range l.Grants {
		o := &l.Grants[i].Overlay
		if o.Isolation != "" {
			o.Isolation = conf.IsolationOf(o.Isolation.Mode() != conf.IsolationNone)
		}
	}
}

// withholds reports whether the agent gets nothing of some overlay; see withheld.
func (n *network) withholds(req *api.RegisterRequest) bool {
	for i := range n.Overlays {
		if withheld(req, &n.Overlays[i]) {
			return true
		}
	}
	return false
}

// withhold puts the reason in the place of what is withheld.
func withhold(n *network, req *api.RegisterRequest, l *conf.Lease) {
	l.Grants = slices.DeleteFunc(l.Grants, func(g conf.Grant) bool { return withheld(req, &g.Overlay) })
	for i := range n.Overlays {
		if o := &n.Overlays[i]; withheld(req, o) {
			l.Grants = append(l.Grants, conf.Grant{Overlay: *o, Error: whyWithheld(o, req.Version)})
		}
	}
}

func whyWithheld(o *conf.Overlay, release string) string {
	return fmt.Sprintf("overlay %s: Mesos and Docker share one pool of addresses in it, which the agent's release (%s) does not know; upgrade the agent", o.Name, release)
}

// lacks reports the families of an overlay that the agent should get and has not.
func lacks(o *conf.Overlay, h held) (v4, v6 bool) {
	if !o.IsEnabled() {
		return false, false
	}
	return o.Subnet.IsValid() && !h.Subnet.IsValid(), o.Subnet6.IsValid() && !h.Subnet6.IsValid()
}

// missingLocked says for every overlay that the agent lacks, or is not told of, why.
func (c *Coordinator) missingLocked(a *agent) map[string]string {
	var missing map[string]string
	overlays := c.network().Overlays
	var st status
	if slices.ContainsFunc(overlays, conf.Overlay.Shared) {
		st = c.view.statuses[a.id].decode()
	}
	for i := range overlays {
		o := &overlays[i]
		v4, v6 := lacks(o, a.held(o.Name))
		withholds := o.Shared() && st.Withheld
		if !v4 && !v6 && !withholds {
			continue
		}
		if missing == nil {
			missing = map[string]string{}
		}
		p := c.view.pools.overlays[o.Name]
		switch {
		case withholds: // whether it has a subnet of it or not
			missing[o.Name] = whyWithheld(o, st.Version)
		case v4 && p.v4.Used() >= p.v4.Total():
			missing[o.Name] = exhausted(o.Name, p.v4, o.Prefix, o.Subnet)
		case v6 && p.v6.Used() >= p.v6.Total():
			missing[o.Name] = exhausted(o.Name, p.v6, o.Prefix6, o.Subnet6)
		default:
			missing[o.Name] = fmt.Sprintf("overlay %s: not leased yet; the agent gets it when it registers next", o.Name)
		}
	}
	return missing
}

// exhausted is the message of an overlay without a free agent subnet.
func exhausted(overlay string, p *allocate.Pool, bits int, subnet netip.Prefix) string {
	return fmt.Sprintf("overlay %s: no free agent subnet: all %d /%d of %s are leased; delete agents that are gone, or configure a larger subnet",
		overlay, p.Total(), bits, subnet)
}

func vtepExhausted(key string, subnet netip.Prefix, pool *allocate.Pool) error {
	return refuse(http.StatusInsufficientStorage,
		"no free VTEP address: all %d of %s %s are leased; delete agents that are gone, or configure a larger %s",
		pool.Total(), key, subnet, key)
}

// logGrant says what an agent has got.
func (c *Coordinator) logGrant(a *agent) {
	c.log.Info("lease granted or changed", "agent", a.id, "ip", a.IP, "vtep", a.VTEP, "vtep6", a.VTEP6, "epoch", c.epochBase.Load()+a.mod)
}
