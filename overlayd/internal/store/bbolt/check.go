package bbolt

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/boltfile"
)

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
	_, err = boltfile.Check(f, boltfile.Options{}, func(_, _, _ []byte) error { return nil })
	if errors.Is(err, boltfile.ErrDamaged) {
		return damagedf("%v", err)
	}
	return err
}
