package ipam

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// rebuild replaces a damaged file by one made from what the kernel knows. It stays in its
// place until there is one to replace it: those who read without the lock would take the
// lack of one for a store that nobody has used yet.
func (s *Store) rebuild(ctx context.Context, why error) error {
	if s.o.Rebuild == nil {
		return why
	}
	if s.db != nil {
		s.db.close()
		s.db = nil
	}
	var aside string
	if err := s.create(ctx, func() (err error) {
		aside, err = quarantine(s.path)
		return err
	}); err != nil {
		return fmt.Errorf("%w; %w", why, err)
	}
	s.repaired = fmt.Sprintf("%s was set aside as %s and made anew from the kernel's links: %v", s.path, filepath.Base(aside), why)
	return s.openChecked()
}

// Repaired says what was done to a damaged file; empty: nothing had to be done.
func (s *Store) Repaired() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.repaired
}

// create makes the file, with what Rebuild knows in it. Where one has to make room for
// it, makeRoom does that, and else is nil. There was one before if it is so, or if
// something is in use.
func (s *Store) create(ctx context.Context, makeRoom func() error) error {
	var known Known
	if s.o.Rebuild != nil {
		var err error
		if known, err = s.o.Rebuild(ctx); err != nil {
			return fmt.Errorf("create %s: ask for what is in use: %w", s.path, err)
		}
	}
	var rebuilt time.Duration
	if makeRoom != nil || len(known.Records) > 0 || len(known.Unfiled) > 0 {
		rebuilt = s.o.Now()
	}
	return create(s.path, makeRoom, func(tx *bolt.Tx) error {
		b, err := tx.CreateBucket([]byte(bucketStore))
		if err != nil {
			return err
		}
		if err := writeBoot(b, s.o.BootID, rebuilt); err != nil {
			return err
		}
		for _, name := range halfNames {
			if err := s.createHalf(tx, conf.Half(name), known); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *Store) createHalf(tx *bolt.Tx, name conf.Half, known Known) error {
	b, err := tx.CreateBucket([]byte(name))
	if err != nil {
		return err
	}
	h := &half{name: name, b: b, seal: newSealer(string(name)), now: s.o.Now(), cool: s.o.Cooling, sumRead: true}
	if slices.Contains(known.Unfiled, name) {
		if err := h.put(unfiledKey, nil); err != nil {
			return err
		}
	}
	for _, rec := range known.Records {
		if cmp.Or(rec.Pool, rec.Half) != name {
			continue
		}
		// Two links that claim one address are both left alone; the first one
		// found keeps the record.
		rec.Addrs = slices.DeleteFunc(slices.Clone(rec.Addrs), func(a netip.Addr) bool {
			return b.Get(addrKey(kindInUse, a)) != nil
		})
		if _, known, err := h.attachment(rec.Key()); err != nil || known || len(rec.Addrs) == 0 {
			if err != nil {
				return err
			}
			continue
		}
		rec.BootID = s.o.BootID
		if err := h.bind(rec); err != nil {
			return err
		}
	}
	return h.writeSum()
}

func readBoot(tx *bolt.Tx) (id string, rebuilt time.Duration, err error) {
	b := tx.Bucket([]byte(bucketStore))
	if b == nil {
		return "", 0, damagef("bucket %s is missing", bucketStore)
	}
	key := []byte{kindBoot}
	payload, err := newSealer(bucketStore).unseal(key, b.Get(key))
	if err != nil {
		return "", 0, err
	}
	r := reader{b: payload}
	id, rebuilt = r.text(), r.duration()
	return id, rebuilt, r.end("boot record")
}

func writeBoot(b *bolt.Bucket, id string, rebuilt time.Duration) error {
	key := []byte{kindBoot}
	payload := binary.BigEndian.AppendUint64(appendText(nil, id), uint64(rebuilt))
	return b.Put(key, newSealer(bucketStore).seal(key, payload))
}

// newBoot releases everything: containers do not survive a reboot. Their peers
// on other hosts do, so the addresses rest.
func (s *Store) newBoot() error {
	err := s.db.update(func(tx *bolt.Tx) error {
		if err := s.eachHalf(tx, func(h *half) error {
			if err := h.restAll(); err != nil {
				return err
			}
			return h.flush()
		}); err != nil {
			return err
		}
		return writeBoot(tx.Bucket([]byte(bucketStore)), s.o.BootID, 0)
	})
	if err != nil {
		return fmt.Errorf("release the addresses of an earlier boot: %w", err)
	}
	s.rebuilt, s.earlier = 0, true
	return nil
}

// quarantine keeps a file that cannot be trusted under another name, which it returns,
// and has it in its place as well until that is given to another: but not a directory,
// which can have one name only, nor where the file system knows no links. The last few
// are kept.
func quarantine(path string) (string, error) {
	var kept []int
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return "", fmt.Errorf("set %s aside: %w", path, err)
	}
	for _, e := range entries {
		number, ok := strings.CutPrefix(e.Name(), filepath.Base(path)+".corrupt-")
		if n, err := strconv.Atoi(number); ok && err == nil {
			kept = append(kept, n)
		}
	}
	slices.Sort(kept)
	next := 1
	if len(kept) > 0 {
		next = kept[len(kept)-1] + 1
	}
	to := fmt.Sprintf("%s.corrupt-%d", path, next)
	err = os.Link(path, to)
	if err != nil {
		err = os.Rename(path, to)
	}
	if err != nil {
		return "", fmt.Errorf("set %s aside: %w", path, err)
	}
	for _, n := range kept[:max(0, len(kept)-keptQuarantines+1)] {
		// A directory somebody put in our place is not ours to empty.
		_ = os.Remove(fmt.Sprintf("%s.corrupt-%d", path, n))
	}
	return to, nil
}

// create makes a complete store under a temporary name and moves it to its
// place, so that a file of that name is never half made; just before that it calls
// makeRoom, if it is not nil. Those who use the file hold the lock.
func create(path string, makeRoom func() error, fill func(*bolt.Tx) error) error {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("create %s: %w", path, err)
	}
	fail := func(err error) error {
		os.Remove(tmp)
		return fmt.Errorf("create %s: %w", path, err)
	}
	d, err := openDatabase(tmp)
	if err != nil {
		return fail(err)
	}
	err = d.update(fill)
	if err == nil {
		err = d.file.Chmod(0o600) // whatever the umask is
	}
	if err == nil {
		err = unix.Fallocate(int(d.file.Fd()), 0, 0, minFileSize)
		if errors.Is(err, unix.EOPNOTSUPP) { // then there is no reserve
			err = nil
		}
	}
	if cerr := d.close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fail(err)
	}
	if makeRoom != nil {
		if err := makeRoom(); err != nil {
			return fail(err)
		}
	}
	if err := os.Rename(tmp, path); err != nil {
		return fail(err)
	}
	return nil
}

// CheckRoom says why no store can be made in dir, and changes nothing: the file
// system is read-only or full. One without limits, as ramfs is, has no blocks. A
// dir that is missing is made with the store.
func CheckRoom(dir string) error {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	for errors.Is(err, unix.ENOENT) && dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		err = unix.Statfs(dir, &st)
	}
	switch {
	case err != nil:
	case st.Flags&unix.ST_RDONLY != 0:
		err = unix.EROFS
	case st.Blocks > 0 && st.Bfree*uint64(st.Bsize) < minFileSize || st.Files > 0 && st.Ffree == 0:
		err = unix.ENOSPC
	}
	if err != nil {
		return fmt.Errorf("no address store can be made in %s: %w", dir, err)
	}
	return nil
}

// makeDir makes the directory of the stores, for us alone.
func makeDir(dir string) error {
	st, err := os.Stat(dir)
	if err == nil && st.IsDir() {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	if err := os.Chmod(dir, 0o700); err != nil { // whatever the umask is
		return fmt.Errorf("make %s: %w", dir, err)
	}
	return nil
}
