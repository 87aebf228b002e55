package plan

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// MaxLearned is how many MACs a bridge of ours learns: several for each of the
// 1,023 ports it can have. Frames to others are flooded; without a limit one
// container that may send from any MAC fills the memory of the host.
const MaxLearned = 4096

// planLinks makes the devices that are missing and repairs those that are there.
// Devices whose name somebody else has are left out of Devices.
func (p *Plan) planLinks(have *State) {
	var usable []Device
	for _, d := range p.Devices {
		plan := p.planBridge
		if d.Overlay == "" {
			plan = p.planVTEP
		}
		if plan(d, have) {
			usable = append(usable, d)
		} else if d.Name == mark.SecondVTEP {
			p.Wanted.VTEP.Second = netip.Addr{}
		}
	}
	p.Devices = usable
}

// planBridge makes a bridge or repairs it, and reports whether it can be used.
func (p *Plan) planBridge(d Device, have *State) bool {
	l, there := have.Links[d.Name]
	mac := mark.BridgeMACOf(l.MAC, d.Addrs)
	alias := Op{Act: Set, Obj: LinkAlias, Dev: d.Name, Overlay: d.Overlay, Value: d.alias()}
	if !there {
		if other := have.nicknamed(d.Name); other != "" {
			p.complain(d.Overlay, "link %s has the other name (altname) %s, which the bridge of overlay %s needs; remove it (ip link property del dev %s altname %s)",
				other, d.Name, d.Overlay, other, d.Name)
			return false
		}
		p.add(Op{Act: Add, Obj: BridgeLink, Dev: d.Name, Overlay: d.Overlay, MAC: mac})
		p.add(alias)
		p.Fresh[d.Name] = true
		return true
	}
	if l.Kind != "bridge" {
		p.complain(d.Overlay, "link %s is in the way: the bridge of overlay %s needs that name, but it is a %s; remove or rename it",
			d.Name, d.Overlay, orUnknown(l.Kind))
		return false
	}
	ours := l.Alias == d.alias()
	if l.Alias == "" && l.MAC == mac {
		// Ours: we were stopped between making it and naming it.
		p.add(alias)
		ours = true
	}
	if !ours {
		if l.STP {
			p.complain(d.Overlay, "bridge %s has the spanning tree protocol on, so that no container can be attached in time, and it is not ours; turn it off (ip link set %s type bridge stp_state 0)", d.Name, d.Name)
		}
		if l.Snooping && l.Querier {
			p.complain(d.Overlay, "bridge %s sends multicast only to those who report to it, so that containers do not find each other's IPv6 addresses, and it is not ours; turn that off (ip link set %s type bridge mcast_querier 0)", d.Name, d.Name)
		}
		return true
	}
	if l.STP {
		p.add(Op{Act: Set, Obj: BridgeSTPOff, Dev: d.Name, Overlay: d.Overlay})
		p.add(Op{Act: Set, Obj: BridgeNoDelay, Dev: d.Name, Overlay: d.Overlay})
	}
	if l.Snooping {
		p.add(Op{Act: Set, Obj: BridgeNoSnooping, Dev: d.Name, Overlay: d.Overlay})
	}
	if l.MaxLearned != nil && *l.MaxLearned != MaxLearned {
		p.add(Op{Act: Set, Obj: BridgeLimit, Dev: d.Name, Overlay: d.Overlay})
	}
	if l.Master != 0 {
		p.add(Op{Act: Set, Obj: LinkMaster, Dev: d.Name, Overlay: d.Overlay})
	}
	if l.MAC != mac {
		p.add(Op{Act: Set, Obj: LinkMAC, Dev: d.Name, Overlay: d.Overlay, MAC: mac})
	}
	return true
}

// Made reports whether a device was made by us or is about to be.
func (p *Plan) Made(d Device, have *State) bool {
	return p.Fresh[d.Name] || have.Links[d.Name].IsOurs() || slices.ContainsFunc(p.Ops, func(o Op) bool {
		return o.Obj == LinkAlias && o.Dev == d.Name
	})
}

// nicknamed is the link that has the name as another one (altname).
func (s *State) nicknamed(name string) string {
	for _, link := range slices.Sorted(maps.Keys(s.Links)) {
		if slices.Contains(s.Links[link].Altnames, name) {
			return link
		}
	}
	return ""
}

