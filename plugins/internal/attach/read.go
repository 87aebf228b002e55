package attach

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// link is what the kernel says about one link.
type link struct {
	index   int
	kind    string // "veth", "bridge", ...
	alias   string
	master  int
	up      bool // IFF_UP
	carrier bool // IFF_LOWER_UP: the other end is up too
	mtu     int
	mac     conf.MAC
	// peerNamed: the namespace of the other end has a name of its own here, so
	// it exists; one that is being torn down has none.
	peerNamed bool
	// operational: the kernel has taken note of the carrier (IF_OPER_UP).
	operational bool
}

// ours reports whether the link is the host end of that name and not a
// stranger's. One without an alias could not be given one and is being undone.
func (l link) ours(name string) bool {
	if l.kind != "veth" {
		return false
	}
	_, ok := mark.IsHostEnd(name, l.alias)
	return ok || l.alias == ""
}

// skipStats is RTEXT_FILTER_SKIP_STATS of linux/rtnetlink.h: counters are added
// up over all processors, for nobody.
const skipStats = 1 << 3

// operUp is IF_OPER_UP of linux/if.h.
const operUp = 6

// getLink reads one link by its name. ok is false where there is none.
func getLink(c *rtnl.Conn, name string) (l link, ok bool, err error) {
	m := rtnl.New("read interface "+name, unix.RTM_GETLINK, 0, nl.NewIfInfomsg(unix.AF_UNSPEC))
	m.Attr(unix.IFLA_IFNAME, nl.ZeroTerminated(name))
	m.Attr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats))
	b, err := c.Get(m)
	if isErrno(err, unix.ENODEV) {
		return link{}, false, nil
	}
	if err != nil {
		return link{}, false, err
	}
	if len(b) < unix.SizeofIfInfomsg {
		return link{}, false, fmt.Errorf("read interface %s: short answer", name)
	}
	header := nl.DeserializeIfInfomsg(b)
	l = link{index: int(header.Index), up: header.Flags&unix.IFF_UP != 0, carrier: header.Flags&unix.IFF_LOWER_UP != 0}
	rtnl.EachAttr(b[unix.SizeofIfInfomsg:], func(typ uint16, data []byte) {
		switch typ {
		case unix.IFLA_IFALIAS:
			l.alias = unix.ByteSliceToString(data)
		case unix.IFLA_MASTER:
			l.master = int(binary.NativeEndian.Uint32(data))
		case unix.IFLA_MTU:
			l.mtu = int(binary.NativeEndian.Uint32(data))
		case unix.IFLA_ADDRESS:
			copy(l.mac[:], data)
		case unix.IFLA_LINK_NETNSID:
			l.peerNamed = int32(binary.NativeEndian.Uint32(data)) >= 0
		case unix.IFLA_OPERSTATE:
			l.operational = len(data) > 0 && data[0] == operUp
		case unix.IFLA_LINKINFO:
			rtnl.EachAttr(data, func(typ uint16, data []byte) {
				if typ == nl.IFLA_INFO_KIND {
					l.kind = unix.ByteSliceToString(data)
				}
			})
		}
	})
	return l, true, nil
}

// isLocal reports whether packets to the address are received here.
func isLocal(c *rtnl.Conn, a netip.Addr) (bool, error) {
	family := uint8(unix.AF_INET)
	if a.Is6() {
		family = unix.AF_INET6
	}
	header := &nl.RtMsg{RtMsg: unix.RtMsg{Family: family, Dst_len: uint8(a.BitLen())}}
	m := rtnl.New("look up the route to "+a.String(), unix.RTM_GETROUTE, 0, header)
	m.Attr(unix.RTA_DST, a.AsSlice())
	b, err := c.Get(m)
	if isErrno(err, unix.ENETUNREACH) || isErrno(err, unix.EHOSTUNREACH) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return len(b) >= unix.SizeofRtMsg && nl.DeserializeRtMsg(b).Type == unix.RTN_LOCAL, nil
}

// addresses reads the addresses of one interface.
func addresses(c *rtnl.Conn, index int) ([]netip.Prefix, error) {
	dump, err := c.Dump(rtnl.New("read addresses", unix.RTM_GETADDR, 0, nl.NewIfAddrmsg(unix.AF_UNSPEC)))
	if err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for _, b := range dump {
		if len(b) < unix.SizeofIfAddrmsg {
			continue
		}
		header := nl.DeserializeIfAddrmsg(b)
		if int(header.Index) != index {
			continue
		}
		var address, local netip.Addr
		rtnl.EachAttr(b[unix.SizeofIfAddrmsg:], func(typ uint16, data []byte) {
			switch typ {
			case unix.IFA_ADDRESS:
				address, _ = netip.AddrFromSlice(data)
			case unix.IFA_LOCAL:
				local, _ = netip.AddrFromSlice(data)
			}
		})
		if local.IsValid() { // IPv4: the other one is the peer of a point-to-point link
			address = local
		}
		out = append(out, netip.PrefixFrom(address, int(header.Prefixlen)))
	}
	return out, nil
}

// routes reads the routes of a namespace that lead somewhere, from all tables:
// a plugin such as sbr moves them to one of its own.
func routes(c *rtnl.Conn) ([]route, error) {
	dump, err := c.Dump(rtnl.New("read routes", unix.RTM_GETROUTE, 0, nl.NewRtMsg()))
	if err != nil {
		return nil, err
	}
	var out []route
	for _, b := range dump {
		if len(b) < unix.SizeofRtMsg {
			continue
		}
		header := nl.DeserializeRtMsg(b)
		r := route{dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0)}
		if header.Family == unix.AF_INET6 {
			r.dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		rtnl.EachAttr(b[unix.SizeofRtMsg:], func(typ uint16, data []byte) {
			switch typ {
			case unix.RTA_DST:
				if a, ok := netip.AddrFromSlice(data); ok {
					r.dst = netip.PrefixFrom(a, int(header.Dst_len))
				}
			case unix.RTA_GATEWAY:
				r.gw, _ = netip.AddrFromSlice(data)
			}
		})
		if header.Type == unix.RTN_UNICAST {
			out = append(out, r)
		}
	}
	return out, nil
}
