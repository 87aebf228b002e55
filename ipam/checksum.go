package ipam

import (
	"encoding/binary"
	"sync"
)

// crc32 goes on with a CRC-32 (IEEE) over more bytes. It is not hash/crc32's
// because that makes its tables whenever a program starts, 0.04 ms for one that
// lives for two; these are made at the first use, in less than 0.01 ms (ADR 0019). A test
// holds both against each other.
func crc32(sum uint32, b []byte) uint32 {
	t := crcTables()
	sum = ^sum
	for ; len(b) >= 4; b = b[4:] {
		sum ^= binary.LittleEndian.Uint32(b)
		sum = t[3][sum&0xff] ^ t[2][sum>>8&0xff] ^ t[1][sum>>16&0xff] ^ t[0][sum>>24]
	}
	for _, c := range b {
		sum = t[0][byte(sum)^c] ^ sum>>8
	}
	return ^sum
}

// crcTables have the remainders of every byte by the polynomial, with no byte
// behind it, with one, two and three.
var crcTables = sync.OnceValue(func() *[4][256]uint32 {
	const polynomial = 0xedb88320
	t := new([4][256]uint32)
	for i := range t[0] {
		r := uint32(i)
		for range 8 {
			r = r>>1 ^ polynomial&-(r&1)
		}
		t[0][i] = r
	}
	for n := 1; n < len(t); n++ {
		for i, r := range t[n-1] {
			t[n][i] = t[0][byte(r)] ^ r>>8
		}
	}
	return t
})
