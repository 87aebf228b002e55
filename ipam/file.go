package ipam

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
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
		why = fmt.Errorf("lock %s: %w: another process has held it for %s", path, ErrBusy, timeout)
	case <-ctx.Done():
		why = fmt.Errorf("lock %s: %w: %w", path, ErrBusy, context.Cause(ctx))
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
	d := &database{}
	err := d.guard(func() (err error) {
		d.db, err = bolt.Open(path, 0o600, &bolt.Options{
			Timeout:      boltLockTimeout,
			FreelistType: bolt.FreelistMapType,
			PageSize:     boltfile.PageSize,
			MaxSize:      maxFileSize,
			NoStatistics: true,
			OpenFile: func(name string, flag int, perm os.FileMode) (f *os.File, err error) {
				d.file, err = openFile(name, flag|unix.O_NOFOLLOW, perm)
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

// quarantine moves a file that cannot be trusted out of the way and returns
// its new name. The last few are kept.
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
	if err := os.Rename(path, to); err != nil {
		return "", fmt.Errorf("set %s aside: %w", path, err)
	}
	for _, n := range kept[:max(0, len(kept)-keptQuarantines+1)] {
		// A directory somebody put in our place is not ours to empty.
		_ = os.Remove(fmt.Sprintf("%s.corrupt-%d", path, n))
	}
	return to, nil
}

// create makes a complete store under a temporary name and moves it to its
// place, so that a file of that name is never half made. Those who use the
// file hold the lock.
func create(path string, fill func(*bolt.Tx) error) error {
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
