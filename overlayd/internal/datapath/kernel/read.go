package kernel

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// Read lists what the kernel has, as far as want makes it our business. With
// compare the entries are not kept but compared with it.
func (k *Kernel) Read(want plan.Wanted, compare *plan.Entries) (*plan.State, error) {
	r := &reader{conn: k.conn, want: want, State: &plan.State{
		IPv6:      hasIPv6(),
		Links:     map[string]plan.Link{},
		Addrs:     map[plan.AddrKey]struct{}{},
		Connected: map[plan.AddrKey]struct{}{},
		Local:     map[plan.AddrKey]struct{}{},
		Foreign:   map[netip.Prefix]plan.ForeignRoute{},
		Elsewhere: map[netip.Prefix]struct{}{},
		Entries:   plan.MakeEntries(len(want.Peers)),
		Known:     k.Expected.knownBridges(),
	}}
	if compare != nil {
		r.Compare = &plan.Comparison{Want: *compare}
	}
	if err := r.readLinks(); err != nil {
		return nil, err
	}
	if err := r.readAddrs(); err != nil {
		return nil, err
	}
	for _, family := range r.families() {
		if err := r.readRoutes(family); err != nil {
			return nil, err
		}
		if err := r.readLocal(family); err != nil {
			return nil, err
		}
	}
	for _, device := range [...]string{conf.VTEPName, mark.SecondVTEP} {
		vtep, ok := r.Links[device]
		if !ok || vtep.Kind != "vxlan" {
			continue
		}
		for _, family := range append(r.families(), unix.AF_BRIDGE) {
			if err := r.readNeighbours(family, device, vtep.Index); err != nil {
				return nil, err
			}
		}
	}
	r.readSysctls()
	if err := r.askWays(); err != nil {
		return nil, err
	}
	if err := r.findPeers(); err != nil {
		return nil, err
	}
	return r.State, r.measureWays()
}

// reader is one Read.
type reader struct {
	*plan.State
	conn    *rtnl.Conn
	want    plan.Wanted
	names   map[int]string      // of every link, by index
	devices map[int]plan.Device // ours, by index
}

func (r *reader) families() []uint8 {
	if r.IPv6 {
		return []uint8{unix.AF_INET, unix.AF_INET6}
	}
	return []uint8{unix.AF_INET}
}

// readLinks lists every link.
func (r *reader) readLinks() error {
	all, err := r.conn.Links()
	if err != nil {
		return err
	}
	r.names = make(map[int]string, len(all))
	ports := map[int]int{}
	for _, l := range all {
		r.names[l.Index] = l.Name
		ports[l.Master]++
		r.Links[l.Name] = plan.Link{Link: l}
	}
	for index, n := range ports {
		if name, ok := r.names[index]; ok {
			l := r.Links[name]
			l.Ports = n
			r.Links[name] = l
		}
	}
	r.devices = map[int]plan.Device{}
	for _, d := range r.want.Devices() {
		if l, ok := r.Links[d.Name]; ok {
			r.devices[l.Index] = d
		}
	}
	return nil
}

// readAddrs lists the global addresses and finds the underlay.
func (r *reader) readAddrs() error {
	all, err := r.conn.Addresses(0)
	if err != nil {
		return err
	}
	for _, a := range all {
		name := r.names[a.Index]
		key := plan.AddrKey{Dev: name, Prefix: a.Prefix}
		_, ours := r.devices[a.Index]
		switch {
		case (ours || r.Links[name].IsOurs()) && a.Scope == unix.RT_SCOPE_UNIVERSE: // also of bridges that are left
			r.Addrs[key] = struct{}{}
		case ours || r.Links[name].IsOurs():
		default:
			switch a.Prefix.Addr() {
			case r.want.VTEP.Local:
				r.Underlay = name
			case r.want.VTEP.Second:
				r.Second = name
			}
			if a.Scope == unix.RT_SCOPE_UNIVERSE {
				r.Others = append(r.Others, key)
			}
		}
	}
	return nil
}

