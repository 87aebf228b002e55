package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit/doctor"
	"overlayd.internal/overlay/overlayd/internal/audit/explain"
	"overlayd.internal/overlay/overlayd/internal/audit/ping"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// maxOrders is how many orders wait for their turn; further ones are refused.
const maxOrders = 4

// surveyor looks at what an operator has the coordinator ask for, and reports it: the
// ways to peers, or the way of a packet. It knows these looks alone, takes them one
// at a time with a pause between, and each has an end; see docs/adr/0057.
type surveyor struct {
	send   func(context.Context, api.SurveyReport) error
	state  func() conf.State // that is published
	look   doctor.Options
	id     string
	pause  time.Duration
	limit  time.Duration // of one look
	orders chan order
	refuse chan order // those beyond that many
	log    *slog.Logger
}

// order is what is to be looked at. Of a ping the targets are peers as the loop knows
// them, and unknown the ids of those that it does not.
type order struct {
	api.SurveyOrder
	targets []ping.Target
	unknown []string
}

func (a *Agent) newSurveyor(id string, log *slog.Logger) *surveyor {
	return &surveyor{
		send: a.opts.Coordinator.ReportSurvey, state: func() conf.State { return a.served.Load().state },
		look: doctor.Options{RunDir: a.opts.RunDir, StateDir: a.opts.StateDir, Version: a.opts.Version},
		id:   id, pause: a.timing.survey, limit: api.SurveyTime, orders: make(chan order, maxOrders), refuse: make(chan order, maxOrders), log: log,
	}
}

// survey has the surveyor look at something.
func (l *loop) survey(o api.SurveyOrder) {
	with := order{SurveyOrder: o}
	for _, id := range o.Targets[:min(len(o.Targets), api.MaxSurveyed)] {
		p, ok := l.peers.claims.peers[id]
		switch {
		case ok:
			with.targets = append(with.targets, ping.TargetOf(l.surveyor.state(), p))
		case id != l.id:
			with.unknown = append(with.unknown, id)
		}
	}
	select {
	case l.surveyor.orders <- with:
		return
	default:
	}
	select {
	case l.surveyor.refuse <- with:
	default:
		l.log.Warn("survey dropped: others are under way", logkey.Kind, string(o.Kind))
	}
}

// run takes orders until ctx is done.
func (s *surveyor) run(ctx context.Context) error {
	var refusing sync.WaitGroup
	defer refusing.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop() // a panic must not wait for who waits for orders
	refusing.Go(func() { s.runRefuse(ctx) })
	for {
		select {
		case o := <-s.orders:
			s.log.Info("looking for an operator", logkey.Kind, string(o.Kind))
			s.report(ctx, o, s.answer(ctx, o))
		case <-ctx.Done():
			return nil
		}
		select {
		case <-time.After(s.pause):
		case <-ctx.Done():
			return nil
		}
	}
}

// runRefuse says of the orders that find no room that they do, while others are looked
// at.
func (s *surveyor) runRefuse(ctx context.Context) {
	for {
		select {
		case o := <-s.refuse:
			s.report(ctx, o, api.SurveyReport{AgentID: s.id, ID: o.ID, Error: "others are under way on this host; try again in some minutes"})
		case <-ctx.Done():
			return
		}
	}
}

func (s *surveyor) report(ctx context.Context, o order, r api.SurveyReport) {
	if err := s.send(ctx, r); err != nil && ctx.Err() == nil {
		s.log.Warn("what an operator asked for could not be reported", logkey.Kind, string(o.Kind), logkey.Err, err)
	}
}

// answer looks, and takes no longer than the limit.
func (s *surveyor) answer(ctx context.Context, o order) api.SurveyReport {
	ctx, cancel := context.WithTimeoutCause(ctx, s.limit, fmt.Errorf("not done within %s", s.limit))
	defer cancel()
	report := api.SurveyReport{AgentID: s.id, ID: o.ID}
	var err error
	switch o.Kind {
	case api.SurveyPing:
		report.Ways, err = s.ping(ctx, o)
	case api.SurveyExplain:
		walk := explain.Walk
		if o.Arrive {
			walk = explain.Arrive
		}
		var walked explain.Result
		if walked, err = walk(ctx, s.look, o.A, o.B); err == nil {
			report.Explain = &walked
		}
	default:
		err = fmt.Errorf("this agent, version %s, does not know surveys of the kind %.40q", s.look.Version, o.Kind)
	}
	if err != nil {
		report.Error = err.Error()
	}
	return report
}

// ping measures the ways to peers, with no more probes than anybody may ask for.
func (s *surveyor) ping(ctx context.Context, o order) ([]api.Way, error) {
	state := s.state()
	wait := time.Duration(o.WaitMS) * time.Millisecond
	count := min(max(o.Count, 1), api.MaxSurveyCount)
	ways, err := ping.Run(ctx, ping.From(state, count, min(max(wait, api.MinSurveyWait), api.MaxSurveyWait)), o.targets)
	for _, id := range o.unknown {
		ways = append(ways, api.Way{From: state.IP, AgentID: id, MTU: state.MTU})
	}
	return ways, err
}
