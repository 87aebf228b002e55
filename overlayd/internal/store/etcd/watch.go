package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	mvcc "go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// errMoved: the member was left; the watch goes on with another one.
var errMoved = errors.New("the member was left")

// Watch is described with store.Store. When a member fails, the watch goes on
// with the next one from where it was.
func (s *Store) Watch(ctx context.Context, prefix string, after uint64, fn func(rev uint64, events []store.Event) error) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := errors.Join(s.closedError(), s.failure()); err != nil {
			return fmt.Errorf("watch %q after revision %d: %w", prefix, after, err)
		}
		m, moved := s.current()
		err := s.watchMember(ctx, m, prefix, &after, fn)
		var own *fnError
		switch {
		case errors.As(err, &own):
			return own.error
		case errors.Is(err, store.ErrCompacted):
			return fmt.Errorf("watch %q after revision %d: %w", prefix, after, err)
		case ctx.Err() != nil:
			return ctx.Err()
		}
		select { // the probe finds out whether the member can serve
		case <-moved:
		case <-time.After(retryPause):
		case <-ctx.Done():
		case <-s.closing:
		}
	}
}

// fnError is an error of the caller's function.
type fnError struct{ error }

// watchMember watches on one member until that fails or is left, and moves after
// along.
func (s *Store) watchMember(ctx context.Context, m *member, prefix string, after *uint64, fn func(uint64, []store.Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(m.ctx, cancel)
	defer stop()
	stopClosing := make(chan struct{})
	defer close(stopClosing)
	go func() {
		select {
		case <-s.closing:
			cancel()
		case <-stopClosing:
		}
	}()
	for r := range m.client.Watch(ctx, s.prefix+prefix, clientv3.WithPrefix(), clientv3.WithRev(int64(*after)+1)) {
		if r.CompactRevision != 0 || errors.Is(r.Err(), rpctypes.ErrCompacted) {
			return store.ErrCompacted
		}
		if err := r.Err(); err != nil {
			return explain(err)
		}
		if err := s.saw(r.Header); err != nil {
			return err
		}
		if err := s.deliver(r.Events, after, fn); err != nil {
			return err
		}
	}
	return errMoved
}

// deliver calls fn once for each revision among the events, which are in order.
func (s *Store) deliver(events []*clientv3.Event, after *uint64, fn func(uint64, []store.Event) error) error {
	for len(events) > 0 {
		rev, n := events[0].Kv.ModRevision, 0
		var txn []store.Event
		for n < len(events) && events[n].Kv.ModRevision == rev {
			txn = append(txn, s.event(events[n]))
			n++
		}
		events = events[n:]
		if uint64(rev) <= *after {
			continue
		}
		if err := fn(uint64(rev), txn); err != nil {
			return &fnError{err}
		}
		*after = uint64(rev)
	}
	return nil
}

func (s *Store) event(e *clientv3.Event) store.Event {
	kv := s.kv(e.Kv)
	if e.Type == mvcc.DELETE {
		return store.Event{KV: store.KV{Key: kv.Key, Mod: kv.Mod}, Delete: true}
	}
	return store.Event{KV: kv}
}
