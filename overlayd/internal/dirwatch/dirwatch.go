// Package dirwatch says when something in a directory changes: an entry made,
// written, renamed or removed, or the directory itself. It is a hint to look and
// no record of what happened: changes that come together are one, and a
// directory that was removed or moved has to be added again. Callers look now
// and then in any case.
//
// It asks inotify itself, because nothing but the hint is of use here: there is
// no table of names and watches that could differ from the kernel's.
//
// A file counts as written when whoever wrote it closes it. Each single write would
// wake this process, often while a CNI program is still waited for.
package dirwatch

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// names are the changes of which entries a directory has, contents those of what is
// in a file. Reading is none.
const (
	names    = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	contents = unix.IN_CLOSE_WRITE | unix.IN_ATTRIB
)

// Watch watches directories. It is safe for concurrent use.
type Watch struct {
	events chan struct{} // capacity 1

	mu      sync.Mutex
	inotify *os.File       // nil: not yet, or closed
	watched map[string]int // watch descriptor by path
	closed  bool
	done    sync.WaitGroup
}

// New watches nothing yet and opens nothing.
func New() *Watch { return &Watch{events: make(chan struct{}, 1), watched: map[string]int{}} }

// Events receives after something has changed.
func (w *Watch) Events() <-chan struct{} { return w.events }

// Add watches the directories. For those that are watched already it changes
// nothing; where another one is in the place of one, that is watched. One that
// was not watched before is an event: what changed in it until now is not known.
func (w *Watch) Add(dirs ...string) error {
	return w.addAll(names|contents|unix.IN_ONLYDIR, dirs)
}

// AddNames watches which entries the directories have, and not what is written in
// files of them: where every call of a CNI program writes one, each would be a hint.
func (w *Watch) AddNames(dirs ...string) error {
	return w.addAll(names|unix.IN_ONLYDIR, dirs)
}

// AddFile watches what is in a file, which has to be added again when another one is
// in its place. It is no error if there is none, and no event if it was not watched
// before: callers look at it afterwards.
func (w *Watch) AddFile(path string) error {
	err := w.addAll(contents|unix.IN_DONT_FOLLOW, []string{path})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (w *Watch) addAll(events uint32, paths []string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	if w.inotify == nil {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
		if err != nil {
			return fmt.Errorf("watch directories: %w (is fs.inotify.max_user_instances used up?)", err)
		}
		f := os.NewFile(uintptr(fd), "inotify")
		w.inotify = f
		w.done.Go(func() { w.follow(f) })
	}
	var errs []error
	for _, path := range paths {
		if err := w.add(path, events); err != nil {
			errs = append(errs, fmt.Errorf("watch %s: %w", path, err))
		}
	}
	return errors.Join(errs...)
}

// add watches one path. The kernel answers with the same descriptor for the same
// directory or file, whatever its name.
func (w *Watch) add(path string, events uint32) error {
	raw, err := w.inotify.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		var wd int
		if wd, failed = unix.InotifyAddWatch(int(fd), path, events); failed != nil {
			return
		}
		before, ok := w.watched[path]
		if ok && before == wd {
			return
		}
		if ok {
			unix.InotifyRmWatch(int(fd), uint32(before)) // has gone, or is somewhere else now
		}
		w.watched[path] = wd
		if events&unix.IN_ONLYDIR != 0 {
			w.hint()
		}
	})
	return errors.Join(err, failed)
}

// follow passes on that there are events until the watch is closed. What they
// say is not looked at; an overflow of the kernel's queue is one of them.
func (w *Watch) follow(inotify *os.File) {
	buf := make([]byte, 64<<10)
	for {
		if _, err := inotify.Read(buf); err != nil {
			return
		}
		w.hint()
	}
}

func (w *Watch) hint() {
	select {
	case w.events <- struct{}{}:
	default:
	}
}

// Close ends the watch. Events is not closed.
func (w *Watch) Close() error {
	w.mu.Lock()
	inotify := w.inotify
	w.inotify, w.closed = nil, true
	w.mu.Unlock()
	if inotify == nil {
		return nil
	}
	err := inotify.Close()
	w.done.Wait()
	return err
}
