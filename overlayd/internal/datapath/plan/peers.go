package plan

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// order is the order in which entries were asked for.
type order struct {
	neigh  []netip.Addr
	fdb    []conf.MAC
	routes []netip.Prefix
}

// expanded is what peers and agent subnets come to.
type expanded struct {
	Entries
	order    order
	problems []Problem
	notices  []string
	disputed bool
}

// remarkable reports whether there is anything to say of some peers.
func (w *expanded) remarkable() bool { return len(w.problems)+len(w.notices) > 0 }

// expand turns peers, our own agent subnets and the ranges of overlays into
// entries. Where two peers claim the same thing, the higher epoch has it.
func expand(c Wanted) expanded {
	w := expandPeers(c)
	if w.disputed {
		c.Peers = slices.Clone(c.Peers)
		slices.SortStableFunc(c.Peers, func(a, b conf.Peer) int { return cmp.Compare(a.Epoch, b.Epoch) })
		w = expandPeers(c)
	}
	for _, o := range c.Overlays {
		for _, a := range o.Agent {
			if r, taken := w.Routes[a]; taken && r.Via.IsValid() {
				w.problems = append(w.problems, Problem{o.Name, fmt.Errorf("agent subnet %s is ours, and the peer at VTEP %s claims it as well", a, r.Via)})
			} else if !taken {
				w.order.routes = append(w.order.routes, a)
			}
			w.Routes[a] = Route{Metric: mark.BlackholeMetric, Kind: Blackhole}
		}
		for _, s := range o.Subnets {
			// An overlay of one agent subnet has nothing else.
			if _, taken := w.Routes[s]; !taken {
				w.order.routes = append(w.order.routes, s)
				w.Routes[s] = unreachableRange()
			}
		}
	}
	return w
}

// expandPeers lets a later peer win over an earlier one. A host that can reach
// none of its peers has a problem; one that cannot reach a few takes notice.
func expandPeers(c Wanted) expanded {
	w := expanded{Entries: MakeEntries(len(c.Peers))}
	var cut []*conf.Peer
	for i := range c.Peers {
		if unreachable(&c.Peers[i], c.VTEP) != "" {
			cut = append(cut, &c.Peers[i])
			continue
		}
		w.addPeer(&c.Peers[i], c)
	}
	for _, p := range cut {
		why := unreachable(p, c.VTEP)
		if len(w.FDB) == 0 {
			w.complain(c, p, why)
			continue
		}
		// One such host among many must not stop the overlays of all of them.
		w.notices = append(w.notices, fmt.Sprintf("peer %s %s", p.AgentID, why))
	}
	return w
}

// unreachable says why nothing can be forwarded to a peer, if so.
func unreachable(p *conf.Peer, own VTEP) string {
	switch {
	case !p.AgentIP.IsValid() || !p.VTEPIP.Is4():
		return "has no agent IP or no IPv4 VTEP address"
	case p.AgentIP.Is4() != own.Local.Is4():
		return fmt.Sprintf("at %s cannot be reached from agent IP %s: one is IPv4, the other IPv6", p.AgentIP, own.Local)
	}
	return ""
}

// complain tells every overlay the peer has a subnet in.
func (w *expanded) complain(c Wanted, p *conf.Peer, why string) {
	var overlays []string
	for _, s := range p.Subnets {
		if o := c.OverlayOf(s); !slices.Contains(overlays, o) {
			overlays = append(overlays, o)
			w.problems = append(w.problems, Problem{o, fmt.Errorf("peer %s %s", p.AgentID, why)})
		}
	}
}

