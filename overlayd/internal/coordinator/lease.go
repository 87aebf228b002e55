package coordinator

import (
	"fmt"
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
		VTEP:        n.vtepOf(a.record),
	}
	for _, o := range n.Overlays {
		g := conf.Grant{Overlay: o, Error: missing[o.Name]}
		var first conf.Block
		first, g.Blocks = a.held(o.Name).granted(o)
		g.Subnet, g.Subnet6 = first.Subnet, first.Subnet6
		if g.Subnet.IsValid() || g.Subnet6.IsValid() || g.Error != "" {
			l.Grants = append(l.Grants, g)
		}
	}
	return l
}

// vtepOf is the VTEP of a record, as its agent and all others are told of it: with the
// addresses of the families that are configured.
func (n *network) vtepOf(r record) conf.VTEP {
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
func withheld(req api.RegisterRequest, o conf.Overlay) bool { return o.Shared() && !req.SharedHalves }

// leaseFor is lease for the agent that asks, without what is withheld from it.
func (c *Coordinator) leaseFor(req api.RegisterRequest, a *agent, missing map[string]string) conf.Lease {
	l := c.lease(a, missing)
	l.Grants = slices.DeleteFunc(l.Grants, func(g conf.Grant) bool { return withheld(req, g.Overlay) })
	for _, o := range c.network().Overlays {
		if withheld(req, o) {
			l.Grants = append(l.Grants, conf.Grant{Overlay: o, Error: whyWithheld(o, req.Version)})
		}
	}
	return l
}

func whyWithheld(o conf.Overlay, release string) string {
	return fmt.Sprintf("overlay %s: Mesos and Docker share one pool of addresses in it, which the agent's release (%s) does not know; upgrade the agent", o.Name, release)
}

// lacks reports the families of an overlay that the agent should get and has not.
func lacks(o conf.Overlay, h held) (v4, v6 bool) {
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
	for _, o := range overlays {
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
