package ipam

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
	Rebuild func(context.Context) (Known, error)
	// Existing: a file that is not there is not made; fs.ErrNotExist.
	Existing bool
}

// Store is the address store of one overlay, open and locked: nobody else gets
// at it before Close. It is safe for concurrent use.
type Store struct {
	o       Options
	path    string
	lock    *filemutex.FileMutex
	rebuilt time.Duration // CLOCK_BOOTTIME of a rebuild; 0: never
	earlier bool          // it was of an earlier boot when it was opened

	mu       sync.Mutex
	copy     *os.File // what db is opened from, of a Snapshot; nil: the file at path
	db       *database
	repaired string
	walked   bool // all of the file was looked at when it was opened
}

// Open locks and opens the store of one overlay. It fails with ErrBusy when
// others keep it for longer than LockTimeout and with ErrDamaged when the file
// cannot be trusted and there is no way to rebuild it.
func Open(ctx context.Context, o Options) (*Store, error) {
	s, err := newStore(o)
	if err != nil {
		return nil, err
	}
	if err := makeDir(o.Dir); err != nil {
		return nil, fmt.Errorf("open address store: %w", err)
	}
	lock, err := lockFile(ctx, s.lockPath(), s.o.LockTimeout)
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

// newStore is one that is not open, with the defaults of its options.
func newStore(o Options) (*Store, error) {
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
	return &Store{o: o, path: filepath.Join(o.Dir, o.Overlay+".db")}, nil
}

func (s *Store) lockPath() string { return filepath.Join(s.o.Dir, s.o.Overlay+".lock") }

// open brings up the database, whatever is at its place.
func (s *Store) open(ctx context.Context) error {
	err := s.openChecked()
	switch {
	case errors.Is(err, fs.ErrNotExist) && !s.o.Existing:
		if err := s.create(ctx, nil); err != nil {
			return err
		}
		return s.openChecked()
	case errors.Is(err, ErrDamaged):
		return s.rebuild(ctx, err)
	}
	return err
}

func (s *Store) openChecked() error {
	walked, err := s.check()
	if err != nil {
		return err
	}
	s.walked = walked
	if s.copy != nil {
		s.db, err = openDatabaseFile(s.path, func(string, int, os.FileMode) (*os.File, error) { return s.copy, nil })
	} else {
		s.db, err = openDatabase(s.path)
	}
	if err != nil {
		return err
	}
	var boot string
	err = s.db.view(func(tx *bolt.Tx) (err error) {
		boot, s.rebuilt, err = readBoot(tx)
		return err
	})
	if err == nil && boot != s.o.BootID {
		err = s.newBoot()
	}
	return err
}

// Close lets others in. It may be called twice.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	if s.db != nil {
		errs = append(errs, s.db.close())
		s.db = nil
	} else if s.copy != nil {
		errs = append(errs, s.copy.Close())
	}
	s.copy = nil
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
	if errors.Is(err, ErrDamaged) && s.o.Rebuild != nil && s.copy == nil {
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
		h.walk = s.walk
	}
	return h, err
}

// eachHalf calls f with each half, in order, until it fails.
func (s *Store) eachHalf(tx *bolt.Tx, f func(*half) error) error {
	for _, name := range halfNames {
		h, err := s.half(tx, conf.Half(name))
		if err == nil {
			err = f(h)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// viewHalves is eachHalf in a transaction that changes nothing.
func (s *Store) viewHalves(f func(*half) error) error {
	return s.db.view(func(tx *bolt.Tx) error { return s.eachHalf(tx, f) })
}

// updateHalves is eachHalf in a transaction for f that says whether it has changed the
// half. Where nothing was changed, nothing is written.
func (s *Store) updateHalves(f func(*half) (changed bool, err error)) error {
	return s.update(func(tx *bolt.Tx) error {
		some := false
		err := s.eachHalf(tx, func(h *half) error {
			changed, err := f(h)
			if err != nil || !changed {
				return err
			}
			some = true
			return h.flush()
		})
		if err == nil && !some {
			return errUnchanged
		}
		return err
	})
}
