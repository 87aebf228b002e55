package datapath

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// encap4 and encap6 are what VXLAN adds to a packet on an IPv4 and on an IPv6
// underlay: inner Ethernet 14, VXLAN 8, UDP 8 and the outer IP header.
const (
	encap4 = 14 + 8 + 8 + 20
	encap6 = 14 + 8 + 8 + 40
)

const (
	maxMTU     = 65535 // of any Ethernet-like device
	minMTU6    = 1280  // below this the kernel takes IPv6 off a device
	defaultMTU = 1500  // of an underlay that is not known
)

// state is what the kernel has, as far as it concerns us.
type state struct {
	ipv6     bool            // the kernel has it
	links    map[string]link // every link of the host, by name
	underlay string          // name of the link that has the agent IP; empty: none
	addrs    map[addrKey]struct{}
	// connected holds the routes the kernel keeps for the addresses.
	connected map[addrKey]struct{}
	entries
	more    []routeEntry                  // further routes of ours to a prefix in routes
	compare *comparison                   // in place of entries and more; nil: those are read
	foreign map[netip.Prefix]foreignRoute // routes of others to prefixes inside overlays
	sysctls map[string]string             // by path below /proc/sys
	// acceptRA names the links that take router advertisements only as long as
	// the host does not forward.
	acceptRA []string
}

type link struct {
	index int
	kind  string // "bridge", "vxlan", ...
	mac   conf.MAC
	mtu   int
	up    bool
	// loopback carries addresses that are reached through other links.
	loopback bool
	alias    string
	ports    int // of a bridge
	vxlan    rtnl.VXLAN
}

type addrKey struct {
	dev    string
	prefix netip.Prefix
}

// entries are what one peer more or less changes: everything on vtep1024, and
// our routes.
type entries struct {
	neigh  map[netip.Addr]conf.MAC
	fdb    map[conf.MAC]netip.Addr
	routes map[netip.Prefix]route
}

// route is a route of ours. Without via it is a blackhole.
type route struct {
	metric uint32
	via    netip.Addr
	odd    bool // as read: something we never make, so it is equal to nothing wanted
}

type routeEntry struct {
	prefix netip.Prefix
	route
}

type foreignRoute struct {
	metric uint32
	text   string
}

// problem is something that cannot be had; overlay is empty when it concerns
// the whole host.
type problem struct {
	overlay string
	err     error
}

// planned is what plan answers.
type planned struct {
	ops      []op
	problems []problem // they stay until the configuration or the kernel changes
	notices  []string  // what somebody should look at, though overlays work without it
	mtu      int
	lowered  bool // the configured MTU does not fit
	disputed bool // peers contradict each other
	spared   bool // something is not wanted and stays, because peers may be missing
	wanted   wantedEntries
	devices  []device
	fresh    map[string]bool // devices that are to be made
	cfg      Config          // without what this host cannot have
}

// device is a link of ours with its addresses.
type device struct {
	name, overlay string // no overlay: the VTEP
	addrs         []netip.Prefix
}

// plan compares what is wanted with what the kernel has and says what to do, in
// order: devices, sysctls while the devices are down, addresses, then
// neighbours and FDB entries before the routes that need them, additions before
// removals, and unwanted bridges last.
func plan(want Config, have *state) planned {
	p := planDevices(want, have)
	p.wanted = expand(p.cfg)
	p.problems = append(p.problems, p.wanted.problems...)
	p.notices = append(p.notices, p.wanted.notices...)
	p.disputed = p.wanted.disputed
	had := have.entries
	more := have.more
	if p.fresh[conf.VTEPName] {
		had, more = withoutVTEP(had), nil
	}
	p.planEntries(had, more, have.foreign)
	p.planLeftBridges(have)
	return p
}

// planDevices is the part of plan that is about devices and the host.
func planDevices(want Config, have *state) (p planned) {
	p.chooseMTU(want.VTEP, have)
	p.cfg = p.supported(want, have)
	p.devices = devices(p.cfg)

	fresh := p.planLinks(have)
	p.fresh = fresh
	for _, d := range p.devices {
		// A bridge that was only made with an MTU takes another one whenever a
		// port comes or goes; one that was told keeps it.
		madeBridge := fresh[d.name] && d.overlay != ""
		if madeBridge || !fresh[d.name] && have.links[d.name].mtu != p.mtu {
			p.add(op{act: set, obj: linkMTU, dev: d.name, overlay: d.overlay, mtu: p.mtu})
		}
	}
	p.planSysctls(have, fresh)
	for _, d := range p.devices {
		up := have.links[d.name].up && !fresh[d.name]
		if !up {
			p.add(op{act: set, obj: linkUp, dev: d.name, overlay: d.overlay})
		}
		p.planAddrs(d, have, fresh[d.name], up)
	}
	return p
}

