package coordinator

import (
	"net/http"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// checkSurvey refuses what no agent would do, and fills in what was left out.
func checkSurvey(req *api.Survey) error {
	bad := func(format string, args ...any) error { return refuse(http.StatusBadRequest, format, args...) }
	wait := time.Duration(req.WaitMS) * time.Millisecond
	switch {
	case req.Here && (req.ID == "" || len(req.ID) > maxWord):
		return bad("id: a part of a survey has that of the survey")
	case !req.Here && (len(req.Targets) > 0 || req.Run != ""):
		return bad("targets and run: only a part of a survey has them")
	case len(req.Targets) > api.MaxSurveyed:
		return bad("targets: %d are named, at most %d are measured", len(req.Targets), api.MaxSurveyed)
	case len(req.Agents) > api.MaxSurveyed:
		return bad("agents: %d are named, at most %d are asked at once", len(req.Agents), api.MaxSurveyed)
	case req.Kind == api.SurveyPing && (req.Count < 0 || req.Count > api.MaxSurveyCount):
		return bad("count %d: want 1 to %d", req.Count, api.MaxSurveyCount)
	case req.Kind == api.SurveyPing && req.WaitMS != 0 && (wait < api.MinSurveyWait || wait > api.MaxSurveyWait):
		return bad("wait_ms %d: want %d to %d", req.WaitMS, api.MinSurveyWait.Milliseconds(), api.MaxSurveyWait.Milliseconds())
	case req.Kind == api.SurveyExplain && (req.A == "" || req.B == "" || max(len(req.A), len(req.B)) > maxWord):
		return bad("a and b: want a container id or an address each")
	case req.Kind == api.SurveyExplain && len(req.Agents) != 1:
		return bad("agents: want the one host that the packet comes from, or arrives at")
	case req.Kind != api.SurveyPing && req.Kind != api.SurveyExplain:
		return bad("kind %.80q: want %s or %s", req.Kind, api.SurveyPing, api.SurveyExplain)
	}
	if req.Kind == api.SurveyPing && req.Count == 0 {
		req.Count = 5
	}
	return nil
}

// checkTime refuses a ping that may take longer than an agent has for it, and fills in
// how long an answer is waited for.
func checkTime(req *api.Survey, targets int) error {
	most := req.MostWait(targets)
	switch wait := time.Duration(req.WaitMS) * time.Millisecond; {
	case wait == 0:
		req.WaitMS = int(min(time.Second, most).Milliseconds())
	case wait > most:
		return refuse(http.StatusBadRequest, "count %d and wait_ms %d: with %d hosts to measure it may take more than the %s that a survey has; lower wait_ms to %d, or count, or name fewer hosts",
			req.Count, req.WaitMS, targets, api.SurveyTime, most.Milliseconds())
	}
	return nil
}

// checkSurveyReport cuts what is longer than any agent of ours says.
func checkSurveyReport(r *api.SurveyReport) error {
	if err := checkAgentID(r.AgentID); err != nil {
		return err
	}
	if len(r.Ways) > api.MaxSurveyed {
		return refuse(http.StatusBadRequest, "%d ways: want at most %d", len(r.Ways), api.MaxSurveyed)
	}
	r.Error = clip(r.Error, api.MaxSurveyText)
	for i := range r.Ways {
		r.Ways[i].AgentID = clip(r.Ways[i].AgentID, maxWord)
	}
	if e := r.Explain; e != nil {
		e.Far, e.FarUnknown, e.NamesUnknown = nil, "", "" // who asks fills them in
		e.From, e.To, e.StopsAt = clip(e.From, maxWord), clip(e.To, maxWord), clip(e.StopsAt, api.MaxSurveyText)
		e.Steps = e.Steps[:min(len(e.Steps), api.MaxSurveySteps)]
		for i := range e.Steps {
			e.Steps[i].Name, e.Steps[i].Text = clip(e.Steps[i].Name, maxWord), clip(e.Steps[i].Text, api.MaxSurveyText)
		}
	}
	return nil
}
