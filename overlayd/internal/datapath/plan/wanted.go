// Package plan decides what has to be done to a host's kernel: it compares the
// wanted end state of the overlays with what the kernel has and answers with the
// operations, in order, and with what cannot be had. It is pure: it neither
// reads the kernel nor changes it, so that the same plan serves the agent and
// for somebody who only wants to see what is wrong.
package plan

import (
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// Wanted is the wanted end state of one host. The zero value of an address
// means that the family is not there.
type Wanted struct {
	VTEP     VTEP
	Bridges  []Bridge
	Overlays []Overlay
	Peers    []conf.Peer // every agent but this one
	// Partial: there may be more peers than Peers has. What the kernel has for
	// those stays.
	Partial bool

	// Direct is what is done without VXLAN.
	Direct Direct
	// Ways are the devices by which peers are on a link of this host, by agent IP,
	// and Underlay the one that has its own. The kernel is asked for them.
	Ways     map[netip.Addr]string
	Underlay string
	// Narrow are the routes of others with an MTU of their own, and PathMTU that of
	// the way to peers behind them, by agent IP. MTU is that of this host's overlays.
	Narrow  []netip.Prefix
	PathMTU map[netip.Addr]int
	MTU     int

	// Withdrawn are agent subnets that this host had and that are another host's now. A
	// bridge that is left because containers are on it has no address in them.
	Withdrawn []netip.Prefix

	// TakenDown are overlays whose bridges go although they have ports.
	TakenDown []string

	// Seeking: a second agent IP would be welcome, so addresses that come matter.
	Seeking bool
	// SecondMTU is what the second VXLAN device takes. A plan fills it in.
	SecondMTU int

	// Refused are ranges of overlays that this host cannot have; no peer's route
	// leads there. A plan fills it in.
	Refused []netip.Prefix
}

// Direct is how a host deals with peers on its links. Who sends takes as well.
type Direct struct {
	Take bool // what they send without VXLAN is taken
	Send bool // those that take it are sent to without VXLAN
}

// VTEP is the host's VXLAN device.
type VTEP struct {
	Local  netip.Addr   // agent IP: source of the outer packets
	Second netip.Addr   // agent IP of the other family; invalid: there is none
	MAC    conf.MAC     //
	IP     netip.Prefix // with the length of its pool
	IP6    netip.Prefix //
	MTU    int          // 0: MTU of the underlay route less the encapsulation
}

// Bridge is one half of one agent subnet.
type Bridge struct {
	Name    string         // m-<overlay> or d-<overlay>
	Overlay string         //
	Addrs   []netip.Prefix // gateway address of each family, with the half's length
}

// Overlay is one overlay network as the firewall and the local routes see it.
type Overlay struct {
	Name      string
	Subnets   []netip.Prefix // the whole overlay, one per family
	Agent     []netip.Prefix // this host's agent subnets, one per family
	Isolation conf.Isolation // from whom its containers are kept apart
	Allow     []string       // overlays whose containers may reach this one all the same
	AnySource bool           // its containers may send from any address
	Shared    bool           // both halves have one bridge, with addresses of all of an agent subnet
}

// BridgeOf is the bridge of a container that a program of the half has attached.
func BridgeOf(all []Overlay, overlay string, half conf.Half) string {
	for _, o := range all {
		if o.Name == overlay && o.Shared {
			return conf.Mesos.Bridge(overlay)
		}
	}
	return half.Bridge(overlay)
}

// Reach is how a peer is sent to: from which agent IP of this host to which of its
// own. ok is false where they have no family in common.
func (w *Wanted) Reach(p *conf.Peer) (own, peer netip.Addr, ok bool) {
	return p.Reach(w.VTEP.Local, w.VTEP.Second)
}

// SourceTo is the VTEP address of this host that it sends to dst from.
func (v VTEP) SourceTo(dst netip.Addr) netip.Addr {
	if dst.Is6() {
		return v.IP6.Addr()
	}
	return v.IP.Addr()
}

// Device is a link of ours with its addresses.
type Device struct {
	Name, Overlay string // no overlay: a VXLAN device
	Addrs         []netip.Prefix
}

// Devices lists ours, the VTEP first.
func (w Wanted) Devices() []Device {
	vtep := Device{Name: conf.VTEPName}
	for _, a := range []netip.Prefix{w.VTEP.IP, w.VTEP.IP6} {
		if a.IsValid() {
			vtep.Addrs = append(vtep.Addrs, a)
		}
	}
	all := []Device{vtep}
	if w.VTEP.Second.IsValid() {
		// The addresses are those of the first; routes name them as their source.
		all = append(all, Device{Name: mark.SecondVTEP})
	}
	for _, b := range w.Bridges {
		all = append(all, Device(b))
	}
	return all
}

// alias is that of a bridge.
func (d Device) alias() string {
	half, _ := mark.HalfOf(d.Name)
	return mark.BridgeAlias(d.Overlay, half)
}

// has6 reports whether the device has IPv6 addresses.
func (d Device) has6() bool { return slices.ContainsFunc(d.Addrs, is6) }

// blocks4 is how many blocks of IPv4 a bridge serves.
func (d Device) blocks4() (n int) {
	for _, a := range d.Addrs {
		if d.Overlay != "" && !is6(a) {
			n++
		}
	}
	return n
}

func is6(p netip.Prefix) bool { return p.Addr().Is6() }

// has6 reports whether any overlay has an IPv6 subnet.
func (w Wanted) has6() bool {
	return slices.ContainsFunc(w.Overlays, func(o Overlay) bool { return slices.ContainsFunc(o.Subnets, is6) })
}

// OverlayOf is the overlay a prefix lies in; empty: none of ours.
func (w Wanted) OverlayOf(p netip.Prefix) string {
	for _, o := range w.Overlays {
		for _, s := range o.Subnets {
			if inside(p, s) {
				return o.Name
			}
		}
	}
	return ""
}

// Ranges are the prefixes in which networks of others matter: whole overlays, also
// those that this host cannot have; this host's own agent subnets; and the pools
// of VTEP addresses.
func (w Wanted) Ranges() (whole, own, pools []netip.Prefix) {
	whole = slices.Clone(w.Refused)
	for _, o := range w.Overlays {
		whole, own = append(whole, o.Subnets...), append(own, o.Agent...)
	}
	for _, pool := range [...]netip.Prefix{w.VTEP.IP, w.VTEP.IP6} {
		if pool.IsValid() {
			pools = append(pools, pool.Masked())
		}
	}
	return whole, own, pools
}

// inside reports whether p is s or a part of it.
func inside(p, s netip.Prefix) bool { return s.Bits() <= p.Bits() && s.Contains(p.Addr()) }

// SameHost reports whether two wanted states differ in peers at most.
func SameHost(a, b Wanted) bool {
	return a.VTEP == b.VTEP && a.Direct == b.Direct && a.Seeking == b.Seeking && slices.Equal(a.Withdrawn, b.Withdrawn) &&
		slices.Equal(a.TakenDown, b.TakenDown) &&
		slices.EqualFunc(a.Bridges, b.Bridges, func(a, b Bridge) bool {
			return a.Name == b.Name && a.Overlay == b.Overlay && slices.Equal(a.Addrs, b.Addrs)
		}) &&
		slices.EqualFunc(a.Overlays, b.Overlays, func(a, b Overlay) bool {
			return a.Name == b.Name && a.Isolation.Mode() == b.Isolation.Mode() && slices.Equal(a.Allow, b.Allow) && a.AnySource == b.AnySource && slices.Equal(a.Subnets, b.Subnets) && slices.Equal(a.Agent, b.Agent)
		})
}

// SamePeer compares what of two peers goes into the kernel. The epoch is not: it
// grows with every renewal of interest to others, and matters only in a dispute.
func SamePeer(a, b *conf.Peer) bool {
	return a.AgentIP == b.AgentIP && a.VTEPIP == b.VTEPIP && a.VTEPIP6 == b.VTEPIP6 && a.VTEPMAC == b.VTEPMAC &&
		a.Underlay == b.Underlay && slices.Equal(a.Subnets, b.Subnets)
}
