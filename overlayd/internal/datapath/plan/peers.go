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
	forwardingOrder                 // of vtep1024
	second          forwardingOrder // of the second device
	routes          []netip.Prefix
}

type forwardingOrder struct {
	neigh []netip.Addr
	fdb   []conf.MAC
}

// on is that of a device.
func (o *order) on(device string) *forwardingOrder {
	if device == mark.SecondVTEP {
		return &o.second
	}
	return &o.forwardingOrder
}

// expanded is what peers and agent subnets come to.
type expanded struct {
	Entries
	order    order
	problems []Problem
	notices  []string
	disputed bool
	narrow   bool // the second device takes too little for the IPv6 of some peers
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
		if unreachable(&c.Peers[i], &c) != "" {
			cut = append(cut, &c.Peers[i])
			continue
		}
		w.addPeer(&c.Peers[i], c)
	}
	for _, p := range cut {
		why := unreachable(p, &c)
		if w.Peers() == 0 {
			w.complain(c, p, why)
			continue
		}
		// One such host among many must not stop the overlays of all of them.
		w.notices = append(w.notices, fmt.Sprintf("peer %s %s", p.AgentID, why))
	}
	if w.narrow {
		w.notices = append(w.notices, fmt.Sprintf("IPv6 of containers goes to no host that is reached from agent IP %s: %s takes packets of %d bytes, and IPv6 needs at least %d; raise the MTU of the link that has the address",
			c.VTEP.Second, mark.SecondVTEP, c.SecondMTU, minMTU6))
	}
	return w
}