func orUnknown(kind string) string {
	if kind == "" {
		return "physical or unknown device"
	}
	return kind
}

// planAddrs adds what is missing and removes what was ours. On a bridge of
// somebody else nothing is removed.
func (p *Plan) planAddrs(d Device, have *State, up bool) {
	var late []Op
	l, fresh := have.Links[d.Name], p.Fresh[d.Name]
	if !fresh && (d.Overlay == "" || l.Alias == d.alias()) {
		for _, k := range slices.SortedFunc(maps.Keys(have.Addrs), compareAddrKeys) {
			if k.Dev != d.Name || slices.Contains(d.Addrs, k.Prefix) {
				continue
			}
			o := Op{Act: Del, Obj: Address, Dev: d.Name, Overlay: d.Overlay, Prefix: k.Prefix}
			if is6(k.Prefix) && slices.ContainsFunc(d.Addrs, func(a netip.Prefix) bool { return a.Addr() == k.Prefix.Addr() }) {
				p.add(o) // the kernel refuses an IPv6 address it has, whatever its length
			} else {
				late = append(late, o)
			}
		}
	}
	for _, a := range d.Addrs {
		p.planAddr(d, a, have, up)
	}
	p.Ops = append(p.Ops, late...)
}

// planAddr adds one address, or what the kernel made for it and somebody
// removed.
func (p *Plan) planAddr(d Device, a netip.Prefix, have *State, up bool) {
	k := AddrKey{d.Name, a}
	o := Op{Act: Add, Obj: Address, Dev: d.Name, Overlay: d.Overlay, Prefix: a}
	_, there := have.Addrs[k]
	_, routed := have.Connected[k]
	_, local := have.Local[k]
	switch {
	case !there || p.Fresh[d.Name]:
		p.add(o)
	case !up: // the kernel makes its routes when the device comes up
	case !local && is6(a):
		// Such a route would outlive the address.
		del := o
		del.Act = Del
		p.add(del)
		p.add(o)
	default:
		if !local {
			p.add(Op{Act: Add, Obj: LocalRoute, Dev: d.Name, Overlay: d.Overlay, Addr: a.Addr(), Prefix: netip.PrefixFrom(a.Addr(), a.Addr().BitLen())})
		}
		if !routed {
			p.add(Op{Act: Add, Obj: ConnectedRoute, Dev: d.Name, Overlay: d.Overlay, Prefix: a.Masked(), Addr: a.Addr()})
		}
	}
}

func compareAddrKeys(a, b AddrKey) int { return a.Prefix.Compare(b.Prefix) }

// planPorts puts the host ends of containers back into the bridges that their
// aliases name, and sets them up: a bridge that was deleted loses its ports, and
// systemd-networkd takes every veth out of its bridge when it starts.
func (p *Plan) planPorts(have *State) {
	overlays := map[string]string{} // by bridge
	for _, d := range p.Devices {
		overlays[d.Name] = d.Overlay
	}
	for _, name := range slices.Sorted(maps.Keys(have.Links)) {
		l := have.Links[name]
		if l.Kind != "veth" {
			continue
		}
		alias, ours := mark.IsHostEnd(name, l.Alias)
		bridge := BridgeOf(p.Wanted.Overlays, alias.Overlay, alias.Half)
		overlay, wanted := overlays[bridge]
		if ours && !wanted {
			overlay, bridge = alias.Overlay, p.leftBridgeOf(alias, have, overlays)
		}
		if ours && bridge == "" && l.Master == 0 && l.Up() { // see cutOff
			p.add(Op{Act: Set, Obj: LinkDown, Dev: name, Overlay: overlay})
		}
		if !ours || bridge == "" {
			continue
		}
		o := Op{Act: Set, Dev: name, Overlay: overlay, Master: bridge}
		moved := p.Fresh[bridge] || l.Master != have.Links[bridge].Index
		if moved {
			p.returning[bridge]++
			o.Obj = LinkMaster
			p.add(o)
		}
		if !l.Up() {
			o.Obj = LinkUp
			p.add(o)
		}
		if moved || WrongPort(l.Link) {
			o.Obj = BridgePort
			o.Blocked = !moved && blocked(l.Link)
			p.add(o)
		}
	}
}

