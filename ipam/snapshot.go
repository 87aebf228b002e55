package ipam

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/boltfile"
)

// A Snapshot is the store of one overlay as it was at one moment. Nobody waits for those
// who read it: it is a copy in memory, made without the lock (ADR 0072). It is safe for
// concurrent use.
type Snapshot struct{ s *Store }

// TakeSnapshot copies the store of one overlay. Without Options.Rebuild it fails with
// fs.ErrNotExist where there is none, and with ErrDamaged where it cannot be trusted; with
// it the store is made first, as by Open.
func TakeSnapshot(ctx context.Context, o Options) (*Snapshot, error) {
	s, err := newStore(o)
	if err != nil {
		return nil, err
	}
	whole := false
	for n := 0; n < copyAttempts && !whole && err == nil; n++ {
		whole, err = s.openCopy()
	}
	switch {
	case whole && err == nil:
		return &Snapshot{s}, nil
	case errors.Is(err, fs.ErrNotExist) && o.Rebuild == nil:
	default: // programs write again and again, or something is wrong with the file
		err = s.openLockedCopy(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("read address store %s: %w", s.path, err)
	}
	return &Snapshot{s}, nil
}

// copyAttempts is how often a copy is made without the lock. One takes less than a
// transaction.
const copyAttempts = 3

// openLockedCopy copies the store while nobody writes to it.
func (s *Store) openLockedCopy(ctx context.Context) error {
	if s.o.Rebuild != nil {
		made, err := Open(ctx, s.o)
		if err != nil {
			return err
		}
		defer made.Close()
		s.repaired = made.Repaired()
	} else {
		lock, err := lockFile(ctx, s.lockPath(), s.o.LockTimeout)
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	_, err := s.openCopy()
	return err
}

// openCopy opens a copy of the file. whole: it is what a transaction has left.
func (s *Store) openCopy() (whole bool, err error) {
	if s.copy, whole, err = copyFile(s.path); err != nil || !whole {
		return whole, err
	}
	if err = s.openChecked(); err != nil {
		s.Close()
	}
	return true, err
}

// metaPages are the first two, which say where all others are.
const metaPages = 2 * boltfile.PageSize

// copyFile copies a file to memory. bbolt writes to pages that the last transaction does
// not use, and then to a meta page: so where the meta pages have not changed meanwhile,
// the pages they lead to have not either.
func copyFile(path string) (_ *os.File, whole bool, _ error) {
	f, err := openRegular(path)
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	fail := func(err error) (*os.File, bool, error) { return nil, false, fmt.Errorf("copy %s: %w", path, err) }
	length, err := sizeOf(f)
	if err != nil {
		return fail(err)
	}
	content, size := make([]byte, length), min(length, metaPages)
	before, after := make([]byte, size), make([]byte, size)
	for _, b := range [][]byte{before, content, after} {
		if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
			return fail(err)
		}
	}
	if !bytes.Equal(before, after) || !bytes.Equal(before, content[:size]) {
		return nil, false, nil
	}
	fd, err := unix.MemfdCreate("overlay-ipam", unix.MFD_CLOEXEC)
	if err != nil {
		return fail(err)
	}
	memory := os.NewFile(uintptr(fd), path)
	if _, err := memory.Write(content); err != nil {
		memory.Close()
		return fail(err)
	}
	return memory, true, nil
}

// Close frees the copy. It may be called twice.
func (s *Snapshot) Close() error { return s.s.Close() }

// Repaired is Store.Repaired of a store that had to be made first.
func (s *Snapshot) Repaired() string { return s.s.Repaired() }

// EarlierBoot reports whether the file is of an earlier boot: what was in use then rests
// in the snapshot from when it was taken, and in the file as soon as it is opened.
func (s *Snapshot) EarlierBoot() bool { return s.s.earlier }

// Get is Store.Get.
func (s *Snapshot) Get(ctx context.Context, a conf.Attachment) (Record, bool, error) {
	return s.s.Get(ctx, a)
}

// List is Store.List.
func (s *Snapshot) List(ctx context.Context) ([]Record, error) { return s.s.List(ctx) }

// Stats is Store.Stats.
func (s *Snapshot) Stats(ctx context.Context, name conf.Half, ranges []netip.Prefix) ([]Stats, error) {
	return s.s.Stats(ctx, name, ranges)
}

// Verify is Store.Verify.
func (s *Snapshot) Verify(ctx context.Context) ([]string, error) { return s.s.Verify(ctx) }

// Unfiled is Store.Unfiled.
func (s *Snapshot) Unfiled(ctx context.Context) ([]conf.Half, error) { return s.s.Unfiled(ctx) }

// Retired is Store.Retired.
func (s *Snapshot) Retired(ctx context.Context, name conf.Half, ranges []netip.Prefix) ([]netip.Prefix, error) {
	return s.s.Retired(ctx, name, ranges)
}
