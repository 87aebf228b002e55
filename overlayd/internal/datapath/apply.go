package datapath

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// batchSize is the number of messages given to the kernel at once. More gains
// nothing, and the send buffer of a socket holds about a thousand.
const batchSize = 512

// applier carries out operations in order.
type applier struct {
	conn    *conn
	lookup  func(name string) (int, error) // index of a link by name
	index   map[string]int                 // of the links known so far
	dead    map[string]bool                // devices that could not be made: what is on them is not tried
	batch   messages
	pending []op // the operations in batch
	changed int
	failed  []problem
}

// apply carries out ops. It answers with an error only when it had to stop, so
// that what follows is not known; everything else is in failed.
func (a *applier) apply(ctx context.Context, ops []op) error {
	for _, o := range ops {
		if len(a.pending) == batchSize || o.obj == sysctl || o.needsIndex() && a.index[o.dev] == 0 {
			if err := a.flush(ctx); err != nil {
				return err
			}
		}
		if a.dead[o.dev] && o.act != del {
			continue
		}
		if o.obj == sysctl {
			a.sysctl(o)
			continue
		}
		if o.needsIndex() && a.index[o.dev] == 0 {
			i, err := a.lookup(o.dev)
			if err != nil {
				a.fail(o, err)
				a.dead[o.dev] = true
				continue
			}
			a.index[o.dev] = i
		}
		a.encode(o)
		a.pending = append(a.pending, o)
		if o.obj == vtepLink || o.obj == bridgeLink {
			delete(a.index, o.dev) // whatever it was, it will be another
		}
	}
	return a.flush(ctx)
}

// needsIndex: links are named, everything on them is numbered.
func (o op) needsIndex() bool {
	return o.obj >= address && o.dev != "" && !(o.obj == routeTo && o.act == del)
}

