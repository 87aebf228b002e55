package attach

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// ifla6AddrGenMode is IFLA_INET6_ADDR_GEN_MODE of linux/if_link.h.
const ifla6AddrGenMode = 8

// pair describes the veth pair of one attachment.
type pair struct {
	host      string // name of the host end
	hostMAC   conf.MAC
	alias     string
	bridge    string
	bridgeIdx int
	hairpin   bool

	name  string // of the container's end
	mac   conf.MAC
	netns int // file descriptor of the container's namespace
	mtu   int
}

// create makes the pair: the host end up and on the bridge, the other end
// already in the container. The container's end stays down, because bringing it
// up in the same message fails with ENOTCONN: at that moment it has no peer.
// The host end's MAC is given so that nobody (udev) thinks it should set one.
//
// One queue each way is what a veth uses. Left to itself the kernel makes as many
// as there are processors, and then takes all but one out of use again.
func (p pair) create() rtnl.Message {
	header := nl.NewIfInfomsg(unix.AF_UNSPEC)
	header.Flags, header.Change = unix.IFF_UP, unix.IFF_UP
	m := rtnl.New(fmt.Sprintf("create interface %s on bridge %s with its peer %s in the container", p.host, p.bridge, p.name),
		unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, header)
	m.Attr(unix.IFLA_IFNAME, nl.ZeroTerminated(p.host))
	m.Attr(unix.IFLA_ADDRESS, p.hostMAC[:])
	m.Attr(unix.IFLA_MTU, nl.Uint32Attr(uint32(p.mtu)))
	m.Attr(unix.IFLA_NUM_TX_QUEUES, nl.Uint32Attr(1))
	m.Attr(unix.IFLA_NUM_RX_QUEUES, nl.Uint32Attr(1))
	m.Attr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(p.bridgeIdx)))

	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(p.name))
	peer.AddRtAttr(unix.IFLA_ADDRESS, p.mac[:])
	peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(p.mtu)))
	peer.AddRtAttr(unix.IFLA_NUM_TX_QUEUES, nl.Uint32Attr(1))
	peer.AddRtAttr(unix.IFLA_NUM_RX_QUEUES, nl.Uint32Attr(1))
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(p.netns)))
	m.AddData(info)
	return m
}

// mark says whose the host end is and sets it up as a bridge port; the kernel
// takes none of this when it creates a link. A bridge port needs no link-local
// address, so it gets none: that saves the packets of announcing one.
// Of a link without IPv6 the kernel does not take that.
func (p pair) mark(ipv6 bool) rtnl.Message {
	m := rtnl.New("set up interface "+p.host, unix.RTM_NEWLINK, 0, nl.NewIfInfomsg(unix.AF_UNSPEC))
	m.Attr(unix.IFLA_IFNAME, nl.ZeroTerminated(p.host))
	m.Attr(unix.IFLA_IFALIAS, nl.NonZeroTerminated(p.alias))

	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	info.AddRtAttr(nl.IFLA_INFO_SLAVE_KIND, nl.NonZeroTerminated("bridge"))
	info.AddRtAttr(nl.IFLA_INFO_SLAVE_DATA, nil).AddRtAttr(nl.IFLA_BRPORT_MODE, flag(p.hairpin))
	m.AddData(info)
	if !ipv6 {
		return m
	}

	family := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	family.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(ifla6AddrGenMode, nl.Uint8Attr(nl.IN6_ADDR_GEN_MODE_NONE))
	m.AddData(family)
	return m
}

func flag(on bool) []byte {
	if on {
		return nl.Uint8Attr(1)
	}
	return nl.Uint8Attr(0)
}

// deleteLink removes a link, and with it the other end of a pair.
func deleteLink(name string, index int) rtnl.Message {
	header := nl.NewIfInfomsg(unix.AF_UNSPEC)
	header.Index = int32(index)
	return rtnl.New("delete interface "+name, unix.RTM_DELLINK, 0, header)
}

