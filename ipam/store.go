package ipam

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"time"

	filemutex "github.com/alexflint/go-filemutex"
	bolt "go.etcd.io/bbolt"

	"overlayd.internal/overlay/conf"
)

const defaultLockTimeout = 8 * time.Second

// halfNames are the names of the halves' buckets.
var halfNames = [...]string{string(conf.Mesos), string(conf.Docker)}

// Options say which store to open and how.
type Options struct {
	Dir     string // of the stores; made if it is not there
	Overlay string // names the file
	BootID  string // of this boot; empty: the kernel's
	// Cooling is how long a released address rests; 0: not at all.
	Cooling time.Duration
	// Now is the time since boot; nil: CLOCK_BOOTTIME.
	Now func() time.Duration
	// LockTimeout bounds the wait for others who have the store open; 0: 8 s.
	LockTimeout time.Duration
	// Rebuild says which attachments there really are, as the kernel sees it. It
	// is asked whenever a file is made: the first one of a boot, and one in
	// place of a damaged one. Nil: the first one is empty, and a damaged one is
	// refused with ErrDamaged.
	Rebuild func(context.Context) ([]Record, error)
}

// Store is the address store of one overlay, open and locked: nobody else gets
// at it before Close. It is safe for concurrent use.
type Store struct {
	o       Options
	path    string
	lock    *filemutex.FileMutex
	rebuilt time.Duration // CLOCK_BOOTTIME of a rebuild; 0: never

	mu       sync.Mutex
	db       *database
	repaired string
	walked   bool // all of the file was looked at when it was opened
}

// Open locks and opens the store of one overlay. It fails with ErrBusy when
// others keep it for longer than LockTimeout and with ErrDamaged when the file
// cannot be trusted and there is no way to rebuild it.
func Open(ctx context.Context, o Options) (*Store, error) {
	if err := conf.CheckName(o.Overlay); err != nil {
		return nil, fmt.Errorf("open address store: overlay name: %w", err)
	}
	if o.Now == nil {
		o.Now = conf.Boottime
	}
	if o.LockTimeout == 0 {
		o.LockTimeout = defaultLockTimeout
	}
	if o.BootID == "" {
		id, err := conf.BootID()
		if err != nil {
			return nil, fmt.Errorf("open address store: %w", err)
		}
		o.BootID = id
	}
	if err := makeDir(o.Dir); err != nil {
		return nil, fmt.Errorf("open address store: %w", err)
	}
	s := &Store{o: o, path: filepath.Join(o.Dir, o.Overlay+".db")}
	lock, err := lockFile(ctx, filepath.Join(o.Dir, o.Overlay+".lock"), o.LockTimeout)
	if err != nil {
		return nil, fmt.Errorf("open address store: %w", err)
	}
	s.lock = lock
	if err := s.open(ctx); err != nil {
		s.Close()
		return nil, fmt.Errorf("open address store %s: %w", s.path, err)
	}
	return s, nil
}

// open brings up the database, whatever is at its place.
func (s *Store) open(ctx context.Context) error {
	err := s.openChecked()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := s.create(ctx, false); err != nil {
			return err
		}
		return s.openChecked()
	case errors.Is(err, ErrDamaged):
		return s.rebuild(ctx, err)
	}
	return err
}

func (s *Store) openChecked() error {
	walked, err := checkFile(s.path)
	if err != nil {
		return err
	}
	s.walked = walked
	db, err := openDatabase(s.path)
	if err != nil {
		return err
	}
	s.db = db
	var boot string
	err = db.view(func(tx *bolt.Tx) (err error) {
		boot, s.rebuilt, err = readBoot(tx)
		return err
	})
	if err == nil && boot != s.o.BootID {
		err = s.newBoot()
	}
	return err
}