// leftBridgeOf is the bridge of a container that is not wanted any more and stays
// because of its containers; empty: there is none. Of an overlay that is not here
// nothing says whether both halves had one.
func (p *Plan) leftBridgeOf(a mark.Alias, have *State, wanted map[string]string) string {
	for _, name := range [...]string{a.Half.Bridge(a.Overlay), conf.Mesos.Bridge(a.Overlay)} {
		l := have.Links[name]
		overlay, _, ours := mark.ParseBridgeAlias(l.Alias)
		if !ours && p.unmarked(name, have) == a.Overlay {
			return name
		}
		if _, is := wanted[name]; ours && !is && l.Kind == "bridge" && overlay == a.Overlay && !slices.Contains(p.Wanted.TakenDown, overlay) {
			return name
		}
	}
	return ""
}

// WrongPort reports whether a bridge treats a port in a way that keeps packets
// from it. Whether it sends them back where they came from (hairpin) is for the
// network to say.
func WrongPort(l rtnl.Link) bool {
	p := l.Port
	return p != nil && *p != rtnl.Port{Hairpin: p.Hairpin, Blocked: p.Blocked} || blocked(l)
}

// blocked: the bridge does not forward for a port that could.
func blocked(l rtnl.Link) bool { return l.Port != nil && l.Port.Blocked && l.Up() && l.Operational }

// planLeftBridges removes the bridges we made and no longer want. One with
// containers stays, without the addresses that are another host's now. Those with
// containers are in LeftBridges, also one that Docker made.
func (p *Plan) planLeftBridges(have *State) {
	wanted := map[string]bool{}
	for _, b := range p.Wanted.Bridges {
		wanted[b.Name] = true
	}
	p.Left, p.LeftBridges = map[string]int{}, map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(have.Links)) {
		l := have.Links[name]
		overlay, _, ours := mark.ParseBridgeAlias(l.Alias)
		if !ours {
			overlay = p.unmarked(name, have)
		}
		if l.Kind != "bridge" || wanted[name] || overlay == "" {
			continue
		}
		ports := l.Ports + p.returning[name]
		if ports > 0 { // one that is removed counts until it is gone
			p.LeftBridges[name] = overlay
		}
		switch {
		case !ours: // goes with its network
		case ports > 0 && !slices.Contains(p.Wanted.TakenDown, overlay):
			p.Left[overlay] += ports
			p.withdrawAddrs(name, overlay, have)
			// The other half and new containers elsewhere have nothing to do with it.
			p.Notices = append(p.Notices, fmt.Sprintf("bridge %s of overlay %s is no longer wanted but has %d ports; it is removed when the last container has gone",
				name, overlay, ports))
		default:
			p.cutOff(name, overlay, have)
			p.add(Op{Act: Del, Obj: BridgeLink, Dev: name, Overlay: overlay})
		}
	}
}

// cutOff sets the containers' interfaces down whose bridge is removed: the host
// would route what comes from them, past every rule that asks for the bridge.
func (p *Plan) cutOff(bridge, overlay string, have *State) {
	for _, name := range slices.Sorted(maps.Keys(have.Links)) {
		if l := have.Links[name]; l.Kind == "veth" && l.Master == have.Links[bridge].Index && l.Up() {
			p.add(Op{Act: Set, Obj: LinkDown, Dev: name, Overlay: overlay, Master: bridge})
		}
	}
}

// withdrawAddrs takes the addresses that are another host's off a bridge that is left.
// With them the kernel takes its routes, so that packets follow the peer's.
func (p *Plan) withdrawAddrs(bridge, overlay string, have *State) {
	for _, k := range slices.SortedFunc(maps.Keys(have.Addrs), compareAddrKeys) {
		others := func(w netip.Prefix) bool { return inside(k.Prefix, w) }
		if k.Dev == bridge && slices.ContainsFunc(p.Wanted.Withdrawn, others) {
			p.add(Op{Act: Del, Obj: Address, Dev: bridge, Overlay: overlay, Prefix: k.Prefix})
		}
	}
}
