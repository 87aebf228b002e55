package coordinator

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// Handler serves the API.
func (c *Coordinator) Handler() http.Handler { return c.handler(nil) }

// handler is Handler with streams that end when ended is closed.
func (c *Coordinator) handler(ended <-chan struct{}) http.Handler {
	return c.api(c.withDescription(c.withPage(c.routes(ended)))).Handler()
}

// routes are what is served, beside the page and the description.
func (c *Coordinator) routes(ended <-chan struct{}) []route {
	stateAccess := reader
	if c.statePublic {
		stateAccess = public
	}
	watch := func(w http.ResponseWriter, r *http.Request) error { return c.serveWatch(w, r, ended) }
	follow := func(w http.ResponseWriter, r *http.Request) error { return c.serveEvents(w, r, ended) }
	survey := func(w http.ResponseWriter, r *http.Request) error { return c.serveSurvey(w, r, ended) }
	reports := func(w http.ResponseWriter, r *http.Request) error { return c.serveReports(w, r, ended) }
	routes := []route{
		{http.MethodGet, api.PathMasterState, stateAccess, c.serveState},
		{http.MethodPost, api.PathAgentsDelete, operator, c.serveDelete},
		{http.MethodPost, api.PathRegister, self, speaking(c.serveRegister)},
		{http.MethodPost, api.PathStatus, self, speaking(c.serveStatus)},
		{http.MethodGet, api.PathWatch, self, ownQuery("agent", watch)},
		{http.MethodGet, api.PathAgents, reader, c.serveAgents},
		{http.MethodGet, api.PathBackup, operator, c.serveBackup},
		{http.MethodPost, api.PathPrune, operator, c.servePrune},
		{http.MethodPost, api.PathAttachments, self, c.unpacked(speaking(c.serveAttachments))},
		{http.MethodGet, api.PathAttachments, reader, reports},
		{http.MethodGet, api.PathContainers, reader, c.serveContainers},
		{http.MethodGet, api.PathAddresses, reader, c.serveAddresses},
		{http.MethodGet, api.PathEvents, reader, follow},
		{http.MethodPost, api.PathSurvey, fellow, survey},
		{http.MethodPost, api.PathSurveyReport, relayed, speaking(c.serveSurveyReport)},
		{http.MethodGet, api.PathHealth, public, c.serveHealth},
		{http.MethodGet, api.PathReady, public, c.serveReady},
		{http.MethodGet, api.PathMetrics, reader, c.serveMetrics},
	}
	if c.logLevel != nil {
		level, setLevel := serve.LogLevel(c.logLevel)
		routes = append(routes, route{http.MethodGet, api.PathLogLevel, reader, level}, route{http.MethodPost, api.PathLogLevel, operator, setLevel})
	}
	routes = append(routes, c.reservedRoutes()...)
	routes = append(routes, c.networkRoutes()...)
	return append(routes, c.identityRoutes()...)
}

// code is the status of an error that is no refusal; 0: none in particular.
func code(err error) int {
	if errors.Is(err, errStopping) || errors.Is(err, store.ErrUnknown) || errors.Is(err, store.ErrConflict) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return http.StatusServiceUnavailable
	}
	return 0
}

func (c *Coordinator) serveState(w http.ResponseWriter, _ *http.Request) error {
	document, err := c.stateDocument()
	if err != nil {
		return err
	}
	serve.WriteDocument(w, http.StatusOK, document)
	return nil
}

func (c *Coordinator) serveAgents(w http.ResponseWriter, _ *http.Request) error {
	serve.WriteJSON(w, http.StatusOK, c.Agents())
	return nil
}

func (c *Coordinator) serveOverlays(w http.ResponseWriter, _ *http.Request) error {
	serve.WriteJSON(w, http.StatusOK, c.Overlays())
	return nil
}

func (c *Coordinator) serveRegister(w http.ResponseWriter, r *http.Request, req *api.RegisterRequest) error {
	if from, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		req.Source = from.Addr().Unmap().WithZone("")
	}
	c.joining.Add(1)
	lease, err := c.register(r.Context(), req)
	c.joining.Add(-1)
	c.counts.registration(err)
	if err != nil {
		return err
	}
	serve.WriteDocument(w, http.StatusOK, lease)
	return nil
}

func (c *Coordinator) serveStatus(w http.ResponseWriter, r *http.Request, report *api.StatusReport) error {
	if err := c.Report(r.Context(), *report); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (c *Coordinator) serveDelete(w http.ResponseWriter, r *http.Request) error {
	var body map[string]json.RawMessage
	if err := serve.ReadJSON(w, r, &body); err != nil {
		return err
	}
	const want = `want {"agents": ["10.0.0.1", ...]}`
	raw, ok := body["agents"]
	if !ok {
		return refuse(http.StatusBadRequest, "the key \"agents\" is missing; %s", want)
	}
	var agents []string
	if err := json.Unmarshal(raw, &agents); err != nil || agents == nil {
		return refuse(http.StatusBadRequest, "\"agents\" is not an array of strings; %s", want)
	}
	state, err := c.Delete(r.Context(), agents)
	if err != nil {
		return err
	}
	serve.WriteJSON(w, http.StatusOK, state)
	return nil
}

// serveHealth tells those who are nobody one word.
func (c *Coordinator) serveHealth(w http.ResponseWriter, r *http.Request) error {
	health := map[string]string{"status": "ok"}
	if askerOf(r).may(reader) {
		health["version"] = c.version
	}
	serve.WriteJSON(w, http.StatusOK, health)
	return nil
}

// serveReady says yes while leases can be granted, as far as is known. Why not is
// nothing for those who are nobody.
func (c *Coordinator) serveReady(w http.ResponseWriter, r *http.Request) error {
	c.mu.Lock()
	err := c.readyLocked()
	c.mu.Unlock()
	switch {
	case err != nil && !askerOf(r).identified():
		return refuse(http.StatusServiceUnavailable, "unready")
	case err != nil:
		return refuse(http.StatusServiceUnavailable, "not ready: %v", err)
	}
	serve.WriteJSON(w, http.StatusOK, map[string]string{"status": "ready"})
	return nil
}