// readRoutes lists the main table: our routes, the connected routes of our
// devices and, of the routes of others, those into an overlay.
func (r *reader) readRoutes(family uint8) error {
	vxlan := devices{vtep: r.Links[conf.VTEPName].Index, second: r.Links[mark.SecondVTEP].Index}
	var kept plan.Comparison
	if r.Compare != nil {
		kept = *r.Compare
	}
	return r.conn.Dump(rtnl.RoutesRequest(family, unix.RT_TABLE_MAIN), func(m rtnl.Message) {
		k, ok := rtnl.ParseRoute(m)
		if !ok || m.Data[0] != family || k.Table != unix.RT_TABLE_MAIN {
			return
		}
		if k.MTU != 0 && k.Protocol != mark.RouteProtocol {
			r.Narrow = append(r.Narrow, k.Dst)
		}
		d, onOurs := r.devices[k.OIF]
		switch {
		case k.Protocol == mark.RouteProtocol:
			r.addRoute(k.Dst, asOurs(k, vxlan, r.names[k.OIF], r.want.VTEP))
		case onOurs && k.Protocol == unix.RTPROT_KERNEL:
			for _, a := range d.Addrs {
				if a.Masked() == k.Dst {
					r.Connected[plan.AddrKey{Dev: d.Name, Prefix: a}] = struct{}{}
				}
			}
		case onOurs || r.Links[r.names[k.OIF]].IsOurs():
		case r.want.OverlayOf(k.Dst) == "":
			if a := k.Dst.Addr(); k.Dst.Bits() > 0 && k.Kind == unix.RTN_UNICAST && !a.IsLinkLocalUnicast() && !a.IsMulticast() {
				r.Elsewhere[k.Dst] = struct{}{}
			}
		default:
			if f, dup := r.Foreign[k.Dst]; !dup || k.Metric < f.Metric {
				r.Foreign[k.Dst] = plan.ForeignRoute{
					Metric: k.Metric, Dev: r.names[k.OIF], Text: text(k, r.names),
					Kernel: k.Protocol == unix.RTPROT_KERNEL, Leads: k.Kind == unix.RTN_UNICAST,
				}
			}
		}
	}, func() { r.dropRoutes(family, kept) })
}

// addRoute records a route of ours; entries hold one for each prefix.
func (r *reader) addRoute(dst netip.Prefix, route plan.Route) {
	if r.Compare != nil {
		r.Compare.Route(dst, route)
		return
	}
	if _, dup := r.Routes[dst]; dup {
		r.More = append(r.More, plan.RouteTo{Dst: dst, Route: route})
		return
	}
	r.Routes[dst] = route
}

// dropRoutes forgets the routes of one family that were read so far.
func (r *reader) dropRoutes(family uint8, kept plan.Comparison) {
	of := func(p netip.Prefix) bool { return p.Addr().Is4() == (family == unix.AF_INET) }
	maps.DeleteFunc(r.Routes, func(p netip.Prefix, _ plan.Route) bool { return of(p) })
	maps.DeleteFunc(r.Foreign, func(p netip.Prefix, _ plan.ForeignRoute) bool { return of(p) })
	maps.DeleteFunc(r.Elsewhere, func(p netip.Prefix, _ struct{}) bool { return of(p) })
	r.Narrow = slices.DeleteFunc(r.Narrow, of)
	maps.DeleteFunc(r.Connected, func(k plan.AddrKey, _ struct{}) bool { return of(k.Prefix) })
	r.More = slices.DeleteFunc(r.More, func(r plan.RouteTo) bool { return of(r.Dst) })
	if r.Compare != nil {
		*r.Compare = kept
	}
}

// The kernel begins to receive for an IPv6 address a moment after it was added,
// in a work queue, which on a busy host takes its time. Adding the address anew
// too early would only make it wait again.
const (
	localTries = 35
	localPause = 20 * time.Millisecond
)

// readLocal finds the routes by which the kernel receives for our addresses.
func (r *reader) readLocal(family uint8) error {
	for try := 1; ; try++ {
		all, err := rtnl.List(r.conn, rtnl.RoutesRequest(family, unix.RT_TABLE_LOCAL), func(m rtnl.Message) (rtnl.Route, bool) {
			k, ok := rtnl.ParseRoute(m)
			_, ours := r.devices[k.OIF]
			return k, ok && ours && k.Table == unix.RT_TABLE_LOCAL && k.Kind == unix.RTN_LOCAL
		})
		if err != nil {
			return err
		}
		for _, k := range all {
			d := r.devices[k.OIF]
			for _, a := range d.Addrs {
				if a.Addr() == k.Dst.Addr() {
					r.Local[plan.AddrKey{Dev: d.Name, Prefix: a}] = struct{}{}
				}
			}
		}
		if family == unix.AF_INET || try == localTries || !r.localMissing() {
			return nil
		}
		time.Sleep(localPause)
	}
}

