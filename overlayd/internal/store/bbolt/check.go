package bbolt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The layout of a bbolt file, as far as it is checked here: pages of pageSize
// bytes, the first two are meta pages, of which the valid one with the higher
// transaction id counts. All numbers are in the byte order of the machine.
const (
	pageHeader  = 16 // id 8, flags 2, count 2, overflow 4
	elementSize = 16 // branch: pos 4, ksize 4, page 8; leaf: flags 4, pos 4, ksize 4, vsize 4

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagFreelist = 0x10
	flagBucket   = 0x01 // of a leaf element: the value is a bucket

	metaMagic   = 0xED0CDAED
	metaVersion = 2
	noFreelist  = ^uint64(0)
	maxDepth    = 64
)

var order = binary.NativeEndian

// lock takes the lock that bbolt takes, waiting no longer than timeout.
func lock(f *os.File, timeout time.Duration) error {
	for deadline := time.Now().Add(timeout); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("lock: %w", err)
		case time.Now().After(deadline):
			return fmt.Errorf("%w; stop it, or give this one another file", ErrLocked)
		}
	}
}

// checkFile reads every page that is in use, without mapping the file, and
// reports the first thing that would make bbolt crash or lose a key. An empty
// file is fine: it becomes a new store.
func checkFile(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("it is not a regular file (%s); give another path", info.Mode().Type())
	}
	if info.Size() == 0 {
		return nil
	}
	m, err := readMeta(f)
	if err != nil {
		return err
	}
	if m.pages < 2 || m.pages > uint64(info.Size())/pageSize {
		return damagedf("it has %d bytes and its header says %d pages of %d; it was truncated", info.Size(), m.pages, pageSize)
	}
	c := &checker{f: f, seen: make([]bool, m.pages)}
	c.seen[0], c.seen[1] = true, true
	if err := c.tree(m.root, nil, nil, 0); err != nil {
		return err
	}
	if m.freelist == noFreelist {
		return nil
	}
	return c.freelist(m.freelist)
}

type meta struct{ root, freelist, pages, txid uint64 }

func readMeta(f io.ReaderAt) (meta, error) {
	var best meta
	found := false
	for i := range int64(2) {
		b := make([]byte, 64)
		if _, err := f.ReadAt(b, i*pageSize+pageHeader); err != nil {
			continue // too short; the other page may do
		}
		sum := fnv.New64a()
		sum.Write(b[:56])
		if order.Uint32(b) != metaMagic || order.Uint32(b[4:]) != metaVersion ||
			order.Uint32(b[8:]) != pageSize || order.Uint64(b[56:]) != sum.Sum64() {
			continue
		}
		m := meta{root: order.Uint64(b[16:]), freelist: order.Uint64(b[32:]), pages: order.Uint64(b[40:]), txid: order.Uint64(b[48:])}
		if !found || m.txid > best.txid {
			best, found = m, true
		}
	}
	if !found {
		return meta{}, damagedf("it has no valid header")
	}
	return best, nil
}

type checker struct {
	f    io.ReaderAt
	seen []bool // by page: in use
}

// page reads a page with its overflow and marks it as in use.
func (c *checker) page(id uint64) ([]byte, error) {
	if id >= uint64(len(c.seen)) {
		return nil, damagedf("page %d lies behind the end", id)
	}
	head := make([]byte, pageHeader)
	if _, err := c.f.ReadAt(head, int64(id)*pageSize); err != nil {
		return nil, fmt.Errorf("read page %d: %w", id, err)
	}
	overflow := uint64(order.Uint32(head[12:]))
	if order.Uint64(head) != id || id+overflow >= uint64(len(c.seen)) {
		return nil, damagedf("page %d has a wrong header", id)
	}
	for i := id; i <= id+overflow; i++ {
		if c.seen[i] {
			return nil, damagedf("page %d is used twice", i)
		}
		c.seen[i] = true
	}
	b := make([]byte, (overflow+1)*pageSize)
	if _, err := c.f.ReadAt(b, int64(id)*pageSize); err != nil {
		return nil, fmt.Errorf("read page %d: %w", id, err)
	}
	return b, nil
}