func (a *applier) flush(ctx context.Context) error {
	if len(a.pending) == 0 {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	refused, err := a.conn.send(&a.batch)
	for i, o := range a.pending {
		err := refused[i]
		switch {
		case err == nil:
			a.changed++
		case o.act == del && gone(err):
		case (o.obj == address || o.obj == connected) && errors.Is(err, unix.EEXIST):
		default:
			a.fail(o, err)
			if o.act == add && (o.obj == vtepLink || o.obj == bridgeLink) {
				a.dead[o.dev] = true
			}
		}
	}
	a.batch.reset()
	a.pending = a.pending[:0]
	return err
}

// gone are the answers to removing what is not there.
func gone(err error) bool {
	for _, e := range []unix.Errno{unix.ENOENT, unix.ESRCH, unix.ENODEV, unix.EADDRNOTAVAIL} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (a *applier) fail(o op, err error) {
	a.failed = append(a.failed, problem{o.overlay, fmt.Errorf("%s: %w", o, err)})
}

func (a *applier) sysctl(o op) {
	switch err := writeSysctl(o.key, o.value); {
	case err == nil:
		a.changed++
	case o.dev == "" && errors.Is(err, fs.ErrNotExist) && o.key != forward4 && o.key != forward6:
		// A link of somebody else that went away meanwhile.
	default:
		a.fail(o, err)
	}
}

// encode adds the message for o to the batch.
func (a *applier) encode(o op) {
	m := &a.batch
	index := a.index[o.dev]
	switch o.obj {
	case vtepLink:
		encodeLink(m, o, encodeVXLAN)
	case bridgeLink:
		encodeLink(m, o, encodeBridge)
	case linkAlias:
		encodeLink(m, o, func(m *messages, o op) { m.attr(unix.IFLA_IFALIAS, []byte(o.value)...) })
	case linkMTU:
		encodeLink(m, o, func(m *messages, o op) { m.attr32(unix.IFLA_MTU, uint32(o.mtu)) })
	case linkUp:
		encodeLink(m, o, nil)
	case address:
		encodeAddr(m, o, index)
	case connected:
		encodeConnected(m, o, index)
	case neighbour, fdbEntry:
		encodeNeighbour(m, o, index)
	case routeTo:
		encodeRoute(m, o, index)
	}
}

func encodeLink(m *messages, o op, fill func(*messages, op)) {
	typ, flags := uint16(unix.RTM_NEWLINK), uint16(0)
	header := make([]byte, unix.SizeofIfInfomsg)
	switch {
	case o.act == del:
		typ, fill = unix.RTM_DELLINK, nil
	case o.act == add:
		flags = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	case o.obj == linkUp:
		native.PutUint32(header[8:], unix.IFF_UP)  // flags
		native.PutUint32(header[12:], unix.IFF_UP) // which of them to change
	}
	m.begin(typ, flags, header)
	m.attrString(unix.IFLA_IFNAME, o.dev)
	if fill != nil {
		fill(m, o)
	}
	m.end()
}

// encodeVXLAN gives the MAC with the creation. Setting it later flushes the
// neighbours of the device.
func encodeVXLAN(m *messages, o op) {
	m.attr32(unix.IFLA_MTU, uint32(o.mtu))
	m.attr(unix.IFLA_ADDRESS, o.mac[:]...)
	m.nest(unix.IFLA_LINKINFO, func() {
		m.attrString(unix.IFLA_INFO_KIND, "vxlan")
		m.nest(unix.IFLA_INFO_DATA, func() {
			m.attr32(nl.IFLA_VXLAN_ID, conf.VNI)
			m.attr(nl.IFLA_VXLAN_PORT, port(conf.VXLANPort)...)
			m.attr(nl.IFLA_VXLAN_LEARNING, 0)
			m.attr(nl.IFLA_VXLAN_TTL, 0) // the host's default
			if o.addr.Is4() {
				m.attr(nl.IFLA_VXLAN_LOCAL, o.addr.AsSlice()...)
				// No checksum around the inner one: what the VXLAN standard
				// asks for, and some network cards spoil it.
				m.attr(nl.IFLA_VXLAN_UDP_CSUM, 1)
			} else {
				m.attr(nl.IFLA_VXLAN_LOCAL6, o.addr.AsSlice()...)
			}
		})
	})
}

// encodeBridge: no spanning tree, so ports forward at once.
func encodeBridge(m *messages, o op) {
	m.attr(unix.IFLA_ADDRESS, o.mac[:]...)
	m.nest(unix.IFLA_LINKINFO, func() {
		m.attrString(unix.IFLA_INFO_KIND, "bridge")
		m.nest(unix.IFLA_INFO_DATA, func() {
			m.attr32(nl.IFLA_BR_STP_STATE, 0)
			m.attr32(nl.IFLA_BR_FORWARD_DELAY, 0)
		})
	})
}

func encodeAddr(m *messages, o op, index int) {
	ip := o.prefix.Addr()
	header := make([]byte, unix.SizeofIfAddrmsg)
	header[0] = family(ip)
	header[1] = byte(o.prefix.Bits())
	header[3] = unix.RT_SCOPE_UNIVERSE
	native.PutUint32(header[4:], uint32(index))
	typ, flags := uint16(unix.RTM_NEWADDR), uint16(unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	if o.act == del {
		typ, flags = unix.RTM_DELADDR, 0
	} else if ip.Is6() {
		header[2] = unix.IFA_F_NODAD
	}
	m.begin(typ, flags, header)
	m.attr(unix.IFA_LOCAL, ip.AsSlice()...)
	m.attr(unix.IFA_ADDRESS, ip.AsSlice()...)
	if ip.Is4() && o.act == add && o.prefix.Bits() < 31 {
		m.attr(unix.IFA_BROADCAST, conf.LastAddr(o.prefix).AsSlice()...)
	}
	m.end()
}

// encodeConnected puts back the route that the kernel made with the address.
func encodeConnected(m *messages, o op, index int) {
	header := routeHeader(o, unix.RTPROT_KERNEL, unix.RTN_UNICAST)
	if o.addr.Is4() {
		header[6] = unix.RT_SCOPE_LINK
	}
	m.begin(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, header)
	m.attr(unix.RTA_DST, o.prefix.Addr().AsSlice()...)
	m.attr32(unix.RTA_OIF, uint32(index))
	if o.addr.Is4() {
		m.attr(unix.RTA_PREFSRC, o.addr.AsSlice()...)
	} else {
		m.attr32(unix.RTA_PRIORITY, 256) // as the kernel does
	}
	m.end()
}

func encodeNeighbour(m *messages, o op, index int) {
	var header [unix.SizeofNdMsg]byte
	header[0] = family(o.addr)
	native.PutUint32(header[4:], uint32(index))
	native.PutUint16(header[8:], unix.NUD_PERMANENT)
	if o.obj == fdbEntry {
		header[0] = unix.AF_BRIDGE
		header[10] = unix.NTF_SELF
		native.PutUint16(header[8:], unix.NUD_PERMANENT|unix.NUD_NOARP)
	}
	typ, flags := uint16(unix.RTM_NEWNEIGH), uint16(unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	if o.act == del {
		typ, flags = unix.RTM_DELNEIGH, 0
	}
	m.begin(typ, flags, header[:])
	// An odd FDB entry, without a plain destination, is removed by its MAC.
	if o.addr.IsValid() {
		m.attrAddr(unix.NDA_DST, o.addr)
	}
	if o.obj == fdbEntry || o.act != del {
		m.attr(unix.NDA_LLADDR, o.mac[:]...)
	}
	m.end()
}

// encodeRoute: onlink, because the gateway is behind our own device whatever
// length the pool had when this host got its address.
func encodeRoute(m *messages, o op, index int) {
	kind := byte(unix.RTN_UNICAST)
	if !o.addr.IsValid() {
		kind = unix.RTN_BLACKHOLE
	}
	header := routeHeader(o, mark.RouteProtocol, kind)
	typ, flags := uint16(unix.RTM_NEWROUTE), uint16(unix.NLM_F_CREATE)
	switch o.act {
	case del:
		typ, flags = unix.RTM_DELROUTE, 0
		header[6] = unix.RT_SCOPE_NOWHERE // any
		header[7] = unix.RTN_UNSPEC       // any: protocol, prefix and metric name it
	case replace:
		flags |= unix.NLM_F_REPLACE
	case add:
		flags |= unix.NLM_F_EXCL
	}
	if o.act != del && o.addr.IsValid() {
		native.PutUint32(header[8:], unix.RTNH_F_ONLINK)
	}
	m.begin(typ, flags, header)
	m.attrAddr(unix.RTA_DST, o.prefix.Addr())
	m.attr32(unix.RTA_PRIORITY, o.metric)
	if o.act != del && o.addr.IsValid() {
		m.attrAddr(unix.RTA_GATEWAY, o.addr)
		m.attr32(unix.RTA_OIF, uint32(index))
	}
	m.end()
}

func routeHeader(o op, protocol, kind byte) []byte {
	header := make([]byte, unix.SizeofRtMsg)
	header[0] = family(o.prefix.Addr())
	header[1] = byte(o.prefix.Bits())
	header[4] = unix.RT_TABLE_MAIN
	header[5] = protocol
	header[7] = kind
	return header
}

func family(ip netip.Addr) byte {
	if ip.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
