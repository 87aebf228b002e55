package kernel

import (
	"maps"
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
		if _, to, ok := r.want.Reach(&r.want.Peers[i]); ok {
			ips = append(ips, to)
		}
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
		if _, to, ok := r.want.Reach(&r.want.Peers[i]); ok {
			ips = append(ips, to)
		}
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
	d.peers = inOrder(p.Entries.FDB, p.Entries.Second.FDB)
	for _, name := range p.Wanted.Ways {
		if i := index[name]; i != 0 {
			d.devices[i] = name
		}
	}
}

// update puts the agent IPs of one plan of peers into the place of others. However
// many they are, each of those that stay is moved once: all peers of a cluster come
// at once.
func (d *waysTo) update(had, want plan.Entries) {
	if gone := inOrder(had.FDB, had.Second.FDB); len(gone) > 0 {
		kept := d.peers[:0]
		for _, ip := range d.peers {
			for len(gone) > 0 && gone[0].Less(ip) {
				gone = gone[1:]
			}
			if len(gone) > 0 && gone[0] == ip {
				gone = gone[1:] // one: two VTEPs may be at one address
				continue
			}
			kept = append(kept, ip)
		}
		d.peers = kept
	}
	came := inOrder(want.FDB, want.Second.FDB)
	at := len(d.peers) - 1 // the last of those that have not moved
	d.peers = append(d.peers, came...)
	for to := len(d.peers) - 1; len(came) > 0; to-- {
		last := came[len(came)-1]
		if at >= 0 && last.Less(d.peers[at]) {
			d.peers[to] = d.peers[at]
			at--
			continue
		}
		d.peers[to] = last
		came = came[:len(came)-1]
	}
}

// inOrder are the agent IPs of forwarding entries.
func inOrder(fdbs ...map[conf.MAC]netip.Addr) (all []netip.Addr) {
	for _, fdb := range fdbs {
		all = slices.AppendSeq(all, maps.Values(fdb))
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return all
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
