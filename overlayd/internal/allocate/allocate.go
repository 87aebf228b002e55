// Package allocate picks what is given to an agent: the lowest free VTEP
// address and, in each overlay and family, the lowest free agent subnet. It is
// pure bookkeeping in memory. What is in use is known to the coordinator's
// store; a Pool is filled from there with Reserve.
package allocate

import (
	"fmt"
	"iter"
	"net/netip"
)

// maxCount is where Total stops counting: an IPv6 pool can hold more blocks
// than fit in 64 bits.
const maxCount = uint64(1) << 62

// Pool hands out blocks of one length from one prefix, lowest first. It is not
// safe for concurrent use.
type Pool struct {
	within      netip.Prefix // the whole pool, as messages name it
	bits        int          // length of a block
	first, last netip.Addr   // blocks that may be given out, both inclusive; invalid: none

	used   used
	cursor netip.Addr // every block below it is in use; invalid: every block is
}

// NewSubnets is the pool of agent subnets of length bits in an overlay. Block 0
// and the last one are given out too. A length that does not lie between the
// overlay's and the family's makes an empty pool.
func NewSubnets(overlay netip.Prefix, bits int) *Pool {
	overlay = overlay.Masked()
	p := &Pool{within: overlay, bits: bits, used: newUsed(bits)}
	if !overlay.IsValid() || bits < overlay.Bits() || bits > overlay.Addr().BitLen() {
		return p
	}
	p.first = overlay.Addr()
	p.last = lastBlock(overlay, bits)
	p.cursor = p.first
	return p
}

// NewAddrs is the pool of VTEP addresses in a VTEP subnet: all but the network
// address and, in IPv4 and IPv6 alike, the last one.
func NewAddrs(vtepSubnet netip.Prefix) *Pool {
	vtepSubnet = vtepSubnet.Masked()
	bits := vtepSubnet.Addr().BitLen()
	p := &Pool{within: vtepSubnet, bits: bits, used: newUsed(bits)}
	if !vtepSubnet.IsValid() || p.bits-vtepSubnet.Bits() < 2 {
		return p
	}
	p.first = vtepSubnet.Addr().Next()
	p.last = lastBlock(vtepSubnet, p.bits).Prev()
	p.cursor = p.first
	return p
}

// Next takes the lowest free block; false means that the pool is exhausted. An
// address comes as a prefix of full length.
//
// Next takes constant time, amortised, except that after a Release it looks
// once more at every block in use above the released one.
func (p *Pool) Next() (netip.Prefix, bool) {
	for p.cursor.IsValid() {
		block := p.cursor
		p.cursor = p.after(block)
		if p.used.add(block) {
			return netip.PrefixFrom(block, p.bits), true
		}
	}
	return netip.Prefix{}, false
}

// NextPast is Next, but leaves up to passed lower blocks free, as many as the pool
// has to spare. It takes time for each of them.
func (p *Pool) NextPast(passed int) (netip.Prefix, bool) {
	block, ok := p.Next()
	for ; ok && passed > 0; passed-- {
		higher, found := p.Next()
		if !found {
			break
		}
		defer p.Release(block)
		block = higher
	}
	return block, ok
}

// Reserve takes a particular block. It fails if the block is not one of this
// pool or is in use, and the error says which.
func (p *Pool) Reserve(block netip.Prefix) error {
	if err := p.Check(block); err != nil {
		return fmt.Errorf("reserve %s: %w", block, err)
	}
	if !p.used.add(block.Addr()) {
		return fmt.Errorf("reserve %s: in use already", block)
	}
	return nil
}

// InUse reports whether a block of the pool is given out.
func (p *Pool) InUse(block netip.Prefix) bool {
	return p.Check(block) == nil && p.used.has(block.Addr())
}

// Blocks are all that are in use, in no order. The pool must not change meanwhile.
func (p *Pool) Blocks() iter.Seq[netip.Prefix] {
	return func(yield func(netip.Prefix) bool) {
		for first := range p.used.all() {
			if !yield(netip.PrefixFrom(first, p.bits)) {
				return
			}
		}
	}
}

// Release gives a block back and reports whether it was in use.
func (p *Pool) Release(block netip.Prefix) bool {
	if p.Check(block) != nil {
		return false
	}
	addr := block.Addr()
	if !p.used.remove(addr) {
		return false
	}
	if !p.cursor.IsValid() || addr.Less(p.cursor) {
		p.cursor = addr
	}
	return true
}

// Used is the number of blocks in use.
func (p *Pool) Used() uint64 { return p.used.n }

// Total is the number of blocks, in use or not, capped at 2^62.
func (p *Pool) Total() uint64 {
	if !p.first.IsValid() {
		return 0
	}
	n := maxCount
	if free := p.bits - p.within.Bits(); free < 62 {
		n = 1 << free
	}
	if p.first != p.within.Addr() { // addresses: two are never given out
		n -= 2
	}
	return n
}

// Check says why a block is none of this pool's, or nil.
func (p *Pool) Check(block netip.Prefix) error {
	switch addr := block.Addr(); {
	case !block.IsValid() || !p.within.Contains(addr):
		return fmt.Errorf("not inside the pool %s", p.within)
	case block.Bits() != p.bits:
		return fmt.Errorf("the pool %s hands out /%d", p.within, p.bits)
	case block != block.Masked():
		return fmt.Errorf("has host bits set; the block is %s", block.Masked())
	case !p.first.IsValid() || addr.Less(p.first) || p.last.Less(addr):
		return fmt.Errorf("the network address and the last address of %s are never given out", p.within)
	}
	return nil
}

// after is the block that follows, or the invalid Addr after the last. The
// carry runs over as many bytes as it takes.
func (p *Pool) after(block netip.Addr) netip.Addr {
	if block == p.last || p.bits == 0 {
		return netip.Addr{}
	}
	b := block.AsSlice()
	i := (p.bits - 1) / 8
	step := byte(1) << (7 - (p.bits-1)%8)
	b[i] += step
	for carry := b[i] < step; carry; carry = b[i] == 0 {
		i--
		b[i]++
	}
	next, _ := netip.AddrFromSlice(b)
	return next
}

// lastBlock is the first address of the last block of length bits in a prefix.
func lastBlock(within netip.Prefix, bits int) netip.Addr {
	b := within.Addr().AsSlice()
	for i := within.Bits(); i < bits; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}
