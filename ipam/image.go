package ipam

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// The file is looked at before bbolt may map it: bbolt trusts its pages, so
// that a truncated file is a SIGBUS, a wild page number a fault or an endless
// recursion, and a wrong element count a silently shorter database. Here the
// bytes are read, never mapped, and every offset is checked.

const (
	pageSize       = 4096 // fixed, so that a file does not depend on the host
	pageHeader     = 16
	elementSize    = 16
	metaSize       = 64 // with its checksum
	flagBranch     = 0x01
	flagLeaf       = 0x02
	flagMeta       = 0x04
	flagFreelist   = 0x10
	bucketElement  = 0x01
	boltMagic      = 0xED0CDAED
	boltVersion    = 2
	maxBucketDepth = 32
)

var native = binary.NativeEndian

type metaPage struct {
	root, freelist, pages, txid uint64
}

// An image is a bbolt file, or the parts of it that were read.
type image struct {
	f     *os.File
	size  int64
	meta  metaPage
	seen  []bool   // by page
	spare [][]byte // buffers of pages that were walked
}

// openImage reads and checks the two meta pages. The newer one says how many
// pages there are, and all of them must be there. Both must be whole and one
// transaction apart: bbolt would silently go back to the older one, which does
// not know the last address given out.
func openImage(path string) (*image, error) {
	st, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, damagef("%s is not a regular file but %s", path, st.Mode().Type())
	}
	f, err := openFile(path, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	im := &image{f: f, size: st.Size()}
	if err := im.readMetas(); err != nil {
		f.Close()
		return nil, err
	}
	return im, nil
}

func (im *image) close() { im.f.Close() }

func (im *image) readMetas() error {
	if im.size == 0 || im.size%pageSize != 0 {
		return damagef("the file has %d bytes, not a multiple of %d", im.size, pageSize)
	}
	b := make([]byte, 2*pageSize)
	if err := im.readAt(b, 0); err != nil {
		return err
	}
	m0, err := parseMeta(b[:pageSize], 0)
	if err != nil {
		return err
	}
	m1, err := parseMeta(b[pageSize:], 1)
	if err != nil {
		return err
	}
	switch {
	case m0.txid == m1.txid+1:
		im.meta = m0
	case m1.txid == m0.txid+1:
		im.meta = m1
	default:
		return damagef("the meta pages are of transactions %d and %d", m0.txid, m1.txid)
	}
	if n := uint64(im.size / pageSize); im.meta.pages > n || im.meta.pages < 4 {
		return damagef("the file has %d pages and should have %d", n, im.meta.pages)
	}
	return nil
}

func (im *image) readAt(b []byte, off int64) error {
	_, err := im.f.ReadAt(b, off)
	if err == io.EOF {
		return damagef("the file ends before byte %d", off+int64(len(b)))
	}
	if err != nil {
		return fmt.Errorf("read address store: %w", err)
	}
	return nil
}

func parseMeta(page []byte, id uint64) (metaPage, error) {
	m := page[pageHeader : pageHeader+metaSize]
	h := fnv.New64a()
	h.Write(m[:metaSize-8])
	switch {
	case native.Uint64(page) != id || native.Uint16(page[8:]) != flagMeta,
		native.Uint32(m) != boltMagic:
		return metaPage{}, damagef("page %d is not a meta page of bbolt", id)
	case native.Uint64(m[metaSize-8:]) != h.Sum64():
		return metaPage{}, damagef("meta page %d: wrong checksum", id)
	case native.Uint32(m[4:]) != boltVersion || native.Uint32(m[8:]) != pageSize:
		return metaPage{}, damagef("meta page %d: version %d, page size %d", id, native.Uint32(m[4:]), native.Uint32(m[8:]))
	}
	return metaPage{root: native.Uint64(m[16:]), freelist: native.Uint64(m[32:]), pages: native.Uint64(m[40:]), txid: native.Uint64(m[48:])}, nil
}

