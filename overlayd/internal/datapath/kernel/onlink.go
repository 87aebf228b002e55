package kernel

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// findPeers finds out which of the wanted peers are on a link of this host.
func (r *reader) findPeers() (err error) {
	if !r.want.Direct.Send {
		return nil
	}
	ips := make([]netip.Addr, 0, len(r.want.Peers))
	for i := range r.want.Peers {
		ips = append(ips, r.want.Peers[i].AgentIP)
	}
	r.Ways, err = onLink(r.conn, ips, func(index int) (rtnl.Link, bool, error) {
		name, ok := r.names[index]
		return r.Links[name].Link, ok, nil
	})
	return err
}

// OnLink asks the kernel's own routes which of these addresses are on a link of
// this host, and by which device.
func (k *Kernel) OnLink(ips []netip.Addr) (map[netip.Addr]string, error) {
	seen := map[int]rtnl.Link{}
	return onLink(k.conn, ips, func(index int) (rtnl.Link, bool, error) {
		if l, ok := seen[index]; ok {
			return l, true, nil
		}
		l, ok, err := k.conn.LinkByIndex(index)
		if ok {
			seen[index] = l
		}
		return l, ok, err
	})
}

// onLink answers with the devices, by address. Only Ethernet counts, where a
// neighbour is asked for by its address: a tunnel to one host, as WireGuard's,
// has addresses of its own idea of who is behind it. So does only a route with
// one way.
func onLink(conn *rtnl.Conn, ips []netip.Addr, link func(index int) (rtnl.Link, bool, error)) (map[netip.Addr]string, error) {
	ways := make(map[netip.Addr]string, len(ips))
	for _, ip := range ips {
		if _, done := ways[ip]; done || !ip.IsValid() {
			continue
		}
		way, ok, err := conn.Lookup(rtnl.Packet{Dst: ip})
		if err != nil {
			return nil, err
		}
		if !ok || way.Kind != unix.RTN_UNICAST || way.Via.IsValid() || way.Multipath || way.OIF == 0 {
			continue
		}
		l, ok, err := link(way.OIF)
		if err != nil {
			return nil, err
		}
		if ok && l.Ethernet && l.Flags&(unix.IFF_NOARP|unix.IFF_LOOPBACK) == 0 && l.Up() && l.Name != conf.VTEPName && !(plan.Link{Link: l}).IsOurs() {
			ways[ip] = l.Name
		}
	}
	return ways, nil
}

// measureWays asks for the MTU of the ways to peers that routes of others narrow.
func (r *reader) measureWays() (err error) {
	if len(r.Narrow) == 0 {
		return nil
	}
	ips := make([]netip.Addr, 0, len(r.want.Peers))
	for i := range r.want.Peers {
		ips = append(ips, r.want.Peers[i].AgentIP)
	}
	r.PathMTU, err = pathMTU(r.conn, ips, r.Narrow)
	return err
}

// PathMTU asks the kernel for the MTU of the way to each address that lies behind
// one of these routes.
func (k *Kernel) PathMTU(ips []netip.Addr, narrow []netip.Prefix) (map[netip.Addr]int, error) {
	return pathMTU(k.conn, ips, narrow)
}

func pathMTU(conn *rtnl.Conn, ips []netip.Addr, narrow []netip.Prefix) (map[netip.Addr]int, error) {
	out := map[netip.Addr]int{}
	for _, ip := range ips {
		if !slices.ContainsFunc(narrow, func(p netip.Prefix) bool { return p.Contains(ip) }) {
			continue
		}
		way, ok, err := conn.Path(ip, 0)
		if err != nil {
			return nil, err
		}
		if ok && way.MTU != 0 {
			out[ip] = way.MTU
		}
	}
	return out, nil
}

// waysTo is what matters of the ways to peers: whether they are on a link, where
// those are sent to without VXLAN, and how much a way carries.
type waysTo struct {
	on      bool
	narrow  bool           // a route of others has an MTU of its own
	peers   []netip.Addr   // agent IPs, in order
	devices map[int]string // names of those that lead to some of them, by index
}

// set takes in the wanted entries and ways.
func (d *waysTo) set(p *plan.Plan, index map[string]int) {
	*d = waysTo{on: p.Wanted.Direct.Send, narrow: len(p.Wanted.Narrow) > 0, devices: map[int]string{}}
	for _, ip := range p.Entries.FDB {
		d.peers = append(d.peers, ip)
	}
	slices.SortFunc(d.peers, netip.Addr.Compare)
	for _, name := range p.Wanted.Ways {
		if i := index[name]; i != 0 {
			d.devices[i] = name
		}
	}
}

// update puts the agent IPs of one plan of peers into the place of others.
func (d *waysTo) update(had, want plan.Entries) {
	for _, ip := range had.FDB {
		if i, found := slices.BinarySearchFunc(d.peers, ip, netip.Addr.Compare); found {
			d.peers = slices.Delete(d.peers, i, i+1)
		}
	}
	for _, ip := range want.FDB {
		i, _ := slices.BinarySearchFunc(d.peers, ip, netip.Addr.Compare)
		d.peers = slices.Insert(d.peers, i, ip)
	}
}

// route reports whether a route of somebody else may say which peers are on a
// link, or what the way to some carries.
func (d *waysTo) route(r rtnl.Route) bool {
	if !d.on && !d.narrow && r.MTU == 0 || r.Table == unix.RT_TABLE_LOCAL || r.Protocol == mark.RouteProtocol {
		return false
	}
	i, found := slices.BinarySearchFunc(d.peers, r.Dst.Masked().Addr(), netip.Addr.Compare)
	return found || i < len(d.peers) && r.Dst.Contains(d.peers[i])
}

// link reports whether a link that leads to peers is no longer what it was. The
// kernel says nothing of the IPv4 routes that go with it.
func (d *waysTo) link(m rtnl.Message, l rtnl.Link) bool {
	name, ok := d.devices[l.Index]
	return ok && (m.Type == unix.RTM_DELLINK || !l.Up() || l.Name != name)
}
