package coordinator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// maxBody bounds a request, in bytes.
const maxBody = 1 << 20

// bodyTimeout is how long a client may take to send it.
const bodyTimeout = 30 * time.Second

// handler answers a request, or returns the error to answer with.
type handler func(http.ResponseWriter, *http.Request) error

// Handler serves the API. Every error is {"error": "..."} with a sentence for
// the person who asked.
func (c *Coordinator) Handler() http.Handler { return c.handler(nil) }

// handler is Handler with streams that end when ended is closed.
func (c *Coordinator) handler(ended <-chan struct{}) http.Handler {
	serveWatch := func(w http.ResponseWriter, r *http.Request) error { return c.serveWatch(w, r, ended) }
	routes := []struct {
		method, path string
		handler
	}{
		{http.MethodGet, api.PathMasterState, c.serveState},
		{http.MethodPost, api.PathAgentsDelete, c.serveDelete},
		{http.MethodPost, api.PathRegister, c.serveRegister},
		{http.MethodPost, api.PathStatus, c.serveStatus},
		{http.MethodGet, api.PathWatch, serveWatch},
		{http.MethodGet, api.PathAgents, c.serveAgents},
		{http.MethodGet, api.PathOverlays, c.serveOverlays},
		{http.MethodGet, api.PathHealth, c.serveHealth},
		{http.MethodGet, api.PathReady, c.serveReady},
		{http.MethodGet, api.PathMetrics, c.serveMetrics},
	}
	mux := http.NewServeMux()
	var paths []string
	for _, r := range routes {
		mux.Handle(r.method+" "+r.path, c.guard(r.handler))
		mux.Handle(r.path, c.guard(func(w http.ResponseWriter, req *http.Request) error {
			w.Header().Set("Allow", r.method)
			return refuse(http.StatusMethodNotAllowed, "%s %s: only %s is served here", req.Method, r.path, r.method)
		}))
		paths = append(paths, r.method+" "+r.path)
	}
	mux.Handle("/", c.guard(func(_ http.ResponseWriter, req *http.Request) error {
		return refuse(http.StatusNotFound, "there is nothing at %.200q; this is the coordinator of the overlay network and serves: %s",
			req.URL.Path, strings.Join(paths, ", "))
	}))
	return mux
}

// guard writes the handler's error, and survives a handler that panics.
func (c *Coordinator) guard(h handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			p := recover()
			if p == nil {
				return
			}
			if p == http.ErrAbortHandler {
				panic(p)
			}
			c.log.Error("request panicked", "path", r.URL.Path, "err", fmt.Sprint(p), "stack", string(debug.Stack()))
			writeError(w, refuse(http.StatusInternalServerError, "internal error; it is in the coordinator's log"))
		}()
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		if r.ContentLength != 0 {
			// What the handler does not read of it the server does, and then only
			// answers. (There is no ReadTimeout, because that would end streams.)
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(c.body)) // a recorder has none
		}
		if err := h(w, r); err != nil {
			c.logError(r, err)
			writeError(w, err)
		}
	})
}

// logError logs what the operator of the coordinator should know. Refusals are
// for the one who asked.
func (c *Coordinator) logError(r *http.Request, err error) {
	var refusal *api.Error
	if errors.As(err, &refusal) || r.Context().Err() != nil {
		c.log.Debug("request refused", "path", r.URL.Path, "remote", r.RemoteAddr, "err", err)
		return
	}
	c.log.Error("request failed", "path", r.URL.Path, "remote", r.RemoteAddr, "err", err)
}

func writeError(w http.ResponseWriter, err error) {
	answer := &api.Error{Code: http.StatusInternalServerError, Message: err.Error()}
	var refusal *api.Error
	switch {
	case errors.As(err, &refusal):
		answer.Code = refusal.Code
	case errors.Is(err, errStopping), errors.Is(err, store.ErrUnknown), errors.Is(err, store.ErrConflict),
		errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		answer.Code = http.StatusServiceUnavailable
	}
	writeJSON(w, answer.Code, answer)
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		code, b = http.StatusInternalServerError, encode(&api.Error{Message: "encode the answer: " + err.Error()})
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	w.Write(append(b, '\n')) // an error means that the client is gone
}

// readJSON reads one JSON document into v. After that a client may be silent for
// as long as the answer takes.
func readJSON(w http.ResponseWriter, r *http.Request, v any) error {
	dec := json.NewDecoder(r.Body)
	err := dec.Decode(v)
	if err == nil {
		if _, more := dec.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("there is more after the first JSON document")
		}
	}
	var tooLarge *http.MaxBytesError
	switch {
	case err == nil:
		_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // a recorder has none
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return refuse(http.StatusRequestTimeout, "the body took too long to come")
	case errors.As(err, &tooLarge):
		return refuse(http.StatusRequestEntityTooLarge, "the body has more than %d bytes", tooLarge.Limit)
	case errors.Is(err, io.EOF):
		return refuse(http.StatusBadRequest, "the body is empty; want a JSON object")
	}
	return refuse(http.StatusBadRequest, "the body cannot be read as JSON: %v", err)
}

func (c *Coordinator) serveState(w http.ResponseWriter, _ *http.Request) error {
	writeJSON(w, http.StatusOK, c.State())
	return nil
}

func (c *Coordinator) serveAgents(w http.ResponseWriter, _ *http.Request) error {
	writeJSON(w, http.StatusOK, c.Agents())
	return nil
}

func (c *Coordinator) serveOverlays(w http.ResponseWriter, _ *http.Request) error {
	writeJSON(w, http.StatusOK, c.Overlays())
	return nil
}

func (c *Coordinator) serveRegister(w http.ResponseWriter, r *http.Request) error {
	var req api.RegisterRequest
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	lease, err := c.Register(r.Context(), req)
	c.counts.registration(err)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, lease)
	return nil
}

func (c *Coordinator) serveStatus(w http.ResponseWriter, r *http.Request) error {
	var report api.StatusReport
	if err := readJSON(w, r, &report); err != nil {
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
	if err := readJSON(w, r, &body); err != nil {
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
	writeJSON(w, http.StatusOK, state)
	return nil
}

func (c *Coordinator) serveHealth(w http.ResponseWriter, _ *http.Request) error {
	writeJSON(w, http.StatusOK, map[string]string{"status": "ok", "version": c.version})
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
	writeJSON(w, http.StatusOK, map[string]string{"status": "ready"})
	return nil
}
