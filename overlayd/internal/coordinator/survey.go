package coordinator

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// A survey asks hosts what they see: see docs/adr/0057. Agents listen to nobody, so
// the order goes out on the stream that each holds open, and the answer comes as a
// request of the agent. Agents that are connected to another coordinator are asked by
// that one, in a part of the survey that has the same id.

// maxSurveys is how many surveys, and how many parts of those of others, are under way
// at once.
const maxSurveys = 4

// surveys are those that are under way here, by id. Coordinator.mu guards them.
type surveys struct {
	underway map[string]*survey
	limit    time.Duration // how long answers are waited for; tests shorten it
}

func (c *Coordinator) surveyLimit() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.surveys.limit
}

func newSurveys() surveys {
	return surveys{underway: map[string]*survey{}, limit: api.SurveyLimit}
}

// survey is one that is under way here. Coordinator.mu guards waiting, local and missing.
type survey struct {
	part    bool                         // of the survey of another coordinator
	asked   int                          // agents that are to answer
	waiting map[string]netip.Addr        // agents that have not answered, and their IPs
	local   map[string]struct{}          // those of them that were asked here
	missing map[string]api.SurveyMissing // agents of which it is known why they do not answer
	answers chan api.SurveyReport        // has room for all
	changed chan struct{}                // has a token when less are waited for without an answer
	asking  sync.WaitGroup               // of the other coordinators
	parts   int                          // those that have not ended
	ended   chan []api.SurveyMissing     // whom they missed; has room for all
}

func (c *Coordinator) serveSurvey(w http.ResponseWriter, r *http.Request, ended <-chan struct{}) error {
	var req api.Survey
	if err := serve.ReadJSON(w, r, &req); err != nil {
		return err
	}
	if err := checkSurvey(&req); err != nil {
		return err
	}
	if req.Run != "" && req.Run != c.run {
		return refuseRun()
	}
	if !req.Here {
		req.ID = c.run + "." + rand.Text()
	}
	ctx, cancel := context.WithTimeout(r.Context(), c.surveyLimit())
	defer cancel()
	sv, err := c.beginSurvey(ctx, req)
	if err != nil {
		return err
	}
	defer func() {
		cancel()
		sv.asking.Wait()
		c.endSurvey(req.ID)
	}()
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Cache-Control", "no-store, no-transform")
	w.Header().Set("X-Accel-Buffering", "no")
	c.followSurvey(ctx, &stream{c: c, w: w, ctx: r.Context(), flush: http.NewResponseController(w)}, sv, ended)
	return nil // the status line is out; whatever happens ends the stream
}

// refuseRun refuses what is meant for another coordinator, which may be at another
// address that it has named: one of its host can be one of this host as well.
func refuseRun() error {
	return refuse(http.StatusServiceUnavailable, "this is another coordinator than the one that is meant")
}

// beginSurvey asks the agents that are connected here, and has the other coordinators
// ask theirs until ctx ends.
func (c *Coordinator) beginSurvey(ctx context.Context, req api.Survey) (*survey, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	chosen, err := c.chooseLocked(req)
	if err != nil {
		return nil, err
	}
	targets := req.Targets
	if req.Kind == api.SurveyPing {
		if len(targets) == 0 {
			targets = slices.Sorted(maps.Keys(chosen))
		}
		if err := checkTime(&req, len(targets)-1); err != nil { // none of them measures itself
			return nil, err
		}
	}
	underway := 0
	for _, s := range c.surveys.underway {
		if s.part == req.Here {
			underway++
		}
	}
	if underway >= maxSurveys || c.surveys.underway[req.ID] != nil {
		return nil, refuse(http.StatusTooManyRequests, "%d surveys are under way; try again in a minute", underway)
	}
	s := &survey{
		part: req.Here, waiting: map[string]netip.Addr{}, local: map[string]struct{}{}, missing: map[string]api.SurveyMissing{},
		answers: make(chan api.SurveyReport, len(chosen)), changed: make(chan struct{}, 1),
	}
	order := &api.SurveyOrder{ID: req.ID, Kind: req.Kind, Targets: targets, SurveyOptions: req.SurveyOptions}
	req.Targets = targets
	for id, ip := range chosen {
		p := c.presence[id]
		here := p != nil && len(p.watches) > 0
		switch {
		case here && p.speechless():
			s.missing[id] = api.SurveyMissing{AgentID: id, AgentIP: ip, Reason: "its agent is of an earlier version, which looks at nothing for others"}
		case here:
			s.waiting[id], s.local[id] = ip, struct{}{}
			for w := range p.watches {
				w.orders = append(w.orders, order)
				w.rouse()
			}
		case req.Here:
		case c.connectedElsewhereLocked(id):
			s.waiting[id] = ip
		default:
			s.missing[id] = api.SurveyMissing{AgentID: id, AgentIP: ip, Reason: "it is not connected to a coordinator"}
		}
	}
	s.asked = len(s.waiting) + len(s.missing)
	if !req.Here {
		c.askOthersLocked(ctx, s, req)
	}
	c.surveys.underway[req.ID] = s
	return s, nil
}

