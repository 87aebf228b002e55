package datapath

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// read lists what the kernel has, as far as cfg makes it our business. With want
// the entries are not kept but compared with it.
func (d *Datapath) read(cfg Config, want *entries) (*state, error) {
	s := &state{
		ipv6:      hasIPv6(),
		links:     map[string]link{},
		addrs:     map[addrKey]struct{}{},
		connected: map[addrKey]struct{}{},
		foreign:   map[netip.Prefix]foreignRoute{},
		entries: entries{
			neigh:  make(map[netip.Addr]conf.MAC, len(cfg.Peers)),
			fdb:    make(map[conf.MAC]netip.Addr, len(cfg.Peers)),
			routes: make(map[netip.Prefix]route, len(cfg.Peers)),
		},
	}
	if want != nil {
		s.compare = &comparison{want: *want}
	}
	names, err := d.readLinks(s)
	if err != nil {
		return nil, err
	}
	if err := d.readAddrs(s, names, cfg); err != nil {
		return nil, err
	}
	for _, family := range s.families() {
		if err := d.readRoutes(s, family, names, cfg); err != nil {
			return nil, err
		}
	}
	if vtep, ok := s.links[conf.VTEPName]; ok {
		for _, family := range append(s.families(), unix.AF_BRIDGE) {
			if err := d.readNeighbours(s, family, vtep.index); err != nil {
				return nil, err
			}
		}
	}
	s.readSysctls(cfg)
	return s, nil
}

func (s *state) families() []uint8 {
	if s.ipv6 {
		return []uint8{unix.AF_INET, unix.AF_INET6}
	}
	return []uint8{unix.AF_INET}
}

// readLinks lists every link and answers with the names by index.
func (d *Datapath) readLinks(s *state) (map[int]string, error) {
	all, err := d.conn.Links()
	if err != nil {
		return nil, err
	}
	names := make(map[int]string, len(all))
	ports := map[int]int{}
	for _, l := range all {
		names[l.Index] = l.Name
		ports[l.Master]++
		s.links[l.Name] = link{index: l.Index, kind: l.Kind, mac: l.MAC, mtu: l.MTU, up: l.Up(), alias: l.Alias, loopback: l.Loopback(), vxlan: l.VXLAN}
	}
	for index, n := range ports {
		if name, ok := names[index]; ok {
			l := s.links[name]
			l.ports = n
			s.links[name] = l
		}
	}
	return names, nil
}

// readAddrs lists the global addresses of our devices and finds the underlay.
func (d *Datapath) readAddrs(s *state, names map[int]string, cfg Config) error {
	all, err := d.conn.Addresses(0)
	if err != nil {
		return err
	}
	ours := map[string]bool{}
	for _, x := range devices(cfg) {
		ours[x.name] = true
	}
	for _, a := range all {
		name := names[a.Index]
		switch {
		case ours[name] && a.Scope == unix.RT_SCOPE_UNIVERSE:
			s.addrs[addrKey{name, a.Prefix}] = struct{}{}
		case !ours[name] && a.Prefix.Addr() == cfg.VTEP.Local:
			s.underlay = name
		}
	}
	return nil
}

// readRoutes lists the main table: our routes, the connected routes of our
// devices and, of the routes of others, those into an overlay.
func (d *Datapath) readRoutes(s *state, family uint8, names map[int]string, cfg Config) error {
	ours := map[int]string{} // our devices by index
	for _, x := range devices(cfg) {
		if l, ok := s.links[x.name]; ok {
			ours[l.index] = x.name
		}
	}
	vtep := s.links[conf.VTEPName].index
	var kept comparison
	if s.compare != nil {
		kept = *s.compare
	}
	return d.conn.Dump(rtnl.RoutesRequest(family, unix.RT_TABLE_MAIN), func(m rtnl.Message) {
		r, ok := rtnl.ParseRoute(m)
		if !ok || m.Data[0] != family || r.Table != unix.RT_TABLE_MAIN {
			return
		}
		dev, onOurs := ours[r.OIF]
		switch {
		case r.Protocol == mark.RouteProtocol:
			s.addRoute(r.Dst, asOurs(r, vtep))
		case onOurs && r.Protocol == unix.RTPROT_KERNEL:
			for _, x := range devices(cfg) {
				for _, a := range x.addrs {
					if x.name == dev && a.Masked() == r.Dst {
						s.connected[addrKey{dev, a}] = struct{}{}
					}
				}
			}
		case !onOurs && overlayOf(cfg, r.Dst) != "":
			if f, dup := s.foreign[r.Dst]; !dup || r.Metric < f.metric {
				s.foreign[r.Dst] = foreignRoute{r.Metric, text(r, names)}
			}
		}
	}, func() { s.dropRoutes(family, kept) })
}

// dropRoutes forgets the routes of one family that were read so far.
func (s *state) dropRoutes(family uint8, kept comparison) {
	is := func(p netip.Prefix) bool { return p.Addr().Is4() == (family == unix.AF_INET) }
	maps.DeleteFunc(s.routes, func(p netip.Prefix, _ route) bool { return is(p) })
	maps.DeleteFunc(s.foreign, func(p netip.Prefix, _ foreignRoute) bool { return is(p) })
	maps.DeleteFunc(s.connected, func(k addrKey, _ struct{}) bool { return is(k.prefix) })
	s.more = slices.DeleteFunc(s.more, func(r routeEntry) bool { return is(r.prefix) })
	if s.compare != nil {
		*s.compare = kept
	}
}

// addRoute records a route of ours; entries hold one for each prefix.
func (s *state) addRoute(dst netip.Prefix, r route) {
	if s.compare != nil {
		s.compare.route(dst, r)
		return
	}
	if _, dup := s.routes[dst]; dup {
		s.more = append(s.more, routeEntry{dst, r})
		return
	}
	s.routes[dst] = r
}

// asOurs is a route with our protocol as one of our own.
func asOurs(k rtnl.Route, vtep int) route {
	r := route{metric: k.Metric, via: k.Via}
	switch k.Kind {
	case unix.RTN_UNICAST:
		r.odd = !k.Via.IsValid() || k.OIF != vtep || k.Multipath
	case unix.RTN_BLACKHOLE:
		r.via = netip.Addr{}
	default:
		r.odd = true
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

// readNeighbours lists the permanent entries of the VTEP: neighbours of one
// family or, for AF_BRIDGE, the FDB.
func (d *Datapath) readNeighbours(s *state, family uint8, vtep int) error {
	var kept comparison
	if s.compare != nil {
		kept = *s.compare
	}
	return d.conn.Dump(rtnl.NeighboursRequest(family, vtep), func(m rtnl.Message) {
		n, ok := rtnl.ParseNeighbour(m)
		if !ok || n.Family != family || n.Index != vtep || n.State&unix.NUD_PERMANENT == 0 {
			return
		}
		switch {
		case s.compare != nil:
			s.compare.neighbour(n)
		case family == unix.AF_BRIDGE:
			s.fdb[n.MAC] = n.IP
		default:
			s.neigh[n.IP] = n.MAC
		}
	}, func() {
		switch {
		case s.compare != nil:
			*s.compare = kept
		case family == unix.AF_BRIDGE:
			clear(s.fdb)
		default:
			maps.DeleteFunc(s.neigh, func(ip netip.Addr, _ conf.MAC) bool { return ip.Is4() == (family == unix.AF_INET) })
		}
	})
}
