package ipam

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	filemutex "github.com/alexflint/go-filemutex"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/boltfile"
)

const (
	maxFileSize = 256 << 20
	minFileSize = 128 << 10
	// reserve is kept allocated behind what is in use, so that addresses can be
	// released when the file system is full: bbolt never writes in place.
	reserve         = 64 << 10
	keptQuarantines = 3
	boltLockTimeout = time.Second
)

// lockFile waits for the lock at path. go-filemutex can only wait for ever, so
// a goroutine does that; if the time is over first, the goroutine gives the
// lock back as soon as it gets it.
func lockFile(ctx context.Context, path string, timeout time.Duration) (*filemutex.FileMutex, error) {
	m, err := filemutex.New(path)
	if err != nil {
		return nil, fmt.Errorf("open lock %s: %w", path, err)
	}
	switch err := m.TryLock(); {
	case err == nil:
		return m, nil
	case err != filemutex.AlreadyLocked:
		m.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	locked := make(chan error, 1)
	go func() { locked <- m.Lock() }()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	var why error
	select {
	case err := <-locked:
		if err != nil {
			m.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		return m, nil
	case <-timer.C:
		why = fmt.Errorf("lock %s: %w: waited for %s, and %s", path, ErrBusy, timeout, holderOf(path))
	case <-ctx.Done():
		why = fmt.Errorf("lock %s: %w: %w, and %s", path, ErrBusy, context.Cause(ctx), holderOf(path))
	}
	go func() {
		<-locked
		m.Close()
	}()
	return nil, why
}

// A database is an open bbolt file. bbolt panics on some kinds of damage, in
// its own transactions too, and cannot be closed after that: its locks stay
// taken. Then only the file is closed, which also ends bbolt's flock.
type database struct {
	db   *bolt.DB
	file *os.File
	dead bool // after a panic or a fault
}

func openDatabase(path string) (*database, error) {
	return openDatabaseFile(path, func(name string, flag int, perm os.FileMode) (*os.File, error) {
		return openFile(name, flag|unix.O_NOFOLLOW, perm)
	})
}

// openDatabaseFile opens the database in the file that open returns.
func openDatabaseFile(path string, open func(name string, flag int, perm os.FileMode) (*os.File, error)) (*database, error) {
	d := &database{}
	err := d.guard(func() (err error) {
		d.db, err = bolt.Open(path, 0o600, &bolt.Options{
			Timeout:      boltLockTimeout,
			FreelistType: bolt.FreelistMapType,
			PageSize:     boltfile.PageSize,
			MaxSize:      maxFileSize,
			NoStatistics: true,
			OpenFile: func(name string, flag int, perm os.FileMode) (f *os.File, err error) {
				d.file, err = open(name, flag, perm)
				return d.file, err
			},
		})
		return err
	})
	switch {
	case err == nil:
		return d, nil
	case d.dead:
		d.close()
		return nil, err
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("open %s: %w: another program has it open", path, ErrBusy)
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrVersionMismatch):
		return nil, damagef("open %s: %w", path, err)
	}
	return nil, fmt.Errorf("open %s: %w", path, err)
}

// openFile is os.OpenFile without the poller, which is of no use for a regular
// file and takes a program that only opens a few as long as reading them.
func openFile(name string, flag int, perm os.FileMode) (*os.File, error) {
	for {
		fd, err := unix.Open(name, flag|unix.O_CLOEXEC, uint32(perm.Perm()))
		switch err {
		case nil:
			return os.NewFile(uintptr(fd), name), nil
		case unix.EINTR:
		default:
			return nil, &os.PathError{Op: "open", Path: name, Err: err}
		}
	}
}

// guard turns a panic or a fault in f into ErrDamaged.
func (d *database) guard(f func() error) (err error) {
	if d.dead {
		return damagef("the file was given up")
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			d.dead = true
			err = damagef("%v", r)
		}
	}()
	return f()
}

func (d *database) update(f func(*bolt.Tx) error) error {
	err := d.guard(func() error { return d.db.Update(f) })
	if errors.Is(err, bolterrors.ErrMaxSizeReached) {
		// Ours need a twentieth of it: a page lies about its length.
		return damagef("%w", err)
	}
	return err
}

func (d *database) view(f func(*bolt.Tx) error) error {
	return d.guard(func() error { return d.db.View(f) })
}

// keepReserve makes sure that the transactions to come have room.
func (d *database) keepReserve(tx *bolt.Tx) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(d.file.Fd()), &st); err != nil {
		return fmt.Errorf("write address store: %w", err)
	}
	need := tx.Size() + reserve
	if st.Blocks*512 >= need {
		return nil
	}
	err := unix.Fallocate(int(d.file.Fd()), 0, 0, (need+reserve)/boltfile.PageSize*boltfile.PageSize)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("write address store: %w", err)
	}
	return nil
}

func (d *database) close() error {
	if !d.dead {
		if err := d.guard(d.db.Close); !d.dead {
			return err
		}
	}
	if d.file != nil {
		return d.file.Close()
	}
	return nil
}