func (w *expanded) addPeer(p *conf.Peer, c Wanted) {
	own := c.VTEP
	if p.AgentIP == own.Local {
		// This very host under an agent id it once had. Its packets would come
		// straight back to us, so there is nothing to forward to.
		return
	}
	ip6 := own.IP6.IsValid() && p.VTEPIP6.IsValid()
	w.addNeigh(p.VTEPIP, p.VTEPMAC)
	if ip6 {
		w.addNeigh(p.VTEPIP6, p.VTEPMAC)
	}
	if old, dup := w.FDB[p.VTEPMAC]; !dup {
		w.order.fdb = append(w.order.fdb, p.VTEPMAC)
	} else if old != p.AgentIP {
		w.disputed = true
	}
	w.FDB[p.VTEPMAC] = p.AgentIP

	metric := mark.PeerMetric(p.VTEPIP, own.IP)
	for _, s := range p.Subnets {
		r := Route{Metric: metric, Via: p.VTEPIP}
		if way, ok := c.plainWay(p, s); ok {
			r = Route{Metric: metric, Via: p.AgentIP, Kind: Plain, Dev: way}
		} else if is6(s) {
			if !ip6 {
				continue
			}
			r.Via = p.VTEPIP6
		}
		if slices.ContainsFunc(c.Refused, func(r netip.Prefix) bool { return inside(s, r) }) {
			continue
		}
		r.MTU = c.mtuTo(p, r.Kind, is6(s))
		w.addRoute(s, r)
	}
	// Its VTEP address goes the same way, so that packets to and from it do.
	if vtep := p.VTEPOf(p.AgentIP); vtep.IsValid() {
		if way, ok := c.plainWay(p, vtep); ok {
			w.addRoute(vtep, Route{Metric: metric, Via: p.AgentIP, Kind: Plain, Dev: way, MTU: c.mtuTo(p, Plain, is6(vtep))})
		}
	}
}

func (w *expanded) addRoute(dst netip.Prefix, r Route) {
	if old, dup := w.Routes[dst]; !dup {
		w.order.routes = append(w.order.routes, dst)
	} else if old != r {
		w.disputed = true
	}
	w.Routes[dst] = r
}

// mtuTo is the MTU of the route to a peer's subnet: what its host takes, and what
// the way to it carries with the headers that go around it; 0: all that this host
// sends. Whoever sends more is told so by the kernel.
func (c *Wanted) mtuTo(p *conf.Peer, kind RouteKind, ip6 bool) int {
	least := cmp.Or(p.MTU, c.MTU)
	if path, ok := c.PathMTU[p.AgentIP]; ok {
		if kind == ToPeer {
			path -= Overhead(c.VTEP.Local)
		}
		least = min(least, path)
	}
	floor := conf.MinMTU
	if ip6 {
		floor = minMTU6
	}
	if least >= c.MTU {
		return 0
	}
	return max(least, floor)
}

// plainWay is the device by which a peer gets what is for one of its subnets
// without VXLAN: both are for it, the peer is on a link of this host, and subnet
// and agent IP are of one family.
func (c *Wanted) plainWay(p *conf.Peer, s netip.Prefix) (device string, ok bool) {
	if !c.Direct.Send || !p.Direct || is6(s) != p.AgentIP.Is6() {
		return "", false
	}
	device, ok = c.Ways[p.AgentIP]
	return device, ok
}

func (w *expanded) addNeigh(ip netip.Addr, mac conf.MAC) {
	if old, dup := w.Neigh[ip]; !dup {
		w.order.neigh = append(w.order.neigh, ip)
	} else if old != mac {
		w.disputed = true
	}
	w.Neigh[ip] = mac
}

// planEntries programs neighbours and FDB entries, then routes, then removes
// what is left over. A route that moved from one peer to another is removed
// right after its successor was added.
func (p *Plan) planEntries(have Entries, more []RouteTo, foreign map[netip.Prefix]ForeignRoute) {
	w := &p.Entries
	p.Ops = slices.Grow(p.Ops, max(0, len(w.Neigh)+len(w.FDB)+len(w.Routes)-len(have.Neigh)-len(have.FDB)-len(have.Routes)))
	for _, ip := range p.order.neigh {
		if mac := w.Neigh[ip]; have.Neigh[ip] != mac {
			p.add(Op{Act: Replace, Obj: Neighbour, Dev: conf.VTEPName, Addr: ip, MAC: mac})
		}
	}
	for _, mac := range p.order.fdb {
		if ip := w.FDB[mac]; have.FDB[mac] != ip {
			p.add(Op{Act: Replace, Obj: FDBEntry, Dev: conf.VTEPName, MAC: mac, Addr: ip})
		}
	}
	extra := map[netip.Prefix][]Route{}
	for _, m := range more {
		extra[m.Dst] = append(extra[m.Dst], m.Route)
	}
	p.removeVTEPRoutes(have)
	for _, dst := range p.order.routes {
		r := w.Routes[dst]
		old, there := have.Routes[dst]
		f, rival := foreign[dst]
		if there && old == r && !rival && len(extra[dst]) == 0 {
			continue
		}
		olds := extra[dst]
		if there {
			olds = append(olds, old)
		}
		if rival && r.leads() && f.Metric <= r.Metric {
			p.complain(p.Wanted.OverlayOf(dst), "route %s is not ours and takes the place of the one via %s; remove it (%s)", f.Text, r.gateway(), showRoute(dst))
			if f.Metric == r.Metric {
				continue
			}
		}
		p.planRoute(dst, r, olds)
	}
	p.takenFromPeers(foreign)
	p.removeLeft(have, extra)
}

