package rtnl

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

var native = binary.NativeEndian

// Batch is a run of messages to be sent together, encoded into one buffer. The
// zero value is an empty one.
type Batch struct {
	buf    []byte
	starts []int    // where each message begins
	steps  []string // what each does, for its error
}

// Reset empties the batch and keeps its memory.
func (b *Batch) Reset() { b.buf, b.starts, b.steps = b.buf[:0], b.starts[:0], b.steps[:0] }

// Len is the number of messages.
func (b *Batch) Len() int { return len(b.starts) }

// Begin starts a message; header is the fixed part that follows nlmsghdr. The
// attributes added until the next Begin belong to it. Step says in words what
// the message does ("add address 9.0.1.5/25") and prefixes the kernel's refusal;
// it may be empty.
func (b *Batch) Begin(step string, typ, flags uint16, header []byte) {
	b.starts = append(b.starts, len(b.buf))
	b.steps = append(b.steps, step)
	b.buf = native.AppendUint32(b.buf, 0) // length, filled in by seal
	b.buf = native.AppendUint16(b.buf, typ)
	b.buf = native.AppendUint16(b.buf, flags|unix.NLM_F_REQUEST)
	b.buf = native.AppendUint32(b.buf, 0) // sequence number, filled in by seal
	b.buf = native.AppendUint32(b.buf, 0)
	b.buf = append(b.buf, header...)
}

func (b *Batch) endOf(i int) int {
	if i+1 < len(b.starts) {
		return b.starts[i+1]
	}
	return len(b.buf)
}

// seal writes what is known only when a message is sent.
func (b *Batch) seal(i int, seq uint32, ack bool) {
	m := b.buf[b.starts[i]:b.endOf(i)]
	native.PutUint32(m, uint32(len(m)))
	native.PutUint32(m[8:], seq)
	if ack {
		native.PutUint16(m[6:], native.Uint16(m[6:])|unix.NLM_F_ACK)
	}
}

// Attr adds an attribute, padded to four bytes.
func (b *Batch) Attr(typ uint16, value ...byte) {
	b.buf = native.AppendUint16(b.buf, uint16(unix.SizeofRtAttr+len(value)))
	b.buf = native.AppendUint16(b.buf, typ)
	b.buf = append(b.buf, value...)
	for len(b.buf)%unix.RTA_ALIGNTO != 0 {
		b.buf = append(b.buf, 0)
	}
}

// Attr32 adds a number in the machine's byte order.
func (b *Batch) Attr32(typ uint16, value uint32) {
	var v [4]byte
	native.PutUint32(v[:], value)
	b.Attr(typ, v[:]...)
}

// AttrAddr adds an address without allocating.
func (b *Batch) AttrAddr(typ uint16, ip netip.Addr) {
	if ip.Is4() {
		v := ip.As4()
		b.Attr(typ, v[:]...)
		return
	}
	v := ip.As16()
	b.Attr(typ, v[:]...)
}

// AttrString adds a text with a terminating zero.
func (b *Batch) AttrString(typ uint16, value string) { b.Attr(typ, append([]byte(value), 0)...) }

// Nest wraps the attributes that fill adds into one.
func (b *Batch) Nest(typ uint16, fill func()) {
	start := len(b.buf)
	b.Attr(typ)
	fill()
	native.PutUint16(b.buf[start:], uint16(len(b.buf)-start))
}

// Raw adds bytes as they are, such as a header inside an attribute. Their number
// must be a multiple of four.
func (b *Batch) Raw(data []byte) { b.buf = append(b.buf, data...) }

// family is AF_INET or AF_INET6.
func family(ip netip.Addr) byte {
	if ip.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
