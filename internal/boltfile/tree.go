package boltfile

import (
	"bytes"
	"fmt"
	"io"
	"os"
)

// A checker walks one file.
type checker struct {
	f     *os.File
	meta  meta
	inUse []bool   // by page; nil: the trees are not walked
	spare [][]byte // buffers of pages that were walked
	entry func(bucket, key, value []byte) error
}

// An elementFunc is called for every element of a leaf page.
type elementFunc func(flags uint32, key, value []byte, depth int) error

// bounds are those of the keys below a page: at least low and below high. A nil
// one is none.
type bounds struct{ low, high []byte }

func (b bounds) has(key []byte) bool {
	return bytes.Compare(key, b.low) >= 0 && (b.high == nil || bytes.Compare(key, b.high) < 0)
}

func (c *checker) readAt(b []byte, id uint64) error {
	_, err := c.f.ReadAt(b, int64(id)*PageSize)
	if err == io.EOF {
		return damagef("the file ends within page %d", id)
	}
	if err != nil {
		return fmt.Errorf("read page %d: %w", id, err)
	}
	return nil
}

// page reads a page with its overflow. A page may be asked for once. The caller
// gives it back to done: a walk reads many pages and holds few, and fresh memory
// costs more than the reading.
func (c *checker) page(id uint64) ([]byte, error) {
	if id < 2 || id >= c.meta.pages {
		return nil, damagef("page %d is out of bounds", id)
	}
	var p []byte
	if n := len(c.spare); n > 0 {
		p, c.spare = c.spare[n-1][:PageSize], c.spare[:n-1]
	} else {
		p = make([]byte, PageSize)
	}
	if err := c.readAt(p, id); err != nil {
		return nil, err
	}
	n := uint64(order.Uint32(p[12:])) + 1
	if order.Uint64(p) != id || n > c.meta.pages-id {
		return nil, damagef("page %d says it is page %d with %d pages", id, order.Uint64(p), n)
	}
	for i := id; i < id+n; i++ {
		if c.inUse[i] {
			return nil, damagef("page %d is used twice", i)
		}
		c.inUse[i] = true
	}
	if n > 1 {
		p = make([]byte, n*PageSize)
		if err := c.readAt(p, id); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (c *checker) done(p []byte) { c.spare = append(c.spare, p) }

// tree walks the pages below one page and calls fn for the elements.
func (c *checker) tree(id uint64, in bounds, depth int, fn elementFunc) error {
	p, err := c.page(id)
	if err != nil {
		return err
	}
	defer c.done(p)
	switch flags := order.Uint16(p[8:]); {
	case depth == maxDepth:
		return damagef("page %d lies deeper than %d levels", id, maxDepth)
	case flags == flagLeaf:
		return leaf(p, in, depth, fn)
	case flags != flagBranch:
		return damagef("page %d has flags %#x", id, flags)
	}
	keys, children, err := branch(p, id, in)
	if err != nil {
		return err
	}
	for i, child := range children {
		below := bounds{keys[i], in.high}
		if i+1 < len(keys) {
			below.high = keys[i+1]
		}
		if err := c.tree(child, below, depth+1, fn); err != nil {
			return err
		}
	}
	return nil
}

// branch reads the elements of a branch page.
func branch(p []byte, id uint64, in bounds) (keys [][]byte, children []uint64, _ error) {
	count := int(order.Uint16(p[10:]))
	if count == 0 || pageHeader+count*elementSize > len(p) {
		return nil, nil, damagef("branch page %d has %d elements", id, count)
	}
	keys, children = make([][]byte, count), make([]uint64, count)
	for i := range count {
		e := p[pageHeader+i*elementSize:]
		pos, ksize := uint64(order.Uint32(e)), uint64(order.Uint32(e[4:]))
		if pos+ksize > uint64(len(e)) {
			return nil, nil, damagef("branch page %d: element %d is out of bounds", id, i)
		}
		keys[i], children[i] = e[pos:pos+ksize], order.Uint64(e[8:])
		if !in.has(keys[i]) || i > 0 && bytes.Compare(keys[i-1], keys[i]) >= 0 {
			return nil, nil, damagef("branch page %d: element %d is out of order", id, i)
		}
	}
	return keys, children, nil
}

// leaf calls fn for the elements of a leaf page, which may stand within another
// page.
func leaf(p []byte, in bounds, depth int, fn elementFunc) error {
	id := order.Uint64(p)
	if order.Uint16(p[8:]) != flagLeaf {
		return damagef("page %d is not a leaf", id)
	}
	count := int(order.Uint16(p[10:]))
	if pageHeader+count*elementSize > len(p) {
		return damagef("leaf page %d has %d elements", id, count)
	}
	var last []byte
	for i := range count {
		e := p[pageHeader+i*elementSize:]
		pos, ksize, vsize := uint64(order.Uint32(e[4:])), uint64(order.Uint32(e[8:])), uint64(order.Uint32(e[12:]))
		if pos+ksize+vsize > uint64(len(e)) || ksize == 0 {
			return damagef("leaf page %d: element %d is out of bounds", id, i)
		}
		k, v := e[pos:pos+ksize], e[pos+ksize:pos+ksize+vsize]
		if !in.has(k) || i > 0 && bytes.Compare(last, k) >= 0 {
			return damagef("leaf page %d: element %d is out of order", id, i)
		}
		if err := fn(order.Uint32(e), k, v, depth); err != nil {
			return err
		}
		last = k
	}
	return nil
}

// buckets is the elementFunc of the root, which holds buckets and nothing else.
func (c *checker) buckets(flags uint32, name, value []byte, depth int) error {
	if flags != flagBucket {
		return damagef("%q among the buckets is not one", name)
	}
	if err := c.entry(name, nil, nil); err != nil {
		return err
	}
	return c.bucket(name, value, depth, func(flags uint32, k, v []byte, depth int) error {
		switch flags {
		case 0:
			return c.entry(name, k, v)
		case flagBucket:
			if err := c.entry(name, k, nil); err != nil {
				return err
			}
			return c.nested(flags, k, v, depth)
		}
		return damagef("%q in bucket %q has flags %#x", k, name, flags)
	})
}

// nested is the elementFunc of a bucket within a bucket.
func (c *checker) nested(flags uint32, k, v []byte, depth int) error {
	switch flags {
	case 0:
		return nil
	case flagBucket:
		return c.bucket(k, v, depth, c.nested)
	}
	return damagef("%q has flags %#x", k, flags)
}

// bucket walks a bucket. Its value is root page 8, sequence 8, and, where the root
// page is 0, a leaf page in place.
func (c *checker) bucket(name, value []byte, depth int, fn elementFunc) error {
	if len(value) < 16 {
		return damagef("bucket %q has %d bytes", name, len(value))
	}
	if root := order.Uint64(value); root != 0 {
		return c.tree(root, bounds{}, depth+1, fn)
	}
	if len(value) < 16+pageHeader || depth >= maxDepth {
		return damagef("bucket %q is cut off", name)
	}
	return leaf(value[16:], bounds{}, depth+1, fn)
}

// freelist proves that no page on the list of free pages is out of bounds or,
// where the trees were walked, in use.
func (c *checker) freelist() error {
	id := c.meta.freelist
	if id == noFreelist { // bbolt then looks for the free pages itself
		return nil
	}
	if id < 2 || id >= c.meta.pages || c.inUse != nil && c.inUse[id] {
		return damagef("list of free pages at page %d is out of bounds or in use", id)
	}
	head := make([]byte, pageHeader+8)
	if err := c.readAt(head, id); err != nil {
		return err
	}
	pages := uint64(order.Uint32(head[12:])) + 1
	if order.Uint64(head) != id || order.Uint16(head[8:]) != flagFreelist || pages > c.meta.pages-id {
		return damagef("page %d is not the list of free pages", id)
	}
	list := make([]byte, pages*PageSize)
	if err := c.readAt(list, id); err != nil {
		return err
	}
	list = list[pageHeader:]
	count := uint64(order.Uint16(head[10:]))
	if count == 0xFFFF { // too many for the header
		count, list = order.Uint64(list), list[8:]
	}
	if count > uint64(len(list)/8) {
		return damagef("list of free pages has %d entries", count)
	}
	for i := id; c.inUse != nil && i < id+pages; i++ {
		if c.inUse[i] {
			return damagef("page %d is used twice", i)
		}
		c.inUse[i] = true
	}
	last := uint64(1)
	for i := range count {
		free := order.Uint64(list[i*8:])
		if free <= last || free >= c.meta.pages {
			return damagef("list of free pages has %d after %d", free, last)
		}
		if c.inUse != nil && c.inUse[free] || id <= free && free < id+pages {
			return damagef("page %d is both free and in use", free)
		}
		last = free
	}
	return nil
}