// setGroup puts a link into a group.
func setGroup(name string, index int, group uint32) rtnl.Message {
	header := nl.NewIfInfomsg(unix.AF_UNSPEC)
	header.Index = int32(index)
	m := rtnl.New("put interface "+name+" into a group", unix.RTM_NEWLINK, 0, header)
	m.Attr(unix.IFLA_GROUP, nl.Uint32Attr(group))
	return m
}

// deleteGroup removes all links of a group.
func deleteGroup(group uint32) rtnl.Message {
	m := rtnl.New(fmt.Sprintf("delete the interfaces of group %#x", group), unix.RTM_DELLINK, 0, nl.NewIfInfomsg(unix.AF_UNSPEC))
	m.Attr(unix.IFLA_GROUP, nl.Uint32Attr(group))
	return m
}

// linkUp sets a link up.
func linkUp(name string, index int) rtnl.Message {
	header := nl.NewIfInfomsg(unix.AF_UNSPEC)
	header.Index = int32(index)
	header.Flags, header.Change = unix.IFF_UP, unix.IFF_UP
	return rtnl.New("set interface "+name+" up", unix.RTM_NEWLINK, 0, header)
}

// addAddress adds an address. Duplicate address detection is left out: we give
// every address to one container only, and detection takes a second or two
// during which the address cannot be used.
func addAddress(index int, p netip.Prefix) rtnl.Message {
	family, scope := unix.AF_INET, unix.RT_SCOPE_UNIVERSE
	if p.Addr().Is6() {
		family = unix.AF_INET6
		if p.Addr().IsLinkLocalUnicast() {
			scope = unix.RT_SCOPE_LINK
		}
	}
	header := nl.NewIfAddrmsg(family)
	header.Index = uint32(index)
	header.Prefixlen = uint8(p.Bits())
	header.Scope = uint8(scope)
	m := rtnl.New("add address "+p.String(), unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, header)
	m.Attr(unix.IFA_LOCAL, p.Addr().AsSlice())
	m.Attr(unix.IFA_ADDRESS, p.Addr().AsSlice())
	if p.Addr().Is4() && p.Bits() < 31 {
		m.Attr(unix.IFA_BROADCAST, conf.LastAddr(p).AsSlice())
	}
	if p.Addr().Is6() {
		m.Attr(unix.IFA_FLAGS, nl.Uint32Attr(unix.IFA_F_NODAD))
	}
	return m
}

// addRoute adds a route; one to the same destination must not be there. Without
// a gateway the destination is on the link.
func addRoute(index int, r route) rtnl.Message {
	header := nl.NewRtMsg()
	header.Family = unix.AF_INET
	if r.dst.Addr().Is6() {
		header.Family = unix.AF_INET6
	}
	header.Protocol = mark.RouteProtocol
	header.Dst_len = uint8(r.dst.Bits())
	if !r.gw.IsValid() {
		header.Scope = unix.RT_SCOPE_LINK
	}
	m := rtnl.New("add route "+r.String(), unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, header)
	if r.dst.Bits() > 0 {
		m.Attr(unix.RTA_DST, r.dst.Masked().Addr().AsSlice())
	}
	if r.gw.IsValid() {
		m.Attr(unix.RTA_GATEWAY, r.gw.AsSlice())
	}
	m.Attr(unix.RTA_OIF, nl.Uint32Attr(uint32(index)))
	return m
}

// route is one route inside a container.
type route struct {
	dst netip.Prefix
	gw  netip.Addr // zero: on the link
}

func (r route) String() string {
	if !r.gw.IsValid() {
		return r.dst.String()
	}
	return r.dst.String() + " via " + r.gw.String()
}

// linkLocal is the address IPv6 derives from a MAC (modified EUI-64).
func linkLocal(m conf.MAC) netip.Prefix {
	a := [16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]}
	return netip.PrefixFrom(netip.AddrFrom16(a), 64)
}