func (p *planned) add(o op) { p.ops = append(p.ops, o) }

func (p *planned) complain(overlay, format string, args ...any) {
	p.problems = append(p.problems, problem{overlay, fmt.Errorf(format, args...)})
}

// chooseMTU takes what fits into the underlay, or less if that is configured.
func (p *planned) chooseMTU(v VTEP, have *state) {
	encap := encap4
	if v.Local.Is6() {
		encap = encap6
	}
	under, found := have.links[have.underlay]
	if found && !under.loopback {
		p.mtu = min(under.mtu-encap, maxMTU)
		p.lowered = v.MTU > p.mtu
		if v.MTU != 0 {
			p.mtu = min(v.MTU, p.mtu)
		}
		return
	}
	if !found {
		p.complain("", "agent IP %s is on no interface of this host", v.Local)
	}
	// An address on the loopback, as routing hosts have it, says nothing about
	// the way packets go.
	vtep, ok := have.links[conf.VTEPName]
	switch {
	case v.MTU != 0:
		p.mtu = v.MTU
	case ok && !found:
		p.mtu = vtep.mtu
	default:
		p.mtu = defaultMTU - encap
	}
}

// supported is the configuration less the IPv6 that this host cannot have;
// every overlay that loses something is told.
func (p *planned) supported(c Config, have *state) Config {
	var why string
	switch {
	case !have.ipv6:
		why = "this kernel has no IPv6; start it without ipv6.disable=1"
	case p.mtu < minMTU6:
		why = fmt.Sprintf("the MTU of the overlay is %d and IPv6 needs at least %d; raise vtep_mtu or the MTU of the underlay", p.mtu, minMTU6)
	case !c.VTEP.IP6.IsValid():
		why = "the lease has no IPv6 VTEP address; configure vtep_subnet6, or a larger one"
	default:
		return c
	}
	only4 := func(in []netip.Prefix) []netip.Prefix {
		return slices.DeleteFunc(slices.Clone(in), func(p netip.Prefix) bool { return p.Addr().Is6() })
	}
	c.VTEP.IP6 = netip.Prefix{}
	var bridges []Bridge
	for _, b := range c.Bridges {
		if b.Addrs = only4(b.Addrs); len(b.Addrs) > 0 {
			bridges = append(bridges, b)
		}
	}
	c.Bridges = bridges
	c.Overlays = slices.Clone(c.Overlays)
	for i, o := range c.Overlays {
		left := only4(o.Subnets)
		if len(left) != len(o.Subnets) {
			p.complain(o.Name, "overlay %s has no IPv6 here: %s", o.Name, why)
		}
		c.Overlays[i].Subnets, c.Overlays[i].Agent = left, only4(o.Agent)
	}
	return c
}

// devices lists ours, the VTEP first.
func devices(c Config) []device {
	vtep := device{name: conf.VTEPName}
	for _, a := range []netip.Prefix{c.VTEP.IP, c.VTEP.IP6} {
		if a.IsValid() {
			vtep.addrs = append(vtep.addrs, a)
		}
	}
	all := []device{vtep}
	for _, b := range c.Bridges {
		all = append(all, device{b.Name, b.Overlay, b.Addrs})
	}
	return all
}

// alias is that of a bridge.
func (d device) alias() string {
	half, _ := mark.HalfOf(d.name)
	return mark.BridgeAlias(d.overlay, half)
}

// has6 says whether the device has IPv6 addresses.
func (d device) has6() bool {
	return slices.ContainsFunc(d.addrs, func(a netip.Prefix) bool { return a.Addr().Is6() })
}