// rebuild replaces a damaged file by one made from what the kernel knows.
func (s *Store) rebuild(ctx context.Context, why error) error {
	if s.o.Rebuild == nil {
		return why
	}
	if s.db != nil {
		s.db.close()
		s.db = nil
	}
	aside, err := quarantine(s.path)
	if err != nil {
		return fmt.Errorf("%w; %w", why, err)
	}
	if err := s.create(ctx, true); err != nil {
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

// create makes the file, with what Rebuild knows in it. There was one before if it
// is again, or if something is in use.
func (s *Store) create(ctx context.Context, again bool) error {
	var recs []Record
	if s.o.Rebuild != nil {
		var err error
		if recs, err = s.o.Rebuild(ctx); err != nil {
			return fmt.Errorf("create %s: ask for what is in use: %w", s.path, err)
		}
	}
	var rebuilt time.Duration
	if again || len(recs) > 0 {
		rebuilt = s.o.Now()
	}
	return create(s.path, func(tx *bolt.Tx) error {
		b, err := tx.CreateBucket([]byte(bucketStore))
		if err != nil {
			return err
		}
		if err := writeBoot(b, s.o.BootID, rebuilt); err != nil {
			return err
		}
		for _, name := range halfNames {
			if err := s.createHalf(tx, conf.Half(name), recs); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *Store) createHalf(tx *bolt.Tx, name conf.Half, recs []Record) error {
	b, err := tx.CreateBucket([]byte(name))
	if err != nil {
		return err
	}
	h := &half{name: name, b: b, seal: newSealer(string(name)), now: s.o.Now(), cool: s.o.Cooling, sumRead: true}
	for _, rec := range recs {
		if rec.Half != name {
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
		for _, name := range halfNames {
			h, err := openHalf(tx, conf.Half(name), s.o.Now(), s.o.Cooling)
			if err != nil {
				return err
			}
			if err := h.restAll(); err != nil {
				return err
			}
			if err := h.flush(); err != nil {
				return err
			}
		}
		return writeBoot(tx.Bucket([]byte(bucketStore)), s.o.BootID, 0)
	})
	if err != nil {
		return fmt.Errorf("release the addresses of an earlier boot: %w", err)
	}
	s.rebuilt = 0
	return nil
}

// Close lets others in. It may be called twice.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	if s.db != nil {
		errs = append(errs, s.db.close())
		s.db = nil
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
		s.lock = nil
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close address store: %w", err)
	}
	return nil
}

// An operation is one transaction. If the file turns out to be damaged and can
// be rebuilt, the operation is run once more on the new file.
func (s *Store) run(ctx context.Context, op func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.db == nil {
		return errors.New("address store is closed")
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("address store: %w", err)
	}
	err := op()
	if errors.Is(err, ErrDamaged) && s.o.Rebuild != nil {
		if err := s.rebuild(ctx, err); err != nil {
			return err
		}
		return op()
	}
	return err
}

// errUnknown: a transaction may or may not be in the file.
type unknownError struct{ err error }

func (e *unknownError) Error() string { return "write address store: " + e.err.Error() }
func (e *unknownError) Unwrap() error { return e.err }

// update runs fn in a transaction. When fn was fine and the transaction failed
// all the same, the error is an *unknownError and the file has been opened anew.
func (s *Store) update(fn func(*bolt.Tx) error) error {
	fine := false
	err := s.db.update(func(tx *bolt.Tx) error {
		err := fn(tx)
		fine = err == nil
		return err
	})
	switch {
	case err == nil || errors.Is(err, errUnchanged):
		return nil
	case !fine || errors.Is(err, ErrDamaged):
		return err
	}
	unknown := &unknownError{err}
	s.db.close()
	s.db = nil
	if err := s.openChecked(); err != nil {
		return fmt.Errorf("%w; open it again: %w", unknown, err)
	}
	return unknown
}

func (s *Store) half(tx *bolt.Tx, name conf.Half) (*half, error) {
	h, err := openHalf(tx, name, s.o.Now(), s.o.Cooling)
	if err == nil && !s.walked {
		// A transaction that has not ended is not in the file.
		h.walk = func() error { return walkFile(s.path) }
	}
	return h, err
}

// Allocate gives an attachment one address of each range, all or none. An
// attachment that has addresses gets the same ones again, unless the ranges
// have changed. It fails with *ExhaustedError or *UnavailableError.
func (s *Store) Allocate(ctx context.Context, r Request) (Allocation, error) {
	r, err := r.checked()
	if err != nil {
		return Allocation{}, fmt.Errorf("allocate an address: %w", err)
	}
	var out Allocation
	err = s.run(ctx, func() error {
		err := s.update(func(tx *bolt.Tx) error {
			h, err := s.half(tx, r.Half)
			if err != nil {
				return err
			}
			if out, err = h.allocate(s.o, r); err != nil {
				return err
			}
			if err := s.db.keepReserve(tx); err != nil {
				return err
			}
			return h.flush()
		})
		var unknown *unknownError
		if errors.As(err, &unknown) && s.db != nil {
			return s.settle(r, out, unknown)
		}
		return err
	})
	if err != nil {
		return Allocation{}, err
	}
	if s.rebuilt > 0 && s.o.Now()-s.rebuilt < s.o.Cooling && !out.Existing {
		// What was cooling is not known after a rebuild.
		out.Flush = slices.Clone(out.Addrs)
	}
	return out, nil
}

// settle finds out whether an allocation that could not be written is there.
func (s *Store) settle(r Request, out Allocation, unknown error) error {
	rec, found, err := s.find(r.Half, r.Key())
	if err != nil {
		return fmt.Errorf("%w; read it back: %w", unknown, err)
	}
	if !found || !slices.Equal(rec.Addrs, out.Addrs) {
		return unknown
	}
	return nil
}

func (s *Store) find(name conf.Half, k conf.Key) (rec Record, found bool, err error) {
	err = s.db.view(func(tx *bolt.Tx) error {
		h, err := s.half(tx, name)
		if err != nil {
			return err
		}
		rec, found, err = h.attachment(k)
		return err
	})
	return rec, found, err
}

// checked returns the request with masked ranges, or says what is wrong.
func (r Request) checked() (Request, error) {
	if err := checkAttachment(r.Attachment); err != nil {
		return r, err
	}
	if _, err := conf.ParseHalf(string(r.Half)); err != nil {
		return r, err
	}
	if len(r.Ranges) == 0 || len(r.Ranges) > 2 {
		return r, fmt.Errorf("%d ranges, want one per family", len(r.Ranges))
	}
	r.Ranges = slices.Clone(r.Ranges)
	for i, p := range r.Ranges {
		if !p.IsValid() || p.Addr().Is4In6() || conf.Containers(p) == 0 {
			return r, fmt.Errorf("range %s has no address for a container", p)
		}
		r.Ranges[i] = p.Masked()
	}
	if len(r.Ranges) == 2 && r.Ranges[0].Addr().BitLen() == r.Ranges[1].Addr().BitLen() {
		return r, fmt.Errorf("ranges %s and %s are of the same family", r.Ranges[0], r.Ranges[1])
	}
	for i, a := range r.Want {
		if slices.ContainsFunc(r.Want[:i], func(b netip.Addr) bool { return a.BitLen() == b.BitLen() }) {
			return r, &UnavailableError{a, "is the second one of its family; one interface gets one address of each"}
		}
		if !slices.ContainsFunc(r.Ranges, func(p netip.Prefix) bool { return p.Addr().BitLen() == a.BitLen() }) {
			return r, &UnavailableError{a, fmt.Sprintf("is of a family that overlay does not have here; there is %v", r.Ranges)}
		}
	}
	return r, nil
}

// checkAttachment refuses one that cannot be stored under its names.
func checkAttachment(a conf.Attachment) error {
	for _, s := range [...]string{a.Network, a.ContainerID, a.IfName} {
		if s == "" || len(s) > 4096 {
			return fmt.Errorf("attachment %q: network, container and interface must be named, with at most 4096 bytes each", a)
		}
	}
	return nil
}

// Release takes the addresses of an attachment back, in both halves, and
// returns them. An attachment that has none is no error.
func (s *Store) Release(ctx context.Context, a conf.Attachment) ([]netip.Addr, error) {
	var out []netip.Addr
	err := s.run(ctx, func() error {
		err := s.update(func(tx *bolt.Tx) error {
			out = nil
			for _, name := range halfNames {
				h, err := s.half(tx, conf.Half(name))
				if err != nil {
					return err
				}
				rec, found, err := h.attachment(a.Key())
				if err != nil {
					return err
				}
				if !found {
					continue
				}
				if err := h.release(rec); err != nil {
					return err
				}
				if err := h.flush(); err != nil {
					return err
				}
				out = append(out, rec.Addrs...)
			}
			if out == nil {
				return errUnchanged
			}
			return nil
		})
		return s.settleReleased(err, a.Key())
	})
	if err != nil {
		return nil, fmt.Errorf("release %s: %w", a, err)
	}
	return out, nil
}

// settleReleased turns an unknown outcome into success if the attachments are
// gone.
func (s *Store) settleReleased(err error, keys ...conf.Key) error {
	var unknown *unknownError
	if !errors.As(err, &unknown) || s.db == nil {
		return err
	}
	for _, k := range keys {
		for _, name := range halfNames {
			if _, found, ferr := s.find(conf.Half(name), k); ferr != nil {
				return fmt.Errorf("%w; read it back: %w", unknown, ferr)
			} else if found {
				return unknown
			}
		}
	}
	return nil
}

// Get returns the record of an attachment, of either half.
func (s *Store) Get(ctx context.Context, a conf.Attachment) (Record, bool, error) {
	var rec Record
	var found bool
	err := s.run(ctx, func() (err error) {
		for _, name := range halfNames {
			if rec, found, err = s.find(conf.Half(name), a.Key()); found || err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return Record{}, false, fmt.Errorf("look up %s: %w", a, err)
	}
	return rec, found, nil
}

// List returns every record of both halves.
func (s *Store) List(ctx context.Context) ([]Record, error) {
	var out []Record
	err := s.run(ctx, func() error {
		out = nil
		return s.db.view(func(tx *bolt.Tx) error {
			for _, name := range halfNames {
				h, err := s.half(tx, conf.Half(name))
				if err != nil {
					return err
				}
				recs, err := h.attachments()
				if err != nil {
					return err
				}
				out = append(out, recs...)
			}
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	return out, nil
}

// Stats says how full the ranges of a half are, in their order. It looks at
// every address that is cooling and, for a range that nothing was ever
// allocated from, at those in use; otherwise its cost is constant.
func (s *Store) Stats(ctx context.Context, name conf.Half, ranges []netip.Prefix) ([]Stats, error) {
	var out []Stats
	err := s.run(ctx, func() error {
		out = nil
		return s.db.view(func(tx *bolt.Tx) error {
			h, err := s.half(tx, name)
			if err != nil {
				return err
			}
			if err := h.loadSpans(); err != nil {
				return err
			}
			for _, p := range ranges {
				st, err := h.stats(p.Masked())
				if err != nil {
					return err
				}
				out = append(out, st)
			}
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("statistics of the %s half: %w", name, err)
	}
	return out, nil
}

func (h *half) stats(p netip.Prefix) (Stats, error) {
	i := slices.IndexFunc(h.spans, func(s *span) bool { return s.prefix == p })
	var s *span
	var err error
	if i >= 0 {
		s = h.spans[i]
	} else if s, err = h.freshSpan(p); err != nil {
		return Stats{}, err
	}
	cooling, err := h.cooling(s)
	return s.stats(cooling), err
}

// GC releases the attachments of one network in one half that keep does not
// want, and returns them.
func (s *Store) GC(ctx context.Context, network string, name conf.Half, keep func(Record) bool) ([]Record, error) {
	var out []Record
	err := s.run(ctx, func() error {
		err := s.update(func(tx *bolt.Tx) error {
			out = nil
			h, err := s.half(tx, name)
			if err != nil {
				return err
			}
			recs, err := h.attachments()
			if err != nil {
				return err
			}
			for _, rec := range recs {
				if rec.Network != network || keep(rec) {
					continue
				}
				if err := h.release(rec); err != nil {
					return err
				}
				out = append(out, rec)
			}
			if out == nil {
				return errUnchanged
			}
			return h.flush()
		})
		var keys []conf.Key
		for _, rec := range out {
			keys = append(keys, rec.Key())
		}
		return s.settleReleased(err, keys...)
	})
	if err != nil {
		return nil, fmt.Errorf("collect garbage of network %s: %w", network, err)
	}
	return out, nil
}