// tree checks a page and everything below it. Its keys must lie in [from, to);
// nil is no bound.
func (c *checker) tree(id uint64, from, to []byte, depth int) error {
	if depth > maxDepth {
		return damagedf("page %d lies deeper than %d levels", id, maxDepth)
	}
	b, err := c.page(id)
	if err != nil {
		return err
	}
	switch order.Uint16(b[8:]) {
	case flagLeaf:
		return c.leaf(b, id, from, to, depth)
	case flagBranch:
	default:
		return damagedf("page %d is of an unknown kind", id)
	}
	n := int(order.Uint16(b[10:]))
	if n == 0 || pageHeader+n*elementSize > len(b) {
		return damagedf("page %d has a wrong number of elements", id)
	}
	keys, children := make([][]byte, n), make([]uint64, n)
	for i := range n {
		e := b[pageHeader+i*elementSize:]
		pos, ksize := uint64(order.Uint32(e)), uint64(order.Uint32(e[4:]))
		if pos+ksize > uint64(len(e)) {
			return damagedf("page %d: element %d reaches behind the page", id, i)
		}
		keys[i], children[i] = e[pos:pos+ksize], order.Uint64(e[8:])
	}
	if err := ordered(id, keys, from, to); err != nil {
		return err
	}
	for i := range n {
		next := to
		if i+1 < n {
			next = keys[i+1]
		}
		if err := c.tree(children[i], keys[i], next, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// leaf checks the page b and the buckets in it.
func (c *checker) leaf(b []byte, id uint64, from, to []byte, depth int) error {
	n := int(order.Uint16(b[10:]))
	if pageHeader+n*elementSize > len(b) {
		return damagedf("page %d has a wrong number of elements", id)
	}
	keys := make([][]byte, n)
	for i := range n {
		e := b[pageHeader+i*elementSize:]
		pos, ksize, vsize := uint64(order.Uint32(e[4:])), uint64(order.Uint32(e[8:])), uint64(order.Uint32(e[12:]))
		if pos+ksize+vsize > uint64(len(e)) {
			return damagedf("page %d: element %d reaches behind the page", id, i)
		}
		keys[i] = e[pos : pos+ksize]
		if order.Uint32(e)&flagBucket == 0 {
			continue
		}
		if err := c.bucket(e[pos+ksize:pos+ksize+vsize], id, depth); err != nil {
			return err
		}
	}
	return ordered(id, keys, from, to)
}

// bucket checks the value of a bucket element: root page 8, sequence 8, and,
// when the root page is 0, a leaf page in place.
func (c *checker) bucket(v []byte, id uint64, depth int) error {
	if len(v) < 16 {
		return damagedf("page %d: a bucket of %d bytes", id, len(v))
	}
	if root := order.Uint64(v); root != 0 {
		return c.tree(root, nil, nil, depth+1)
	}
	inline := v[16:]
	if len(inline) < pageHeader || order.Uint16(inline[8:]) != flagLeaf || depth > maxDepth {
		return damagedf("page %d: a small bucket has a wrong header", id)
	}
	return c.leaf(inline, id, nil, nil, depth+1)
}

// ordered checks that keys ascend and lie in [from, to).
func ordered(id uint64, keys [][]byte, from, to []byte) error {
	for i, k := range keys {
		if i > 0 && bytes.Compare(keys[i-1], k) >= 0 ||
			from != nil && bytes.Compare(k, from) < 0 ||
			to != nil && bytes.Compare(k, to) >= 0 {
			return damagedf("page %d: key %d is out of order", id, i)
		}
	}
	return nil
}

// freelist checks that the free pages are in range, sorted, and really free.
func (c *checker) freelist(id uint64) error {
	b, err := c.page(id)
	if err != nil {
		return err
	}
	if order.Uint16(b[8:]) != flagFreelist {
		return damagedf("page %d is not the list of free pages", id)
	}
	n, ids := uint64(order.Uint16(b[10:])), b[pageHeader:]
	if n == 0xFFFF { // too many for the header
		n, ids = order.Uint64(ids), ids[8:]
	}
	if n > uint64(len(ids))/8 {
		return damagedf("the list of free pages is longer than its page")
	}
	var last uint64
	for i := range n {
		free := order.Uint64(ids[i*8:])
		if free <= last || free >= uint64(len(c.seen)) || c.seen[free] {
			return damagedf("page %d is in use and free, or listed out of order", free)
		}
		last = free
	}
	return nil
}
