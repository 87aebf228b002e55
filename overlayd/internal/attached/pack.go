package attached

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"strings"
	"unique"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// An agent's attachments are one piece of memory, one record after the other in
// the order of their first address:
//
//	kind     uvarint  index into the agent's kinds
//	id       uvarint  length<<1 | 1 where it is hexadecimal and packed; bytes
//	name     uvarint  length; bytes
//	since    4 bytes  Unix seconds
//	addrs    1 byte   number<<4 | how many of them are IPv4, which come first; bytes
//
// A million containers are few objects so, and little to look at for the garbage
// collector.

// kind is what many attachments have in common.
type kind struct {
	network, ifName, overlay, runtime string
	half                              conf.Half
}

// record is one attachment as it lies in memory: it points into that.
type record struct {
	kind  int
	hex   bool   // id is packed
	id    []byte // as it lies there
	name  []byte
	since uint32
	v4    int    // how many of addrs are IPv4
	addrs []byte // 4 bytes each, then 16 bytes each
	all   []byte // the whole record
}

// next cuts the first record off. What lies there was packed by appendRecord.
func next(b []byte) (r record, rest []byte) {
	whole := b
	number := func() int {
		v, n := binary.Uvarint(b)
		b = b[n:]
		return int(v)
	}
	take := func(n int) []byte {
		out := b[:n:n]
		b = b[n:]
		return out
	}
	r.kind = number()
	n := number()
	r.hex = n&1 == 1
	r.id = take(n >> 1)
	r.name = take(number())
	r.since = binary.BigEndian.Uint32(take(4))
	count := int(take(1)[0])
	r.v4 = count & 0xf
	r.addrs = take(4*r.v4 + 16*(count>>4-r.v4))
	r.all = whole[:len(whole)-len(b)]
	return r, b
}

// appendRecord packs an attachment of a kind. check has seen that it fits.
func appendRecord(b []byte, kind int, a api.Attachment) []byte {
	b = binary.AppendUvarint(b, uint64(kind))
	if packed, ok := packHex(a.ID); ok {
		b = binary.AppendUvarint(b, uint64(len(packed))<<1|1)
		b = append(b, packed...)
	} else {
		b = binary.AppendUvarint(b, uint64(len(a.ID))<<1)
		b = append(b, a.ID...)
	}
	b = binary.AppendUvarint(b, uint64(len(a.Name)))
	b = append(b, a.Name...)
	b = binary.BigEndian.AppendUint32(b, uint32(min(max(a.Since, 0), 1<<32-1)))
	var v4, v6 []byte
	for _, addr := range a.Addresses {
		if addr.Is4() {
			v4 = append(v4, addr.AsSlice()...)
		} else {
			v6 = append(v6, addr.AsSlice()...)
		}
	}
	b = append(b, byte((len(v4)/4+len(v6)/16)<<4|len(v4)/4))
	return append(append(b, v4...), v6...)
}

// packHex takes ids as the runtimes make them, in lower case.
func packHex(id string) ([]byte, bool) {
	if len(id) == 0 || len(id)%2 != 0 || strings.Trim(id, "0123456789abcdef") != "" {
		return nil, false
	}
	packed, err := hex.DecodeString(id)
	return packed, err == nil
}

func (r record) idText() string {
	if r.hex {
		return hex.EncodeToString(r.id)
	}
	return string(r.id)
}

// addr is the i-th address.
func (r record) addr(i int) netip.Addr {
	if i < r.v4 {
		return netip.AddrFrom4([4]byte(r.addrs[4*i:]))
	}
	return netip.AddrFrom16([16]byte(r.addrs[4*r.v4+16*(i-r.v4):]))
}

func (r record) count() int { return r.v4 + (len(r.addrs)-4*r.v4)/16 }

func (r record) addresses() []netip.Addr {
	out := make([]netip.Addr, r.count())
	for i := range out {
		out[i] = r.addr(i)
	}
	return out
}

// order is how the records of an agent are sorted: by address, then by key.
func (r record) order(k kind) order {
	o := order{key: r.key(k)}
	if r.count() > 0 {
		o.addr = r.addr(0)
	}
	return o
}

type order struct {
	addr netip.Addr
	key  string
}

func (o order) compare(p order) int {
	if c := o.addr.Compare(p.addr); c != 0 {
		return c
	}
	return strings.Compare(o.key, p.key)
}

func orderOf(a api.Attachment) order { return order{addr: firstAddr(a), key: a.Key()} }

// byOrder compares as order does. Keys cost a checksum, and are rarely needed.
func byOrder(x, y api.Attachment) int {
	if c := firstAddr(x).Compare(firstAddr(y)); c != 0 {
		return c
	}
	return strings.Compare(x.Key(), y.Key())
}

// firstAddr is the one that lies first: IPv4 addresses do.
func firstAddr(a api.Attachment) (first netip.Addr) {
	for i, addr := range a.Addresses {
		if i == 0 || addr.Is4() && !first.Is4() {
			first = addr
		}
	}
	return first
}

// key is api.Attachment.Key.
func (r record) key(k kind) string {
	return api.Attachment{Network: k.network, ID: r.idText(), IfName: k.ifName, Overlay: k.overlay}.Key()
}

func (r record) attachment(k kind) api.Attachment {
	return api.Attachment{
		Network: k.network, ID: r.idText(), IfName: k.ifName, Overlay: k.overlay, Half: k.half,
		Addresses: r.addresses(), Since: int64(r.since), Runtime: k.runtime, Name: string(r.name),
	}
}

func kindOf(a api.Attachment) kind {
	return kind{network: a.Network, ifName: a.IfName, overlay: a.Overlay, runtime: a.Runtime, half: a.Half}
}

// kinds are those of one agent. A handle keeps its kind only while somebody has
// it, so that nobody can fill the memory with names.
type kinds []unique.Handle[kind]

// find returns the place of a kind, where it is appended if it is new.
func (ks *kinds) find(k kind) int {
	h := unique.Make(k)
	for i, have := range *ks {
		if have == h {
			return i
		}
	}
	*ks = append(*ks, h)
	return len(*ks) - 1
}

// appendUsage packs how full a half is; kinds has its overlay and half.
func appendUsage(b []byte, kind int, u api.HalfUsage) []byte {
	b = binary.AppendUvarint(b, uint64(kind))
	for _, p := range [...]netip.Prefix{u.Subnet, u.Subnet6} {
		text, _ := p.MarshalBinary() // never fails
		b = append(append(b, byte(len(text))), text...)
	}
	for _, n := range [...]uint64{u.Total, u.Used, u.Cooling, u.Free} {
		b = binary.AppendUvarint(b, n)
	}
	return b
}

func nextUsage(b []byte, ks kinds) (u api.HalfUsage, rest []byte) {
	number := func() uint64 {
		v, n := binary.Uvarint(b)
		b = b[n:]
		return v
	}
	k := ks[number()].Value()
	u.Overlay, u.Half = k.overlay, k.half
	for _, p := range [...]*netip.Prefix{&u.Subnet, &u.Subnet6} {
		n := int(b[0])
		_ = p.UnmarshalBinary(b[1 : 1+n]) // it was packed by appendUsage
		b = b[1+n:]
	}
	for _, n := range [...]*uint64{&u.Total, &u.Used, &u.Cooling, &u.Free} {
		*n = number()
	}
	return u, b
}
