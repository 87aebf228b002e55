package coordinator

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/pki"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// access is who a route is for. One guard in front of all handlers decides; there
// is nothing about it in a handler.
type access int

const (
	public   access = iota // anybody
	member                 // whoever has an identity
	reader                 // readers, coordinators and operators
	operator               // operators
	self                   // operators, and the agent that the request speaks for
	fellow                 // operators and coordinators
	relayed                // as self, and coordinators, which hand it on
)

// route is one thing that is served, and who it is for.
type route struct {
	method, path string
	access       access
	handler      serve.Handler
}

// asker is who a request is from.
type asker struct {
	who  pki.Identity // the zero Identity: nobody
	cert *x509.Certificate
	// local: root of this host, by the socket in the state directory, or anybody
	// where there are no identities at all.
	local bool
}

type askerKey struct{}

func askerOf(r *http.Request) asker {
	a, _ := r.Context().Value(askerKey{}).(asker)
	return a
}

// identified reports whether the asker is somebody.
func (a asker) identified() bool { return a.local || a.who.Role != "" }

// may reports whether the asker has access. For self it may still speak for one
// agent alone.
func (a asker) may(to access) bool {
	if a.local || a.who.Role == pki.RoleOperator {
		return true
	}
	switch to {
	case public:
		return true
	case member:
		return a.identified()
	case reader:
		return a.who.Role == pki.RoleReader || a.who.Role == pki.RoleCoordinator
	case self:
		return a.who.Role == pki.RoleAgent
	case fellow:
		return a.fellow()
	case relayed:
		return a.who.Role == pki.RoleAgent || a.fellow()
	}
	return false
}

// fellow reports whether another coordinator asks.
func (a asker) fellow() bool { return a.who.Role == pki.RoleCoordinator }

// speaksFor refuses an agent that speaks for another one.
func (a asker) speaksFor(agentID string) error {
	if a.local || a.who.Role != pki.RoleAgent || a.who.Name == agentID {
		return nil
	}
	return refuse(http.StatusForbidden, "this is the certificate of %s, which may speak for itself alone, and the request is about agent %.80q", a.who, agentID)
}

// maxElements is how many elements what an agent says may have, many times what ours
// say at once. In memory an element may be a hundred times as large as in a body.
const maxElements = 1 << 18

// speaking serves a request that speaks for an agent. The request is read once,
// and that is what is judged and what the handler gets.
func speaking[T interface{ Speaker() string }](h func(http.ResponseWriter, *http.Request, *T) error) serve.Handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		var req T
		r.Body = serve.LimitElements(r.Body, maxElements)
		if err := serve.ReadJSON(w, r, &req); err != nil {
			return err
		}
		if err := askerOf(r).speaksFor(req.Speaker()); err != nil {
			return err
		}
		return h(w, r, &req)
	}
}

// ownQuery is speaking for a request that names the agent in its query.
func ownQuery(key string, h serve.Handler) serve.Handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		if err := askerOf(r).speaksFor(r.URL.Query().Get(key)); err != nil {
			return err
		}
		return h(w, r)
	}
}

// api makes the routes, and the guard in front of them.
func (c *Coordinator) api(routes []route) serve.API {
	access := map[string]access{}
	a := serve.API{
		Name: "the coordinator of the overlay network", Log: c.log, Code: code,
		Body: func() time.Duration { return c.body },
	}
	for _, r := range routes {
		access[r.method+" "+r.path] = r.access
		a.Routes = append(a.Routes, serve.Route{Method: r.method, Path: r.path, Handler: r.handler, MaxBody: maxBody(r.path)})
	}
	a.Allow = func(w http.ResponseWriter, r *http.Request, found *serve.Route) (*http.Request, error) {
		need := member // to learn what there is
		if found != nil {
			need = access[found.Method+" "+found.Path]
		}
		return c.admit(w, r, need)
	}
	return a
}

// admit finds out who asks, and whether that may be.
func (c *Coordinator) admit(w http.ResponseWriter, r *http.Request, need access) (*http.Request, error) {
	from := asker{local: c.identity == nil}
	if isLocal(r) {
		from.local = true
	} else if c.identity != nil {
		w.Header().Set(api.HeaderBundle, c.identity.Bundle())
		var err error
		var refused *pki.Refused
		from.cert, from.who, err = pki.PeerOf(r)
		if errors.As(err, &refused) {
			w.Header().Set(api.HeaderRefused, refused.Reason)
		}
		if err != nil && need != public {
			return nil, refuse(http.StatusForbidden, "%v", err)
		}
	}
	switch {
	case from.may(need):
		return r.WithContext(context.WithValue(r.Context(), askerKey{}, from)), nil
	case !from.identified():
		return nil, stranger(r)
	}
	return nil, refuse(http.StatusForbidden, "%s may not do that (%s %.200q); it needs another role: overlayctl login with a token of role operator", from.who, r.Method, r.URL.Path)
}

type localKey struct{}

// localConn marks connections of the socket in the state directory, which root
// alone can open.
func localConn(ctx context.Context, _ net.Conn) context.Context {
	return context.WithValue(ctx, localKey{}, true)
}

func isLocal(r *http.Request) bool {
	local, _ := r.Context().Value(localKey{}).(bool)
	return local
}
