package plan

import (
	"fmt"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
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
	defaultMTU = 1500  // of an underlay whose MTU cannot be read
)

// Overhead is what VXLAN adds to a packet between agent IPs of the family of a.
func Overhead(a netip.Addr) int {
	if a.Is6() {
		return encap6
	}
	return encap4
}

// Problem is something that cannot be had; Overlay is empty when it concerns
// the whole host.
type Problem struct {
	Overlay string
	Err     error
}

// Plan is what has to be done, and what cannot be.
type Plan struct {
	Ops      []Op
	Problems []Problem // they stay until the configuration or the kernel changes
	Notices  []string  // what somebody should look at, though overlays work without it
	MTU      int
	Lowered  bool     // the configured MTU does not fit
	Disputed bool     // peers contradict each other
	AtOdds   bool     // some of the problems are with peers
	Refused  []string // overlays that are not set up here
	// Left is, by overlay, how many ports the bridges have that are not wanted.
	Left map[string]int
	// LeftBridges are those bridges, with their overlays, and those with ports that
	// Docker made or that are removed all the same.
	LeftBridges map[string]string
	// Kept: something is not wanted and stays, because peers may be missing.
	Kept    bool
	Entries Entries // what the kernel has in the end
	Devices []Device
	Fresh   map[string]bool // devices that are to be made
	Wanted  Wanted          // without what this host cannot have
	gone    map[string]bool // VXLAN devices that are removed before anything else
	// returning is how many ports are put back into each bridge.
	returning map[string]int

	order order
}

// Make compares what is wanted with what the kernel has and says what to do, in
// order: devices, sysctls while the devices are down, addresses, ports, then
// neighbours and FDB entries before the routes that need them, additions before
// removals, and unwanted bridges last.
func Make(want Wanted, have *State) *Plan {
	p := ForDevices(want, have)
	usable := p.HasVTEP()
	if !usable {
		p.Wanted.Peers = nil // nothing may be done to a link that is not ours
	}
	p.take(expand(p.Wanted))
	had, more := have.Entries, have.More
	gone := func(device string) bool { return !usable || p.Fresh[device] || p.gone[device] }
	if gone(conf.VTEPName) || gone(mark.SecondVTEP) {
		had = had.without(gone)
		more = slices.DeleteFunc(slices.Clone(more), func(r RouteTo) bool { return r.goesWith(gone) })
	}
	p.planEntries(had, more, have.Foreign)
	p.diverted(have)
	p.planLeftBridges(have)
	p.planLeftVTEP(have)
	return p
}

// HasVTEP reports whether the host has a VTEP to reach peers by, or gets one.
func (p *Plan) HasVTEP() bool { return len(p.Devices) > 0 && p.Devices[0].Name == conf.VTEPName }

// ForDevices is the part of Make that is about the host, its devices and what
// is attached to them.
func ForDevices(want Wanted, have *State) *Plan {
	p := &Plan{Fresh: map[string]bool{}, gone: map[string]bool{}, returning: map[string]int{}}
	want.Underlay, want.Narrow, want.PathMTU = have.Underlay, have.Narrow, have.PathMTU
	if want.Underlay != "" { // what is sent without VXLAN comes from there
		want.Ways = have.Ways
	}
	p.chooseMTU(want.VTEP, have)
	want.MTU = p.MTU
	want.takeSecond(have)
	p.Wanted = p.possible(want, have)
	p.Wanted = p.withoutIPv4(p.withoutIPv6(p.Wanted, have))
	p.Devices = p.Wanted.Devices()
	if !p.poolIsFree(have) {
		p.Devices, p.Wanted.Bridges, p.Wanted.Overlays, p.Wanted.Peers = nil, nil, nil, nil
		p.planPorts(have)
		return p
	}
	p.planLinks(have)
	for _, d := range p.Devices {
		// A bridge that was only made with an MTU takes another one whenever a
		// port comes or goes; one that was given an MTU keeps it.
		madeBridge := p.Fresh[d.Name] && d.Overlay != ""
		if mtu := p.MTUOf(d); madeBridge || !p.Fresh[d.Name] && have.Links[d.Name].MTU != mtu {
			p.add(Op{Act: Set, Obj: LinkMTU, Dev: d.Name, Overlay: d.Overlay, MTU: mtu})
		}
	}
	p.planSysctls(have)
	for _, d := range p.Devices {
		up := have.Links[d.Name].Up() && !p.Fresh[d.Name]
		if !up {
			p.add(Op{Act: Set, Obj: LinkUp, Dev: d.Name, Overlay: d.Overlay})
		}
		p.planAddrs(d, have, up)
	}
	p.planPorts(have)
	p.underlayForwards(have)
	return p
}

