package rtnl

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Attributes of linux/pkt_sched.h, linux/rtnetlink.h and linux/pkt_cls.h.
const (
	tcaKind    = 1
	tcaOptions = 2

	tcaBPFFD    = 6
	tcaBPFName  = 7
	tcaBPFFlags = 8

	bpfDirectAction = 1 // TCA_BPF_FLAG_ACT_DIRECT
)

// sizeofTcMsg is the size of struct tcmsg.
const sizeofTcMsg = 20

// Where filters stand at a device with the qdisc clsact.
const (
	clsactRoot    = 0xfffffff1
	clsactHandle  = 0xffff0000
	clsactIngress = 0xfffffff2
	clsactEgress  = 0xfffffff3
)

// TCFilter is a filter of a device's ingress, as far as it matters here.
type TCFilter struct {
	Index    int    // of the device
	Priority uint16 // of filters that match, the one with the lowest comes first
	Handle   uint32
	Kind     string // "bpf" and others
	Name     string // of one of kind bpf
}

func tcHeader(index int, handle, parent, info uint32) (h [sizeofTcMsg]byte) {
	native.PutUint32(h[4:], uint32(index))
	native.PutUint32(h[8:], handle)
	native.PutUint32(h[12:], parent)
	native.PutUint32(h[16:], info)
	return h
}

// AddClsact adds the qdisc that filters at a device's ingress need; it must not
// be there.
func (b *Batch) AddClsact(step string, index int) {
	header := tcHeader(index, clsactHandle, clsactRoot, 0)
	b.Begin(step, unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_EXCL, header[:])
	b.AttrString(tcaKind, "clsact")
}

// DeleteClsact removes the qdisc and with it all filters of ingress and egress.
func (b *Batch) DeleteClsact(step string, index int) {
	header := tcHeader(index, clsactHandle, clsactRoot, 0)
	b.Begin(step, unix.RTM_DELQDISC, 0, header[:])
}

// protocolInfo is the last word of a filter's header: priority and protocol.
func protocolInfo(priority uint16) uint32 {
	all := uint32(unix.ETH_P_ALL<<8|unix.ETH_P_ALL>>8) & 0xffff // in network order
	return uint32(priority)<<16 | all
}

// ReplaceBPF makes the program with this descriptor the filter at priority and
// handle of f. One that is there is replaced in one step.
func (b *Batch) ReplaceBPF(step string, f TCFilter, program int) {
	header := tcHeader(f.Index, f.Handle, clsactIngress, protocolInfo(f.Priority))
	b.Begin(step, unix.RTM_NEWTFILTER, unix.NLM_F_CREATE, header[:])
	b.AttrString(tcaKind, "bpf")
	b.Nest(tcaOptions, func() {
		b.Attr32(tcaBPFFD, uint32(program))
		b.AttrString(tcaBPFName, f.Name)
		b.Attr32(tcaBPFFlags, bpfDirectAction)
	})
}

// DeleteTCFilter removes a filter of a device's ingress.
func (b *Batch) DeleteTCFilter(step string, f TCFilter) {
	header := tcHeader(f.Index, f.Handle, clsactIngress, protocolInfo(f.Priority))
	b.Begin(step, unix.RTM_DELTFILTER, 0, header[:])
	b.AttrString(tcaKind, f.Kind)
}

// tcRoot is TC_H_ROOT: where the qdisc stands that a device sends through.
const tcRoot = 0xffffffff

// RootQdisc is the index of the device of which a notification says that it sends
// through another qdisc.
func RootQdisc(m Message) (index int, ok bool) {
	if m.Type != unix.RTM_NEWQDISC && m.Type != unix.RTM_DELQDISC || len(m.Data) < sizeofTcMsg {
		return 0, false
	}
	return int(native.Uint32(m.Data[4:])), native.Uint32(m.Data[12:]) == tcRoot
}

// Clsacts lists the indexes of the devices with the qdisc clsact.
func (c *Conn) Clsacts() ([]int, error) {
	header := tcHeader(0, 0, 0, 0)
	return List(c, Request{"list qdiscs", unix.RTM_GETQDISC, header[:], nil}, func(m Message) (index int, ok bool) {
		if len(m.Data) < sizeofTcMsg {
			return 0, false
		}
		EachAttr(m.Data[sizeofTcMsg:], func(typ uint16, v []byte) {
			ok = ok || typ == tcaKind && unix.ByteSliceToString(v) == "clsact"
		})
		return int(native.Uint32(m.Data[4:])), ok
	})
}

// TCFilters lists the filters of a device's ingress, or egress.
func (c *Conn) TCFilters(index int, egress bool) ([]TCFilter, error) {
	parent := uint32(clsactIngress)
	if egress {
		parent = clsactEgress
	}
	header := tcHeader(index, 0, parent, 0)
	return List(c, Request{fmt.Sprintf("list the filters of device %d", index), unix.RTM_GETTFILTER, header[:], nil}, parseTCFilter)
}

// parseTCFilter leaves out the messages about a priority as a whole, which have
// no handle.
func parseTCFilter(m Message) (f TCFilter, ok bool) {
	if len(m.Data) < sizeofTcMsg {
		return f, false
	}
	f = TCFilter{
		Index: int(native.Uint32(m.Data[4:])), Handle: native.Uint32(m.Data[8:]),
		Priority: uint16(native.Uint32(m.Data[16:]) >> 16),
	}
	EachAttr(m.Data[sizeofTcMsg:], func(typ uint16, v []byte) {
		switch typ {
		case tcaKind:
			f.Kind = unix.ByteSliceToString(v)
		case tcaOptions:
			EachAttr(v, func(typ uint16, v []byte) {
				if typ == tcaBPFName {
					f.Name = unix.ByteSliceToString(v)
				}
			})
		}
	})
	return f, f.Handle != 0
}
