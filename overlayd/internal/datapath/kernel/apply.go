package kernel

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
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// Result is what became of a plan.
type Result struct {
	Changed int            // kernel objects added, changed or removed
	Failed  []plan.Problem // operations that the kernel refused
	Second  []error        // the same of those at the second VXLAN device, without which a host goes on
	Index   map[string]int // of the links by name, as far as they were needed
}

// Apply carries out operations in order. index holds the links whose index is
// certain. It answers with an error only when it had to stop, so that the
// outcome of the rest is uncertain; everything else is in Failed. done, which may
// be nil, is called with each operation that changed something.
func (k *Kernel) Apply(ctx context.Context, ops []plan.Op, index map[string]int, done func(plan.Op)) (Result, error) {
	if index == nil {
		index = map[string]int{}
	}
	a := &applier{conn: k.conn, dead: map[string]bool{}, Result: Result{Index: index}, done: done}
	err := a.apply(ctx, ops)
	return a.Result, err
}

type applier struct {
	Result
	conn    *rtnl.Conn
	done    func(plan.Op)
	dead    map[string]bool // devices that could not be made or taken up: what is on them is not tried
	batch   rtnl.Batch
	pending []*plan.Op // the operations in batch
}

func (a *applier) apply(ctx context.Context, ops []plan.Op) error {
	for i := range ops {
		o := &ops[i] // one is large, and of peers there are many
		unknown := o.NeedsIndex() && a.Index[o.Dev] == 0 || o.Master != "" && a.Index[o.Master] == 0
		if len(a.pending) == a.conn.MaxSend() || o.Obj == plan.Sysctl || unknown {
			if err := a.flush(ctx); err != nil {
				return err
			}
		}
		if (a.dead[o.Dev] || a.dead[o.Master]) && o.Act != plan.Del {
			continue
		}
		if o.Obj == plan.Sysctl {
			a.sysctl(*o)
			continue
		}
		if unknown && !a.find(*o) {
			continue
		}
		encode(&a.batch, *o, a.Index[o.Dev], a.Index[o.Master])
		a.pending = append(a.pending, o)
		if o.IsLink() {
			delete(a.Index, o.Dev) // whatever it was, it will be another
		}
	}
	return a.flush(ctx)
}

// find looks up the devices of an operation: by name, once, after they were
// made. From then on they go by index.
func (a *applier) find(o plan.Op) bool {
	for _, dev := range [...]string{o.Dev, o.Master} {
		if dev == "" || a.Index[dev] != 0 {
			continue
		}
		l, ok, err := a.conn.LinkByName(dev)
		if err == nil && !ok {
			err = unix.ENODEV
		}
		if err != nil {
			if o.Act != plan.Del || !gone(err) {
				a.fail(o, err)
				a.dead[dev] = true
			}
			return false
		}
		a.Index[dev] = l.Index
	}
	return true
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
			a.count(o)
		case o.Act == plan.Del && gone(err):
		case errors.Is(err, unix.EEXIST) && (o.Obj == plan.Address || o.Obj == plan.ConnectedRoute || o.Obj == plan.LocalRoute):
		case errors.Is(err, unix.ENODEV) && o.OfPort(): // the container has gone meanwhile
		case errors.Is(err, unix.EEXIST) && o.Obj == plan.PeerRoute && a.isThere(*o):
		case a.dead[o.Dev] && o.Act != plan.Del: // it was in the batch before that was known
		default:
			a.fail(*o, explain(*o, err))
			if o.Act == plan.Add && o.IsLink() || o.Obj == plan.LinkUp && o.Overlay == "" {
				a.dead[o.Dev] = true
			}
		}
	}
	a.batch.Reset()
	a.pending = a.pending[:0]
	return err
}

// isThere reports whether the kernel has a route although it did not list it: while
// IPv6 routes come and go, a listing leaves out some that nobody touches.
func (a *applier) isThere(o plan.Op) bool {
	to := o.Prefix.Addr()
	if o.Prefix.Bits() < to.BitLen() {
		to = to.Next()
	}
	r, ok, err := a.conn.Lookup(rtnl.Packet{Dst: to})
	return err == nil && ok && r.Dst == o.Prefix && r.Protocol == mark.RouteProtocol && r.Metric == o.Metric && r.Via == o.Addr
}