// unreachable says why nothing can be forwarded to a peer, if so.
func unreachable(p *conf.Peer, c *Wanted) string {
	if !p.AgentIP.IsValid() {
		return "has no agent IP"
	}
	if vtep, vtep6 := p.Meet(c.VTEP.IP, c.VTEP.IP6); !vtep.IsValid() && !vtep6.IsValid() {
		return "has no VTEP address of a family that this host has one of"
	}
	if _, _, ok := c.Reach(p); ok {
		return ""
	}
	if c.VTEP.Second.IsValid() && !p.TwoFamilies {
		return fmt.Sprintf("at %s cannot be reached from agent IP %s: one is IPv4, the other IPv6, and its agent is of a release that does not know %s", p.AgentIP, c.VTEP.Local, c.VTEP.Second)
	}
	return fmt.Sprintf("at %s cannot be reached from agent IP %s: one is IPv4, the other IPv6", p.AgentIP, c.VTEP.Local)
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
	from, to, _ := c.Reach(p)
	if to == from || p.AgentIP == own.Local {
		// This very host under an agent id it once had. Its packets would come
		// straight back to us, so there is nothing to forward to.
		return
	}
	device, second := conf.VTEPName, from != own.Local
	if second {
		device = mark.SecondVTEP
	}
	vtep, vtep6 := p.Meet(own.IP, own.IP6)
	ip4, ip6 := vtep.IsValid(), vtep6.IsValid()
	if second && ip6 && c.SecondMTU < minMTU6 {
		ip6 = false
		w.narrow = w.narrow || slices.ContainsFunc(p.Subnets, is6)
	}
	if ip4 {
		w.addNeigh(device, vtep, p.VTEPMAC)
	}
	if ip6 {
		w.addNeigh(device, vtep6, p.VTEPMAC)
	}
	w.addFDB(device, p.VTEPMAC, to)

	metric := own.metricOf(p)
	if second { // before the routes via it: otherwise the network of the VTEP has it
		if ip4 {
			w.addVTEPRoute(vtep, metric)
		}
		if ip6 {
			w.addVTEPRoute(vtep6, metric)
		}
	}
	for _, s := range p.Subnets {
		r := Route{Metric: metric}
		if second {
			r.Dev = device
		}
		if way, ok := c.plainWay(p, s); ok {
			r = Route{Metric: metric, Via: p.AgentIP, Kind: Plain, Dev: way}
		} else if is6(s) && ip6 {
			r.Via = vtep6
		} else if !is6(s) && ip4 {
			r.Via = vtep
		} else {
			continue
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

func (w *expanded) addVTEPRoute(vtep netip.Addr, metric uint32) {
	w.addRoute(netip.PrefixFrom(vtep, vtep.BitLen()), Route{Metric: metric, Kind: ToVTEP, Dev: mark.SecondVTEP})
}

// metricOf is the metric of the routes to a peer.
func (v VTEP) metricOf(p *conf.Peer) uint32 {
	if p.VTEPIP.Is4() {
		return mark.PeerMetric(p.VTEPIP, v.IP)
	}
	return mark.PeerMetric(p.VTEPIP6, v.IP6)
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
	from, to, _ := c.Reach(p)
	least := cmp.Or(p.MTUAt(to), c.MTU)
	if from != c.VTEP.Local {
		least = min(least, c.SecondMTU)
	}
	if path, ok := c.PathMTU[to]; ok {
		if kind == ToPeer {
			path -= Overhead(from)
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
// and agent IP are of one family. Second agent IPs have no part in it.
func (c *Wanted) plainWay(p *conf.Peer, s netip.Prefix) (device string, ok bool) {
	if !c.Direct.Send || !p.Direct || is6(s) != p.AgentIP.Is6() || is6(s) != c.VTEP.Local.Is6() {
		return "", false
	}
	device, ok = c.Ways[p.AgentIP]
	return device, ok
}

func (w *expanded) addNeigh(device string, ip netip.Addr, mac conf.MAC) {
	neigh, order := w.On(device).Neigh, w.order.on(device)
	if old, dup := neigh[ip]; !dup {
		order.neigh = append(order.neigh, ip)
	} else if old != mac {
		w.disputed = true
	}
	neigh[ip] = mac
}

func (w *expanded) addFDB(device string, mac conf.MAC, ip netip.Addr) {
	fdb, order := w.On(device).FDB, w.order.on(device)
	if old, dup := fdb[mac]; !dup {
		order.fdb = append(order.fdb, mac)
	} else if old != ip {
		w.disputed = true
	}
	fdb[mac] = ip
}

// planEntries programs neighbours and FDB entries, then routes, then removes
// what is left over. A route that moved from one peer to another is removed
// right after its successor was added.
func (p *Plan) planEntries(have Entries, more []RouteTo, foreign map[netip.Prefix]ForeignRoute) {
	w := &p.Entries
	p.Ops = slices.Grow(p.Ops, max(0, len(w.Neigh)+len(w.FDB)+len(w.Routes)-len(have.Neigh)-len(have.FDB)-len(have.Routes)))
	for _, device := range vxlanDevices {
		p.planForwarding(device, have.On(device))
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

// vxlanDevices are those that peers may be behind.
var vxlanDevices = [...]string{conf.VTEPName, mark.SecondVTEP}

// planForwarding programs neighbours and FDB entries of one device.
func (p *Plan) planForwarding(device string, have *Forwarding) {
	want, order := p.Entries.On(device), p.order.on(device)
	for _, ip := range order.neigh {
		if mac := want.Neigh[ip]; have.Neigh[ip] != mac {
			p.add(Op{Act: Replace, Obj: Neighbour, Dev: device, Addr: ip, MAC: mac})
		}
	}
	for _, mac := range order.fdb {
		if ip := want.FDB[mac]; have.FDB[mac] != ip {
			p.add(Op{Act: Replace, Obj: FDBEntry, Dev: device, MAC: mac, Addr: ip})
		}
	}
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
	if r.Kind != Plain && r.Kind != ToVTEP || !dst.IsSingleIP() || !v.IP.Contains(dst.Addr()) && !v.IP6.Contains(dst.Addr()) {
		return false
	}
	_, wanted := p.Entries.Routes[dst]
	_, known := p.Entries.Neigh[dst.Addr()]
	if _, bySecond := p.Entries.Second.Neigh[dst.Addr()]; bySecond {
		known = true
	}
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
	for _, device := range vxlanDevices {
		had, want := have.On(device), w.On(device)
		for _, ip := range slices.SortedFunc(maps.Keys(had.Neigh), netip.Addr.Compare) {
			if _, keep := want.Neigh[ip]; !keep {
				remove(Op{Act: Del, Obj: Neighbour, Dev: device, Addr: ip, MAC: had.Neigh[ip]})
			}
		}
		for _, mac := range slices.SortedFunc(maps.Keys(had.FDB), compareMACs) {
			if _, keep := want.FDB[mac]; !keep {
				remove(Op{Act: Del, Obj: FDBEntry, Dev: device, MAC: mac, Addr: had.FDB[mac]})
			}
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
	case r.bySecond():
		o.Dev, o.Source = r.Dev, p.Wanted.VTEP.SourceTo(dst.Addr())
	case r.Via.IsValid():
		o.Dev = conf.VTEPName
	}
	return o
}

// without is what is left of our entries once some of the VXLAN devices have gone.
func (e Entries) without(gone func(device string) bool) Entries {
	left := Entries{Forwarding: e.Forwarding, Second: e.Second, Routes: map[netip.Prefix]Route{}}
	for _, device := range vxlanDevices {
		if gone(device) {
			*left.On(device) = Forwarding{}
		}
	}
	for dst, r := range e.Routes {
		if !r.goesWith(gone) {
			left.Routes[dst] = r
		}
	}
	return left
}

// goesWith reports whether a route goes with its device.
func (r Route) goesWith(gone func(device string) bool) bool {
	return (r.Kind == ToPeer || r.Kind == ToVTEP) && gone(cmp.Or(r.Dev, conf.VTEPName))
}

func compareMACs(a, b conf.MAC) int { return bytes.Compare(a[:], b[:]) }
