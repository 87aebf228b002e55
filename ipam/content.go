package ipam

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/boltfile"
)

// Files with more pages than this are not walked at every opening, because that
// would make an ADD slower the more addresses are in use: 0.4 ms with a thousand. Their records still
// carry checksums, so what is found there is true. Absence is only proven by a
// full walk; callers that rely on absence ask for one.
const maxPagesWalked = 32

// check says whether the file can be trusted with bbolt, and whether all of it was
// looked at.
func (s *Store) check() (walked bool, err error) { return s.checkContent(maxPagesWalked) }

// walk is check for a file of any size: it proves that the file holds what was
// written last, and so that what is not found there is not there.
func (s *Store) walk() error {
	_, err := s.checkContent(0)
	return err
}

// openRegular opens a file to read it. One that is not regular is damage: to open it
// may take for ever.
func openRegular(path string) (*os.File, error) {
	st, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, damagef("%s is not a regular file but %s", path, st.Mode().Type())
	}
	return openFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
}

// sizeOf is the length of a file, where it is one that a store can have. Any other is
// damage: a file of no blocks may claim a length for which there is no memory.
func sizeOf(f *os.File) (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if st.Size() > maxFileSize {
		return 0, damagef("the file has %d bytes, and a store at most %d", st.Size(), maxFileSize)
	}
	return st.Size(), nil
}

func (s *Store) checkContent(maxPages uint64) (walked bool, _ error) {
	if s.copy != nil {
		return checkContent(s.copy, maxPages)
	}
	f, err := openRegular(s.path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return checkContent(f, maxPages)
}

// checkContent proves that the file holds exactly the entries that were written
// last, each as it was written, unless it has more pages than maxPages (0: any).
func checkContent(f *os.File, maxPages uint64) (walked bool, _ error) {
	if _, err := sizeOf(f); err != nil {
		return false, err
	}
	c := content{}
	result, err := boltfile.Check(f, boltfile.Options{Latest: true, MaxPages: maxPages}, c.entry)
	if err == nil && result.Walked {
		err = c.complete()
	}
	if errors.Is(err, boltfile.ErrDamaged) {
		err = damagef("%w", err)
	}
	return result.Walked, err
}

// A digest is the sum of the fingerprints of a bucket's entries.
type digest struct{ sum, count uint64 }

// content adds up what is found in each bucket.
type content struct {
	buckets []bucketContent
}

type bucketContent struct {
	name    string
	seal    sealer
	found   digest
	written *digest // as the bucket's own record of it says
}

// entry is called by boltfile.Check.
func (c *content) entry(bucket, key, value []byte) error {
	if key == nil {
		name := string(bucket)
		c.buckets = append(c.buckets, bucketContent{name: name, seal: newSealer(name)})
		return nil
	}
	b := &c.buckets[len(c.buckets)-1]
	if value == nil {
		return damagef("bucket %s has a bucket in it", b.name)
	}
	payload, err := b.seal.unseal(key, value)
	if err != nil {
		return err
	}
	if key[0] == kindSum {
		r := reader{b: payload}
		b.written = &digest{r.u64(), r.u64()}
		return r.end("digest")
	}
	b.found.sum += fingerprint(key, value)
	b.found.count++
	return nil
}

// complete compares what was found with what was written.
func (c *content) complete() error {
	halves := 0
	for _, b := range c.buckets {
		switch {
		case b.name == bucketStore:
			if b.found.count != 1 {
				return damagef("records that every store has are missing")
			}
		case b.written == nil || b.found != *b.written:
			return damagef("half %s does not have the entries that were written", b.name)
		default:
			halves++
		}
	}
	if halves != len(halfNames) || len(c.buckets) != 1+len(halfNames) {
		return damagef("records that every store has are missing")
	}
	return nil
}