// gone reports whether an error is the answer to removing what is not there.
func gone(err error) bool {
	for _, e := range [...]unix.Errno{unix.ENOENT, unix.ESRCH, unix.ENODEV, unix.EADDRNOTAVAIL} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// count takes in an operation that the kernel carried out.
func (a *applier) count(o *plan.Op) {
	a.Changed++
	if a.done != nil {
		a.done(*o)
	}
}

func (a *applier) fail(o plan.Op, err error) {
	err = fmt.Errorf("%s: %w", o, err)
	if o.Dev == mark.SecondVTEP {
		a.Second = append(a.Second, err)
		return
	}
	a.Failed = append(a.Failed, plan.Problem{Overlay: o.Overlay, Err: err})
}

func (a *applier) sysctl(o plan.Op) {
	switch err := writeSysctl(o.Key, o.Value); {
	case err == nil:
		a.count(&o)
	case o.Dev == "" && errors.Is(err, fs.ErrNotExist) && !plan.HostWide(o.Key):
		// A link of somebody else that went away meanwhile.
	default:
		a.fail(o, err)
	}
}

// encode adds the message for o to the batch. A refusal is reported with the
// operation's own text.
func encode(b *rtnl.Batch, o plan.Op, index, master int) {
	switch o.Obj {
	case plan.VTEPLink, plan.BridgeLink, plan.LinkAlias, plan.LinkMTU, plan.LinkMAC, plan.LinkUp, plan.LinkDown,
		plan.LinkMaster, plan.BridgePort, plan.BridgeSTPOff, plan.BridgeNoDelay, plan.BridgeNoSnooping, plan.BridgeLimit, plan.VXLANLearning:
		encodeLink(b, o, index, master)
	case plan.Address:
		if o.Act == plan.Del {
			b.DeleteAddress("", index, o.Prefix)
		} else {
			b.AddAddress("", index, o.Prefix)
		}
	case plan.ConnectedRoute:
		b.AddRoute("", 0, connectedRoute(o, index))
	case plan.LocalRoute:
		b.AddRoute("", 0, rtnl.Route{Dst: o.Prefix, OIF: index, Protocol: unix.RTPROT_KERNEL, Kind: unix.RTN_LOCAL,
			Scope: unix.RT_SCOPE_HOST, PrefSrc: o.Addr, Table: unix.RT_TABLE_LOCAL})
	case plan.Neighbour, plan.FDBEntry:
		encodeNeighbour(b, o, index)
	case plan.PeerRoute:
		encodeRoute(b, o, index)
	}
}

func encodeLink(b *rtnl.Batch, o plan.Op, index, master int) {
	switch {
	case o.IsLink() && o.Act == plan.Del:
		b.DeleteLink("", index)
		return
	case o.Obj == plan.VTEPLink:
		b.AddLink("", o.Dev, false)
		encodeVXLAN(b, o)
		return
	case o.Obj == plan.BridgeLink:
		b.AddLink("", o.Dev, false)
		b.Attr(unix.IFLA_ADDRESS, o.MAC[:]...)
		encodeKind(b, "bridge", encodeBridge)
		return
	case o.Obj == plan.LinkUp:
		b.LinkUp("", index)
		return
	case o.Obj == plan.LinkDown:
		b.LinkDown("", index)
		return
	}
	b.SetLink("", index)
	switch o.Obj {
	case plan.LinkAlias:
		b.Attr(unix.IFLA_IFALIAS, []byte(o.Value)...)
	case plan.LinkMTU:
		b.Attr32(unix.IFLA_MTU, uint32(o.MTU))
	case plan.LinkMAC:
		b.Attr(unix.IFLA_ADDRESS, o.MAC[:]...)
	case plan.LinkMaster:
		b.Attr32(unix.IFLA_MASTER, uint32(master))
	case plan.BridgeSTPOff:
		encodeKind(b, "bridge", func(b *rtnl.Batch) { b.Attr32(unix.IFLA_BR_STP_STATE, 0) })
	case plan.BridgeLimit:
		encodeKind(b, "bridge", encodeLimit)
	case plan.BridgeNoDelay: // refused in the message that turns the spanning tree off
		encodeKind(b, "bridge", func(b *rtnl.Batch) { b.Attr32(unix.IFLA_BR_FORWARD_DELAY, 0) })
	case plan.BridgeNoSnooping:
		encodeKind(b, "bridge", encodeNoSnooping)
	case plan.VXLANLearning:
		encodeKind(b, "vxlan", func(b *rtnl.Batch) { b.Attr(unix.IFLA_VXLAN_LEARNING, 0) })
	case plan.BridgePort:
		encodePort(b, o.Blocked)
	}
}

func encodeKind(b *rtnl.Batch, kind string, data func(*rtnl.Batch)) {
	b.Nest(unix.IFLA_LINKINFO, func() {
		b.AttrString(unix.IFLA_INFO_KIND, kind)
		b.Nest(unix.IFLA_INFO_DATA, func() { data(b) })
	})
}

// encodeVXLAN gives the MAC with the creation. Setting it later flushes the
// neighbours of the device.
func encodeVXLAN(b *rtnl.Batch, o plan.Op) {
	b.Attr32(unix.IFLA_MTU, uint32(o.MTU))
	b.Attr(unix.IFLA_ADDRESS, o.MAC[:]...)
	encodeKind(b, "vxlan", func(b *rtnl.Batch) {
		b.Attr32(unix.IFLA_VXLAN_ID, conf.VNI)
		b.Attr(unix.IFLA_VXLAN_PORT, binary.BigEndian.AppendUint16(nil, conf.VXLANPort)...)
		b.Attr(unix.IFLA_VXLAN_LEARNING, 0)
		b.Attr(unix.IFLA_VXLAN_TTL, 0) // the host's default
		if o.Addr.Is4() {
			b.AttrAddr(unix.IFLA_VXLAN_LOCAL, o.Addr)
			// No checksum around the inner one: what the VXLAN standard
			// asks for, and some network cards spoil it.
			b.Attr(unix.IFLA_VXLAN_UDP_CSUM, 1)
		} else {
			b.AttrAddr(unix.IFLA_VXLAN_LOCAL6, o.Addr)
			// What the fast path of a peer sends has no checksum outside.
			b.Attr(unix.IFLA_VXLAN_UDP_ZERO_CSUM6_RX, 1)
		}
	})
}

// encodeBridge: without spanning tree ports forward at once.
func encodeBridge(b *rtnl.Batch) {
	b.Attr32(unix.IFLA_BR_STP_STATE, 0)
	b.Attr32(unix.IFLA_BR_FORWARD_DELAY, 0)
	encodeLimit(b)
	encodeNoSnooping(b)
}

// encodeNoSnooping has a bridge send multicast to all ports. Without a querier,
// which nobody is here, it does so anyway, and looks at every port whenever one
// comes or goes (ADR 0049).
func encodeNoSnooping(b *rtnl.Batch) { b.Attr(unix.IFLA_BR_MCAST_SNOOPING, 0) }

// encodeLimit is ignored by kernels before 6.6.
func encodeLimit(b *rtnl.Batch) { b.Attr32(unix.IFLA_BR_FDB_MAX_LEARNED, plan.MaxLearned) }

// encodePort makes a port as an ADD makes it, where the network does not say
// otherwise: a container reaches itself through its own mapped ports.
func encodePort(b *rtnl.Batch, blocked bool) {
	b.Nest(unix.IFLA_LINKINFO, func() {
		b.AttrString(unix.IFLA_INFO_SLAVE_KIND, "bridge")
		b.Nest(unix.IFLA_INFO_SLAVE_DATA, func() {
			if blocked { // refused of one that is down
				b.Attr(unix.IFLA_BRPORT_STATE, rtnl.PortForwarding)
			}
			for _, on := range [...]uint16{unix.IFLA_BRPORT_MODE, unix.IFLA_BRPORT_LEARNING, unix.IFLA_BRPORT_UNICAST_FLOOD,
				unix.IFLA_BRPORT_MCAST_FLOOD, unix.IFLA_BRPORT_BCAST_FLOOD} {
				b.Attr(on, 1)
			}
			b.Attr(unix.IFLA_BRPORT_ISOLATED, 0)
		})
	})
}

// connectedRoute is the route that the kernel made with the address.
func connectedRoute(o plan.Op, index int) rtnl.Route {
	r := rtnl.Route{Dst: o.Prefix, OIF: index, Protocol: unix.RTPROT_KERNEL, Kind: unix.RTN_UNICAST}
	if o.Addr.Is4() {
		r.Scope, r.PrefSrc = unix.RT_SCOPE_LINK, o.Addr
	} else {
		r.Metric = 256 // as the kernel does
	}
	return r
}

func encodeNeighbour(b *rtnl.Batch, o plan.Op, index int) {
	n := rtnl.Neighbour{Family: unix.AF_INET, Index: index, State: unix.NUD_PERMANENT, MAC: o.MAC, IP: o.Addr}
	switch {
	case o.Obj == plan.FDBEntry:
		n.Family, n.Flags = unix.AF_BRIDGE, unix.NTF_SELF
		n.State |= unix.NUD_NOARP
	case o.Addr.Is6():
		n.Family = unix.AF_INET6
	}
	if o.Act == plan.Del {
		b.DeleteNeighbour("", n)
	} else {
		b.ReplaceNeighbour("", n)
	}
}

// encodeRoute: onlink, because the gateway is behind our own device whatever
// length the pool had when this host got its address.
func encodeRoute(b *rtnl.Batch, o plan.Op, index int) {
	r := rtnl.Route{Dst: o.Prefix, Via: o.Addr, Metric: o.Metric, Protocol: mark.RouteProtocol, Kind: unix.RTN_BLACKHOLE}
	switch {
	case o.Kind == plan.Unreachable:
		r.Kind = unix.RTN_UNREACHABLE
	case o.Kind == plan.ToVTEP:
		r.OIF, r.Kind, r.PrefSrc = index, unix.RTN_UNICAST, o.Source
		if o.Prefix.Addr().Is4() {
			r.Scope = unix.RT_SCOPE_LINK
		}
	case o.Addr.IsValid():
		r.OIF, r.Kind, r.Flags, r.PrefSrc = index, unix.RTN_UNICAST, unix.RTNH_F_ONLINK, o.Source
		r.MTU = o.MTU
	}
	switch o.Act {
	case plan.Del:
		b.DeleteRoute("", r)
	case plan.Replace:
		b.AddRoute("", unix.NLM_F_REPLACE, r)
	default:
		b.AddRoute("", 0, r)
	}
}
