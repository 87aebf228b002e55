package attach

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// pair describes the veth pair of one attachment.
type pair struct {
	host      string // name of the host end
	hostMAC   conf.MAC
	alias     string
	bridge    string
	bridgeIdx int
	hairpin   bool
	group     uint32 // of links; 0: none
	// filtered: the fast path will attach a filter to the host end.
	filtered bool

	name  string // of the container's end
	mac   conf.MAC
	netns int // file descriptor of the container's namespace
	mtu   int
}

// create makes the pair: the host end up, unless it is to be filtered, and on the
// bridge, the other end already in the container. The container's end stays down, because bringing it
// up in the same message fails with ENOTCONN: at that moment it has no peer.
// The host end's MAC is given so that nobody (udev) thinks it should set one.
//
// One queue each way is what a veth uses. Left to itself the kernel makes as many
// as there are processors, and then takes all but one out of use again.
func (p pair) create(b *rtnl.Batch) {
	b.AddLink(fmt.Sprintf("create interface %s on bridge %s with its peer %s in the container", p.host, p.bridge, p.name), p.host, !p.filtered)
	b.Attr(unix.IFLA_ADDRESS, p.hostMAC[:]...)
	p.common(b)
	b.Attr32(unix.IFLA_MASTER, uint32(p.bridgeIdx))
	if p.group != 0 {
		b.Attr32(unix.IFLA_GROUP, p.group)
	}
	b.Nest(unix.IFLA_LINKINFO, func() {
		b.Attr(unix.IFLA_INFO_KIND, []byte("veth")...)
		b.Nest(unix.IFLA_INFO_DATA, func() {
			b.Nest(rtnl.VethPeer, func() {
				b.ChildLink()
				b.AttrString(unix.IFLA_IFNAME, p.name)
				b.Attr(unix.IFLA_ADDRESS, p.mac[:]...)
				p.common(b)
				b.Attr32(unix.IFLA_NET_NS_FD, uint32(p.netns))
			})
		})
	})
}

// common is what both ends have.
func (p pair) common(b *rtnl.Batch) {
	b.Attr32(unix.IFLA_MTU, uint32(p.mtu))
	b.Attr32(unix.IFLA_NUM_TX_QUEUES, 1)
	b.Attr32(unix.IFLA_NUM_RX_QUEUES, 1)
}

// qdisc adds what filters of the host end stand in, while it is down: a device that is
// up drops what it is sent while such a qdisc comes (ADR 0064).
func (p pair) qdisc(b *rtnl.Batch, index int) {
	b.AddClsact("make room for filters at interface "+p.host, index)
}

// mark says whose the host end is and makes it a bridge port as it should be; the
// kernel takes none of this when it creates a link. One that is to be filtered comes up
// with it. A bridge port needs no link-local address, so it gets none: that saves the
// packets of announcing one. Of a link without IPv6 the kernel does not take that.
func (p pair) mark(b *rtnl.Batch, index int, ipv6 bool) {
	step := "set up interface " + p.host
	if p.filtered {
		b.LinkUp(step, index)
	} else {
		b.SetLink(step, index)
	}
	b.Attr(unix.IFLA_IFALIAS, []byte(p.alias)...)
	b.Nest(unix.IFLA_LINKINFO, func() {
		b.Attr(unix.IFLA_INFO_KIND, []byte("veth")...)
		b.Attr(unix.IFLA_INFO_SLAVE_KIND, []byte("bridge")...)
		b.Nest(unix.IFLA_INFO_SLAVE_DATA, func() { b.Attr(unix.IFLA_BRPORT_MODE, flag(p.hairpin)) })
	})
	if !ipv6 {
		return
	}
	b.Nest(unix.IFLA_AF_SPEC, func() {
		b.Nest(unix.AF_INET6, func() { b.Attr(unix.IFLA_INET6_ADDR_GEN_MODE, rtnl.AddrGenNone) })
	})
}

func flag(on bool) byte {
	if on {
		return 1
	}
	return 0
}

// setGroup puts a link into a group.
func setGroup(b *rtnl.Batch, name string, index int, group uint32) {
	b.SetLink("put interface "+name+" into a group", index)
	b.Attr32(unix.IFLA_GROUP, group)
}

// deleteGroup removes all links of a group.
func deleteGroup(b *rtnl.Batch, group uint32) {
	b.DeleteLink(fmt.Sprintf("delete the interfaces of group %#x", group), 0)
	b.Attr32(unix.IFLA_GROUP, group)
}

func addAddress(b *rtnl.Batch, index int, p netip.Prefix) {
	b.AddAddress("add address "+p.String(), index, p)
}

// addRoute adds a route; one to the same destination must not be there. Without
// a gateway the destination is on the link.
func addRoute(b *rtnl.Batch, index int, r route) {
	scope := uint8(unix.RT_SCOPE_UNIVERSE)
	if !r.gw.IsValid() {
		scope = unix.RT_SCOPE_LINK
	}
	b.AddRoute("add route "+r.String(), 0, rtnl.Route{
		Dst: r.dst.Masked(), Via: r.gw, OIF: index, Protocol: mark.RouteProtocol, Kind: unix.RTN_UNICAST, Scope: scope, Metric: r.metric,
	})
}

// route is one route inside a container.
type route struct {
	dst netip.Prefix
	gw  netip.Addr // zero: on the link
	// metric: of several routes to one destination the lowest counts; 0: the
	// kernel's default.
	metric uint32
}

func (r route) String() string {
	if !r.gw.IsValid() {
		return r.dst.String()
	}
	return r.dst.String() + " via " + r.gw.String()
}