// planLinks makes the devices that are missing and answers with their names.
func (p *planned) planLinks(have *state) map[string]bool {
	fresh := map[string]bool{}
	v := p.cfg.VTEP
	l, there := have.links[conf.VTEPName]
	if there && (l.kind != "vxlan" || l.mac != v.MAC || l.vxlan != (rtnl.VXLAN{VNI: conf.VNI, Port: conf.VXLANPort, Local: v.Local})) {
		p.add(op{act: del, obj: vtepLink, dev: conf.VTEPName})
		there = false
	}
	if !there {
		for _, name := range slices.Sorted(maps.Keys(have.links)) {
			if x := have.links[name].vxlan; name != conf.VTEPName && x.VNI == conf.VNI && x.Port == conf.VXLANPort {
				p.complain("", "link %s is a VXLAN device with our VNI %d and UDP port %d; remove it so that %s can be made",
					name, conf.VNI, conf.VXLANPort, conf.VTEPName)
			}
		}
		p.add(op{act: add, obj: vtepLink, dev: conf.VTEPName, mac: v.MAC, addr: v.Local, mtu: p.mtu})
		fresh[conf.VTEPName] = true
	}

	var usable []device
	for _, d := range p.devices {
		l, there := have.links[d.name]
		switch {
		case d.overlay == "":
		case !there:
			p.add(op{act: add, obj: bridgeLink, dev: d.name, overlay: d.overlay, mac: mark.BridgeMAC(d.addrs)})
			p.add(op{act: set, obj: linkAlias, dev: d.name, overlay: d.overlay, value: d.alias()})
			fresh[d.name] = true
		case l.kind != "bridge":
			p.complain(d.overlay, "link %s is in the way: the bridge of overlay %s needs that name, but it is a %s; remove or rename it",
				d.name, d.overlay, orUnknown(l.kind))
			continue
		case l.alias == "" && l.mac == mark.BridgeMAC(d.addrs):
			// Ours: we were stopped between making it and naming it.
			p.add(op{act: set, obj: linkAlias, dev: d.name, overlay: d.overlay, value: d.alias()})
		}
		usable = append(usable, d)
	}
	p.devices = usable
	return fresh
}

func orUnknown(kind string) string {
	if kind == "" {
		return "physical or unknown device"
	}
	return kind
}

// planAddrs adds what is missing and removes what was ours. On a bridge of
// somebody else nothing is removed.
func (p *planned) planAddrs(d device, have *state, fresh, up bool) {
	var late []op
	l := have.links[d.name]
	if !fresh && (d.overlay == "" || l.alias == d.alias()) {
		for _, k := range slices.SortedFunc(maps.Keys(have.addrs), compareAddrKeys) {
			if k.dev != d.name || slices.Contains(d.addrs, k.prefix) {
				continue
			}
			o := op{act: del, obj: address, dev: d.name, overlay: d.overlay, prefix: k.prefix}
			if k.prefix.Addr().Is6() && slices.ContainsFunc(d.addrs, func(a netip.Prefix) bool { return a.Addr() == k.prefix.Addr() }) {
				p.add(o) // the kernel refuses an IPv6 address it has, whatever its length
			} else {
				late = append(late, o)
			}
		}
	}
	for _, a := range d.addrs {
		k := addrKey{d.name, a}
		_, there := have.addrs[k]
		_, routed := have.connected[k]
		switch {
		case !there || fresh:
			p.add(op{act: add, obj: address, dev: d.name, overlay: d.overlay, prefix: a})
		case up && !routed:
			p.add(op{act: add, obj: connected, dev: d.name, overlay: d.overlay, prefix: a.Masked(), addr: a.Addr()})
		}
	}
	p.ops = append(p.ops, late...)
}

func compareAddrKeys(a, b addrKey) int { return a.prefix.Compare(b.prefix) }

