package coordinator_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/pki"
)

// answering follows as an agent and answers orders, to the client given, until the
// test ends. What it answers to an order is by answer; nil: nothing.
func answering(t *testing.T, follow, tell *api.Client, id string, answer func(api.SurveyOrder) *api.SurveyReport) {
	t.Helper()
	following(t, follow, tell, id, "start of "+id, answer)
}

// following is answering for an agent that says of its start what is given.
func following(t *testing.T, follow, tell *api.Client, id, instance string, answer func(api.SurveyOrder) *api.SurveyReport) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	connected := make(chan struct{})
	var ran sync.WaitGroup
	first := sync.OnceFunc(func() { close(connected) })
	ran.Go(func() {
		watch := func(e api.PeerEvent) error {
			first()
			if e.Survey == nil {
				return nil
			}
			if r := answer(*e.Survey); r != nil {
				r.AgentID, r.ID = id, e.Survey.ID
				if err := tell.ReportSurvey(ctx, *r); err != nil && ctx.Err() == nil {
					t.Errorf("agent %s: %v", id, err)
				}
			}
			return nil
		}
		// It ends with the test. A coordinator that another one has told of the agent may
		// not have heard of it yet.
		for refused := new(api.Error); ctx.Err() == nil; {
			if err := follow.Watch(ctx, id, api.Known{Instance: instance}, watch); !errors.As(err, &refused) || refused.Code != http.StatusNotFound {
				return
			}
		}
	})
	t.Cleanup(func() { cancel(); ran.Wait() })
	select {
	case <-connected:
	case <-time.After(patience):
		t.Fatalf("agent %s is not connected", id)
	}
}

// measured answers a ping with a row for each other host.
func measured(id string) func(api.SurveyOrder) *api.SurveyReport {
	return func(o api.SurveyOrder) *api.SurveyReport {
		r := &api.SurveyReport{}
		for _, to := range o.Targets {
			if to != id {
				r.Ways = append(r.Ways, api.Way{From: netip.MustParseAddr("6.6.6.6"), AgentID: to, Sent: o.Count, Received: o.Count, MTU: o.WaitMS})
			}
		}
		return r
	}
}

// survey collects the answer of a coordinator.
func survey(t *testing.T, c *api.Client, req api.Survey) (asked int, reports []api.SurveyReport, missing []api.SurveyMissing) {
	t.Helper()
	done := false
	err := c.Survey(t.Context(), req, func(line api.SurveyLine) error {
		asked = max(asked, line.Asked)
		if line.Report != nil {
			reports = append(reports, *line.Report)
		}
		missing, done = line.Missing, line.Done
		return nil
	})
	if err != nil || !done {
		t.Fatalf("survey: %v, done %t", err, done)
	}
	slices.SortFunc(reports, func(a, b api.SurveyReport) int { return strings.Compare(a.AgentID, b.AgentID) })
	return asked, reports, missing
}

// TestSurveyEarlier: nobody waits for an agent of the build of 2026-11-23, which does
// not know what it is asked.
func TestSurveyEarlier(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	for i := range 2 {
		n.register(t, nth(i))
	}
	n.SetSurveyLimit(300 * time.Millisecond)
	answering(t, n.client, n.client, "agent-0", measured("agent-0"))
	following(t, n.client, n.client, "agent-1", "", func(api.SurveyOrder) *api.SurveyReport {
		t.Error("it is asked")
		return nil
	})
	asked, reports, missing := survey(t, n.client, api.Survey{Kind: api.SurveyPing})
	if asked != 2 || len(reports) != 1 || len(missing) != 1 || missing[0].AgentID != "agent-1" || !strings.Contains(missing[0].Reason, "is of an earlier version") {
		t.Errorf("asked %d, %+v, missing %+v", asked, reports, missing)
	}
}

