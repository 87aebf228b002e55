package allocate

import (
	"iter"
	"math/bits"
	"net/netip"
)

// used are the blocks in use: one bit each, in pages of neighbours that are there
// where one of them is in use. Blocks are given out lowest first, so nearly all
// pages are full; a map of blocks would take fifty bytes for each.
type used struct {
	bits  int // length of a block
	pages map[netip.Addr]*page
	n     uint64
}

// A page holds 1<<pageBits blocks.
const pageBits = 9

type page [1 << pageBits / 64]uint64

func newUsed(bits int) used { return used{bits: bits, pages: map[netip.Addr]*page{}} }

// at is the first address of the page of a block, and its number there.
func (u *used) at(block netip.Addr) (first netip.Addr, number int) {
	from := max(u.bits-pageBits, 0)
	b, offset := block.As16(), 128-block.BitLen()
	for i := from + offset; i < u.bits+offset; i++ {
		number = number<<1 | int(b[i/8]>>(7-i%8))&1
	}
	return netip.PrefixFrom(block, from).Masked().Addr(), number
}

func (u *used) has(block netip.Addr) bool {
	first, i := u.at(block)
	p := u.pages[first]
	return p != nil && p[i/64]>>(i%64)&1 != 0
}

// add reports whether the block was not in use.
func (u *used) add(block netip.Addr) bool {
	first, i := u.at(block)
	p := u.pages[first]
	if p == nil {
		p = &page{}
		u.pages[first] = p
	}
	bit := uint64(1) << (i % 64)
	if p[i/64]&bit != 0 {
		return false
	}
	p[i/64] |= bit
	u.n++
	return true
}

// remove reports whether the block was in use.
func (u *used) remove(block netip.Addr) bool {
	first, i := u.at(block)
	p := u.pages[first]
	bit := uint64(1) << (i % 64)
	if p == nil || p[i/64]&bit == 0 {
		return false
	}
	p[i/64] &^= bit
	u.n--
	if *p == (page{}) {
		delete(u.pages, first)
	}
	return true
}

// all are the blocks in use, in no order.
func (u *used) all() iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		for first, p := range u.pages {
			for i, word := range p {
				for ; word != 0; word &= word - 1 {
					if !yield(u.block(first, i*64+bits.TrailingZeros64(word))) {
						return
					}
				}
			}
		}
	}
}

// block is the reverse of at.
func (u *used) block(first netip.Addr, number int) netip.Addr {
	b, offset := first.As16(), 128-first.BitLen()
	for i := u.bits + offset - 1; number != 0; i-- {
		b[i/8] |= byte(number&1) << (7 - i%8)
		number >>= 1
	}
	a := netip.AddrFrom16(b)
	if first.Is4() {
		return a.Unmap()
	}
	return a
}
