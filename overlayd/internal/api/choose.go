package api

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"time"
)

const (
	// MoveOnTimeout is how long one of several coordinators may take before the
	// next is asked.
	MoveOnTimeout = 3 * time.Second
	// MoveOnSilence ends a watch at one of several coordinators on which nothing
	// was received for so long.
	MoveOnSilence = HeartbeatInterval + MoveOnTimeout
)

// Spread puts the coordinators into an order of the client's own, so that many
// clients with the same URLs spread over them, and those of one that ends over
// the rest. The first in that order is the client's home. It is called before
// the first request.
func (c *Client) Spread() {
	rand.Shuffle(len(c.order), func(i, j int) { c.order[i], c.order[j] = c.order[j], c.order[i] })
}

// Within is for a caller who waits no longer than that for all coordinators: each gets
// its share, so that the last is asked as well. It is called before the first request.
func (c *Client) Within(all time.Duration) {
	c.moveOn = min(MoveOnTimeout, all/time.Duration(len(c.order)))
}

// Return moves a client that is not at its home back there, if that is ready
// again, and reports whether it did. Without it, one that returns would have
// nothing to do until another one ends.
func (c *Client) Return(ctx context.Context) bool {
	if c.good.Load() == 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, MoveOnTimeout)
	defer cancel()
	if c.once(ctx, http.MethodGet, c.url(0)+PathReady, nil, nil) != nil {
		return false
	}
	c.good.Store(0)
	return true
}

// Reconnect ends connections that are not in use: they are of an address that
// this host may not have any more.
func (c *Client) Reconnect() { c.hc.CloseIdleConnections() }

// MoveOn leaves the present coordinator for the next, for a caller who knows a
// reason that its answers do not show.
func (c *Client) MoveOn() { c.good.Store(uint32((int(c.good.Load()) + 1) % len(c.order))) }

// url is the n-th in the client's own order.
func (c *Client) url(n int) string { return c.urls[c.order[n]] }

// try calls f for one URL after the other, the last good one first, until one
// gives an answer. f reports whether it got through; then its error is final.
// limit is how long f is to wait for the first sign of an answer, and silence
// for further ones; the last to be asked gets all the time.
func (c *Client) try(ctx context.Context, f func(base string, limit, silence time.Duration) (through bool, err error)) error {
	first := int(c.good.Load())
	var failed []error
	for i := range c.order {
		n := (first + i) % len(c.order)
		limit, silence := c.moveOn, MoveOnSilence
		if i == len(c.order)-1 {
			limit = RequestTimeout
		}
		if len(c.order) == 1 {
			silence = WatchTimeout
		}
		through, err := f(c.url(n), limit, silence)
		if through || err == nil || answered(err) {
			c.good.Store(uint32(n))
			return err
		}
		if ctx.Err() != nil {
			return err
		}
		failed = append(failed, err)
	}
	// The next call starts with another one, in case this one only hangs.
	c.good.Store(uint32((first + 1) % len(c.order)))
	return errors.Join(failed...)
}

// answered reports whether err is a coordinator's own decision.
func answered(err error) bool {
	var e *Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Code {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return false
	}
	return true
}
