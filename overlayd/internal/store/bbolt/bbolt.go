// Package bbolt keeps the coordinator's data in one file, for one coordinator.
//
// The file holds two buckets: "kv" with every key and "meta" with the format of
// the file, the revision of the last transaction and the digest of all records.
// Commits that wait at the
// same moment share one write to the disk, and yet each of them is a
// transaction of its own, with its own conditions and its own revision.
package bbolt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"

	"overlayd.internal/overlay/internal/boltfile"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// Errors a caller branches on.
var (
	// ErrLocked: another process has the file open.
	ErrLocked = errors.New("another coordinator holds the file")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("the store is closed")
)

// format is the version of the layout described above and in record.go.
const format = 2

// lockTimeout is how long Open waits for another process to let go of the file.
const lockTimeout = time.Second

// pageSize is fixed, so that a file can be carried to a machine with other pages.
const pageSize = boltfile.PageSize

// A batch of commits is bounded so that the first in it need not wait long.
const maxBatch = 512

var (
	bucketKV    = []byte("kv")
	bucketMeta  = []byte("meta")
	keyFormat   = []byte("format")
	keyRevision = []byte("revision")
	keyDigest   = []byte("digest")
)

// Store implements store.Store.
type Store struct {
	db      *bbolt.DB
	path    string
	file    os.FileInfo // of what was opened
	log     *slog.Logger
	history *history
	commit  func(*bbolt.Tx) error // (*bbolt.Tx).Commit; tests make it fail

	requests chan *request
	closing  chan struct{}
	done     chan struct{} // the committer has ended
	close    func() error

	// Of the committer alone:
	revision uint64
	broken   error // set once the file cannot be trusted any more
}

// request is one Commit on its way to the committer. Whoever moves it out of
// waiting owns it: the committer, or a caller that gives up.
type request struct {
	txn    store.Txn
	state  atomic.Int32
	result chan result
}

const (
	waiting int32 = iota
	taken
	abandoned
)

type result struct {
	rev uint64
	err error
}

// Open opens the file at path, or creates it and its directory. The errors say
// what to do; errors.Is(err, ErrLocked) when another process has the file. The
// whole file is read and checked before it is used, so that a damaged one is
// an error here and not a crash later.
func Open(path string, log *slog.Logger) (*Store, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	db, err := openFile(path)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	file, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", errors.Join(err, db.Close()))
	}
	revision, err := prepare(db)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, errors.Join(err, db.Close()))
	}
	s := &Store{
		db: db, path: path, file: file, log: log,
		history:  newHistory(revision),
		commit:   (*bbolt.Tx).Commit,
		requests: make(chan *request, maxBatch),
		closing:  make(chan struct{}),
		done:     make(chan struct{}),
		revision: revision,
	}
	s.close = sync.OnceValue(func() error {
		close(s.closing)
		<-s.done
		s.history.close(ErrClosed)
		return s.db.Close()
	})
	go s.committer()
	return s, nil
}

// List is described with store.Store.
func (s *Store) List(ctx context.Context, prefix string) ([]store.KV, uint64, error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, fmt.Errorf("list %q: %w", prefix, err)
	}
	var list []store.KV
	var revision uint64
	err := s.db.View(func(tx *bbolt.Tx) (err error) {
		if revision, err = readRevision(tx); err != nil {
			return err
		}
		c := tx.Bucket(bucketKV).Cursor()
		for k, v := c.Seek([]byte(prefix)); k != nil && bytes.HasPrefix(k, []byte(prefix)); k, v = c.Next() {
			r, err := decode(k, v)
			if err != nil {
				return err
			}
			list = append(list, r)
		}
		return nil
	})
	if err != nil {
		return nil, 0, fmt.Errorf("list %q: %w", prefix, s.closedError(err))
	}
	return list, revision, nil
}

// Commit is described with store.Store.
func (s *Store) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	if err := store.Validate(txn); err != nil {
		return 0, fmt.Errorf("commit: %w", err)
	}
	r := &request{txn: txn, result: make(chan result, 1)}
	select {
	case <-s.closing: // select picks at random, and the queue may have room
		return 0, fmt.Errorf("commit: %w", ErrClosed)
	default:
	}
	select {
	case s.requests <- r:
	case <-s.closing:
		return 0, fmt.Errorf("commit: %w", ErrClosed)
	case <-ctx.Done():
		return 0, fmt.Errorf("commit: %w", ctx.Err())
	}
	var got result
	select {
	case got = <-r.result:
	case <-s.done:
		// The committer answered everything it took; what is left in the queue
		// it never saw.
		select {
		case got = <-r.result:
		default:
			got = result{err: ErrClosed}
		}
	case <-ctx.Done():
		if r.state.CompareAndSwap(waiting, abandoned) {
			return 0, fmt.Errorf("commit: %w", ctx.Err())
		}
		return 0, fmt.Errorf("commit: %w: %w", store.ErrUnknown, ctx.Err())
	}
	if got.err != nil {
		return 0, fmt.Errorf("commit: %w", got.err)
	}
	return got.rev, nil
}

// Watch is described with store.Store. The events are shared with other
// watchers and must not be modified. A watcher that falls behind by more than
// what is remembered gets ErrCompacted; it never holds up a commit.
func (s *Store) Watch(ctx context.Context, prefix string, after uint64, fn func(rev uint64, events []store.Event) error) error {
	w := s.history.begin(prefix, after)
	defer s.history.end(w)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		changes, more, err := s.history.since(after)
		if errors.Is(err, store.ErrCompacted) {
			s.history.behind(prefix)
		}
		if err != nil {
			return fmt.Errorf("watch %q after revision %d: %w", prefix, after, err)
		}
		for _, c := range changes {
			if events := c.withPrefix(prefix); len(events) > 0 {
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := fn(c.rev, events); err != nil {
					return err
				}
			}
			after = c.rev
		}
		if len(changes) > 0 {
			s.history.took(w, after)
			continue
		}
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Ready is described with store.Store. A file that was deleted, or replaced, is
// still written to, and nobody will find it at the next start.
func (s *Store) Ready(context.Context) error {
	now, err := os.Stat(s.path)
	if err != nil || !os.SameFile(now, s.file) {
		return fmt.Errorf("the file %s was deleted or replaced while it is in use, so what is leased is lost at the next start; "+
			"run `overlayctl backup FILE` now, stop the coordinator, and put the copy back with `overlayctl restore`", s.path)
	}
	return nil
}

// Close is described with store.Store. It may be called more than once.
func (s *Store) Close() error { return s.close() }

func (s *Store) closedError(err error) error {
	select {
	case <-s.closing:
		return ErrClosed
	default:
		return err
	}
}