// speechless reports whether the agent that follows is of a release which does not say
// when it was started, and knows of no survey.
func (p *presence) speechless() bool {
	for w := range p.watches {
		if w.instance != "" {
			return false
		}
	}
	return true
}

// chooseLocked are the agents that a survey is about, and their IPs.
func (c *Coordinator) chooseLocked(req api.Survey) (map[string]netip.Addr, error) {
	chosen := map[string]netip.Addr{}
	if len(req.Agents) == 0 {
		for id, a := range c.view.agents {
			if a.Superseded == "" {
				chosen[id] = a.IP
			}
		}
		if len(chosen) > api.MaxSurveyed {
			return nil, refuse(http.StatusBadRequest, "there are %d hosts, and one survey asks %d at most; name some", len(chosen), api.MaxSurveyed)
		}
	}
	for _, name := range req.Agents {
		id := name
		if ip, err := netip.ParseAddr(name); err == nil {
			id = c.view.byIP[ip.Unmap()].id
		}
		a := c.view.agents[id]
		switch {
		case a != nil:
			chosen[id] = a.IP
		case !req.Here: // another coordinator may know of one that has come a moment ago
			return nil, refuse(http.StatusNotFound, "no agent has the id or IP %.80q", name)
		}
	}
	return chosen, nil
}

// askOthersLocked has the other coordinators ask the agents that follow there.
func (c *Coordinator) askOthersLocked(ctx context.Context, s *survey, req api.Survey) {
	req.Here = true
	req.Agents = slices.Sorted(maps.Keys(s.waiting))
	if len(s.local) == len(s.waiting) {
		s.ended = make(chan []api.SurveyMissing)
		return
	}
	for run, o := range c.others {
		if len(o.urls) == 0 || c.deadLocked(run) {
			continue
		}
		s.parts++
	}
	s.ended = make(chan []api.SurveyMissing, s.parts)
	for run, o := range c.others {
		if len(o.urls) == 0 || c.deadLocked(run) {
			continue
		}
		part := req
		part.Run = run
		s.asking.Go(func() { s.ended <- c.askOther(ctx, o, s, part) })
	}
}

// askOther has one other coordinator ask, hands on what it says, and returns who did
// not answer it.
func (c *Coordinator) askOther(ctx context.Context, o *other, s *survey, req api.Survey) (missing []api.SurveyMissing) {
	client, err := api.NewClient(o.urls, c.peerClient)
	if err == nil {
		err = client.Survey(ctx, req, func(line api.SurveyLine) error {
			if line.Report != nil {
				c.answer(s, *line.Report)
			}
			missing = append(missing, line.Missing...)
			return nil
		})
	}
	if err != nil && ctx.Err() == nil {
		c.log.Warn("another coordinator could not be asked for a survey", "url", o.name(""), "err", err)
	}
	return missing
}

// answer takes in what an agent has seen, once, and reports whether it was waited for.
func (c *Coordinator) answer(s *survey, r api.SurveyReport) (taken bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ip, waited := s.waiting[r.AgentID]
	if !waited {
		return false
	}
	delete(s.waiting, r.AgentID)
	delete(s.local, r.AgentID)
	r.AgentIP = ip
	for i := range r.Ways {
		w := &r.Ways[i]
		w.From = ip
		if a := c.view.agents[w.AgentID]; a != nil && !w.To.IsValid() {
			w.To = a.IP
		}
	}
	s.answers <- r
	return true
}