// localMissing reports whether an IPv6 address of ours is there and not received
// for.
func (r *reader) localMissing() bool {
	for k := range r.Addrs {
		_, local := r.Local[k]
		if !local && k.Prefix.Addr().Is6() && r.Links[k.Dev].Up() && r.wants(k) {
			return true
		}
	}
	return false
}

func (r *reader) wants(k plan.AddrKey) bool {
	return slices.Contains(r.devices[r.Links[k.Dev].Index].Addrs, k.Prefix)
}

// devices are the indexes of the VXLAN devices; 0: there is none.
type devices struct{ vtep, second int }

// asOurs is a route with our protocol as one of our own. device is the name of
// that which it leads to.
func asOurs(k rtnl.Route, vxlan devices, device string, own plan.VTEP) plan.Route {
	r := plan.Route{Metric: k.Metric, Via: k.Via, MTU: k.MTU}
	switch k.Kind {
	case unix.RTN_UNICAST:
		bySecond := k.OIF == vxlan.second && k.OIF != 0
		switch {
		case k.Multipath || bySecond && k.PrefSrc != own.SourceTo(k.Dst.Addr()):
			r.Kind = plan.Alien
		case bySecond && k.Via.IsValid():
			r.Dev = mark.SecondVTEP
		case bySecond:
			r.Kind, r.Dev = plan.ToVTEP, mark.SecondVTEP
		case !k.Via.IsValid():
			r.Kind = plan.Alien
		case k.OIF == vxlan.vtep:
		case k.PrefSrc == own.Local && device != "":
			r.Kind, r.Dev = plan.Plain, device
		default:
			r.Kind = plan.Alien
		}
	case unix.RTN_BLACKHOLE:
		r.Via, r.Kind = netip.Addr{}, plan.Blackhole
	case unix.RTN_UNREACHABLE:
		r.Via, r.Kind = netip.Addr{}, plan.Unreachable
	default:
		r.Kind = plan.Alien
	}
	return r
}

func text(r rtnl.Route, names map[int]string) string {
	t := r.Dst.String()
	if r.Via.IsValid() {
		t += " via " + r.Via.String()
	}
	if dev, ok := names[r.OIF]; ok {
		t += " dev " + dev
	}
	return fmt.Sprintf("%s protocol %d metric %d", t, r.Protocol, r.Metric)
}

// readNeighbours lists the permanent entries of a VXLAN device: neighbours of one
// family or, for AF_BRIDGE, the FDB.
func (r *reader) readNeighbours(family uint8, device string, vtep int) error {
	have := r.On(device)
	var kept plan.Comparison
	if r.Compare != nil {
		kept = *r.Compare
	}
	return r.conn.Dump(rtnl.NeighboursRequest(family, vtep), func(m rtnl.Message) {
		n, ok := rtnl.ParseNeighbour(m)
		if !ok || n.Family != family || n.Index != vtep || n.State&unix.NUD_PERMANENT == 0 {
			return
		}
		switch {
		case r.Compare != nil && family == unix.AF_BRIDGE:
			r.Compare.FDBEntry(device, n.MAC, n.IP)
		case r.Compare != nil:
			r.Compare.Neighbour(device, n.IP, n.MAC)
		case family == unix.AF_BRIDGE:
			have.FDB[n.MAC] = n.IP
		default:
			have.Neigh[n.IP] = n.MAC
		}
	}, func() {
		switch {
		case r.Compare != nil:
			*r.Compare = kept
		case family == unix.AF_BRIDGE:
			clear(have.FDB)
		default:
			maps.DeleteFunc(have.Neigh, func(ip netip.Addr, _ conf.MAC) bool { return ip.Is4() == (family == unix.AF_INET) })
		}
	})
}
