package rtnl

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Route is a route.
type Route struct {
	Dst      netip.Prefix
	Via      netip.Addr // invalid: on the link, or of a kind that leads nowhere
	OIF      int        // index of the device; 0: none
	Metric   uint32
	Protocol uint8
	Kind     uint8  // RTN_*
	Scope    uint8  // RT_SCOPE_*
	Flags    uint32 // RTNH_F_*
	PrefSrc  netip.Addr
	Table    uint32 // 0: main
	TOS      uint8
	MTU      int // of the route; 0: that of the device
	// Multipath: it has several next hops, or a next hop object.
	Multipath bool
}

// AddRoute adds a route, without NLM_F_REPLACE in flags one that must not be
// there.
func (b *Batch) AddRoute(step string, flags uint16, r Route) {
	header := r.header()
	if flags&unix.NLM_F_REPLACE == 0 {
		flags |= unix.NLM_F_EXCL
	}
	b.Begin(step, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|flags, header[:])
	b.routeTo(r)
	if r.Via.IsValid() {
		b.AttrAddr(unix.RTA_GATEWAY, r.Via)
	}
	if r.OIF != 0 {
		b.Attr32(unix.RTA_OIF, uint32(r.OIF))
	}
	if r.PrefSrc.IsValid() {
		b.AttrAddr(unix.RTA_PREFSRC, r.PrefSrc)
	}
	if r.MTU != 0 {
		b.Nest(unix.RTA_METRICS, func() { b.Attr32(unix.RTAX_MTU, uint32(r.MTU)) })
	}
}

// DeleteRoute removes the route that destination, protocol and metric name,
// whatever its kind and next hop. Metric 0 is any in IPv6.
func (b *Batch) DeleteRoute(step string, r Route) {
	r.Kind, r.Scope, r.Flags = unix.RTN_UNSPEC, unix.RT_SCOPE_NOWHERE, 0 // any
	header := r.header()
	b.Begin(step, unix.RTM_DELROUTE, 0, header[:])
	b.routeTo(r)
}

func (b *Batch) routeTo(r Route) {
	if r.Dst.Bits() > 0 {
		b.AttrAddr(unix.RTA_DST, r.Dst.Addr())
	}
	if r.Metric != 0 {
		b.Attr32(unix.RTA_PRIORITY, r.Metric)
	}
}

// header is a struct rtmsg.
func (r Route) header() (h [unix.SizeofRtMsg]byte) {
	h[0] = family(r.Dst.Addr())
	h[1] = byte(r.Dst.Bits())
	h[3] = r.TOS
	h[4] = unix.RT_TABLE_MAIN
	if r.Table != 0 {
		h[4] = uint8(r.Table)
	}
	h[5] = r.Protocol
	h[6] = r.Scope
	h[7] = r.Kind
	native.PutUint32(h[8:], r.Flags)
	return h
}

// RoutesRequest asks for the routes of one family (AF_INET, AF_INET6) in a
// table; 0: in all of them. A kernel before 5.0 lists all.
func RoutesRequest(family uint8, table uint32) Request {
	header := [unix.SizeofRtMsg]byte{family}
	return Request{"list routes", unix.RTM_GETROUTE, header[:], func(b *Batch) {
		if table != 0 {
			b.Attr32(unix.RTA_TABLE, table)
		}
	}}
}

// ParseRoute reads an RTM_NEWROUTE or RTM_DELROUTE of IPv4 or IPv6.
func ParseRoute(m Message) (r Route, ok bool) {
	if len(m.Data) < unix.SizeofRtMsg {
		return r, false
	}
	b := m.Data
	r = Route{TOS: b[3], Table: uint32(b[4]), Protocol: b[5], Scope: b[6], Kind: b[7], Flags: native.Uint32(b[8:])}
	var dst netip.Addr
	switch b[0] {
	case unix.AF_INET:
		dst = netip.IPv4Unspecified()
	case unix.AF_INET6:
		dst = netip.IPv6Unspecified()
	default:
		return r, false
	}
	EachAttr(b[unix.SizeofRtMsg:], func(typ uint16, v []byte) {
		switch {
		case typ == unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(v)
		case typ == unix.RTA_GATEWAY:
			r.Via, _ = netip.AddrFromSlice(v)
		case typ == unix.RTA_PREFSRC:
			r.PrefSrc, _ = netip.AddrFromSlice(v)
		case typ == unix.RTA_MULTIPATH || typ == rtaNHID:
			r.Multipath = true
		case typ == unix.RTA_METRICS:
			EachAttr(v, func(typ uint16, v []byte) {
				if typ == unix.RTAX_MTU && len(v) == 4 {
					r.MTU = int(native.Uint32(v))
				}
			})
		case len(v) < 4:
		case typ == unix.RTA_OIF:
			r.OIF = int(native.Uint32(v))
		case typ == unix.RTA_PRIORITY:
			r.Metric = native.Uint32(v)
		case typ == unix.RTA_TABLE:
			r.Table = native.Uint32(v)
		}
	})
	r.Dst = netip.PrefixFrom(dst, int(b[1]))
	return r, r.Dst.IsValid()
}

