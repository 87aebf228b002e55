package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// applier carries out operations in order.
type applier struct {
	conn    *rtnl.Conn
	lookup  func(name string) (int, error) // index of a link by name
	index   map[string]int                 // of the links known so far
	dead    map[string]bool                // devices that could not be made: what is on them is not tried
	batch   rtnl.Batch
	pending []op // the operations in batch
	changed int
	failed  []problem
}

// apply carries out ops. It answers with an error only when it had to stop, so
// that what follows is not known; everything else is in failed.
func (a *applier) apply(ctx context.Context, ops []op) error {
	for _, o := range ops {
		if len(a.pending) == rtnl.MaxSend || o.obj == sysctl || o.needsIndex() && a.index[o.dev] == 0 {
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
			if o.act == del && gone(err) {
				continue
			}
			if err != nil {
				a.fail(o, err)
				a.dead[o.dev] = true
				continue
			}
			a.index[o.dev] = i
		}
		a.encode(o)
		a.pending = append(a.pending, o)
		if o.isLink() {
			delete(a.index, o.dev) // whatever it was, it will be another
		}
	}
	return a.flush(ctx)
}

func (a *applier) flush(ctx context.Context) error {
	if len(a.pending) == 0 {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	refused, err := a.conn.Send(&a.batch)
	for i, o := range a.pending {
		err := refused[i]
		switch {
		case err == nil:
			a.changed++
		case o.act == del && gone(err):
		case (o.obj == address || o.obj == connected) && errors.Is(err, unix.EEXIST):
		default:
			a.fail(o, err)
			if o.act == add && o.isLink() {
				a.dead[o.dev] = true
			}
		}
	}
	a.batch.Reset()
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

// encode adds the message for o to the batch. A refusal is told with the
// operation's own text.
func (a *applier) encode(o op) {
	encode(&a.batch, o, a.index[o.dev])
}

func encode(b *rtnl.Batch, o op, index int) {
	switch o.obj {
	case vtepLink, bridgeLink:
		encodeLink(b, o, index)
	case linkAlias:
		b.SetLink("", index)
		b.Attr(unix.IFLA_IFALIAS, []byte(o.value)...)
	case linkMTU:
		b.SetLink("", index)
		b.Attr32(unix.IFLA_MTU, uint32(o.mtu))
	case linkUp:
		b.LinkUp("", index)
	case address:
		if o.act == del {
			b.DeleteAddress("", index, o.prefix)
		} else {
			b.AddAddress("", index, o.prefix)
		}
	case connected:
		b.AddRoute("", 0, connectedRoute(o, index))
	case neighbour, fdbEntry:
		encodeNeighbour(b, o, index)
	case routeTo:
		encodeRoute(b, o, index)
	}
}

func encodeLink(b *rtnl.Batch, o op, index int) {
	switch {
	case o.act == del:
		b.DeleteLink("", index)
	case o.obj == vtepLink:
		b.AddLink("", o.dev, false)
		encodeVXLAN(b, o)
	default:
		b.AddLink("", o.dev, false)
		encodeBridge(b, o)
	}
}

// encodeVXLAN gives the MAC with the creation. Setting it later flushes the
// neighbours of the device.
func encodeVXLAN(b *rtnl.Batch, o op) {
	b.Attr32(unix.IFLA_MTU, uint32(o.mtu))
	b.Attr(unix.IFLA_ADDRESS, o.mac[:]...)
	b.Nest(unix.IFLA_LINKINFO, func() {
		b.AttrString(unix.IFLA_INFO_KIND, "vxlan")
		b.Nest(unix.IFLA_INFO_DATA, func() {
			b.Attr32(unix.IFLA_VXLAN_ID, conf.VNI)
			b.Attr(unix.IFLA_VXLAN_PORT, binary.BigEndian.AppendUint16(nil, conf.VXLANPort)...)
			b.Attr(unix.IFLA_VXLAN_LEARNING, 0)
			b.Attr(unix.IFLA_VXLAN_TTL, 0) // the host's default
			if o.addr.Is4() {
				b.AttrAddr(unix.IFLA_VXLAN_LOCAL, o.addr)
				// No checksum around the inner one: what the VXLAN standard
				// asks for, and some network cards spoil it.
				b.Attr(unix.IFLA_VXLAN_UDP_CSUM, 1)
			} else {
				b.AttrAddr(unix.IFLA_VXLAN_LOCAL6, o.addr)
			}
		})
	})
}

// encodeBridge: no spanning tree, so ports forward at once.
func encodeBridge(b *rtnl.Batch, o op) {
	b.Attr(unix.IFLA_ADDRESS, o.mac[:]...)
	b.Nest(unix.IFLA_LINKINFO, func() {
		b.AttrString(unix.IFLA_INFO_KIND, "bridge")
		b.Nest(unix.IFLA_INFO_DATA, func() {
			b.Attr32(unix.IFLA_BR_STP_STATE, 0)
			b.Attr32(unix.IFLA_BR_FORWARD_DELAY, 0)
		})
	})
}

// connectedRoute is the route that the kernel made with the address.
func connectedRoute(o op, index int) rtnl.Route {
	r := rtnl.Route{Dst: o.prefix, OIF: index, Protocol: unix.RTPROT_KERNEL, Kind: unix.RTN_UNICAST}
	if o.addr.Is4() {
		r.Scope, r.PrefSrc = unix.RT_SCOPE_LINK, o.addr
	} else {
		r.Metric = 256 // as the kernel does
	}
	return r
}

func encodeNeighbour(b *rtnl.Batch, o op, index int) {
	n := rtnl.Neighbour{Family: unix.AF_INET, Index: index, State: unix.NUD_PERMANENT, MAC: o.mac, IP: o.addr}
	switch {
	case o.obj == fdbEntry:
		n.Family, n.Flags = unix.AF_BRIDGE, unix.NTF_SELF
		n.State |= unix.NUD_NOARP
	case o.addr.Is6():
		n.Family = unix.AF_INET6
	}
	if o.act == del {
		b.DeleteNeighbour("", n)
	} else {
		b.ReplaceNeighbour("", n)
	}
}

// encodeRoute: onlink, because the gateway is behind our own device whatever
// length the pool had when this host got its address.
func encodeRoute(b *rtnl.Batch, o op, index int) {
	r := rtnl.Route{Dst: o.prefix, Via: o.addr, Metric: o.metric, Protocol: mark.RouteProtocol, Kind: unix.RTN_BLACKHOLE}
	if o.addr.IsValid() {
		r.OIF, r.Kind, r.Flags = index, unix.RTN_UNICAST, unix.RTNH_F_ONLINK
	}
	switch o.act {
	case del:
		b.DeleteRoute("", r)
	case replace:
		b.AddRoute("", unix.NLM_F_REPLACE, r)
	default:
		b.AddRoute("", 0, r)
	}
}
