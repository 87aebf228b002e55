package rtnl

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// Neighbour is a neighbour or, in family AF_BRIDGE, an entry of a forwarding
// database (FDB).
type Neighbour struct {
	Family uint8
	Index  int
	State  uint16 // NUD_*
	Flags  uint8  // NTF_*
	MAC    conf.MAC
	// IP is the neighbour's address; of an FDB entry where frames go, and invalid
	// if that is not plainly one host.
	IP netip.Addr
}

const ndaNHID = 13 // NDA_NH_ID of linux/neighbour.h

// ReplaceNeighbour makes an entry, whatever was in its place.
func (b *Batch) ReplaceNeighbour(step string, n Neighbour) {
	b.beginNeighbour(step, unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, n)
	b.Attr(unix.NDA_LLADDR, n.MAC[:]...)
}

// DeleteNeighbour removes an entry. An FDB entry without a plain destination is
// removed by its MAC.
func (b *Batch) DeleteNeighbour(step string, n Neighbour) {
	b.beginNeighbour(step, unix.RTM_DELNEIGH, 0, n)
	if n.Family == unix.AF_BRIDGE {
		b.Attr(unix.NDA_LLADDR, n.MAC[:]...)
	}
}

func (b *Batch) beginNeighbour(step string, typ, flags uint16, n Neighbour) {
	var header [unix.SizeofNdMsg]byte
	header[0] = n.Family
	native.PutUint32(header[4:], uint32(n.Index))
	native.PutUint16(header[8:], n.State)
	header[10] = n.Flags
	b.Begin(step, typ, flags, header[:])
	if n.IP.IsValid() {
		b.AttrAddr(unix.NDA_DST, n.IP)
	}
}

// NeighboursRequest asks for the neighbours of one family, or for the FDB
// (AF_BRIDGE), of one device.
func NeighboursRequest(family uint8, index int) Request {
	header := [unix.SizeofNdMsg]byte{family}
	r := Request{"list neighbours", unix.RTM_GETNEIGH, header[:], nil}
	if family == unix.AF_BRIDGE {
		native.PutUint32(r.Header[4:], uint32(index))
	} else {
		r.Attrs = func(b *Batch) { b.Attr32(unix.NDA_IFINDEX, uint32(index)) }
	}
	return r
}

// ParseNeighbour reads an RTM_NEWNEIGH or RTM_DELNEIGH.
func ParseNeighbour(m Message) (n Neighbour, ok bool) {
	if len(m.Data) < unix.SizeofNdMsg {
		return n, false
	}
	b := m.Data
	n = Neighbour{Family: b[0], Index: int(native.Uint32(b[4:])), State: native.Uint16(b[8:]), Flags: b[10]}
	plain := true
	EachAttr(b[unix.SizeofNdMsg:], func(typ uint16, v []byte) {
		switch typ {
		case unix.NDA_DST:
			n.IP, _ = netip.AddrFromSlice(v)
		case unix.NDA_LLADDR:
			copy(n.MAC[:], v)
		case unix.NDA_PORT, unix.NDA_VNI, unix.NDA_IFINDEX, ndaNHID:
			plain = false
		}
	})
	if !plain && n.Family == unix.AF_BRIDGE {
		n.IP = netip.Addr{}
	}
	return n, true
}