// followSurvey writes what comes until all have answered, the time is up, or nobody
// listens any more.
func (c *Coordinator) followSurvey(ctx context.Context, out *stream, s *survey, ended <-chan struct{}) {
	lines := json.NewEncoder(out.w)
	write := func(line api.SurveyLine) bool {
		return out.deadline(0) == nil && lines.Encode(line) == nil && out.sync() == nil
	}
	if !write(api.SurveyLine{Asked: s.asked}) {
		return
	}
	heartbeat := time.NewTicker(api.HeartbeatInterval)
	defer heartbeat.Stop()
	for !c.surveyed(s) {
		line := api.SurveyLine{}
		select {
		case r := <-s.answers:
			line.Report = &r
		case missing := <-s.ended:
			s.parts--
			c.noteMissing(s, missing)
			continue
		case <-s.changed:
			continue
		case <-heartbeat.C:
		case <-ctx.Done():
			c.timeUp(s)
			continue
		case <-c.stopped:
			return
		case <-ended:
			return
		}
		if !write(line) {
			return
		}
	}
	for len(s.answers) > 0 {
		r := <-s.answers
		if !write(api.SurveyLine{Report: &r}) {
			return
		}
	}
	missing := slices.SortedFunc(maps.Values(s.missing), func(a, b api.SurveyMissing) int { return a.AgentIP.Compare(b.AgentIP) })
	write(api.SurveyLine{Done: true, Missing: missing})
}

// surveyed reports whether nobody is waited for any longer. Of agents elsewhere that is
// when all coordinators have ended their parts.
func (c *Coordinator) surveyed(s *survey) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(s.waiting) > 0 && (len(s.local) > 0 || s.parts > 0) {
		return false
	}
	for id, ip := range s.waiting {
		s.missing[id] = api.SurveyMissing{AgentID: id, AgentIP: ip, Reason: "it is connected to a coordinator that could not be asked"}
	}
	clear(s.waiting)
	return true
}

// missOrdersLocked: an agent has gone, and the orders it was not sent are waited for in
// vain.
func (c *Coordinator) missOrdersLocked(id string, orders []*api.SurveyOrder) {
	for _, o := range orders {
		s := c.surveys.underway[o.ID]
		if s == nil {
			continue
		}
		ip, waited := s.waiting[id]
		if !waited {
			continue
		}
		delete(s.waiting, id)
		delete(s.local, id)
		s.missing[id] = api.SurveyMissing{AgentID: id, AgentIP: ip, Reason: "its connection ended before it was asked"}
		select {
		case s.changed <- struct{}{}:
		default:
		}
	}
}

func (c *Coordinator) noteMissing(s *survey, missing []api.SurveyMissing) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range missing {
		if ip, waited := s.waiting[m.AgentID]; waited {
			delete(s.waiting, m.AgentID)
			s.missing[m.AgentID] = api.SurveyMissing{AgentID: m.AgentID, AgentIP: ip, Reason: clip(m.Reason, api.MaxSurveyText)}
		}
	}
}

// timeUp waits for nobody any longer.
func (c *Coordinator) timeUp(s *survey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, ip := range s.waiting {
		s.missing[id] = api.SurveyMissing{AgentID: id, AgentIP: ip, Reason: fmt.Sprintf("it has not answered within %s; an agent of an earlier version does not", c.surveys.limit)}
	}
	clear(s.waiting)
	clear(s.local)
}

func (c *Coordinator) endSurvey(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.surveys.underway, id)
}

// serveSurveyReport takes the answer of an agent. An agent may bring it to another
// coordinator than the one that has asked it; that one hands it on.
func (c *Coordinator) serveSurveyReport(w http.ResponseWriter, r *http.Request, report *api.SurveyReport) error {
	if err := checkSurveyReport(report); err != nil {
		return err
	}
	run, _, _ := strings.Cut(report.ID, ".")
	if report.Run != "" && report.Run != c.run {
		return refuseRun()
	}
	c.mu.Lock()
	s, o := c.surveys.underway[report.ID], c.others[run]
	c.mu.Unlock()
	taken := s != nil && c.answer(s, *report)
	switch {
	case taken:
	case (s == nil || s.part) && report.Run == "" && o != nil && len(o.urls) > 0 && !askerOf(r).fellow():
		client, err := api.NewClient(o.urls, c.peerClient)
		if err != nil {
			return err
		}
		report.Run = run
		if err := client.ReportSurvey(r.Context(), *report); err != nil {
			return fmt.Errorf("hand on the answer to a survey: %w", err)
		}
	case s == nil || s.part:
		return refuse(http.StatusNotFound, "there is no such survey, or it has ended")
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
