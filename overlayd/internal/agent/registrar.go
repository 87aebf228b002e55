package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/crashpoint"
	"overlayd.internal/overlay/overlayd/internal/problems"
)

// registration is what came of asking for the lease once.
type registration struct {
	ip    netip.Addr // agent IP asked with; zero if none was found
	lease conf.Lease
	sent  renewal // just before the request: the term counts from here
	want  map[string]int
	err   error
}

// registrar asks for the lease, and renews it for ever, by the same request.
type registrar struct {
	ask  func(context.Context, api.RegisterRequest) (conf.Lease, error)
	find func(context.Context) (netip.Addr, error) // agent IP
	// under is what the interface with the agent IP takes (MTU 0: not known), and the
	// second agent IP.
	under  func(netip.Addr, conf.Lease) conf.Underlay
	req    api.RegisterRequest // without what may change
	held   func() conf.Lease   // zero: none
	asks   func() *roomAsks    // besides the lease; nil: never anything
	moveOn func()              // to the next coordinator
	again  func()              // the next request makes a connection of its own
	last   netip.Addr          // agent IP asked with last
	boot   boot
	timing timing
	kick   chan struct{} // capacity 1: register now
	out    chan registration
}

// run registers at once, after every kick, and when it is time to renew or to
// try again. It returns nil when ctx is done.
func (r *registrar) run(ctx context.Context) error {
	retry := backoff{min: r.timing.backoffMin, max: r.timing.backoffMax}
	for {
		o := r.try(ctx)
		select {
		case r.out <- o:
		case <-ctx.Done():
			return nil
		}
		var pause time.Duration
		switch {
		case o.err == nil:
			retry.reset()
			pause = jitter(renewEvery(r.timing.renew, o.lease.Term()))
		case isKind(o.err, api.KindOtherCluster):
			// Another of the URLs may lead to the right one.
			r.moveOn()
			pause = max(r.timing.backoffMin, jitter(r.timing.otherCluster))
		case refused(o.err):
			// Asking more often does not make a full pool emptier.
			pause = jitter(r.timing.backoffMax)
		default:
			pause = retry.next()
		}
		if !r.wait(ctx, pause) {
			return nil
		}
	}
}

// wait returns after pause or a kick, and false when ctx is done. Even a kick
// waits for the shortest backoff, so that a coordinator that kicks with every
// answer is not asked at full speed.
func (r *registrar) wait(ctx context.Context, pause time.Duration) bool {
	least := time.NewTimer(r.timing.backoffMin)
	defer least.Stop()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	case <-r.kick:
	}
	select {
	case <-ctx.Done():
		return false
	case <-least.C:
		return true
	}
}

func (r *registrar) try(ctx context.Context) registration {
	ip, err := r.find(ctx)
	if err != nil {
		return registration{err: err}
	}
	if ip != r.last && r.last.IsValid() {
		r.again() // the present ones may be of an address that has gone
	}
	r.last = ip
	o := registration{ip: ip, sent: renewal{BootID: r.boot.id, Boottime: r.boot.now(), Wall: time.Now()}}
	held := r.held()
	under := r.under(ip, held)
	if under.MTU != 0 {
		r.req.MTU = under.MTU
	}
	req := r.req
	req.Direct = req.Direct && under.Direct
	req.SecondIP, req.SecondMTU = under.SecondIP, under.SecondMTU
	req.AgentIP, req.ClusterID = ip, held.ClusterID
	if asks := r.wanted(); asks != nil {
		req.Want, req.Return = asks.want, asks.back
		o.want = asks.want
	}
	if s := held.Signed; s != nil && len(s.Lease) <= api.MaxPresented {
		req.Presented = s
	}
	if o.lease, o.err = r.ask(ctx, req); o.err == nil {
		crashpoint.At("lease-answered")
		o.err = checkLease(o.lease, req.AgentID)
	}
	if o.err == nil && req.ClusterID != "" && o.lease.ClusterID != req.ClusterID {
		// An older coordinator does not look at what it was asked with.
		o.err = &api.Error{Code: http.StatusConflict, Kind: api.KindOtherCluster, Message: fmt.Sprintf(
			"this coordinator is of cluster %s, and the lease of this host is of cluster %s", o.lease.ClusterID, req.ClusterID)}
	}
	return o
}

// wanted is what to ask for besides the lease; nil: nothing.
func (r *registrar) wanted() *roomAsks {
	if r.asks == nil {
		return nil
	}
	return r.asks()
}

// isKind reports whether the coordinator refused for that reason.
func isKind(err error, kind string) bool {
	var e *api.Error
	return errors.As(err, &e) && e.Kind == kind
}

// refused reports whether the coordinator understood the request and said no:
// a pool is exhausted, the request is in conflict, the agent may not.
func refused(err error) bool {
	var e *api.Error
	return errors.As(err, &e) && (e.Code < 500 || e.Code == http.StatusInsufficientStorage)
}

// reporter tells the coordinator what became of the lease, the newest report
// only, until it is taken.
type reporter struct {
	send     func(context.Context, api.StatusReport) error
	timing   timing
	problems *problems.Set
	in       chan api.StatusReport // capacity 1, filled by replace
	register chan<- struct{}       // kicked when the coordinator does not want the report
}

// run returns nil when ctx is done.
func (r *reporter) run(ctx context.Context) error {
	retry := backoff{min: r.timing.backoffMin, max: r.timing.backoffMax}
	var report *api.StatusReport
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case s := <-r.in:
			report = &s
			retry.reset()
		case <-again:
		}
		again = nil
		err := r.send(ctx, *report)
		if ctx.Err() != nil {
			return nil
		}
		r.problems.Report(reportProblem, withoutPorts(err))
		if err == nil {
			continue
		}
		again = time.After(retry.next())
		if refused(err) {
			kick(r.register) // our lease was deleted
		}
	}
}

// errUnreachable stands for the errors of a network, which name a port that is
// another one each time.
var errUnreachable = errors.New("the coordinator does not answer")

func withoutPorts(err error) error {
	if !answered(err) {
		return errUnreachable
	}
	return err
}
