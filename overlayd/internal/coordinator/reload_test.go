package coordinator_test

import (
	"bytes"
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// losing is a real store of whose changes one is lost: that somebody asks whether an
// agent lives.
type losing struct {
	store.Store
	lost atomic.Bool
}

func (l *losing) Watch(ctx context.Context, prefix string, after uint64, fn func(uint64, []store.Event) error) error {
	err := l.Store.Watch(ctx, prefix, after, func(rev uint64, events []store.Event) error {
		for _, e := range events {
			if strings.HasPrefix(e.Key, "seen/") && bytes.Contains(e.Value, []byte(`"asks"`)) && l.lost.CompareAndSwap(false, true) {
				return errEnough
			}
		}
		return fn(rev, events)
	})
	if err != nil && l.lost.Load() && ctx.Err() == nil {
		return store.ErrCompacted
	}
	return err
}

// A coordinator that reads the store anew finds what another one asks of it there, as
// if it had been told: here, whether a host lives of which a copy came elsewhere.
func TestAskedWhileBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t)
		behind := &losing{Store: s}
		a, b := bubbleWith(t, coordinator.Options{Store: behind, Shared: true}), bubbleWith(t, coordinator.Options{Store: s, Shared: true})
		if _, err := a.Register(t.Context(), instanceOf("one", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		events, disconnect := a.connect("a")
		defer disconnect()
		time.Sleep(time.Second)
		for len(events) > 0 {
			<-events
		}
		if l, err := b.Register(t.Context(), instanceOf("copy", "10.0.0.1", "one")); err == nil {
			t.Fatalf("the copy got %+v", l)
		}
		synctest.Wait()
		asked := false
		for len(events) > 0 {
			e := <-events
			asked = asked || e.Register
		}
		if !behind.lost.Load() || !asked {
			t.Errorf("a change was lost: %t; the host was asked whether it lives: %t", behind.lost.Load(), asked)
		}
	})
}
