package bbolt

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/boltfile"
)

// openFile opens, locks and checks the file, in this order, and hands it to
// bbolt. bbolt maps the file and follows whatever page number it finds there: a
// truncated file is a SIGBUS and a damaged page a panic, hence the check.
func openFile(path string) (db *bbolt.DB, err error) {
	_, statErr := os.Stat(path)
	var opened *os.File
	defer func() {
		if p := recover(); p != nil {
			db, err = nil, errors.Join(damagedf("%v", p), opened.Close())
		}
	}()
	db, err = bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout:      lockTimeout,
		FreelistType: bbolt.FreelistMapType,
		PageSize:     pageSize,
		OpenFile: func(name string, flag int, perm os.FileMode) (*os.File, error) {
			f, err := os.OpenFile(name, flag, perm)
			if err != nil {
				return nil, err
			}
			// The lock belongs to the open file; bbolt takes it once more.
			if err := lock(f, lockTimeout); err != nil {
				return nil, errors.Join(err, f.Close())
			}
			if err := checkFile(f); err != nil {
				return nil, errors.Join(err, f.Close())
			}
			if err := makeRoom(f); err != nil {
				return nil, errors.Join(err, f.Close())
			}
			opened = f
			return f, nil
		},
	})
	if err != nil {
		return nil, err
	}
	if errors.Is(statErr, os.ErrNotExist) {
		if err := syncDir(filepath.Dir(path)); err != nil {
			return nil, errors.Join(err, db.Close())
		}
	}
	return db, nil
}

// makeRoom sets aside the pages that bbolt begins a new file with. On a disk that
// is nearly full it would write some of them, and what it leaves is no store.
func makeRoom(f *os.File) error {
	const begin = 4 * pageSize
	info, err := f.Stat()
	if err != nil || info.Size() > 0 {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, begin)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil // a file system that cannot tell beforehand
	} else if err != nil {
		return fmt.Errorf("make room for a new store: %w", err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

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
			if who := holder(f); who != "" {
				return fmt.Errorf("%w: %s; stop it, or give this one another file", ErrLocked, who)
			}
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
	_, err = boltfile.Check(f, boltfile.Options{}, func(_, _, _ []byte) error { return nil })
	if errors.Is(err, boltfile.ErrDamaged) {
		return damagedf("%v", err)
	}
	return err
}

// holder names the process that has the lock on the file, as far as the kernel
// tells; it is empty otherwise.
func holder(f *os.File) string {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return ""
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return ""
	}
	inode := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(locks)) {
		// 1: FLOCK  ADVISORY  WRITE 2345 fe:01:678 0 EOF
		fields := strings.Fields(line)
		if len(fields) < 6 || fields[1] != "FLOCK" || fields[5] != inode {
			continue
		}
		name, err := os.ReadFile("/proc/" + fields[4] + "/comm")
		if err != nil {
			return "process " + fields[4]
		}
		return fmt.Sprintf("process %s (%s)", fields[4], strings.TrimSpace(string(name)))
	}
	return ""
}
