package coordinator_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// two are two coordinators on one store.
func two(t *testing.T) (a, b *bubble) {
	t.Helper()
	s := newStore(t)
	a = bubbleWith(t, coordinator.Options{Store: s, Shared: true})
	return a, bubbleWith(t, coordinator.Options{Store: s, Shared: true})
}

// Who is connected to one coordinator is alive for every other.
func TestConnectedElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := two(t)
		lease := a.register("x", "10.0.0.1")
		_, disconnect := a.connect("x")
		time.Sleep(time.Hour)
		b.refuses("x", "10.0.0.2", "agent id x", "10.0.0.1", "--agent-id")
		b.refuses("y", "10.0.0.1", "agent x", "connected")
		if got := b.register("x", "10.0.0.1"); got.Epoch != lease.Epoch {
			t.Error("a renewal elsewhere changed the lease")
		}
		disconnect()
		time.Sleep(time.Second)
		b.refuses("y", "10.0.0.1", "agent x", "may be alive")
		if moved := b.register("x", "10.0.0.2"); moved.Epoch <= lease.Epoch || moved.VTEP != lease.VTEP {
			t.Errorf("lease after the move %+v, before %+v", moved, lease)
		}
	})
}

// An agent that moves to another coordinator is where it is, though the first one
// notices later that it has gone.
func TestMovesToAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := two(t)
		a.register("x", "10.0.0.1")
		_, disconnectA := a.connect("x")
		time.Sleep(time.Second)
		_, disconnectB := b.connect("x")
		defer disconnectB()
		time.Sleep(time.Second)
		disconnectA()
		time.Sleep(time.Hour)
		a.refuses("x", "10.0.0.2", "agent id x")
		a.refuses("y", "10.0.0.1", "agent x", "connected")
	})
}

// The agents of a coordinator that has died are connected no longer, and were last
// seen when it was.
func TestCoordinatorDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t)
		cut := &unreachable{Store: s}
		a, b := bubbleWith(t, coordinator.Options{Store: cut, Shared: true}), bubbleWith(t, coordinator.Options{Store: s, Shared: true})
		a.register("x", "10.0.0.1")
		_, disconnect := a.connect("x")
		time.Sleep(time.Hour)
		cut.off.Store(true) // who dies does not write that he ends
		a.stop()
		disconnect()
		died := time.Now()
		time.Sleep(5 * time.Second)
		b.refuses("x", "10.0.0.2", "agent id x")
		time.Sleep(2 * time.Minute)
		if moved := b.register("x", "10.0.0.2"); moved.AgentIP.String() != "10.0.0.2" {
			t.Errorf("%+v", moved)
		}
		seen := b.lastSeen("x")
		if seen.Before(died) {
			t.Errorf("last seen at %s, before it registered", seen)
		}
	})
}

// The agents of a coordinator that ends in order are free at once.
func TestCoordinatorEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := two(t)
		a.register("x", "10.0.0.1")
		_, disconnect := a.connect("x")
		time.Sleep(time.Hour)
		a.stop()
		disconnect()
		if moved := b.register("x", "10.0.0.2"); moved.AgentIP.String() != "10.0.0.2" {
			t.Errorf("%+v", moved)
		}
	})
}

// unreachable is a real store to which nothing gets any more once it is off.
type unreachable struct {
	store.Store
	off atomic.Bool
}

func (u *unreachable) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	if u.off.Load() {
		return 0, errors.New("the store cannot be reached")
	}
	return u.Store.Commit(ctx, txn)
}

func (b *bubble) lastSeen(id string) time.Time {
	b.t.Helper()
	for _, a := range b.Agents() {
		if a.AgentID == id {
			return a.LastSeen
		}
	}
	b.t.Fatalf("no agent %s", id)
	return time.Time{}
}

