package coordinator

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// Handler serves the API.
func (c *Coordinator) Handler() http.Handler { return c.handler(nil) }

// handler is Handler with streams that end when ended is closed.
func (c *Coordinator) handler(ended <-chan struct{}) http.Handler {
	get := func(path string, h serve.Handler) serve.Route {
		return serve.Route{Method: http.MethodGet, Path: path, Handler: h}
	}
	post := func(path string, h serve.Handler) serve.Route {
		return serve.Route{Method: http.MethodPost, Path: path, Handler: h}
	}
	return serve.API{
		Name: "the coordinator of the overlay network",
		Routes: []serve.Route{
			get(api.PathMasterState, c.serveState),
			post(api.PathAgentsDelete, c.serveDelete),
			post(api.PathRegister, c.serveRegister),
			post(api.PathStatus, c.serveStatus),
			get(api.PathWatch, func(w http.ResponseWriter, r *http.Request) error { return c.serveWatch(w, r, ended) }),
			get(api.PathAgents, c.serveAgents),
			get(api.PathOverlays, c.serveOverlays),
			get(api.PathHealth, c.serveHealth),
			get(api.PathReady, c.serveReady),
			get(api.PathMetrics, c.serveMetrics),
		},
		Log: c.log, Body: func() time.Duration { return c.body }, Code: code,
	}.Handler()
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

func (c *Coordinator) serveRegister(w http.ResponseWriter, r *http.Request) error {
	var req api.RegisterRequest
	if err := serve.ReadJSON(w, r, &req); err != nil {
		return err
	}
	lease, err := c.Register(r.Context(), req)
	c.counts.registration(err)
	if err != nil {
		return err
	}
	serve.WriteJSON(w, http.StatusOK, lease)
	return nil
}

func (c *Coordinator) serveStatus(w http.ResponseWriter, r *http.Request) error {
	var report api.StatusReport
	if err := serve.ReadJSON(w, r, &report); err != nil {
		return err
	}
	if err := c.Report(r.Context(), report); err != nil {
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

func (c *Coordinator) serveHealth(w http.ResponseWriter, _ *http.Request) error {
	serve.WriteJSON(w, http.StatusOK, map[string]string{"status": "ok", "version": c.version})
	return nil
}

// serveReady says yes while leases can be granted, as far as is known.
func (c *Coordinator) serveReady(w http.ResponseWriter, _ *http.Request) error {
	c.mu.Lock()
	err := c.readyLocked()
	c.mu.Unlock()
	if err != nil {
		return refuse(http.StatusServiceUnavailable, "not ready: %v", err)
	}
	serve.WriteJSON(w, http.StatusOK, map[string]string{"status": "ready"})
	return nil
}
