package bbolt

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// Where many commit at the same time the committer waits for company: a batch
// costs about as much as the pages it touches, however many commits it holds.
// Commits that come one by one do not wait.
const (
	busy   = 4 // commits in the batch before
	gather = 3 * time.Millisecond
)

// committer is the one writer. While it waits for the disk the next requests
// gather in the queue, so that under load many share one fsync.
func (s *Store) committer() {
	defer close(s.done)
	timer := time.NewTimer(0)
	defer timer.Stop()
	last := 0
	for {
		var batch []*request
		select {
		case r := <-s.requests:
			batch = append(batch, r)
		case <-s.closing:
			return
		}
		if last >= busy {
			timer.Reset(gather)
			batch = s.company(batch, timer.C)
		}
		batch = s.queued(batch)
		last = len(batch)
		s.run(batch)
	}
}

// queued adds what has come.
func (s *Store) queued(batch []*request) []*request {
	for len(batch) < maxBatch {
		select {
		case r := <-s.requests:
			batch = append(batch, r)
		default:
			return batch
		}
	}
	return batch
}

// company adds what comes until the time is over, the batch is full, or the
// store is closing.
func (s *Store) company(batch []*request, over <-chan time.Time) []*request {
	for len(batch) < maxBatch {
		select {
		case r := <-s.requests:
			batch = append(batch, r)
		case <-over:
			return batch
		case <-s.closing:
			return batch
		}
	}
	return batch
}

// outcome is what became of one request inside a batch that is not yet durable.
type outcome struct {
	request *request
	rev     uint64
	err     error
}

// run commits a batch and answers everybody in it.
func (s *Store) run(batch []*request) {
	var live []*request
	for _, r := range batch {
		if r.state.CompareAndSwap(waiting, taken) {
			live = append(live, r)
		}
	}
	if len(live) == 0 {
		return
	}
	outcomes, changes, err := s.write(live)
	if err == nil || errors.Is(err, store.ErrUnknown) {
		if n := len(changes); n > 0 {
			s.revision = changes[n-1].rev
		}
		s.history.add(changes)
	}
	for _, o := range outcomes {
		if err != nil {
			o.rev, o.err = 0, err // also a conflict: it may be one with a change that was not written
		}
		o.request.result <- result{o.rev, o.err}
	}
}

// write runs the requests in one bbolt transaction. A condition that does not
// hold fails its own request only. The error is that of the batch as a whole:
// nothing was written, unless it is ErrUnknown.
func (s *Store) write(live []*request) (outcomes []outcome, changes []change, err error) {
	refuse := func(err error) ([]outcome, []change, error) {
		outcomes = outcomes[:0]
		for _, r := range live {
			outcomes = append(outcomes, outcome{request: r})
		}
		return outcomes, nil, err
	}
	if s.broken != nil {
		return refuse(s.broken)
	}
	tx, err := s.db.Begin(true)
	if err != nil {
		return refuse(fmt.Errorf("nothing was written: %w", err))
	}
	meta := tx.Bucket(bucketMeta)
	digest, err := readDigest(meta)
	if err != nil {
		return refuse(errors.Join(fmt.Errorf("nothing was written: %w", err), tx.Rollback()))
	}
	rev, kv := s.revision, &records{Bucket: tx.Bucket(bucketKV)}
	for _, r := range live {
		o := outcome{request: r, rev: rev}
		c, err := apply(kv, r.txn, rev+1)
		switch {
		case errors.Is(err, store.ErrConflict):
			o.rev, o.err = 0, err
		case err != nil:
			return refuse(errors.Join(fmt.Errorf("nothing was written: %w", err), tx.Rollback()))
		case len(c.events) > 0:
			rev++
			o.rev = rev
			changes = append(changes, c)
		}
		outcomes = append(outcomes, o)
	}
	if len(changes) == 0 {
		return outcomes, nil, tx.Rollback()
	}
	before, after := number(s.revision), number(rev)
	digest += kv.change + fingerprint(keyRevision, after) - fingerprint(keyRevision, before)
	if err := errors.Join(meta.Put(keyRevision, after), meta.Put(keyDigest, number(digest))); err != nil {
		return refuse(errors.Join(fmt.Errorf("nothing was written: %w", err), tx.Rollback()))
	}
	if err := s.commit(tx); err != nil {
		return outcomes, changes, s.readBack(err, rev)
	}
	return outcomes, changes, nil
}

