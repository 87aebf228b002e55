// Package netns opens, checks and enters network namespaces, and remembers which
// one a path stood for.
package netns

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// NS is an open network namespace.
type NS struct {
	FD   int
	path string
}

// Open opens the network namespace at path.
func Open(path string) (NS, error) {
	// Non-blocking, because the path may be a FIFO.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return NS{}, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	return NS{fd, path}, nil
}

// Close closes the namespace.
func (n NS) Close() { unix.Close(n.FD) }

// Inside runs f in the namespace, on the calling goroutine: a thread made for
// it would cost more than all that f does. Should there be no way back, the
// thread is kept from everything but the caller, who has to stop: sockets that
// are open are still good for undoing, since each stays in the namespace it was
// made in.
func (n NS) Inside(f func() error) (err error) {
	runtime.LockOSThread()
	own, err := Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer own.Close()
	if err := unix.Setns(n.FD, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %s: %w", n.path, err)
	}
	defer func() {
		if back := unix.Setns(own.FD, unix.CLONE_NEWNET); back != nil {
			err = errors.Join(err, fmt.Errorf("return from network namespace %s: %w", n.path, back))
			return
		}
		runtime.UnlockOSThread()
	}()
	return f()
}

// Check proves that the path is a network namespace and not the one we are
// in, before anything is done.
func Check(path string) error {
	// Non-blocking, because the path may be a FIFO.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		return fmt.Errorf("%s is not a namespace", path)
	}
	if kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err == nil && kind != unix.CLONE_NEWNET {
		return fmt.Errorf("%s is a namespace, but not a network namespace", path)
	}
	var it, own unix.Stat_t
	if err := unix.Fstat(fd, &it); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := unix.Stat("/proc/thread-self/ns/net", &own); err != nil {
		return fmt.Errorf("look up our own namespace: %w", err)
	}
	if it.Dev == own.Dev && it.Ino == own.Ino {
		return fmt.Errorf("%s is the host's own namespace", path)
	}
	return nil
}

// Same reports whether two paths are one namespace. Equal paths are, also where
// nothing is there.
func Same(a, b string) bool {
	if a == b {
		return true
	}
	var x, y unix.Stat_t
	return unix.Stat(a, &x) == nil && unix.Stat(b, &y) == nil && x.Dev == y.Dev && x.Ino == y.Ino
}
