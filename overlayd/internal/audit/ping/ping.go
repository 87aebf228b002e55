// Package ping measures the ways from this host to others through the overlay:
// loss, round trip, and the largest packet that goes there and back.
package ping

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit/echo"
)

// Target is an address to measure the way to, and the host that it is on.
type Target struct {
	Address netip.Addr
	AgentIP netip.Addr
	AgentID string
}

// TargetOf is the VTEP of a peer as the host that has published a state reaches it.
// Where they have no family in common it is one that does not answer.
func TargetOf(state conf.State, p conf.Peer) Target {
	return Target{Address: cmp.Or(state.VTEPOf(&p), p.VTEP()), AgentIP: p.AgentIP, AgentID: p.AgentID}
}

// From are the options for measuring from the host that has published a state.
func From(state conf.State, count int, wait time.Duration) Options {
	o := Options{From: state.IP, MTU: state.MTU, Count: count, Wait: wait}
	if len(state.Overlays) > 0 {
		o.Source = state.Overlays[0].Backend.VXLAN.VTEPIP.Addr()
	}
	return o
}

// Options say how to measure.
type Options struct {
	From     netip.Addr // agent IP of this host, for the result
	Source   netip.Addr // IPv4 address that probes are sent from; zero: the kernel's choice
	MTU      int        // of this host's overlay devices; nothing larger is tried
	Count    int        // probes to each target, to measure loss and round trip
	Wait     time.Duration
	Progress func(done, all int) // of targets, may be nil
}

// Result is what was measured of one way.
type Result = api.Way

const (
	// parallel is how many targets are measured at once. Their answers fit in the
	// buffer of one socket.
	parallel = api.SurveyParallel
	// least is the size of the small probes; every way carries them, or none.
	least = 64
	// pause lies between two probes to the same target.
	pause = api.SurveyPause
	// tries is how often a packet of a size has to be lost before the way does not
	// carry it.
	tries = 2
)

// Run measures the ways to all targets, some at a time. It needs root, and sends
// from the network namespace of the calling thread. When ctx ends, the error is its
// cause, and what was measured until then is returned: a path MTU that is 0 of a way
// that answers was not found yet.
func Run(ctx context.Context, o Options, targets []Target) ([]Result, error) {
	results := make([]Result, 0, len(targets))
	for first := 0; first < len(targets); first += parallel {
		part := targets[first:min(first+parallel, len(targets))]
		rows, err := o.measure(ctx, part)
		results = append(results, rows...)
		if err != nil {
			return results, err
		}
		if o.Progress != nil {
			o.Progress(len(results), len(targets))
		}
	}
	return results, nil
}

func (o Options) measure(ctx context.Context, targets []Target) ([]Result, error) {
	rows := make([]Result, len(targets))
	for i, t := range targets {
		rows[i] = Result{From: o.From, To: t.AgentIP, AgentID: t.AgentID, Address: t.Address, MTU: o.MTU}
	}
	everyone := make([]int, len(targets))
	sizes := make([]int, len(targets))
	for i := range everyone {
		everyone[i], sizes[i] = i, least
	}
	err := o.rounds(ctx, rows, everyone, sizes)
	if err != nil && rows[0].Sent == 0 {
		return nil, err // of none of them anything is known
	}
	for i := range rows {
		finish(&rows[i])
	}
	if err == nil {
		err = o.pathMTU(ctx, rows)
	}
	return rows, err
}

// rounds sends a probe to everyone as often as was asked for.
func (o Options) rounds(ctx context.Context, rows []Result, everyone, sizes []int) error {
	if _, err := o.send(ctx, rows, everyone, sizes); err != nil { // neighbours may have to be looked for first
		return err
	}
	for range o.Count {
		round, err := o.send(ctx, rows, everyone, sizes)
		if err != nil {
			return err
		}
		for i, rtt := range round {
			count(&rows[i], rtt)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
	return nil
}

// count takes one answer, or silence, into the row.
func count(r *Result, rtt time.Duration) {
	r.Sent++
	if rtt == echo.Silence {
		return
	}
	ms := float64(rtt.Microseconds()) / 1000
	if r.Received == 0 || ms < r.Min {
		r.Min = ms
	}
	r.Received++
	r.Avg += ms
	r.Max = max(r.Max, ms)
}

func finish(r *Result) {
	if r.Received > 0 {
		r.Avg /= float64(r.Received)
	}
	if r.Sent > 0 {
		r.Loss = 100 * float64(r.Sent-r.Received) / float64(r.Sent)
	}
}

// send sends one probe to each of some rows and returns the answers of these.
func (o Options) send(ctx context.Context, rows []Result, which, sizes []int) ([]time.Duration, error) {
	requests := make([]echo.Request, len(which))
	for i, row := range which {
		requests[i] = echo.Request{To: rows[row].Address, Size: sizes[i]}
		if rows[row].Address.Is4() {
			requests[i].From = o.Source
		}
	}
	answers, err := echo.Send(ctx, o.Wait, requests)
	if err != nil {
		return nil, fmt.Errorf("send probes (this needs root): %w", err)
	}
	if ctx.Err() != nil { // then silence says nothing
		return nil, context.Cause(ctx)
	}
	return answers, nil
}

// pathMTU finds for every row that answers the largest packet that goes there and
// back unfragmented: the whole MTU first, and where that is lost by halving.
func (o Options) pathMTU(ctx context.Context, rows []Result) error {
	low, high := make([]int, len(rows)), make([]int, len(rows))
	next := make([]int, len(rows))
	defer func() {
		for i := range rows {
			if rows[i].Received > 0 && low[i] >= high[i] {
				rows[i].PathMTU = low[i]
			}
		}
	}()
	for i := range rows {
		low[i], high[i], next[i] = least, o.MTU, o.MTU
		if rows[i].Received == 0 {
			high[i] = 0
		}
	}
	for {
		var open []int
		for i := range rows {
			if low[i] < high[i] {
				open = append(open, i)
			}
		}
		if len(open) == 0 {
			return nil
		}
		carried, err := o.carry(ctx, rows, open, next)
		if err != nil {
			return err
		}
		for _, i := range open {
			if carried[i] {
				low[i] = next[i]
			} else {
				high[i] = next[i] - 1
			}
			next[i] = (low[i] + high[i] + 1) / 2
		}
	}
}

// carry reports which of some rows answer a packet of the size that is next.
func (o Options) carry(ctx context.Context, rows []Result, open, next []int) (map[int]bool, error) {
	carried := map[int]bool{}
	for range tries {
		var silent, sizes []int
		for _, i := range open {
			if !carried[i] {
				silent, sizes = append(silent, i), append(sizes, next[i])
			}
		}
		if len(silent) == 0 {
			break
		}
		answers, err := o.send(ctx, rows, silent, sizes)
		if err != nil {
			return nil, err
		}
		for k, i := range silent {
			carried[i] = answers[k] != echo.Silence
		}
	}
	return carried, nil
}