// readBack finds out what a failed commit has left. An error does not mean that
// nothing was written: when only the last sync fails, the transaction is in the
// file and seen by every reader, but may be lost with the power.
func (s *Store) readBack(cause error, rev uint64) error {
	var found uint64
	err := s.db.View(func(tx *bbolt.Tx) (err error) {
		found, err = readRevision(tx)
		return err
	})
	switch {
	case err == nil && found == s.revision:
		s.log.Error("commit failed, nothing was written", "path", s.path, "err", cause)
		return fmt.Errorf("nothing was written: %w", cause)
	case err == nil && found == rev:
		s.log.Error("commit may not survive a power failure; check the disk", "path", s.path, "err", cause)
		return fmt.Errorf("%w: %w", store.ErrUnknown, cause)
	}
	s.broken = fmt.Errorf("the store failed earlier and must be reopened: %w", errors.Join(cause, err))
	s.history.close(s.broken)
	s.log.Error("store unusable; restart the coordinator", "path", s.path, "err", s.broken)
	return fmt.Errorf("%w: %w", store.ErrUnknown, s.broken)
}

// apply checks the conditions and writes the operations of one transaction. A
// delete of a key that is not there is no event; a transaction without events
// has no revision of its own.
func apply(kv *records, txn store.Txn, rev uint64) (change, error) {
	for _, c := range txn.If {
		if c.Prefix {
			if err := kv.unchanged([]byte(c.Key), c.Mod); err != nil {
				return change{}, err
			}
			continue
		}
		var mod uint64
		if b := kv.Get([]byte(c.Key)); b != nil {
			r, err := decode([]byte(c.Key), b)
			if err != nil {
				return change{}, err
			}
			mod = r.Mod
		}
		if mod != c.Mod {
			return change{}, fmt.Errorf("%w: key %q is at revision %d, not %d", store.ErrConflict, c.Key, mod, c.Mod)
		}
	}
	ch := change{rev: rev}
	for _, op := range txn.Then {
		key := []byte(op.Key)
		var old []byte
		if !absent(txn.If, op.Key) {
			old = kv.Get(key)
		}
		e := store.Event{KV: store.KV{Key: op.Key, Mod: rev}, Delete: op.Delete}
		if op.Delete {
			if old == nil {
				continue
			}
			if err := kv.delete(key, old); err != nil {
				return change{}, err
			}
			ch.events = append(ch.events, e)
			continue
		}
		e.Create = rev
		if old != nil {
			r, err := decode(key, old)
			if err != nil {
				return change{}, err
			}
			e.Create = r.Create
		}
		e.Value = append([]byte{}, op.Value...)
		if err := kv.put(key, old, encode(key, e.Create, rev, op.Value)); err != nil {
			return change{}, err
		}
		ch.events = append(ch.events, e)
	}
	return ch, nil
}

// absent reports whether it is a condition, which was checked, that a key is not there:
// a search less for nearly all that a new agent gets.
func absent(conds []store.Cond, key string) bool {
	return slices.ContainsFunc(conds, func(c store.Cond) bool { return c.Mod == 0 && !c.Prefix && c.Key == key })
}

// records are the records in a transaction, and by how much it changes the digest.
type records struct {
	*bbolt.Bucket
	change uint64
}

// unchanged fails with ErrConflict when a key that begins with prefix was modified
// after a revision.
func (r *records) unchanged(prefix []byte, after uint64) error {
	c := r.Cursor()
	for key, b := c.Seek(prefix); bytes.HasPrefix(key, prefix); key, b = c.Next() {
		kv, err := decode(key, b)
		if err != nil {
			return err
		}
		if kv.Mod > after {
			return fmt.Errorf("%w: key %q is at revision %d, after %d", store.ErrConflict, key, kv.Mod, after)
		}
	}
	return nil
}

// put and delete take what Get returns for the key.

func (r *records) put(key, old, value []byte) error {
	if old != nil {
		r.change -= fingerprint(key, old)
	}
	r.change += fingerprint(key, value)
	return r.Put(key, value)
}

func (r *records) delete(key, old []byte) error {
	r.change -= fingerprint(key, old)
	return r.Delete(key)
}
