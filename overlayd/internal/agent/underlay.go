package agent

import (
	"net/netip"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/datapath"
)

// underlay is what the kernel says about this host's interfaces, addresses and
// routes at one moment.
type underlay struct {
	conn  *rtnl.Conn
	links map[int]hostLink // by index
	addrs []hostAddr       // in the kernel's order
}

type hostLink struct {
	name      string
	ours      bool
	loopback  bool
	mtu       int
	container bool // of a kind that container networks are made of
}

type hostAddr struct {
	ip   netip.Addr
	bits int
	link int
	// temporary: a privacy address, replaced within hours.
	temporary bool
	// fading: deprecated, still being probed, or found to be a duplicate.
	fading bool
}

// containerKinds are the kinds of links whose addresses are container networks'
// gateways, which other hosts cannot send to.
var containerKinds = []string{"bridge", "veth", "vxlan", "geneve", "ipvlan", "ifb"}

// readUnderlay asks the kernel. The result has to be closed.
func readUnderlay() (*underlay, error) {
	conn, err := rtnl.Open()
	if err != nil {
		return nil, err
	}
	u := &underlay{conn: conn, links: map[int]hostLink{}}
	links, err := conn.Links()
	var addrs []rtnl.Address
	if err == nil {
		addrs, err = conn.Addresses(0)
	}
	if err != nil {
		u.close()
		return nil, err
	}
	for _, l := range links {
		u.addLink(l)
	}
	for _, a := range addrs {
		u.addAddr(a)
	}
	return u, nil
}

func (u *underlay) close() { u.conn.Close() }

func (u *underlay) addLink(l rtnl.Link) {
	container := slices.Contains(containerKinds, l.Kind)
	_, _, bridge := mark.ParseBridgeAlias(l.Alias)
	_, half := mark.HalfOf(l.Name)
	u.links[l.Index] = hostLink{
		name: l.Name, loopback: l.Loopback(), mtu: l.MTU, container: container,
		ours: bridge || container && (half || l.Name == conf.VTEPName),
	}
}

func (u *underlay) addAddr(a rtnl.Address) {
	ip := a.Prefix.Addr()
	has := func(flag uint32) bool { return a.Flags&flag != 0 }
	u.addrs = append(u.addrs, hostAddr{
		ip: ip, bits: a.Prefix.Bits(), link: a.Index,
		// In IPv4 the same bit says that it is the second of its network.
		temporary: ip.Is6() && has(unix.IFA_F_TEMPORARY),
		fading:    has(unix.IFA_F_DEPRECATED|unix.IFA_F_DADFAILED) || has(unix.IFA_F_TENTATIVE) && !has(unix.IFA_F_OPTIMISTIC),
	})
}

// find returns the entry of an address.
func (u *underlay) find(ip netip.Addr) (hostAddr, bool) {
	i := slices.IndexFunc(u.addrs, func(a hostAddr) bool { return a.ip == ip })
	if i < 0 {
		return hostAddr{}, false
	}
	return u.addrs[i], true
}

// underlayOf is what the interface with the agent IP takes: the MTU of overlay
// packets, 0 where it is not known, and whether they may come without VXLAN. To an
// address of the loopback they come by whatever interface, and could not be told
// from those of a stranger. With it comes the second agent IP, where there is to be
// one.
func (o Options) underlayOf(ip netip.Addr, held conf.Lease) conf.Underlay {
	u, err := readUnderlay()
	if err != nil {
		return o.underlayUnread(held)
	}
	defer u.close()
	out := u.at(ip)
	if o.seeksSecond() {
		out.SecondIP = u.second(ip, o.Second, held.SecondIP)
	}
	if out.SecondIP.IsValid() {
		// What goes on from there to containers is what their bridges take.
		out.SecondMTU = u.at(out.SecondIP).MTU
		if out.MTU != 0 {
			out.SecondMTU = min(out.SecondMTU, out.MTU)
		}
	}
	return out
}

// underlayUnread is underlayOf where the kernel does not answer: nothing is known to
// have changed but what was asked for.
func (o Options) underlayUnread(held conf.Lease) conf.Underlay {
	out := conf.Underlay{Direct: true}
	if o.seeksSecond() {
		out.SecondIP, out.SecondMTU = held.SecondIP, held.SecondMTU
	}
	return out
}

func (u *underlay) at(ip netip.Addr) conf.Underlay {
	a, ok := u.find(ip)
	l := u.links[a.link]
	out := conf.Underlay{Direct: !ok || !l.loopback}
	if !ok || l.loopback || l.ours {
		return out
	}
	if mtu := min(l.mtu-datapath.Overhead(ip), conf.MaxMTU); mtu >= conf.MinMTU {
		out.MTU = mtu
	}
	return out
}

// has reports whether an interface that is not ours has the address.
func (u *underlay) has(ip netip.Addr) bool {
	return slices.ContainsFunc(u.addrs, func(a hostAddr) bool { return a.ip == ip && !u.links[a.link].ours })
}

// path asks for the way to an address; its zone names the interface. ok is
// false where no route leads to it.
func (u *underlay) path(to netip.Addr) (r rtnl.Route, ok bool, err error) {
	return u.conn.Path(to.WithZone(""), u.linkNamed(to.Zone()))
}

// linkNamed is the index of the interface that a zone names, 0 if there is none.
func (u *underlay) linkNamed(zone string) int {
	if n, err := strconv.Atoi(zone); err == nil {
		return n
	}
	for i, l := range u.links {
		if l.name == zone {
			return i
		}
	}
	return 0
}
