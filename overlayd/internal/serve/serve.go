// Package serve is what every HTTP server of ours shares: routes, refusals in
// one form, limits on what a client may send, hold and leave unread, a guard
// against handlers that panic, and the keeping of unix sockets.
package serve

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// MaxBody bounds a request's body, in bytes, where its route says nothing else.
const MaxBody = 1 << 20

// BodyTimeout is how long a client may take to send it.
const BodyTimeout = 30 * time.Second

// How long a client may take to read an answer: answerTimeout, and one second
// more for every answerRate bytes.
const (
	answerTimeout = 30 * time.Second
	answerRate    = 32 << 10
)

// Handler answers a request, or returns the error to answer with.
type Handler func(http.ResponseWriter, *http.Request) error

// Route is one thing that is served.
type Route struct {
	Method, Path string
	Handler      Handler
	MaxBody      int64 // 0: MaxBody
}

// API is a set of routes. Every answer that is not 2xx is {"error": "..."} with a
// sentence for the person who asked.
type API struct {
	Name   string // of the server, as in "the coordinator of the overlay network"
	Routes []Route
	Log    *slog.Logger
	Body   func() time.Duration // how long a body may take to come; nil: BodyTimeout
	// Allow decides before anything else whether a request may be answered, and
	// may give the handler another request. The route is nil where there is none.
	// A nil Allow admits everybody.
	Allow func(http.ResponseWriter, *http.Request, *Route) (*http.Request, error)
	// Code is the status for an error that is no refusal; 0, or a nil Code: 500.
	Code func(error) int
}

// Refuse is an answer that says no. The message is for the person who asked.
func Refuse(code int, format string, args ...any) error {
	return &api.Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Handler serves the routes. A known path with another method gets 405, an
// unknown path 404 with a list of what there is.
func (a API) Handler() http.Handler {
	mux := http.NewServeMux()
	var paths, served []string
	methods := map[string][]string{}
	for _, r := range a.Routes {
		mux.Handle(r.Method+" "+exact(r.Path), a.guard(&r, r.Handler))
		if methods[r.Path] == nil {
			paths = append(paths, r.Path)
		}
		methods[r.Path] = append(methods[r.Path], r.Method)
		served = append(served, r.Method+" "+r.Path)
	}
	for _, path := range paths {
		allowed := methods[path]
		route := &a.Routes[slices.IndexFunc(a.Routes, func(r Route) bool { return r.Path == path })]
		mux.Handle(exact(path), a.guard(route, func(w http.ResponseWriter, req *http.Request) error {
			w.Header().Set("Allow", strings.Join(allowed, ", "))
			return Refuse(http.StatusMethodNotAllowed, "%s %s: only %s is served here", req.Method, path, strings.Join(allowed, " and "))
		}))
	}
	mux.Handle("/", a.guard(nil, func(_ http.ResponseWriter, req *http.Request) error {
		return Refuse(http.StatusNotFound, "there is nothing at %.200q; this is %s and serves: %s", req.URL.Path, a.Name, strings.Join(served, ", "))
	}))
	return mux
}

// exact is the pattern of a path alone: "/" would match everything below it.
func exact(path string) string {
	if path == "/" {
		return "/{$}"
	}
	return path
}

// guard asks Allow, bounds the body, writes the handler's error, and survives a
// handler that panics.
func (a API) guard(route *Route, h Handler) http.Handler {
	body := a.Body
	if body == nil {
		body = func() time.Duration { return BodyTimeout }
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			p := recover()
			if p == nil {
				return
			}
			if p == http.ErrAbortHandler {
				panic(p)
			}
			a.Log.Error("request panicked", logkey.Path, r.URL.Path, logkey.Err, fmt.Sprint(p), logkey.Stack, string(debug.Stack()))
			a.writeError(w, Refuse(http.StatusInternalServerError, "internal error; the log of %s has it", a.Name))
		}()
		limit := int64(MaxBody)
		if route != nil && route.MaxBody > 0 {
			limit = route.MaxBody
		}
		r.Body = http.MaxBytesReader(w, r.Body, limit)
		control := http.NewResponseController(w)
		_ = control.SetWriteDeadline(time.Time{}) // that of the answer before; a recorder has none
		if r.ContentLength != 0 {
			// What the handler does not read of it the server does, and then only
			// answers. (There is no ReadTimeout where streams are served.)
			_ = control.SetReadDeadline(time.Now().Add(body()))
		}
		err := error(nil)
		if a.Allow != nil {
			var admitted *http.Request
			if admitted, err = a.Allow(w, r, route); err == nil {
				r = admitted
			}
		}
		if err == nil {
			err = h(w, r)
		}
		if err != nil {
			a.logError(r, err)
			a.writeError(w, err)
		}
	})
}

