package rtnl

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// Address is an address of an interface.
type Address struct {
	Index  int
	Prefix netip.Prefix // the interface's own address, with the length of its network
	Scope  uint8        // RT_SCOPE_*
	Flags  uint32       // IFA_F_*
}

// Addresses lists the addresses of every interface of the namespace, or of one.
func (c *Conn) Addresses(index int) ([]Address, error) {
	var header [unix.SizeofIfAddrmsg]byte
	native.PutUint32(header[4:], uint32(index))
	return List(c, Request{"list addresses", unix.RTM_GETADDR, header[:], nil}, func(m Message) (Address, bool) {
		a, ok := ParseAddress(m)
		return a, ok && (index == 0 || a.Index == index) // kernels before 5.0 list all
	})
}

// ParseAddress reads an RTM_NEWADDR or RTM_DELADDR.
func ParseAddress(m Message) (a Address, ok bool) {
	if len(m.Data) < unix.SizeofIfAddrmsg {
		return a, false
	}
	a = Address{Index: int(native.Uint32(m.Data[4:])), Scope: m.Data[3], Flags: uint32(m.Data[2])}
	var ip netip.Addr
	EachAttr(m.Data[unix.SizeofIfAddrmsg:], func(typ uint16, v []byte) {
		switch {
		case typ == unix.IFA_LOCAL: // of a point-to-point link; the other one is the peer
			ip, _ = netip.AddrFromSlice(v)
		case typ == unix.IFA_ADDRESS && !ip.IsValid():
			ip, _ = netip.AddrFromSlice(v)
		case typ == unix.IFA_FLAGS && len(v) == 4:
			a.Flags = native.Uint32(v)
		}
	})
	a.Prefix = netip.PrefixFrom(ip, int(m.Data[1]))
	return a, a.Prefix.IsValid()
}

// AddAddress adds an address; it must not be there. Duplicate address detection
// is left out: every address is given out once only, and detection takes a
// second or two during which the address cannot be used.
func (b *Batch) AddAddress(step string, index int, p netip.Prefix) {
	header := addressHeader(index, p)
	if p.Addr().Is6() {
		header[2] = unix.IFA_F_NODAD
	}
	b.Begin(step, unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, header[:])
	b.AttrAddr(unix.IFA_LOCAL, p.Addr())
	b.AttrAddr(unix.IFA_ADDRESS, p.Addr())
	if p.Addr().Is4() && p.Bits() < 31 {
		b.AttrAddr(unix.IFA_BROADCAST, conf.LastAddr(p))
	}
}

// DeleteAddress removes an address.
func (b *Batch) DeleteAddress(step string, index int, p netip.Prefix) {
	header := addressHeader(index, p)
	b.Begin(step, unix.RTM_DELADDR, 0, header[:])
	b.AttrAddr(unix.IFA_LOCAL, p.Addr())
	b.AttrAddr(unix.IFA_ADDRESS, p.Addr())
}

func addressHeader(index int, p netip.Prefix) (h [unix.SizeofIfAddrmsg]byte) {
	h[0] = family(p.Addr())
	h[1] = byte(p.Bits())
	h[3] = unix.RT_SCOPE_UNIVERSE
	if p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() {
		h[3] = unix.RT_SCOPE_LINK
	}
	native.PutUint32(h[4:], uint32(index))
	return h
}
