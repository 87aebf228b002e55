package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit/explain"
)

const (
	// coordinatorPatience is how long explain waits for the coordinator in all: to say
	// which containers there are, and to begin to have hosts walk. What is asked in
	// between takes it milliseconds.
	coordinatorPatience = 5 * time.Second
	// hostsPatience is how long explain waits in all for the hosts that the coordinator
	// has asked. Each looks for what doctor finds and sends probes: where another host is
	// down that is three seconds each.
	hostsPatience = 12 * time.Second
	// agentPatience is how long the agent of this host may take to say who the
	// coordinators are; what it has published says so too.
	agentPatience = time.Second
)

// others are whom explain asks beside this host. Whoever was silent for as long as is
// left for him is asked no more.
type others struct {
	env                *env
	client             *api.Client // nil: not asked yet
	coordinator, hosts patience
}

// patience is how long somebody may still take.
type patience struct {
	who        string
	all, spent time.Duration
}

func (e *env) others() *others {
	return &others{env: e,
		coordinator: patience{who: "the coordinator has not answered", all: coordinatorPatience},
		hosts:       patience{who: "the hosts that the coordinator asked have not answered", all: hostsPatience}}
}

// over is the error of somebody who was too slow.
func (p *patience) over() error { return fmt.Errorf("%s within %s", p.who, p.all) }

// ask calls f with the coordinator, and with what f calls when hosts are waited for from
// then on.
func (o *others) ask(ctx context.Context, f func(ctx context.Context, client *api.Client, begun func()) error) error {
	for _, p := range []*patience{&o.coordinator, &o.hosts} {
		if p.spent >= p.all {
			return fmt.Errorf("it was not asked again, because %w", p.over())
		}
	}
	if err := o.connect(ctx); err != nil {
		return err
	}
	asking, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	wait := func(p *patience) (end func()) {
		began := time.Now()
		timer := time.AfterFunc(p.all-p.spent, func() { cancel(p.over()) })
		return func() {
			timer.Stop()
			p.spent += time.Since(began)
		}
	}
	end := wait(&o.coordinator)
	defer func() { end() }()
	err := f(asking, o.client, func() {
		end()
		end = wait(&o.hosts)
	})
	if err != nil && asking.Err() != nil {
		return context.Cause(asking)
	}
	return err
}

// connect finds the coordinator.
func (o *others) connect(ctx context.Context) (err error) {
	if o.client == nil {
		ctx, cancel := context.WithTimeout(ctx, agentPatience)
		defer cancel()
		if o.client, err = o.env.client(ctx); err == nil {
			o.client.Within(o.coordinator.all)
		}
	}
	return err
}

// candidates are those of the cluster.
func (o *others) candidates(ctx context.Context, name string) (all []api.Container, err error) {
	err = o.ask(ctx, func(ctx context.Context, client *api.Client, _ func()) error {
		all, err = candidates(ctx, client, name)
		return err
	})
	return all, err
}

// walk has a host walk.
func (o *others) walk(ctx context.Context, agent string, options api.SurveyOptions) (explain.Result, error) {
	var seen surveyed
	err := o.ask(ctx, func(ctx context.Context, client *api.Client, begun func()) (err error) {
		seen, err = o.env.ask(ctx, client, api.Survey{Kind: api.SurveyExplain, Agents: []string{agent}, SurveyOptions: options}, begun)
		return err
	})
	for _, report := range seen.reports {
		switch {
		case report.Explain != nil:
			return *report.Explain, nil
		case report.Error != "":
			return explain.Result{}, errors.New(report.Error)
		}
	}
	for _, m := range seen.missing {
		return explain.Result{}, errors.New(m.Reason)
	}
	return explain.Result{}, cmp.Or(err, errors.New("the coordinator says nothing of it"))
}
