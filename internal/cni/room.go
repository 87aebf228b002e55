package cni

import (
	"context"
	"errors"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/published"
	"overlayd.internal/overlay/ipam"
)

// How long an ADD that finds its half full waits for the further block that the
// agent is about to get, and how often it looks.
const (
	roomPatience = 5 * time.Second
	roomPause    = 50 * time.Millisecond
	filedPause   = 4 * roomPause // it opens the store each time
)

// Allocate reserves addresses for the call. The agent asks for a further block
// before the last address is gone, and is woken by every change of a store; a burst
// may be faster. So where nothing is left and the agent can get more, this waits a
// moment for what it publishes. It returns the overlay with the ranges that the
// addresses are from. The error has a CNI code.
func Allocate(ctx context.Context, c *Call, state conf.State, o conf.AgentOverlay, r ipam.Request) (ipam.Allocation, conf.AgentOverlay, error) {
	var until time.Time
	for {
		got, err := allocate(ctx, c, state.CoolingSeconds, r)
		if errors.Is(err, ipam.ErrUnfiled) && awaitFiled(ctx, &until) {
			continue
		}
		// More addresses do not help a bridge that has no port left.
		if exhausted := new(*ipam.ExhaustedError); !errors.As(err, exhausted) || (*exhausted).Stats.PortLimited() {
			return got, o, storeError(err, o)
		}
		if until.IsZero() {
			until = time.Now().Add(roomPatience)
		}
		next, room := awaitRoom(ctx, c, r, until)
		if !room {
			return got, o, storeError(err, o)
		}
		o, r.Ranges = next, next.Ranges(r.By)
	}
}

// awaitFiled waits a moment for the agent to file what Docker has, which it does as
// soon as it has seen a store that was made anew; false: that was long enough.
func awaitFiled(ctx context.Context, until *time.Time) bool {
	if until.IsZero() {
		*until = time.Now().Add(roomPatience)
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(filedPause):
	}
	return time.Now().Before(*until)
}

// storeError is StoreError of an overlay's store.
func storeError(err error, o conf.AgentOverlay) error {
	if exhausted := new(*ipam.ExhaustedError); errors.As(err, exhausted) {
		(*exhausted).Half = o.Info.PoolName((*exhausted).Half)
	}
	return StoreError(err)
}

// allocate is one try. Its error has a code only if the store cannot be opened.
func allocate(ctx context.Context, c *Call, coolingSeconds int, r ipam.Request) (ipam.Allocation, error) {
	store, err := OpenStore(ctx, c, coolingSeconds)
	if err != nil {
		return ipam.Allocation{}, err
	}
	got, err := store.Allocate(ctx, r)
	// Others need not wait for what follows: a large connection table takes longer
	// to read than they would.
	store.Close()
	return got, err
}

// awaitRoom waits until the agent publishes other ranges than those of the request,
// or a retired one may be in use again; false: there will be none.
func awaitRoom(ctx context.Context, c *Call, r ipam.Request, until time.Time) (conf.AgentOverlay, bool) {
	again := time.Now().Add(20 * roomPause)
	for {
		state, err := LoadState(c.Conf)
		if err != nil {
			return conf.AgentOverlay{}, false
		}
		o, _, err := Overlay(state, c.Conf.OverlayName(), r.By)
		switch {
		case err != nil:
			return o, false
		case !slices.Equal(o.Ranges(r.By), r.Ranges):
			return o, true
		case !published.HasRoom(state, o.Info.Name) || time.Now().After(until):
			return o, false
		case time.Now().After(again):
			return o, true
		}
		select {
		case <-ctx.Done():
			return o, false
		case <-time.After(roomPause):
		}
	}
}