// page reads a page with its overflow. A page may be asked for once. The caller
// gives it back to done when it needs it no more: a walk reads many pages and
// holds few, and fresh memory costs more than the reading.
func (im *image) page(id uint64) ([]byte, error) {
	if id < 2 || id >= im.meta.pages {
		return nil, damagef("page %d is out of bounds", id)
	}
	var p []byte
	if n := len(im.spare); n > 0 {
		p, im.spare = im.spare[n-1][:pageSize], im.spare[:n-1]
	} else {
		p = make([]byte, pageSize)
	}
	if err := im.readAt(p, int64(id)*pageSize); err != nil {
		return nil, err
	}
	n := uint64(native.Uint32(p[12:])) + 1
	if native.Uint64(p) != id || n > im.meta.pages-id {
		return nil, damagef("page %d says it is page %d with %d pages", id, native.Uint64(p), n)
	}
	for i := id; i < id+n; i++ {
		if im.seen[i] {
			return nil, damagef("page %d is used twice", i)
		}
		im.seen[i] = true
	}
	if n > 1 {
		p = make([]byte, n*pageSize)
		if err := im.readAt(p, int64(id)*pageSize); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (im *image) done(p []byte) { im.spare = append(im.spare, p) }

// checkFreelist proves that no page on the list of free pages is out of bounds
// or, where all pages were walked before, in use.
func (im *image) checkFreelist() error {
	id := im.meta.freelist
	if id < 2 || id >= im.meta.pages {
		return damagef("list of free pages at page %d is out of bounds", id)
	}
	head := make([]byte, pageHeader+8)
	if err := im.readAt(head, int64(id)*pageSize); err != nil {
		return err
	}
	pages := uint64(native.Uint32(head[12:])) + 1
	if native.Uint64(head) != id || native.Uint16(head[8:]) != flagFreelist || pages > im.meta.pages-id {
		return damagef("page %d is not the list of free pages", id)
	}
	list := make([]byte, pages*pageSize)
	if err := im.readAt(list, int64(id)*pageSize); err != nil {
		return err
	}
	list = list[pageHeader:]
	count := uint64(native.Uint16(head[10:]))
	if count == 0xFFFF {
		count, list = native.Uint64(list), list[8:]
	}
	if count > uint64(len(list)/8) {
		return damagef("list of free pages has %d entries", count)
	}
	last := uint64(1)
	for i := range count {
		free := native.Uint64(list[i*8:])
		if free <= last || free >= im.meta.pages {
			return damagef("list of free pages has %d after %d", free, last)
		}
		if im.seen != nil && im.seen[free] || id <= free && free < id+pages {
			return damagef("page %d is both free and in use", free)
		}
		last = free
	}
	return nil
}

// An entryFunc is called for every entry of one bucket.
type entryFunc func(key, value []byte) error

// entries goes through every bucket; visit says what to call for its entries.
// It fails if any page, element or key is not where and what it should be.
func (im *image) entries(visit func(bucket string) entryFunc) error {
	im.seen = make([]bool, im.meta.pages)
	return im.tree(im.meta.root, nil, nil, 0, func(flags uint32, name, v []byte) error {
		if flags != bucketElement || len(v) < 16 {
			return damagef("%q among the buckets is not one", name)
		}
		fn := visit(string(name))
		leaf := func(flags uint32, k, v []byte) error {
			if flags != 0 {
				return damagef("bucket %s has a bucket in it", name)
			}
			return fn(k, v)
		}
		if root := native.Uint64(v); root != 0 {
			return im.tree(root, nil, nil, 0, leaf)
		}
		if len(v) < 16+pageHeader {
			return damagef("bucket %s is cut off", name)
		}
		return leaves(v[16:], nil, nil, leaf)
	})
}

// tree walks the pages below one page. All keys are at least low and, unless
// it is nil, below high.
func (im *image) tree(id uint64, low, high []byte, depth int, fn func(flags uint32, k, v []byte) error) error {
	p, err := im.page(id)
	if err != nil {
		return err
	}
	defer im.done(p)
	switch flags := native.Uint16(p[8:]); {
	case flags == flagLeaf:
		return leaves(p, low, high, fn)
	case flags != flagBranch:
		return damagef("page %d has flags %#x", id, flags)
	case depth == maxBucketDepth:
		return damagef("the tree at page %d is too deep", id)
	}
	count := int(native.Uint16(p[10:]))
	if count == 0 {
		return damagef("branch page %d is empty", id)
	}
	keys, kids := make([][]byte, count), make([]uint64, count)
	for i := range count {
		at := pageHeader + i*elementSize
		if at+elementSize > len(p) {
			return damagef("branch page %d has %d elements", id, count)
		}
		e := p[at:]
		pos, ksize := uint64(native.Uint32(e)), uint64(native.Uint32(e[4:]))
		if pos+ksize > uint64(len(e)) {
			return damagef("branch page %d: element %d is out of bounds", id, i)
		}
		keys[i], kids[i] = e[pos:pos+ksize], native.Uint64(e[8:])
		if bytes.Compare(keys[i], low) < 0 || high != nil && bytes.Compare(keys[i], high) >= 0 ||
			i > 0 && bytes.Compare(keys[i-1], keys[i]) >= 0 {
			return damagef("branch page %d: element %d is out of order", id, i)
		}
	}
	for i := range count {
		below := high
		if i+1 < count {
			below = keys[i+1]
		}
		if err := im.tree(kids[i], keys[i], below, depth+1, fn); err != nil {
			return err
		}
	}
	return nil
}

func leaves(p, low, high []byte, fn func(flags uint32, k, v []byte) error) error {
	if native.Uint16(p[8:]) != flagLeaf {
		return damagef("page %d is not a leaf", native.Uint64(p))
	}
	var last []byte
	for i := range int(native.Uint16(p[10:])) {
		at := pageHeader + i*elementSize
		if at+elementSize > len(p) {
			return damagef("leaf page %d has too many elements", native.Uint64(p))
		}
		e := p[at:]
		pos, ksize, vsize := uint64(native.Uint32(e[4:])), uint64(native.Uint32(e[8:])), uint64(native.Uint32(e[12:]))
		if pos+ksize+vsize > uint64(len(e)) || ksize == 0 {
			return damagef("leaf page %d: element %d is out of bounds", native.Uint64(p), i)
		}
		k, v := e[pos:pos+ksize], e[pos+ksize:pos+ksize+vsize]
		if bytes.Compare(k, low) < 0 || high != nil && bytes.Compare(k, high) >= 0 || i > 0 && bytes.Compare(last, k) >= 0 {
			return damagef("leaf page %d: element %d is out of order", native.Uint64(p), i)
		}
		if err := fn(native.Uint32(e), k, v); err != nil {
			return err
		}
		last = k
	}
	return nil
}

// Files with more pages than this are not walked at every opening, because that
// would make an ADD slower the more addresses are in use. Their records still
// carry checksums, so what is found there is true; that something is not there
// is only proven by a walk, which who needs the proof asks for.
const maxPagesWalked = 96

// checkFile says whether the file can be trusted with bbolt, and whether all of
// it was looked at.
func checkFile(path string) (walked bool, err error) {
	im, err := openImage(path)
	if err != nil {
		return false, err
	}
	defer im.close()
	if im.meta.pages > maxPagesWalked {
		return false, im.checkFreelist()
	}
	return true, im.checkContent()
}

// walkFile is checkFile for a file of any size: it proves that the file holds
// what was written last, and so that what is not found there is not there.
func walkFile(path string) error {
	im, err := openImage(path)
	if err != nil {
		return err
	}
	defer im.close()
	return im.checkContent()
}

// A digest is the sum of the fingerprints of a bucket's entries.
type digest struct {
	sum, count uint64
	stored     bool // as written, rather than as found
}

// checkContent proves that the file holds exactly the entries that were
// written last, each as it was written.
func (im *image) checkContent() error {
	found, written := map[string]*digest{}, map[string]*digest{}
	err := im.entries(func(bucket string) entryFunc {
		f, w := &digest{}, &digest{}
		found[bucket], written[bucket] = f, w
		return newSealer(bucket).digestInto(f, w)
	})
	if err != nil {
		return err
	}
	if d := found[bucketStore]; d == nil || d.count != 1 || len(found) != 1+len(halfNames) {
		return damagef("records that every store has are missing")
	}
	for _, name := range halfNames {
		f, w := found[name], written[name]
		if f == nil || !w.stored || f.sum != w.sum || f.count != w.count {
			return damagef("half %s does not have the entries that were written", name)
		}
	}
	return im.checkFreelist()
}

// digestInto adds entries up, and picks out the digest that was written.
func (s sealer) digestInto(found, written *digest) entryFunc {
	return func(k, v []byte) error {
		payload, err := s.unseal(k, v)
		if err != nil {
			return err
		}
		if k[0] == kindSum {
			r := reader{b: payload}
			written.sum, written.count, written.stored = r.u64(), r.u64(), true
			return r.end("digest")
		}
		found.sum += fingerprint(k, v)
		found.count++
		return nil
	}
}