// planLeftBridges removes the bridges we made and no longer want.
func (p *planned) planLeftBridges(have *state) {
	wanted := map[string]bool{}
	for _, b := range p.cfg.Bridges {
		wanted[b.Name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(have.links)) {
		l := have.links[name]
		overlay, _, ours := mark.ParseBridgeAlias(l.alias)
		switch {
		case !ours || l.kind != "bridge" || wanted[name]:
		case l.ports > 0:
			// The other half and new containers elsewhere have nothing to do with it.
			p.notices = append(p.notices, fmt.Sprintf("bridge %s of overlay %s is no longer wanted but has %d ports; it is removed when the last container has gone",
				name, overlay, l.ports))
		default:
			p.add(op{act: del, obj: bridgeLink, dev: name, overlay: overlay})
		}
	}
}

// wantedEntries are entries and the order in which they were asked for.
type wantedEntries struct {
	entries
	neighOrder []netip.Addr
	fdbOrder   []conf.MAC
	routeOrder []netip.Prefix
	problems   []problem
	notices    []string
	disputed   bool
}

// odd says whether some peers are not as they should be.
func (w *wantedEntries) odd() bool { return len(w.problems)+len(w.notices) > 0 }

// expand turns peers and our own agent subnets into entries. Where two peers
// claim the same thing, the higher epoch has it.
func expand(c Config) wantedEntries {
	w := expandPeers(c)
	if w.disputed {
		c.Peers = slices.Clone(c.Peers)
		slices.SortStableFunc(c.Peers, func(a, b conf.Peer) int { return cmp.Compare(a.Epoch, b.Epoch) })
		w = expandPeers(c)
	}
	for _, o := range c.Overlays {
		for _, a := range o.Agent {
			if r, taken := w.routes[a]; taken && r.via.IsValid() {
				w.problems = append(w.problems, problem{o.Name, fmt.Errorf("agent subnet %s is ours, and the peer at VTEP %s claims it as well", a, r.via)})
			} else if !taken {
				w.routeOrder = append(w.routeOrder, a)
			}
			w.routes[a] = route{metric: mark.BlackholeMetric}
		}
	}
	return w
}

// expandPeers lets a later peer win over an earlier one. A host that can reach
// none of its peers has a problem; one that cannot reach a few takes notice.
func expandPeers(c Config) wantedEntries {
	n := len(c.Peers)
	w := wantedEntries{entries: entries{
		neigh:  make(map[netip.Addr]conf.MAC, n),
		fdb:    make(map[conf.MAC]netip.Addr, n),
		routes: make(map[netip.Prefix]route, n),
	}}
	var cut []*conf.Peer
	for i := range c.Peers {
		if unreachable(&c.Peers[i], c.VTEP) != "" {
			cut = append(cut, &c.Peers[i])
			continue
		}
		w.addPeer(&c.Peers[i], c.VTEP)
	}
	for _, p := range cut {
		why := unreachable(p, c.VTEP)
		if len(w.fdb) == 0 {
			w.complain(c, p, why)
			continue
		}
		// One odd host among many must not stop the overlays of all of them.
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
func (w *wantedEntries) complain(c Config, p *conf.Peer, why string) {
	var told []string
	for _, s := range p.Subnets {
		if o := overlayOf(c, s); !slices.Contains(told, o) {
			told = append(told, o)
			w.problems = append(w.problems, problem{o, fmt.Errorf("peer %s %s", p.AgentID, why)})
		}
	}
}

func (w *wantedEntries) addPeer(p *conf.Peer, own VTEP) {
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
	if old, dup := w.fdb[p.VTEPMAC]; !dup {
		w.fdbOrder = append(w.fdbOrder, p.VTEPMAC)
	} else if old != p.AgentIP {
		w.disputed = true
	}
	w.fdb[p.VTEPMAC] = p.AgentIP

	metric := mark.PeerMetric(p.VTEPIP, own.IP)
	for _, s := range p.Subnets {
		r := route{metric: metric, via: p.VTEPIP}
		if s.Addr().Is6() {
			if !ip6 {
				continue
			}
			r.via = p.VTEPIP6
		}
		if old, dup := w.routes[s]; !dup {
			w.routeOrder = append(w.routeOrder, s)
		} else if old != r {
			w.disputed = true
		}
		w.routes[s] = r
	}
}

func (w *wantedEntries) addNeigh(ip netip.Addr, mac conf.MAC) {
	if old, dup := w.neigh[ip]; !dup {
		w.neighOrder = append(w.neighOrder, ip)
	} else if old != mac {
		w.disputed = true
	}
	w.neigh[ip] = mac
}

// planEntries programs neighbours and FDB entries, then routes, then removes
// what is left over. A route that moved from one peer to another is removed
// right after its successor was added.
func (p *planned) planEntries(have entries, more []routeEntry, foreign map[netip.Prefix]foreignRoute) {
	w := &p.wanted
	p.ops = slices.Grow(p.ops, max(0, len(w.neigh)+len(w.fdb)+len(w.routes)-len(have.neigh)-len(have.fdb)-len(have.routes)))
	for _, ip := range w.neighOrder {
		if mac := w.neigh[ip]; have.neigh[ip] != mac {
			p.add(op{act: replace, obj: neighbour, dev: conf.VTEPName, addr: ip, mac: mac})
		}
	}
	for _, mac := range w.fdbOrder {
		if ip := w.fdb[mac]; have.fdb[mac] != ip {
			p.add(op{act: replace, obj: fdbEntry, dev: conf.VTEPName, mac: mac, addr: ip})
		}
	}
	extra := map[netip.Prefix][]route{}
	for _, m := range more {
		extra[m.prefix] = append(extra[m.prefix], m.route)
	}
	for _, dst := range w.routeOrder {
		r := w.routes[dst]
		old, there := have.routes[dst]
		f, rival := foreign[dst]
		if there && old == r && !rival && len(extra[dst]) == 0 {
			continue
		}
		olds := extra[dst]
		if there {
			olds = append(olds, old)
		}
		if rival && r.via.IsValid() && f.metric <= r.metric {
			p.complain(overlayOf(p.cfg, dst), "route %s is not ours and takes the place of the one via VTEP %s; remove it", f.text, r.via)
			if f.metric == r.metric {
				continue
			}
		}
		p.planRoute(dst, r, olds)
	}

	p.removeLeft(have, extra)
}

// removeLeft removes what is not wanted, or leaves it where peers may be
// missing.
func (p *planned) removeLeft(have entries, extra map[netip.Prefix][]route) {
	w := &p.wanted
	remove := func(o op) {
		if p.cfg.Partial && o.dev != "" {
			p.spared = true
			return
		}
		p.add(o)
	}
	for _, dst := range slices.SortedFunc(maps.Keys(have.routes), netip.Prefix.Compare) {
		if _, keep := w.routes[dst]; keep {
			continue
		}
		for _, r := range append(extra[dst], have.routes[dst]) {
			remove(p.routeOp(del, dst, r))
		}
	}
	for _, ip := range slices.SortedFunc(maps.Keys(have.neigh), netip.Addr.Compare) {
		if _, keep := w.neigh[ip]; !keep {
			remove(op{act: del, obj: neighbour, dev: conf.VTEPName, addr: ip, mac: have.neigh[ip]})
		}
	}
	for _, mac := range slices.SortedFunc(maps.Keys(have.fdb), compareMACs) {
		if _, keep := w.fdb[mac]; !keep {
			remove(op{act: del, obj: fdbEntry, dev: conf.VTEPName, mac: mac, addr: have.fdb[mac]})
		}
	}
}

// planRoute makes r the only route of ours to dst.
func (p *planned) planRoute(dst netip.Prefix, r route, olds []route) {
	act := add
	for _, o := range olds {
		switch {
		case o == r:
			act = keep
		case o.metric == r.metric && act == add:
			act = replace
		}
	}
	if act != keep {
		p.add(p.routeOp(act, dst, r))
	}
	for _, o := range olds {
		if o != r && (o.metric != r.metric || act == keep) {
			p.add(p.routeOp(del, dst, o))
		}
	}
}

func (p *planned) routeOp(act action, dst netip.Prefix, r route) op {
	o := op{act: act, obj: routeTo, overlay: overlayOf(p.cfg, dst), prefix: dst, addr: r.via, metric: r.metric}
	if r.via.IsValid() {
		o.dev = conf.VTEPName
	}
	return o
}

// overlayOf is the overlay a prefix lies in; empty: none of ours.
func overlayOf(c Config, p netip.Prefix) string {
	for _, o := range c.Overlays {
		for _, s := range o.Subnets {
			if s.Bits() <= p.Bits() && s.Contains(p.Addr()) {
				return o.Name
			}
		}
	}
	return ""
}

// withoutVTEP is what is left of our entries once the VTEP has gone.
func withoutVTEP(e entries) entries {
	left := entries{routes: map[netip.Prefix]route{}}
	for dst, r := range e.routes {
		if !r.via.IsValid() && !r.odd {
			left.routes[dst] = r
		}
	}
	return left
}

func compareMACs(a, b conf.MAC) int { return bytes.Compare(a[:], b[:]) }