// When an agent was seen last survives restarts, also of an agent that was
// connected when the coordinator ended.
func TestLastSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t)
		b := inBubble(t, s)
		b.register("left", "10.0.0.1")
		b.register("stays", "10.0.0.2")
		_, disconnect := b.connect("left")
		_, disconnectStays := b.connect("stays")
		time.Sleep(time.Hour)
		disconnect()
		left := time.Now()
		time.Sleep(time.Hour)
		stayed := time.Now()
		if seen := b.lastSeen("stays"); stayed.Sub(seen) > time.Second {
			t.Errorf("a connected agent was last seen at %s, now it is %s", seen, stayed)
		}
		b.stop()
		disconnectStays()
		for range 3 {
			b = inBubble(t, s)
			time.Sleep(time.Hour)
			if seen := b.lastSeen("left"); seen.Sub(left).Abs() > time.Second {
				t.Errorf("last seen at %s, want %s", seen, left)
			}
			if seen := b.lastSeen("stays"); seen.Sub(stayed).Abs() > time.Second {
				t.Errorf("last seen at %s, want %s", seen, stayed)
			}
			b.stop()
		}
	})
}

// An agent that was at one coordinator once, and at another since, was seen there
// last, whether it left or the other one died.
func TestLastSeenElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := two(t)
		a.register("x", "10.0.0.1")
		_, disconnect := a.connect("x")
		time.Sleep(time.Minute)
		disconnect()
		at := func(want time.Time) {
			t.Helper()
			if seen := a.lastSeen("x"); seen.Sub(want).Abs() > 10*time.Second {
				t.Errorf("last seen at %s, want %s", seen, want)
			}
			gone, err := a.Prune(t.Context(), api.PruneRequest{NotSeenSeconds: 3600})
			if err != nil || len(gone) > 0 {
				t.Errorf("pruned %v, %v", gone, err)
			}
		}
		time.Sleep(2 * time.Hour)
		_, disconnect = b.connect("x")
		time.Sleep(time.Minute)
		disconnect()
		left := time.Now()
		time.Sleep(10 * time.Minute)
		at(left)

		_, disconnect = b.connect("x")
		time.Sleep(90 * time.Minute)
		b.stop()
		disconnect()
		left = time.Now()
		time.Sleep(10 * time.Minute)
		at(left)
	})
}

// Beats go on, and who comes and goes is written, after a time in which the store
// took no writes.
func TestPresenceAfterFailedWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t)
		failing := &full{Store: s}
		a := bubbleWith(t, coordinator.Options{Store: failing, Shared: true})
		b := bubbleWith(t, coordinator.Options{Store: s, Shared: true})
		a.register("x", "10.0.0.1")
		a.register("y", "10.0.0.2")
		_, disconnectX := a.connect("x")
		time.Sleep(time.Second)
		failing.now.Store(true)
		disconnectX()
		left := time.Now()
		time.Sleep(time.Second)
		_, disconnectY := a.connect("y") // while what failed waits for the next beat
		defer disconnectY()
		time.Sleep(10 * time.Second)
		failing.now.Store(false)
		time.Sleep(time.Minute)
		b.refuses("y", "10.0.0.3", "agent id y", "10.0.0.2")
		if seen := b.lastSeen("x"); seen.Sub(left).Abs() > time.Second {
			t.Errorf("last seen at %s, want %s", seen, left)
		}
	})
}

// An agent that was back for a moment, between two beats, was seen then.
func TestSeenForAMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t)
		b := inBubble(t, s)
		b.register("x", "10.0.0.1")
		var last time.Time
		for range 2 {
			_, disconnect := b.connect("x")
			time.Sleep(time.Minute)
			disconnect()
			last = time.Now()
			time.Sleep(time.Hour)
		}
		b.stop()
		b = inBubble(t, s)
		if seen := b.lastSeen("x"); seen.Sub(last).Abs() > time.Second {
			t.Errorf("last seen at %s, want %s", seen, last)
		}
	})
}

// Presence is not written for agents that stay: a coordinator that has the store
// for itself writes a beat now and then, whatever their number.
func TestPresenceWritesLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t)
		b := inBubble(t, s)
		for i := range 20 {
			b.register(nth(i).AgentID, nth(i).AgentIP.String())
			_, disconnect := b.connect(nth(i).AgentID)
			defer disconnect()
		}
		time.Sleep(time.Second)
		before := revision(t, s)
		time.Sleep(10*time.Minute - 2*time.Second)
		if after := revision(t, s); after-before > 10 {
			t.Errorf("%d writes in ten minutes", after-before)
		}
	})
}
