package datapath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// read lists what the kernel has, as far as cfg makes it our business. A
// listing that changed while it was read is taken again, a few times.
//
// With want the entries are not kept but compared with it.
func (d *Datapath) read(cfg Config, want *entries) (*state, error) {
	for try := 0; ; try++ {
		s, err := d.readOnce(cfg, want)
		interrupted := errors.Is(err, errInterrupted) || errors.Is(err, netlink.ErrDumpInterrupted)
		if err == nil || !interrupted || try == 8 {
			return s, err
		}
	}
}

func (d *Datapath) readOnce(cfg Config, want *entries) (*state, error) {
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
		return nil, fmt.Errorf("list links: %w", err)
	}
	if err := d.readAddrs(s, names, cfg); err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, family := range s.families() {
		if err := d.readRoutes(s, family, names, cfg); err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
	}
	if vtep, ok := s.links[conf.VTEPName]; ok {
		for _, family := range append(s.families(), unix.AF_BRIDGE) {
			if err := d.readNeighbours(s, family, vtep.index); err != nil {
				return nil, fmt.Errorf("list neighbours of %s: %w", conf.VTEPName, err)
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
	all, err := d.handle.LinkList()
	if err != nil {
		return nil, err
	}
	names := make(map[int]string, len(all))
	ports := map[int]int{}
	for _, l := range all {
		a := l.Attrs()
		names[a.Index] = a.Name
		ports[a.MasterIndex]++
		n := link{index: a.Index, kind: l.Type(), mtu: a.MTU, up: a.Flags&net.FlagUp != 0, alias: a.Alias, loopback: a.Flags&net.FlagLoopback != 0}
		copy(n.mac[:], a.HardwareAddr)
		switch x := l.(type) {
		case *netlink.Vxlan:
			local, _ := netip.AddrFromSlice(x.SrcAddr)
			n.vxlan = vxlan{x.VxlanId, x.Port, local, x.Learning, x.Group != nil || x.VtepDevIndex != 0 || x.FlowBased}
		case *netlink.Device:
			n.kind = ""
		}
		s.links[a.Name] = n
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
	all, err := d.handle.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	ours := map[string]bool{}
	for _, x := range devices(cfg) {
		ours[x.name] = true
	}
	for _, a := range all {
		ip, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			continue
		}
		ip = ip.Unmap()
		name := names[a.LinkIndex]
		bits, _ := a.Mask.Size()
		switch {
		case ours[name] && a.Scope == unix.RT_SCOPE_UNIVERSE:
			s.addrs[addrKey{name, netip.PrefixFrom(ip, bits)}] = struct{}{}
		case !ours[name] && ip == cfg.VTEP.Local:
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
	header := make([]byte, unix.SizeofRtMsg)
	header[0] = family
	attrs := func(m *messages) { m.attr32(unix.RTA_TABLE, unix.RT_TABLE_MAIN) }
	return d.conn.dump(unix.RTM_GETROUTE, header, attrs, func(h nlmsg) {
		r, ok := parseRoute(h)
		if !ok || r.family != family || r.table != unix.RT_TABLE_MAIN {
			return
		}
		dev, onOurs := ours[r.oif]
		switch {
		case r.protocol == mark.RouteProtocol:
			s.addRoute(r.dst, r.ours(vtep))
		case onOurs && r.protocol == unix.RTPROT_KERNEL:
			for _, x := range devices(cfg) {
				for _, a := range x.addrs {
					if x.name == dev && a.Masked() == r.dst {
						s.connected[addrKey{dev, a}] = struct{}{}
					}
				}
			}
		case !onOurs && overlayOf(cfg, r.dst) != "":
			if f, dup := s.foreign[r.dst]; !dup || r.metric < f.metric {
				s.foreign[r.dst] = foreignRoute{r.metric, r.text(names)}
			}
		}
	})
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

// kernelRoute is a route as a netlink message tells it.
type kernelRoute struct {
	family, protocol, kind uint8
	table                  uint32
	dst                    netip.Prefix
	via                    netip.Addr
	oif                    int
	metric                 uint32
	multipath              bool
}

func parseRoute(h nlmsg) (r kernelRoute, ok bool) {
	if len(h.data) < unix.SizeofRtMsg {
		return r, false
	}
	b := h.data
	r = kernelRoute{family: b[0], protocol: b[5], kind: b[7], table: uint32(b[4])}
	var dst netip.Addr
	switch r.family {
	case unix.AF_INET:
		dst = netip.IPv4Unspecified()
	case unix.AF_INET6:
		dst = netip.IPv6Unspecified()
	default:
		return r, false
	}
	eachAttr(b[unix.SizeofRtMsg:], func(typ uint16, v []byte) {
		switch {
		case typ == unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(v)
		case typ == unix.RTA_GATEWAY:
			r.via, _ = netip.AddrFromSlice(v)
		case typ == unix.RTA_MULTIPATH:
			r.multipath = true
		case len(v) < 4:
		case typ == unix.RTA_OIF:
			r.oif = int(native.Uint32(v))
		case typ == unix.RTA_PRIORITY:
			r.metric = native.Uint32(v)
		case typ == unix.RTA_TABLE:
			r.table = native.Uint32(v)
		}
	})
	r.dst = netip.PrefixFrom(dst, int(b[1]))
	return r, r.dst.IsValid()
}

// ours is the route as one of our own.
func (k kernelRoute) ours(vtep int) route {
	r := route{metric: k.metric, via: k.via}
	switch k.kind {
	case unix.RTN_UNICAST:
		r.odd = !k.via.IsValid() || k.oif != vtep || k.multipath
	case unix.RTN_BLACKHOLE:
		r.via = netip.Addr{}
	default:
		r.odd = true
	}
	return r
}

func (k kernelRoute) text(names map[int]string) string {
	t := k.dst.String()
	if k.via.IsValid() {
		t += " via " + k.via.String()
	}
	if dev, ok := names[k.oif]; ok {
		t += " dev " + dev
	}
	return fmt.Sprintf("%s protocol %d metric %d", t, k.protocol, k.metric)
}

// readNeighbours lists the permanent entries of the VTEP: neighbours of one
// family or, for AF_BRIDGE, the FDB.
func (d *Datapath) readNeighbours(s *state, family uint8, vtep int) error {
	header := make([]byte, unix.SizeofNdMsg)
	header[0] = family
	var attrs func(*messages)
	if family == unix.AF_BRIDGE {
		native.PutUint32(header[4:], uint32(vtep))
	} else {
		attrs = func(m *messages) { m.attr32(unix.NDA_IFINDEX, uint32(vtep)) }
	}
	return d.conn.dump(unix.RTM_GETNEIGH, header, attrs, func(h nlmsg) {
		n, ok := parseNeighbour(h)
		if !ok || n.family != family || n.ifindex != vtep || n.state&unix.NUD_PERMANENT == 0 {
			return
		}
		switch {
		case s.compare != nil:
			s.compare.neighbour(n)
		case family == unix.AF_BRIDGE:
			s.fdb[n.mac] = n.ip
		default:
			s.neigh[n.ip] = n.mac
		}
	})
}

// kernelNeighbour is a neighbour or FDB entry as a netlink message tells it.
type kernelNeighbour struct {
	family  uint8
	ifindex int
	state   uint16
	ip      netip.Addr // of an FDB entry: where frames go; invalid if it is not plainly one host
	mac     conf.MAC
}

const ndaNHID = 13 // from linux/neighbour.h

func parseNeighbour(h nlmsg) (n kernelNeighbour, ok bool) {
	if len(h.data) < unix.SizeofNdMsg {
		return n, false
	}
	n = kernelNeighbour{family: h.data[0], ifindex: int(native.Uint32(h.data[4:])), state: native.Uint16(h.data[8:])}
	plain := true
	eachAttr(h.data[unix.SizeofNdMsg:], func(typ uint16, v []byte) {
		switch typ {
		case unix.NDA_DST:
			n.ip, _ = netip.AddrFromSlice(v)
		case unix.NDA_LLADDR:
			copy(n.mac[:], v)
		case unix.NDA_PORT, unix.NDA_VNI, unix.NDA_IFINDEX, ndaNHID:
			plain = false
		}
	})
	if !plain && n.family == unix.AF_BRIDGE {
		n.ip = netip.Addr{}
	}
	return n, true
}