// TestSurvey: those who are connected are asked and answer, once each and for
// themselves; who is not connected, or does not answer, is named.
func TestSurvey(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	for i := range 3 {
		n.register(t, nth(i))
	}
	answering(t, n.client, n.client, "agent-0", measured("agent-0"))
	answering(t, n.client, n.client, "agent-1", measured("agent-1"))
	asked, reports, missing := survey(t, n.client, api.Survey{Kind: api.SurveyPing, SurveyOptions: api.SurveyOptions{Count: 7, WaitMS: 300}})
	if asked != 3 || len(reports) != 2 || len(missing) != 1 || missing[0].AgentID != "agent-2" || missing[0].AgentIP != nth(2).AgentIP || missing[0].Reason != "it is not connected to a coordinator" {
		t.Fatalf("asked %d, %+v, missing %+v", asked, reports, missing)
	}
	for i, r := range reports {
		if r.AgentIP != nth(i).AgentIP || len(r.Ways) != 2 {
			t.Fatalf("%+v", r)
		}
		for _, w := range r.Ways {
			if w.From != nth(i).AgentIP || !w.To.IsValid() || w.To == w.From || w.Sent != 7 || w.MTU != 300 {
				t.Errorf("%+v", w)
			}
		}
	}
	// Some of them, one by its address in two forms, and what is left out has a value.
	ip := nth(1).AgentIP.String()
	asked, reports, missing = survey(t, n.client, api.Survey{Kind: api.SurveyPing, Agents: []string{"agent-0", ip, "::ffff:" + ip}})
	if asked != 2 || len(reports) != 2 || len(missing) != 0 || len(reports[0].Ways) != 1 || reports[0].Ways[0].Sent != 5 || reports[0].Ways[0].MTU != 1000 {
		t.Errorf("asked %d, %+v, missing %+v", asked, reports, missing)
	}

	// Who answers late, or a survey that is none, is told so.
	refused(t, n.client.ReportSurvey(t.Context(), api.SurveyReport{AgentID: "agent-0", ID: "gone"}), http.StatusNotFound, "has ended")
	n.SetSurveyLimit(300 * time.Millisecond)
	answering(t, n.client, n.client, "agent-2", func(api.SurveyOrder) *api.SurveyReport { return nil })
	asked, reports, missing = survey(t, n.client, api.Survey{Kind: api.SurveyPing})
	if asked != 3 || len(reports) != 2 || len(missing) != 1 || missing[0].AgentID != "agent-2" || !strings.Contains(missing[0].Reason, "has not answered within") {
		t.Errorf("asked %d, %+v, missing %+v", asked, reports, missing)
	}
}

// TestSurveyExplain: one host walks, and what it says is cut to what people read.
func TestSurveyExplain(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	n.register(t, nth(0))
	long := strings.Repeat("x", 4000)
	answering(t, n.client, n.client, "agent-0", func(o api.SurveyOrder) *api.SurveyReport {
		e := &api.Explanation{From: o.A, To: o.B, StopsAt: long}
		for range 200 {
			e.Steps = append(e.Steps, api.Step{Name: "step", Text: long})
		}
		return &api.SurveyReport{Explain: e}
	})
	_, reports, _ := survey(t, n.client, api.Survey{Kind: api.SurveyExplain, Agents: []string{"agent-0"}, SurveyOptions: api.SurveyOptions{A: "one", B: "two"}})
	if len(reports) != 1 || reports[0].Explain == nil {
		t.Fatalf("%+v", reports)
	}
	e := reports[0].Explain
	if e.From != "one" || e.To != "two" || len(e.StopsAt) > api.MaxSurveyText+10 || len(e.Steps) != api.MaxSurveySteps || len(e.Steps[0].Text) > api.MaxSurveyText+10 {
		t.Errorf("%d steps, the first %d bytes; %+.300v", len(e.Steps), len(e.Steps[0].Text), e)
	}
}

// TestSurveyRefused: what no agent would do is refused before anybody is asked, and so
// are more surveys than are good for the hosts.
func TestSurveyRefused(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	n.register(t, nth(0))
	answering(t, n.client, n.client, "agent-0", func(api.SurveyOrder) *api.SurveyReport { return nil })
	fail := func(api.SurveyLine) error { t.Error("it was answered"); return nil }
	many := make([]string, api.MaxSurveyed+1)
	ping, explain := api.SurveyPing, api.SurveyExplain
	for says, req := range map[string]api.Survey{
		`kind "shell"`:           {Kind: "shell", Agents: []string{"agent-0"}},
		"count 101":              {Kind: ping, SurveyOptions: api.SurveyOptions{Count: 101}},
		"wait_ms 3000":           {Kind: ping, SurveyOptions: api.SurveyOptions{WaitMS: 3000}},
		"257 are named":          {Kind: ping, Agents: many},
		"a and b":                {Kind: explain, Agents: []string{"agent-0"}, SurveyOptions: api.SurveyOptions{A: "x"}},
		"want the one host":      {Kind: explain, SurveyOptions: api.SurveyOptions{A: "x", B: "y"}},
		"a part of a survey has": {Kind: ping, Here: true},
		"only a part":            {Kind: ping, Targets: []string{"agent-0"}},
		"lower wait_ms to 442":   {Kind: ping, SurveyOptions: api.SurveyOptions{Count: 100, WaitMS: 1000}},
	} {
		refused(t, n.client.Survey(t.Context(), req, fail), http.StatusBadRequest, says)
	}
	refused(t, n.client.Survey(t.Context(), api.Survey{Kind: ping, Here: true, ID: "x.y", Run: "another"}, fail), http.StatusServiceUnavailable, "another coordinator")
	refused(t, n.client.ReportSurvey(t.Context(), api.SurveyReport{AgentID: "agent-0", ID: "another.y", Run: "another"}), http.StatusServiceUnavailable, "another coordinator")
	refused(t, n.client.Survey(t.Context(), api.Survey{Kind: ping, Agents: []string{"nobody"}}, fail), http.StatusNotFound, `"nobody"`)

	enough := errors.New("enough")
	var underway, ended sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	for range 4 {
		underway.Add(1)
		ended.Go(func() {
			begun := sync.OnceFunc(underway.Done)
			_ = n.client.Survey(ctx, api.Survey{Kind: ping}, func(api.SurveyLine) error { begun(); return nil })
			begun()
		})
	}
	underway.Wait()
	refused(t, n.client.Survey(t.Context(), api.Survey{Kind: ping}, fail), http.StatusTooManyRequests, "4 surveys are under way")
	cancel()
	ended.Wait()
	eventually(t, "others may ask again", func() bool {
		return errors.Is(n.client.Survey(t.Context(), api.Survey{Kind: ping}, func(api.SurveyLine) error { return enough }), enough)
	})
}

