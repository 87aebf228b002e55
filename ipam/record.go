package ipam

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/netns"
)

// Every value in the file is sealed: one byte of format version, the payload,
// and a CRC-32 over the bucket's name, the key and both. bbolt checks nothing
// but its two meta pages, and a record that is well formed but stands at the
// wrong key is as wrong as a flipped bit.

const formatVersion = 1

// The first byte of a key says what the entry is.
const (
	kindAttachment = 'a' // key of the attachment -> names, addresses, time
	kindOrigin     = 'o' // key of the attachment -> runtime and name of its container
	kindInUse      = 'u' // address -> key of the attachment
	kindQueue      = 'q' // family, sequence number -> address, time of release
	kindReleased   = 'c' // address -> sequence number in the queue
	kindRange      = 'r' // prefix -> frontier and counters
	kindBy         = 'p' // key of the attachment -> nothing: it is of the other half's program
	kindRetired    = 'x' // prefix -> nothing: no address of it is given out any more
	kindUnfiled    = 'f' // (alone) -> nothing: Docker has addresses that are not filed
	kindSum        = 's' // (alone) -> digest of all the others
	kindBoot       = 'b' // (alone, in bucketStore) -> boot id, time of a rebuild
)

// A sealer is the checksum of a bucket's name, from which those of its entries
// go on.
type sealer uint32

func newSealer(bucket string) sealer { return sealer(crc32(0, append([]byte(bucket), 0))) }

func (s sealer) checksum(key, body []byte) uint32 { return crc32(crc32(uint32(s), key), body) }

func (s sealer) seal(key, payload []byte) []byte {
	b := make([]byte, 0, len(payload)+5)
	b = append(b, formatVersion)
	b = append(b, payload...)
	return binary.BigEndian.AppendUint32(b, s.checksum(key, b))
}

// unseal returns the payload; it shares memory with v.
func (s sealer) unseal(key, v []byte) ([]byte, error) {
	if len(v) < 5 {
		return nil, damagef("record %x has %d bytes", key, len(v))
	}
	body, sum := v[:len(v)-4], binary.BigEndian.Uint32(v[len(v)-4:])
	if s.checksum(key, body) != sum {
		return nil, damagef("record %x: wrong checksum", key)
	}
	if body[0] != formatVersion {
		return nil, fmt.Errorf("record %x has format %d and this program knows %d; use the newer program", key, body[0], formatVersion)
	}
	return body[1:], nil
}

// fingerprint stands for one entry in the bucket's digest, which is the sum of
// all fingerprints. The value's own checksum stands for the value.
func fingerprint(key, v []byte) uint64 {
	const offset, prime = 14695981039346656037, 1099511628211 // FNV-1a
	h := uint64(offset)
	for _, c := range key {
		h = (h ^ uint64(c)) * prime
	}
	for _, c := range v[max(0, len(v)-4):] {
		h = (h ^ uint64(c)) * prime
	}
	return h
}

func damagef(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrDamaged}, args...)...)
}

// Keys.

func byKey(k conf.Key) []byte { return append([]byte{kindBy}, k[:]...) }

func attachmentKey(k conf.Key) []byte { return append([]byte{kindAttachment}, k[:]...) }

func originKey(k conf.Key) []byte { return append([]byte{kindOrigin}, k[:]...) }

func addrKey(kind byte, a netip.Addr) []byte {
	b := a.As16()
	return append([]byte{kind}, b[:]...)
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return 4
	}
	return 6
}

func queueKey(fam byte, seq uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{kindQueue, fam}, seq)
}

func rangeKey(p netip.Prefix) []byte { return prefixKey(kindRange, p) }

func prefixKey(kind byte, p netip.Prefix) []byte {
	return append(addrKey(kind, p.Addr()), byte(p.Bits()), family(p.Addr()))
}

// keyAddr is the address in a key made by addrKey.
func keyAddr(k []byte) (netip.Addr, error) {
	if len(k) != 17 {
		return netip.Addr{}, damagef("key %x has %d bytes", k, len(k))
	}
	return netip.AddrFrom16([16]byte(k[1:])).Unmap(), nil
}

// Payloads. A reader remembers the first thing that does not fit.

type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.b) {
		r.bad, r.b = true, nil
		return make([]byte, n)
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) u64() uint64             { return binary.BigEndian.Uint64(r.take(8)) }
func (r *reader) duration() time.Duration { return time.Duration(r.u64()) }
func (r *reader) addr() netip.Addr        { return netip.AddrFrom16([16]byte(r.take(16))).Unmap() }
func (r *reader) byte() byte              { return r.take(1)[0] }
func (r *reader) text() string            { return string(r.take(int(binary.BigEndian.Uint16(r.take(2))))) }

func (r *reader) end(what string) error {
	if r.bad || len(r.b) > 0 {
		return damagef("%s does not have the length it should", what)
	}
	return nil
}

func appendAddr(b []byte, a netip.Addr) []byte {
	a16 := a.As16()
	return append(b, a16[:]...)
}

func appendText(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}

func encodeRecord(r Record) []byte {
	b := make([]byte, 0, 160)
	b = appendText(b, r.Network)
	b = appendText(b, r.ContainerID)
	b = appendText(b, r.IfName)
	b = appendText(b, r.BootID)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Since))
	b = append(b, byte(len(r.Addrs)))
	for _, a := range r.Addrs {
		b = appendAddr(b, a)
	}
	if r.NetNS.Path != "" {
		b = appendText(b, r.NetNS.Path)
		b = binary.BigEndian.AppendUint64(b, r.NetNS.Inode)
		b = binary.BigEndian.AppendUint64(b, r.NetNS.Mount)
	}
	return b
}

func encodeOrigin(o conf.Origin) []byte { return appendText(appendText(nil, o.Runtime), o.Name) }

func decodeOrigin(payload []byte) (o conf.Origin, err error) {
	r := reader{b: payload}
	o.Runtime, o.Name = r.text(), r.text()
	return o, r.end("origin of a container")
}

func decodeRecord(half conf.Half, key conf.Key, payload []byte) (Record, error) {
	r := reader{b: payload}
	rec := Record{Half: half}
	rec.Network, rec.ContainerID, rec.IfName, rec.BootID = r.text(), r.text(), r.text(), r.text()
	rec.Since = r.duration()
	for range r.byte() {
		rec.Addrs = append(rec.Addrs, r.addr())
	}
	if len(r.b) > 0 {
		rec.NetNS = netns.Ref{Path: r.text(), Inode: r.u64(), Mount: r.u64()}
	}
	if err := r.end("attachment " + key.String()); err != nil {
		return Record{}, err
	}
	if rec.Key() != key {
		return Record{}, damagef("attachment %s is filed under %s", rec.Attachment, key)
	}
	return rec, nil
}
