// Package boltfile checks a bbolt file before bbolt may map it. bbolt trusts its
// pages: a truncated file is a SIGBUS, a wrong page number a fault or an endless
// recursion, and a wrong element count a silently shorter database. Here the
// bytes are read, never mapped, and every offset is checked (ADR 0019).
package boltfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// PageSize is that of the files of both stores: fixed, so that a file does not
// depend on the machine it was made on.
const PageSize = 4096

// The layout of a bbolt file: pages, of which the first two are meta pages. All
// numbers are in the byte order of the machine.
const (
	pageHeader  = 16 // id 8, flags 2, count 2, overflow 4
	elementSize = 16 // branch: pos 4, ksize 4, page 8; leaf: flags 4, pos 4, ksize 4, vsize 4
	metaSize    = 64 // with its checksum

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagMeta     = 0x04
	flagFreelist = 0x10
	flagBucket   = 0x01 // of a leaf element: the value is a bucket

	magic      = 0xED0CDAED
	version    = 2
	noFreelist = ^uint64(0)
	maxDepth   = 64
)

var order = binary.NativeEndian

// ErrDamaged is what errors.Is finds in the error of a file that is not what bbolt
// has written.
var ErrDamaged = errors.New("the file is damaged")

// damage is such an error. Its text says where, and leaves it to the caller to
// say what that means.
type damage string

func (d damage) Error() string        { return string(d) }
func (d damage) Is(target error) bool { return target == ErrDamaged }

func damagef(format string, args ...any) error { return damage(fmt.Sprintf(format, args...)) }

// Options say how strict Check is.
type Options struct {
	// Latest demands what proves that the last transaction is in the file: two
	// sound meta pages, one transaction apart. bbolt goes back to the older one
	// without a word when the newer one is damaged.
	Latest bool
	// MaxPages bounds the work: the entries of a file with more pages are not
	// looked at. 0: no bound.
	MaxPages uint64
}

// Result is what a Check has found out about a sound file.
type Result struct {
	// Walked: all entries were looked at. False only beyond Options.MaxPages.
	Walked bool
	// InUse says of each page whether it is in use, where the file was walked.
	InUse []bool
}

// Check reads every page of the file that is in use and calls entry for what is
// in the buckets: with a nil key where a bucket begins, then for each of its keys
// in order. A nil value is a bucket within the bucket, whose pages are checked and
// whose entries are not reported. What entry is given is valid during the call.
// The first error ends the check; errors.Is(err, ErrDamaged) unless it comes from
// entry or from reading.
func Check(f *os.File, o Options, entry func(bucket, key, value []byte) error) (Result, error) {
	info, err := f.Stat()
	if err != nil {
		return Result{}, err
	}
	if !info.Mode().IsRegular() {
		return Result{}, damagef("it is no regular file but %s", info.Mode().Type())
	}
	m, err := readMeta(f, info.Size(), o.Latest)
	if err != nil {
		return Result{}, err
	}
	c := &checker{f: f, meta: m, entry: entry}
	if o.MaxPages > 0 && m.pages > o.MaxPages {
		return Result{}, c.freelist()
	}
	c.inUse = make([]bool, m.pages)
	c.inUse[0], c.inUse[1] = true, true
	if err := c.tree(m.root, bounds{}, 0, c.buckets); err != nil {
		return Result{}, err
	}
	if err := c.freelist(); err != nil {
		return Result{}, err
	}
	return Result{Walked: true, InUse: c.inUse}, nil
}

// A meta page says where everything else is.
type meta struct{ root, freelist, pages, txid uint64 }

// readMeta returns the newer one of the sound meta pages.
func readMeta(f io.ReaderAt, size int64, latest bool) (meta, error) {
	if latest && (size == 0 || size%PageSize != 0) {
		return meta{}, damagef("the file has %d bytes, not a multiple of %d", size, PageSize)
	}
	metas, errs := [2]meta{}, [2]error{}
	for id := range metas {
		b := make([]byte, pageHeader+metaSize)
		if _, err := f.ReadAt(b, int64(id)*PageSize); err == io.EOF {
			errs[id] = damagef("the file ends before page %d", id)
		} else if err != nil {
			return meta{}, fmt.Errorf("read page %d: %w", id, err)
		} else {
			metas[id], errs[id] = parseMeta(b, uint64(id))
		}
	}
	m := metas[0]
	if errs[0] != nil || errs[1] == nil && metas[1].txid > m.txid {
		m = metas[1]
	}
	switch older := metas[0].txid + metas[1].txid - m.txid; {
	case errs[0] != nil && errs[1] != nil:
		return m, damagef("it has no valid header (%v)", errs[0])
	case latest && errors.Join(errs[:]...) != nil:
		return m, errors.Join(errs[:]...)
	case latest && m.txid != older+1:
		return m, damagef("the meta pages are of transactions %d and %d", metas[0].txid, metas[1].txid)
	case m.pages < 4 || m.pages > uint64(size)/PageSize:
		return m, damagef("it has %d bytes and its header says %d pages of %d; it was truncated", size, m.pages, PageSize)
	}
	return m, nil
}

func parseMeta(page []byte, id uint64) (meta, error) {
	m := page[pageHeader : pageHeader+metaSize]
	sum := fnv.New64a()
	sum.Write(m[:metaSize-8])
	switch {
	case order.Uint64(page) != id || order.Uint16(page[8:]) != flagMeta || order.Uint32(m) != magic:
		return meta{}, damagef("page %d is not a meta page of bbolt", id)
	case order.Uint64(m[metaSize-8:]) != sum.Sum64():
		return meta{}, damagef("meta page %d: wrong checksum", id)
	case order.Uint32(m[4:]) != version || order.Uint32(m[8:]) != PageSize:
		return meta{}, damagef("meta page %d: version %d, page size %d", id, order.Uint32(m[4:]), order.Uint32(m[8:]))
	}
	return meta{root: order.Uint64(m[16:]), freelist: order.Uint64(m[32:]), pages: order.Uint64(m[40:]), txid: order.Uint64(m[48:])}, nil
}