// TestSurveyOfCoordinators: any coordinator asks the agents of all, and an agent may
// bring its answer to any of them.
func TestSurveyOfCoordinators(t *testing.T) {
	s := newStore(t)
	a, b, c := shared(t, s, "127.0.0.1:0"), shared(t, s, "127.0.0.1:0"), shared(t, s, "127.0.0.1:0")
	for i := range 3 {
		a.register(t, nth(i))
	}
	answering(t, a.client, a.client, "agent-0", measured("agent-0"))
	answering(t, b.client, b.client, "agent-1", measured("agent-1"))
	answering(t, b.client, c.client, "agent-2", measured("agent-2"))
	for _, asked := range []*node{a, b, c} {
		var reports []api.SurveyReport
		var missing []api.SurveyMissing
		eventually(t, "the coordinators know who is connected to them", func() bool {
			_, reports, missing = survey(t, asked.client, api.Survey{Kind: api.SurveyPing})
			return len(missing) == 0
		})
		if len(reports) != 3 || reports[2].AgentID != "agent-2" || len(reports[2].Ways) != 2 {
			t.Errorf("%s: %+v", asked.url, reports)
		}
	}
	// One that is away is not waited for.
	b.stop()
	began := time.Now()
	_, reports, missing := survey(t, a.client, api.Survey{Kind: api.SurveyPing})
	if len(reports) != 1 || len(missing) != 2 || missing[0].Reason == "" {
		t.Errorf("%+v, missing %+v", reports, missing)
	}
	t.Logf("without one coordinator after %s: %s", time.Since(began).Round(time.Millisecond), missing[0].Reason)
}