// removeVTEPRoutes removes the routes to VTEP addresses that are not wanted, before
// a route via such an address is made: IPv6 refuses that while another leads
// somewhere else. Packets then follow the network of the VTEP.
func (p *Plan) removeVTEPRoutes(have Entries) {
	var left []netip.Prefix
	for dst, r := range have.Routes {
		if p.isLeftVTEPRoute(dst, r) {
			left = append(left, dst)
		}
	}
	slices.SortFunc(left, netip.Prefix.Compare)
	for _, dst := range left {
		p.add(p.routeOp(Del, dst, have.Routes[dst]))
	}
}

// isLeftVTEPRoute: one of a peer that may be missing stays.
func (p *Plan) isLeftVTEPRoute(dst netip.Prefix, r Route) bool {
	v := p.Wanted.VTEP
	if r.Kind != Plain || !dst.IsSingleIP() || !v.IP.Contains(dst.Addr()) && !v.IP6.Contains(dst.Addr()) {
		return false
	}
	_, wanted := p.Entries.Routes[dst]
	_, known := p.Entries.Neigh[dst.Addr()]
	return !wanted && (known || !p.Wanted.Partial)
}

// removeLeft removes what is not wanted, or leaves it where peers may be
// missing.
func (p *Plan) removeLeft(have Entries, extra map[netip.Prefix][]Route) {
	w := &p.Entries
	remove := func(o Op) {
		if p.Wanted.Partial && o.Dev != "" {
			p.Kept = true
			return
		}
		p.add(o)
	}
	for _, dst := range slices.SortedFunc(maps.Keys(have.Routes), netip.Prefix.Compare) {
		if _, keep := w.Routes[dst]; keep || p.isLeftVTEPRoute(dst, have.Routes[dst]) {
			continue
		}
		for _, r := range append(extra[dst], have.Routes[dst]) {
			remove(p.routeOp(Del, dst, r))
		}
	}
	for _, ip := range slices.SortedFunc(maps.Keys(have.Neigh), netip.Addr.Compare) {
		if _, keep := w.Neigh[ip]; !keep {
			remove(Op{Act: Del, Obj: Neighbour, Dev: conf.VTEPName, Addr: ip, MAC: have.Neigh[ip]})
		}
	}
	for _, mac := range slices.SortedFunc(maps.Keys(have.FDB), compareMACs) {
		if _, keep := w.FDB[mac]; !keep {
			remove(Op{Act: Del, Obj: FDBEntry, Dev: conf.VTEPName, MAC: mac, Addr: have.FDB[mac]})
		}
	}
}

// planRoute makes r the only route of ours to dst.
func (p *Plan) planRoute(dst netip.Prefix, r Route, olds []Route) {
	act := Add
	for _, o := range olds {
		switch {
		case o == r:
			act = Keep
		case o.Metric == r.Metric && act == Add:
			act = Replace
		}
	}
	if act != Keep {
		p.add(p.routeOp(act, dst, r))
	}
	for _, o := range olds {
		if o != r && (o.Metric != r.Metric || act == Keep) {
			p.add(p.routeOp(Del, dst, o))
		}
	}
}

func (p *Plan) routeOp(act Action, dst netip.Prefix, r Route) Op {
	o := Op{Act: act, Obj: PeerRoute, Overlay: p.Wanted.OverlayOf(dst), Prefix: dst, Addr: r.Via, Metric: r.Metric, Kind: r.Kind, MTU: r.MTU}
	switch {
	case r.Kind == Plain:
		o.Dev, o.Source = r.Dev, p.Wanted.VTEP.Local
	case r.Via.IsValid():
		o.Dev = conf.VTEPName
	}
	return o
}

// withoutVTEP is what is left of our entries once the VTEP has gone.
func withoutVTEP(e Entries) Entries {
	left := Entries{Routes: map[netip.Prefix]Route{}}
	for dst, r := range e.Routes {
		if r.Kind != ToPeer {
			left.Routes[dst] = r
		}
	}
	return left
}

func compareMACs(a, b conf.MAC) int { return bytes.Compare(a[:], b[:]) }
