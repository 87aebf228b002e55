package cni

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Package os and package context would start the poller, timers, a signal
// handler and the threads for them, which is a fifth of what ADD costs and of no
// use to a program that does one thing after the other (ADR 0006).

// A descriptor is one of the three files that a program starts with. A reader of
// standard output that goes away is an error of the write, so that ADD can be
// undone: package os would end the process.
type descriptor struct {
	fd int
	by time.Time // when reading ends, finished or not; zero: never
}

func (d *descriptor) SetReadDeadline(t time.Time) error {
	d.by = t
	return nil
}

func (d *descriptor) Read(b []byte) (int, error) {
	for {
		if err := d.poll(unix.POLLIN); err != nil {
			return 0, err
		}
		n, err := unix.Read(d.fd, b)
		switch {
		case err == unix.EINTR || err == unix.EAGAIN:
			continue
		case err != nil:
			return 0, err
		case n == 0 && len(b) > 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

func (d *descriptor) Write(b []byte) (n int, err error) {
	for n < len(b) {
		w, err := unix.Write(d.fd, b[n:])
		switch {
		case err == unix.EAGAIN: // whoever started us made it non-blocking
			if err := d.poll(unix.POLLOUT); err != nil {
				return n, err
			}
		case err != nil && err != unix.EINTR:
			return n, err
		case err == nil:
			n += w
		}
	}
	return n, nil
}

// poll waits until the file is ready, or broken.
func (d *descriptor) poll(events int16) error {
	for {
		timeout := -1
		if events == unix.POLLIN && !d.by.IsZero() {
			timeout = max(0, int(time.Until(d.by)/time.Millisecond)+1)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(d.fd), Events: events}}, timeout)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		case n == 0:
			return os.ErrDeadlineExceeded
		default:
			return nil
		}
	}
}

// stdout is the standard output, or a writer that fails when it was closed. The
// Go runtime opens /dev/null for reading and writing in place of a closed one,
// so that no other file becomes descriptor 1, and a result would vanish there. Who
// calls with such a /dev/null cannot be told from who closed it.
func stdout() io.Writer {
	var st unix.Stat_t
	if err := unix.Fstat(1, &st); err != nil {
		return closedFile{}
	}
	flags, err := unix.FcntlInt(1, unix.F_GETFL, 0)
	null := st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
	if err != nil || null && flags&unix.O_ACCMODE == unix.O_RDWR {
		return closedFile{}
	}
	return &descriptor{fd: 1}
}

type closedFile struct{}

func (closedFile) Write([]byte) (int, error) {
	return 0, errors.New("standard output is closed, or /dev/null opened for reading and writing: pass a pipe or a file, for the result is written there")
}

// A deadline is a context that ends at a time, like context.WithDeadline's, but
// starts a timer for it only if somebody waits, which few calls have to.
type deadline struct {
	context.Context // the parent
	at              time.Time

	mu      sync.Mutex
	waiting context.Context // of context.WithDeadline, once somebody waits
	cancel  func()
}

func (d *deadline) Deadline() (time.Time, bool) {
	if t, ok := d.Context.Deadline(); ok && t.Before(d.at) {
		return t, true
	}
	return d.at, true
}

func (d *deadline) Done() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.waiting == nil {
		d.waiting, d.cancel = context.WithDeadline(d.Context, d.at)
	}
	return d.waiting.Done()
}

func (d *deadline) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.waiting != nil:
		return d.waiting.Err()
	case d.Context.Err() != nil:
		return d.Context.Err()
	case !time.Now().Before(d.at):
		return context.DeadlineExceeded
	}
	return nil
}

// stop ends the waiting of whoever still does.
func (d *deadline) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cancel != nil {
		d.cancel()
	}
}

// readAll reads everything, within bounds of size and, where the reader has
// them, of time.
func readAll(ctx context.Context, r io.Reader, most int) ([]byte, error) {
	if d, ok := r.(interface{ SetReadDeadline(time.Time) error }); ok {
		if by, ok := ctx.Deadline(); ok {
			if err := d.SetReadDeadline(by); err != nil && !errors.Is(err, os.ErrNoDeadline) {
				return nil, err
			}
		}
	}
	return io.ReadAll(io.LimitReader(r, int64(most)))
}

// growStack makes the stack as large as a verb needs while next to nothing is on
// it. Otherwise it doubles three times on the way down, and each time the runtime
// looks up every frame and moves it (ADR 0006).
//
//go:noinline
func growStack(used int) byte {
	if used == 0 { // always: what counts is the size of the frame
		return 0
	}
	var frame [24 << 10]byte
	return frame[used]
}
