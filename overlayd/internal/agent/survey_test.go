package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit/doctor"
)

// An agent takes one order at a time, says what it does not know, and goes on when an
// answer cannot be told; orders beyond those that wait are refused at once.
func TestSurveyor(t *testing.T) {
	reports, hold := make(chan api.SurveyReport, 10), make(chan struct{})
	s := &surveyor{
		send: func(ctx context.Context, r api.SurveyReport) error {
			select {
			case <-hold:
			case <-ctx.Done():
			}
			reports <- r
			return errors.New("cannot be told")
		},
		state: func() conf.State { return conf.State{MTU: 1450} },
		look:  doctor.Options{RunDir: t.TempDir(), StateDir: t.TempDir(), Version: "1.2"},
		id:    "me", limit: time.Minute, orders: make(chan order, maxOrders), refuse: make(chan order, maxOrders), log: slog.New(slog.DiscardHandler),
	}
	l := &loop{id: "me", surveyor: s, log: s.log, peers: peerState{claims: newClaims()}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.run(ctx) }()
	l.survey(api.SurveyOrder{ID: "1", Kind: "shell", SurveyOptions: api.SurveyOptions{A: "rm -rf /"}})
	eventually(t, "the first is being worked on", func() error {
		if len(s.orders) > 0 {
			return errors.New("it waits")
		}
		return nil
	})
	for _, id := range []string{"2", "3", "4", "5", "refused", "refused"} {
		l.survey(api.SurveyOrder{ID: id, Kind: api.SurveyPing, Targets: []string{"me", "stranger"}})
	}
	if len(reports) != 0 {
		t.Error("the second did not wait for the first")
	}
	close(hold)
	next := func() api.SurveyReport {
		t.Helper()
		select {
		case r := <-reports:
			return r
		case <-time.After(30 * time.Second):
			t.Fatal("no report")
			return api.SurveyReport{}
		}
	}
	var got []api.SurveyReport
	for range 7 {
		got = append(got, next())
	}
	slices.SortStableFunc(got, func(a, b api.SurveyReport) int { return strings.Compare(a.ID, b.ID) })
	if r := got[0]; r.ID != "1" || r.AgentID != "me" || !strings.Contains(r.Error, `version 1.2, does not know surveys of the kind "shell"`) {
		t.Errorf("%+v", r)
	}
	for i, id := range []string{"2", "3", "4", "5"} {
		r := got[i+1]
		if r.ID != id || r.Error != "" || len(r.Ways) != 1 || r.Ways[0].AgentID != "stranger" || r.Ways[0].Sent != 0 || r.Ways[0].Whole() {
			t.Errorf("%+v", r)
		}
	}
	for _, r := range got[5:] {
		if r.ID != "refused" || r.AgentID != "me" || !strings.Contains(r.Error, "others are under way") || len(r.Ways) > 0 {
			t.Errorf("%+v", r)
		}
	}
	l.survey(api.SurveyOrder{ID: "6", Kind: api.SurveyExplain, SurveyOptions: api.SurveyOptions{A: "a", B: "b"}})
	if r := next(); r.ID != "6" || !strings.Contains(r.Error, "no agent has published anything") || r.Explain != nil {
		t.Errorf("%+v", r)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A defect in a look ends the agent, as everywhere: it does not leave a surveyor that
// waits for ever.
func TestSurveyorPanics(t *testing.T) {
	s := &surveyor{
		send: func(context.Context, api.SurveyReport) error { panic("a defect") }, state: func() conf.State { return conf.State{} },
		limit: time.Minute, orders: make(chan order, 1), refuse: make(chan order, 1), log: slog.New(slog.DiscardHandler),
	}
	s.orders <- order{SurveyOrder: api.SurveyOrder{Kind: "shell"}}
	ended := make(chan any, 1)
	go func() {
		defer func() { ended <- recover() }()
		_ = s.run(t.Context())
	}()
	select {
	case r := <-ended:
		if r != "a defect" {
			t.Errorf("recovered %v", r)
		}
	case <-time.After(30 * time.Second):
		t.Error("the panic waits")
	}
}

// A look ends at its limit, and says so.
func TestSurveyorEnds(t *testing.T) {
	s := &surveyor{
		state: func() conf.State { return conf.State{} }, look: doctor.Options{RunDir: t.TempDir()}, limit: time.Nanosecond, log: slog.New(slog.DiscardHandler),
	}
	if r := s.answer(t.Context(), order{SurveyOrder: api.SurveyOrder{Kind: api.SurveyExplain}}); r.Error == "" {
		t.Errorf("%+v", r)
	}
}
