// Package dirwatch says when something in a directory changes: an entry made,
// written, renamed or removed. It is a hint to look, through inotify, and no
// record of what happened: changes that come together are one, and a directory
// that is removed has to be added again. Callers look now and then in any case.
package dirwatch

import (
	"errors"
	"fmt"
	"sync"

	"github.com/fsnotify/fsnotify"
)

// Watch watches directories. It is safe for concurrent use.
type Watch struct {
	events chan struct{} // capacity 1

	mu      sync.Mutex
	watcher *fsnotify.Watcher // nil: not yet, or closed
	closed  bool
	done    sync.WaitGroup
}

// New watches nothing yet and opens nothing.
func New() *Watch { return &Watch{events: make(chan struct{}, 1)} }

// Events receives after something has changed.
func (w *Watch) Events() <-chan struct{} { return w.events }

// Add watches the directories. Those that are watched already cost nothing;
// one that was removed and made again is watched again.
func (w *Watch) Add(dirs ...string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	if w.watcher == nil {
		watcher, err := fsnotify.NewWatcher()
		if err != nil {
			return fmt.Errorf("watch directories: %w (is fs.inotify.max_user_instances used up?)", err)
		}
		w.watcher = watcher
		w.done.Go(func() { w.follow(watcher) })
	}
	var errs []error
	for _, dir := range dirs {
		if err := w.watcher.Add(dir); err != nil {
			errs = append(errs, fmt.Errorf("watch %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

// follow passes events on until the watcher is closed. An overflow of the
// kernel's queue, which is an error here, is a reason to look, too.
func (w *Watch) follow(watcher *fsnotify.Watcher) {
	for {
		select {
		case _, ok := <-watcher.Events:
			if !ok {
				return
			}
		case _, ok := <-watcher.Errors:
			if !ok {
				return
			}
		}
		select {
		case w.events <- struct{}{}:
		default:
		}
	}
}

// Close ends the watch. Events is not closed.
func (w *Watch) Close() error {
	w.mu.Lock()
	watcher := w.watcher
	w.watcher, w.closed = nil, true
	w.mu.Unlock()
	if watcher == nil {
		return nil
	}
	err := watcher.Close()
	w.done.Wait()
	return err
}