// rtaNHID is RTA_NH_ID of linux/rtnetlink.h.
const rtaNHID = 30

// From linux/rtnetlink.h: the answer to a look-up names the table, and shows the
// table's entry.
const (
	lookupTable = 0x1000 // RTM_F_LOOKUP_TABLE
	fibMatch    = 0x2000 // RTM_F_FIB_MATCH
)

// Lookup asks the kernel which route a packet to an address takes: the entry of
// its table, with its prefix, and not one made for the address. ok is false
// where no route leads to it.
func (c *Conn) Lookup(p Packet) (r Route, ok bool, err error) {
	if p.Dst.Is6() { // which names the table anyway, and refuses to be asked for it
		return c.lookup(p, fibMatch)
	}
	return c.lookup(p, fibMatch|lookupTable)
}

// Packet is a packet whose route is asked for: of this host itself or, with a
// device it came in by, of somebody else.
type Packet struct {
	Dst, Src netip.Addr // without a source the kernel chooses
	IIF      int        // the device it came in by
	OIF      int        // the device to send it through, which a link-local address needs
}

// Devices asks the kernel for the devices that packets of this host to an
// address leave by, of a route with several next hops all of them.
func (c *Conn) Devices(dst netip.Addr) (indexes []int, err error) {
	header := [unix.SizeofRtMsg]byte{family(dst), byte(dst.BitLen())}
	native.PutUint32(header[8:], fibMatch)
	request := Request{"look up the devices to " + dst.String(), unix.RTM_GETROUTE, header[:], func(b *Batch) { b.AttrAddr(unix.RTA_DST, dst) }}
	err = c.Get(request, func(m Message) {
		if len(m.Data) < unix.SizeofRtMsg {
			return
		}
		EachAttr(m.Data[unix.SizeofRtMsg:], func(typ uint16, v []byte) {
			switch {
			case typ == unix.RTA_OIF && len(v) == 4:
				indexes = append(indexes, int(native.Uint32(v)))
			case typ == unix.RTA_MULTIPATH:
				for len(v) >= unix.SizeofRtNexthop { // struct rtnexthop, with attributes of its own
					indexes = append(indexes, int(native.Uint32(v[4:])))
					v = v[min(len(v), max(unix.SizeofRtNexthop, int(native.Uint16(v)+3)&^3)):]
				}
			}
		})
	})
	return indexes, err
}

// Path asks the kernel how it would send to an address: the device, and in
// PrefSrc the source address it would choose. oif, if not 0, is the device to
// send through, which a link-local address needs. ok is as in Lookup.
func (c *Conn) Path(dst netip.Addr, oif int) (r Route, ok bool, err error) {
	return c.lookup(Packet{Dst: dst, OIF: oif}, 0)
}

// IsLocal reports whether packets to the address are received here.
func (c *Conn) IsLocal(a netip.Addr) (bool, error) {
	r, ok, err := c.lookup(Packet{Dst: a}, 0)
	return ok && r.Kind == unix.RTN_LOCAL, err
}

func (c *Conn) lookup(p Packet, flags uint32) (r Route, ok bool, err error) {
	header := [unix.SizeofRtMsg]byte{family(p.Dst), byte(p.Dst.BitLen())}
	if p.Src.IsValid() {
		header[2] = byte(p.Src.BitLen())
	}
	native.PutUint32(header[8:], flags)
	err = c.Get(Request{"look up the route to " + p.Dst.String(), unix.RTM_GETROUTE, header[:], func(b *Batch) {
		b.AttrAddr(unix.RTA_DST, p.Dst)
		if p.Src.IsValid() {
			b.AttrAddr(unix.RTA_SRC, p.Src)
		}
		if p.IIF != 0 {
			b.Attr32(unix.RTA_IIF, uint32(p.IIF))
		}
		if p.OIF != 0 {
			b.Attr32(unix.RTA_OIF, uint32(p.OIF))
		}
	}}, func(m Message) { r, ok = ParseRoute(m) })
	for _, none := range [...]unix.Errno{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL} {
		if errors.Is(err, none) { // also an unreachable, prohibit or blackhole route
			return r, false, nil
		}
	}
	return r, ok, err
}

// Rules counts the rules of a family (ip rule) beside the kernel's own, which
// lead to the tables local, main and default.
func (c *Conn) Rules(family uint8) (others int, err error) {
	header := [unix.SizeofRtMsg]byte{family} // struct fib_rule_hdr has the same size
	err = c.Dump(Request{"list rules", unix.RTM_GETRULE, header[:], nil}, func(m Message) {
		if len(m.Data) < unix.SizeofRtMsg {
			return
		}
		var priority uint32
		EachAttr(m.Data[unix.SizeofRtMsg:], func(typ uint16, v []byte) {
			if typ == unix.FRA_PRIORITY && len(v) == 4 {
				priority = native.Uint32(v)
			}
		})
		if table := m.Data[4]; priority != 0 && (priority != 32766 || table != unix.RT_TABLE_MAIN) && (priority != 32767 || table != unix.RT_TABLE_DEFAULT) {
			others++
		}
	}, func() { others = 0 })
	return others, err
}