// ForLook is Make for a kernel that has exactly the wanted entries.
func ForLook(want Wanted, have *State, entries Entries) *Plan {
	p := ForDevices(want, have)
	p.diverted(have)
	p.planLeftBridges(have)
	p.planLeftVTEP(have)
	p.Entries = entries
	return p
}

// ForPeers is Make for the case that only these peers changed, from old to now.
// host is the Wanted of the last plan. ok is false when it is not so simple.
func ForPeers(host Wanted, old, now []conf.Peer) (p *Plan, had Entries, ok bool) {
	host.Peers = old
	was := expandPeers(host)
	host.Peers = now
	w := expandPeers(host)
	if was.disputed || w.disputed || was.remarkable() || w.remarkable() {
		return nil, Entries{}, false
	}
	p = &Plan{Wanted: host}
	p.take(w)
	p.planEntries(was.Entries, nil, nil)
	return p, was.Entries, true
}

// take takes over what peers and agent subnets expand to.
func (p *Plan) take(w expanded) {
	p.Problems = append(p.Problems, w.problems...)
	p.Notices = append(p.Notices, w.notices...)
	p.Disputed, p.AtOdds = w.disputed, len(w.problems) > 0
	p.Entries, p.order = w.Entries, w.order
}

func (p *Plan) add(o Op) { p.Ops = append(p.Ops, o) }

func (p *Plan) complain(overlay, format string, args ...any) {
	p.Problems = append(p.Problems, Problem{overlay, fmt.Errorf(format, args...)})
}

// chooseMTU takes what fits into the underlay, or less if that is configured.
func (p *Plan) chooseMTU(v VTEP, have *State) {
	encap := Overhead(v.Local)
	under, found := have.Links[have.Underlay]
	if found && !under.Loopback() {
		p.MTU = min(under.MTU-encap, maxMTU)
		p.Lowered = v.MTU > p.MTU
		if v.MTU != 0 {
			p.MTU = min(v.MTU, p.MTU)
		}
		return
	}
	if !found {
		p.complain("", "agent IP %s is on no interface of this host", v.Local)
	}
	// An address on the loopback, as routing hosts have it, says nothing about
	// the way packets go.
	vtep, ok := have.Links[conf.VTEPName]
	switch {
	case v.MTU != 0:
		p.MTU = v.MTU
	case ok && !found:
		p.MTU = vtep.MTU
	default:
		p.MTU = defaultMTU - encap
	}
}

// withoutIPv6 is the wanted state less the IPv6 that this host cannot have;
// every overlay that loses something says so.
func (p *Plan) withoutIPv6(w Wanted, have *State) Wanted {
	var why string
	switch {
	case !have.IPv6:
		why = "this kernel has no IPv6; start it without ipv6.disable=1"
	case p.MTU < minMTU6:
		why = fmt.Sprintf("the MTU of the overlay is %d and IPv6 needs at least %d; raise vtep_mtu or the MTU of the underlay", p.MTU, minMTU6)
	case !w.VTEP.IP6.IsValid():
		why = "the lease has no IPv6 VTEP address; configure vtep_subnet6, or a larger one"
	default:
		return w
	}
	w.VTEP.IP6 = netip.Prefix{}
	return p.without(w, "IPv6", is6, why)
}

// withoutIPv4 is the wanted state less the IPv4 of a host whose VTEP has no address
// of it, as one that was there before vtep_subnet, which has no room for it.
func (p *Plan) withoutIPv4(w Wanted) Wanted {
	if w.VTEP.IP.IsValid() {
		return w
	}
	is4 := func(s netip.Prefix) bool { return !is6(s) }
	return p.without(w, "IPv4", is4, "the lease has no IPv4 VTEP address; configure vtep_subnet, or a larger one")
}

// without is the wanted state less a family.
func (p *Plan) without(w Wanted, family string, is func(netip.Prefix) bool, why string) Wanted {
	others := func(in []netip.Prefix) []netip.Prefix { return slices.DeleteFunc(slices.Clone(in), is) }
	var bridges []Bridge
	for _, b := range w.Bridges {
		if b.Addrs = others(b.Addrs); len(b.Addrs) > 0 {
			bridges = append(bridges, b)
		}
	}
	w.Bridges = bridges
	w.Overlays = slices.Clone(w.Overlays)
	for i, o := range w.Overlays {
		left := others(o.Subnets)
		if len(left) != len(o.Subnets) {
			p.complain(o.Name, "overlay %s has no %s here: %s", o.Name, family, why)
		}
		w.Overlays[i].Subnets, w.Overlays[i].Agent = left, others(o.Agent)
	}
	return w
}