// TestSurveyAcross: the answer of an agent that brings it to a coordinator which waits
// for another one in the same survey is not lost; and all measure all, whoever they are
// connected to, also those that are not connected.
func TestSurveyAcross(t *testing.T) {
	s := newStore(t)
	a, b, begins := shared(t, s, "127.0.0.1:0"), shared(t, s, "127.0.0.1:0"), shared(t, s, "127.0.0.1:0")
	for i := range 3 {
		a.register(t, nth(i))
	}
	for _, n := range []*node{a, b, begins} {
		n.SetSurveyLimit(5 * time.Second)
	}
	within := func(c chan struct{}) {
		select {
		case <-c:
		case <-time.After(3 * time.Second):
		}
	}
	under, told := make(chan struct{}, 100), make(chan struct{}, 100) // the part of b is; the answer of agent-0 is
	answering(t, a.client, b.client, "agent-0", func(o api.SurveyOrder) *api.SurveyReport {
		within(under)
		return measured("agent-0")(o)
	})
	answering(t, b.client, b.client, "agent-1", func(o api.SurveyOrder) *api.SurveyReport {
		under <- struct{}{}
		within(told)
		return measured("agent-1")(o)
	})
	var reports []api.SurveyReport
	eventually(t, "the coordinators know who is connected to them", func() bool {
		reports = nil
		var missing []api.SurveyMissing
		err := begins.client.Survey(t.Context(), api.Survey{Kind: api.SurveyPing}, func(line api.SurveyLine) error {
			if line.Report != nil {
				reports = append(reports, *line.Report)
				told <- struct{}{}
			}
			missing = line.Missing
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for len(under)+len(told) > 0 {
			select {
			case <-under:
			case <-told:
			}
		}
		return len(missing) == 1
	})
	if len(reports) != 2 || reports[0].AgentID != "agent-0" {
		t.Fatalf("%+v", reports)
	}
	for _, r := range reports {
		if len(r.Ways) != 2 {
			t.Errorf("%s measures %+v, want the ways to both others", r.AgentID, r.Ways)
		}
	}
}

// TestSurveyAddressOfAnother: where the first address of a coordinator is that of the
// one that asks it, the next one is tried.
func TestSurveyAddressOfAnother(t *testing.T) {
	s := newStore(t)
	a := shared(t, s, "127.0.0.1:0")
	b := shared(t, s, "127.0.0.1:0", a.url)
	for i := range 2 {
		a.register(t, nth(i))
	}
	answering(t, b.client, b.client, "agent-0", measured("agent-0"))
	answering(t, b.client, a.client, "agent-1", measured("agent-1"))
	for _, asked := range []*node{a, b} {
		var missing []api.SurveyMissing
		eventually(t, "both answer", func() bool {
			asked.SetSurveyLimit(3 * time.Second)
			_, _, missing = survey(t, asked.client, api.Survey{Kind: api.SurveyPing})
			return len(missing) == 0
		})
	}
}

// TestSurveyGone: who goes before he was asked is not waited for.
func TestSurveyGone(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	n.register(t, nth(0))
	s := n.GoUnasked(t, "agent-0")
	if len(s) != 1 || s[0].AgentID != "agent-0" || s[0].Reason != "its connection ended before it was asked" {
		t.Errorf("%+v", s)
	}
}

// TestSurveyIdentify: over TLS, coordinators ask each other, and nobody else but
// operators asks.
func TestSurveyIdentify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	share := func(_ *pki.Options, o *coordinator.Options) { o.Shared = true }
	a := startSecure(t, s, path, share)
	b := startSecure(t, s, path, share, withToken(a.token(t, api.TokenRequest{Role: "coordinator"})))
	p := b.agent(t, "host")
	if _, err := p.Register(t.Context(), request("host", "10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	answering(t, p.Client, p.Client, "host", measured("host"))
	eventually(t, "the agent of the other coordinator answers", func() bool {
		_, reports, missing := survey(t, a.root, api.Survey{Kind: api.SurveyPing})
		return len(reports) == 1 && len(missing) == 0
	})
	nothing := func(api.SurveyLine) error { t.Error("something was told"); return nil }
	ask := api.Survey{Kind: api.SurveyPing}
	refused(t, p.Survey(t.Context(), ask, nothing), http.StatusForbidden, "may not do that")
	refused(t, p.ReportSurvey(t.Context(), api.SurveyReport{AgentID: "victim", ID: "x"}), http.StatusForbidden, "itself alone")
	refused(t, newClient(t, b.url, stranger(t)).Survey(t.Context(), ask, nothing), http.StatusUnauthorized)
	reader := b.join(t, "somebody", a.token(t, api.TokenRequest{Role: "reader"}))
	refused(t, reader.Survey(t.Context(), ask, nothing), http.StatusForbidden, "may not do that")
	operator := b.join(t, "boss", a.token(t, api.TokenRequest{Role: "operator"}))
	if _, reports, _ := survey(t, operator.Client, ask); len(reports) != 1 {
		t.Errorf("an operator: %+v", reports)
	}
}

// TestSurveyDescribed: the lines of a survey are what the description says.
func TestSurveyDescribed(t *testing.T) {
	n, ask, d := described(t)
	p := n.agent(t, "host")
	if _, err := p.Register(t.Context(), request("host", "10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	answering(t, p.Client, p.Client, "host", func(o api.SurveyOrder) *api.SurveyReport {
		return &api.SurveyReport{Error: "partly", Ways: []api.Way{{AgentID: "host"}}, Explain: &api.Explanation{Steps: []api.Step{{Name: "one"}}}}
	})
	status, body := ask(http.MethodPost, api.PathSurvey, `{"kind": "ping"}`)
	item := d.Paths[api.PathSurvey]["post"].Responses["200"].Content["application/x-ndjson"].Item
	lines := strings.Split(strings.TrimSpace(string(body)), "\n")
	if status != http.StatusOK || item == nil || len(lines) != 3 {
		t.Fatalf("%d, %v: %s", status, item, body)
	}
	for _, line := range lines {
		var v any
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatal(err)
		}
		for _, w := range d.check("line", item, v) {
			t.Error(w)
		}
	}
}
