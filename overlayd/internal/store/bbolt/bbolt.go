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
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

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

// Keys are limited by bbolt, values so that one transaction cannot fill memory.
const (
	maxKey   = 4 << 10
	maxValue = 1 << 20
)

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
	revision, err := prepare(db)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, errors.Join(err, db.Close()))
	}
	s := &Store{
		db: db, path: path, log: log,
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

// prepare makes the buckets of a new file, checks those of an old one, and
// returns the revision of the last transaction.
func prepare(db *bbolt.DB) (revision uint64, err error) {
	fresh := false
	err = db.View(func(tx *bbolt.Tx) error {
		meta, kv := tx.Bucket(bucketMeta), tx.Bucket(bucketKV)
		if name, _ := tx.Cursor().First(); name == nil {
			fresh = true
			return nil
		} else if meta == nil || kv == nil {
			return fmt.Errorf("it is a bbolt file of another program (it has a bucket %q); give another path", name)
		}
		f := meta.Get(keyFormat)
		if len(f) != 8 {
			return damagedf("the format of the file is not recorded in it")
		}
		if n := binary.BigEndian.Uint64(f); n != format {
			return fmt.Errorf("it has format %d and this program knows format %d; run the version that wrote it", n, format)
		}
		if revision, err = readRevision(tx); err != nil {
			return err
		}
		digest, err := readDigest(meta)
		if err != nil {
			return err
		}
		return checkRecords(kv, revision, digest)
	})
	if fresh {
		err = db.Update(create)
	}
	return revision, err
}

func create(tx *bbolt.Tx) error {
	if _, err := tx.CreateBucket(bucketKV); err != nil {
		return err
	}
	meta, err := tx.CreateBucket(bucketMeta)
	if err != nil {
		return err
	}
	revision := number(0)
	return errors.Join(
		meta.Put(keyFormat, number(format)),
		meta.Put(keyRevision, revision),
		meta.Put(keyDigest, number(fingerprint(keyRevision, revision))))
}

func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func readRevision(tx *bbolt.Tx) (uint64, error) {
	r := tx.Bucket(bucketMeta).Get(keyRevision)
	if len(r) != 8 {
		return 0, damagedf("the revision is not recorded in it")
	}
	return binary.BigEndian.Uint64(r), nil
}

func readDigest(meta *bbolt.Bucket) (uint64, error) {
	d := meta.Get(keyDigest)
	if len(d) != 8 {
		return 0, damagedf("the digest is not recorded in it")
	}
	return binary.BigEndian.Uint64(d), nil
}

// checkRecords reads every record once, and compares their digest with the one
// that was written.
func checkRecords(kv *bbolt.Bucket, revision, digest uint64) error {
	sum := fingerprint(keyRevision, number(revision))
	err := kv.ForEach(func(k, v []byte) error {
		sum += fingerprint(k, v)
		r, err := decode(k, v)
		if err != nil {
			return err
		}
		if r.Mod > revision {
			return damagedf("key %q has revision %d, which is after the last one, %d", k, r.Mod, revision)
		}
		return nil
	})
	if err == nil && sum != digest {
		err = damagedf("the digest of what it holds is %016x and should be %016x, so records are missing", sum, digest)
	}
	return err
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
	if err := validate(txn); err != nil {
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

// validate refuses what bbolt would refuse in the middle of a batch.
func validate(txn store.Txn) error {
	seen := make(map[string]bool, len(txn.Then))
	for _, op := range txn.Then {
		switch {
		case op.Key == "":
			return errors.New("empty key")
		case len(op.Key) > maxKey:
			return fmt.Errorf("key of %d bytes, at most %d fit", len(op.Key), maxKey)
		case len(op.Value) > maxValue:
			return fmt.Errorf("key %q: value of %d bytes, at most %d fit", op.Key, len(op.Value), maxValue)
		case seen[op.Key]:
			return fmt.Errorf("key %q is written twice", op.Key)
		}
		seen[op.Key] = true
	}
	return nil
}

// Watch is described with store.Store. The events are shared with other
// watchers and must not be modified. A watcher that falls behind by more than
// what is remembered gets ErrCompacted; it never holds up a commit.
func (s *Store) Watch(ctx context.Context, prefix string, after uint64, fn func(rev uint64, events []store.Event) error) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		changes, more, err := s.history.since(after)
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
			continue
		}
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
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