// logError logs what the operator of the server should know. Refusals are for
// the one who asked.
func (a API) logError(r *http.Request, err error) {
	if errors.As(err, new(*api.Error)) || r.Context().Err() != nil {
		a.Log.Debug("request refused", logkey.Path, r.URL.Path, logkey.Remote, r.RemoteAddr, logkey.Err, err)
		return
	}
	a.Log.Error("request failed", logkey.Path, r.URL.Path, logkey.Remote, r.RemoteAddr, logkey.Err, err)
}

func (a API) writeError(w http.ResponseWriter, err error) {
	answer := &api.Error{Code: http.StatusInternalServerError, Message: err.Error()}
	var refusal *api.Error
	if errors.As(err, &refusal) {
		answer.Code, answer.Kind, answer.Problems = refusal.Code, refusal.Kind, refusal.Problems
	} else if a.Code != nil {
		if code := a.Code(err); code != 0 {
			answer.Code = code
		}
	}
	WriteJSON(w, answer.Code, answer)
}

// WriteJSON answers with a document. Whoever does not read it in time loses the
// connection.
func WriteJSON(w http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		code = http.StatusInternalServerError
		b, _ = json.Marshal(&api.Error{Message: "encode the answer: " + err.Error()}) // a text always can be
	}
	WriteDocument(w, code, append(b, '\n'))
}

// WriteDocument is WriteJSON of a document that is encoded already.
func WriteDocument(w http.ResponseWriter, code int, document []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(document))) // else a long one goes out in chunks
	LimitAnswer(w, len(document))
	w.WriteHeader(code)
	w.Write(document) // an error means that the client is gone
}

// LimitAnswer has the client read the so many bytes that follow in good time, or
// lose the connection: what it leaves unread is kept in memory.
func LimitAnswer(w http.ResponseWriter, bytes int) {
	allowed := answerTimeout + time.Duration(bytes)*time.Second/answerRate
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(allowed)) // a recorder has none
}

// ReadJSON reads one JSON document into v. After that a client may be silent for
// as long as the answer takes.
func ReadJSON(w http.ResponseWriter, r *http.Request, v any) error {
	dec := json.NewDecoder(r.Body)
	err := dec.Decode(v)
	if err == nil {
		if _, more := dec.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("there is more after the first JSON document")
		}
	}
	if err == nil {
		_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // a recorder has none
		return nil
	}
	return bodyRefusal(err)
}

// ReadBody is ReadJSON of a body that is to be read later.
func ReadBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, bodyRefusal(err)
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // a recorder has none
	return body, nil
}

// bodyRefusal says what is wrong with a body that could not be read.
func bodyRefusal(err error) error {
	var tooLarge *http.MaxBytesError
	var tooMany *elementsError
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return Refuse(http.StatusRequestTimeout, "the body took too long to come")
	case errors.As(err, &tooLarge):
		return Refuse(http.StatusRequestEntityTooLarge, "the body has more than %d bytes", tooLarge.Limit)
	case errors.As(err, &tooMany):
		return Refuse(http.StatusRequestEntityTooLarge, "the body has %v", tooMany)
	case errors.Is(err, io.EOF):
		return Refuse(http.StatusBadRequest, "the body is empty; want a JSON object")
	}
	return Refuse(http.StatusBadRequest, "the body cannot be read as JSON: %v", err)
}
