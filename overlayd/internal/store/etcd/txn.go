package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	mvcc "go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"overlayd.internal/overlay/overlayd/internal/store"
)

const (
	// listPage is how many keys one call returns.
	listPage = 5000
	// readTimeout is how long a read is tried, on whichever members.
	readTimeout = 10 * time.Second
)

// errCompactedMeanwhile: a list took so long that etcd forgot its revision.
var errCompactedMeanwhile = errors.New("the revision was compacted while it was listed")

// List is described with store.Store. It is linearizable.
func (s *Store) List(ctx context.Context, prefix string) ([]store.KV, uint64, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, readTimeout, fmt.Errorf("%w after %s", context.DeadlineExceeded, readTimeout))
	defer cancel()
	for {
		kvs, rev, err := s.list(ctx, prefix)
		if errors.Is(err, errCompactedMeanwhile) {
			continue
		}
		if err != nil {
			return nil, 0, fmt.Errorf("list %q: %w", prefix, err)
		}
		return kvs, rev, nil
	}
}

// list reads page after page, all at the revision of the first.
func (s *Store) list(ctx context.Context, prefix string) (kvs []store.KV, rev uint64, err error) {
	from, end := s.prefix+prefix, clientv3.GetPrefixRangeEnd(s.prefix+prefix)
	for {
		r, err := s.read(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(listPage), clientv3.WithRev(int64(rev)))
		if errors.Is(err, rpctypes.ErrCompacted) && rev != 0 {
			return nil, 0, errCompactedMeanwhile
		} else if err != nil {
			return nil, 0, err
		}
		if rev == 0 {
			rev = uint64(r.Header.Revision)
		}
		for _, kv := range r.Kvs {
			kvs = append(kvs, s.kv(kv))
		}
		if !r.More {
			return kvs, rev, nil
		}
		from = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
}

// read gets keys from whichever member answers. It waits for one until ctx ends.
func (s *Store) read(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	for {
		if err := errors.Join(ctx.Err(), s.closedError(), s.failure()); err != nil {
			return nil, err
		}
		m, moved := s.current()
		before := s.high.Load()
		r, err := call(ctx, m, func(ctx context.Context) (*clientv3.GetResponse, error) {
			return m.client.Get(ctx, key, opts...)
		})
		switch {
		case err == nil:
			return r, s.sawLinearized(m, r.Header, before)
		case errors.Is(err, rpctypes.ErrCompacted), refused(err):
			return nil, explain(err)
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%w (%w)", ctx.Err(), explain(err))
		}
		select {
		case <-moved:
		case <-time.After(retryPause):
		case <-ctx.Done():
		case <-s.closing:
		}
	}
}

// call runs one call to a member within callTimeout; it ends when the member is left.
func call[T any](ctx context.Context, m *member, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	stop := context.AfterFunc(m.ctx, cancel)
	defer stop()
	return f(ctx)
}

func (s *Store) kv(kv *mvcc.KeyValue) store.KV {
	value := kv.Value
	if value == nil {
		value = []byte{}
	}
	return store.KV{
		Key: strings.TrimPrefix(string(kv.Key), s.prefix), Value: value,
		Create: uint64(kv.CreateRevision), Mod: uint64(kv.ModRevision),
	}
}

// Commit is described with store.Store. It is one transaction of etcd, sent once:
// when the answer does not come, only reading tells whether it was carried out.
func (s *Store) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	if err := store.Validate(txn); err != nil {
		return 0, fmt.Errorf("commit: %w", err)
	}
	if err := errors.Join(ctx.Err(), s.closedError(), s.failure()); err != nil {
		return 0, fmt.Errorf("commit: %w", err)
	}
	var conds []clientv3.Cmp
	for _, c := range txn.If {
		if c.Prefix {
			conds = append(conds, clientv3.Compare(clientv3.ModRevision(s.prefix+c.Key), "<", int64(c.Mod)+1).WithPrefix())
			continue
		}
		conds = append(conds, clientv3.Compare(clientv3.ModRevision(s.prefix+c.Key), "=", int64(c.Mod)))
	}
	var ops []clientv3.Op
	for _, op := range txn.Then {
		if op.Delete {
			ops = append(ops, clientv3.OpDelete(s.prefix+op.Key))
		} else {
			ops = append(ops, clientv3.OpPut(s.prefix+op.Key, string(op.Value)))
		}
	}
	otherwise := []clientv3.Op{}
	if len(ops) == 0 {
		// Without any operation a member compares with what it has itself, which
		// may be old. A read in both branches makes it ask the others first.
		read := clientv3.OpGet(s.prefix, clientv3.WithCountOnly())
		ops, otherwise = append(ops, read), append(otherwise, read)
	}
	m, _ := s.current()
	r, err := call(ctx, m, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return m.client.Txn(ctx).If(conds...).Then(ops...).Else(otherwise...).Commit()
	})
	switch {
	case err != nil && refused(err):
		if errors.Is(rpctypes.Error(err), rpctypes.ErrNoSpace) {
			s.setNoSpace(true)
		}
		return 0, fmt.Errorf("commit: nothing was written: %w", explain(err))
	case err != nil:
		if ctx.Err() != nil {
			err = errors.Join(ctx.Err(), err)
		}
		return 0, fmt.Errorf("commit: %w: %w", store.ErrUnknown, explain(err))
	}
	if err := s.saw(r.Header); err != nil {
		return 0, fmt.Errorf("commit: %w: %w", store.ErrUnknown, err)
	}
	if !r.Succeeded {
		return 0, fmt.Errorf("commit: %w", store.ErrConflict)
	}
	if len(txn.Then) > 0 {
		s.setNoSpace(false)
	}
	return uint64(r.Header.Revision), nil
}
