// Package door lets one browser on this host see the page as the person who opened
// it, whose certificate the browser has not got. It serves on the loopback
// address, behind a link that works once.
package door

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/page"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// openPath is where the link leads.
const openPath = "/open/"

// Options are the parts a Door is made of.
type Options struct {
	Client *api.Client   // asks the coordinators as the person
	Idle   time.Duration // how long nobody may ask before Serve ends
	Log    *slog.Logger
}

// Door is one listener with one link.
type Door struct {
	Options
	link   string // the secret in the link
	secret string // the value of the cookie
	cookie string // its name, another one for each Door, for a browser has one jar for all ports

	mu     sync.Mutex // guards what follows
	opened bool
	asking int // requests in progress, streams too
	idle   *time.Timer
}

// New makes the secrets.
func New(o Options) *Door {
	return &Door{Options: o, link: rand.Text(), secret: rand.Text(), cookie: "overlay-page-" + strings.ToLower(rand.Text()[:8])}
}

// Link is what opens the page, once.
func (d *Door) Link(l net.Listener) string {
	return "http://" + l.Addr().String() + openPath + d.link
}

// Serve answers until ctx ends, or nobody has asked for the idle time.
func (d *Door) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.mu.Lock()
	d.idle = time.AfterFunc(d.Idle, cancel)
	d.mu.Unlock()
	defer d.idle.Stop()
	s := serve.Server{
		Handler: d.handler(ctx), Log: d.Log, HeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, IdleTimeout: time.Minute,
		Grace: time.Second, MaxConns: 64,
	}
	return s.Serve(ctx, l)
}

func (d *Door) handler(ctx context.Context) http.Handler {
	routes := []serve.Route{{Method: http.MethodGet, Path: openPath + "{link}", Handler: d.open}}
	pass := func(w http.ResponseWriter, r *http.Request) error { return d.pass(ctx, w, r) }
	for _, r := range page.Routes() {
		routes = append(routes, serve.Route{Method: http.MethodGet, Path: r.Path, Handler: pass})
	}
	for _, path := range page.Reads() {
		routes = append(routes, serve.Route{Method: http.MethodGet, Path: path, Handler: pass})
	}
	h := serve.API{Name: "overlayctl page", Routes: routes, Log: d.Log, Allow: d.allow}.Handler()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer d.busy()()
		h.ServeHTTP(w, r)
	})
}

// busy holds off the end of the idle time until the function it returns is called.
func (d *Door) busy() (done func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asking++
	d.idle.Stop()
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.asking--; d.asking == 0 {
			d.idle.Reset(d.Idle)
		}
	}
}

// allow refuses what does not come from the browser that followed the link. A name
// that somebody made point here (DNS rebinding) shows in the Host header; a request
// that another site makes, in Sec-Fetch-Site.
func (d *Door) allow(w http.ResponseWriter, r *http.Request, _ *serve.Route) (*http.Request, error) {
	page.Guard(w.Header())
	w.Header().Set("Cache-Control", "no-store")
	if !local(r.Host) {
		return nil, serve.Refuse(http.StatusMisdirectedRequest, "this is asked for as %.100q, and answers to 127.0.0.1 and localhost alone", r.Host)
	}
	if r.Method != http.MethodGet {
		return nil, serve.Refuse(http.StatusMethodNotAllowed, "%s: only GET passes here", r.Method)
	}
	if strings.HasPrefix(r.URL.Path, openPath) {
		return r, nil
	}
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "none", "same-origin":
	default:
		return nil, serve.Refuse(http.StatusForbidden, "another site asks for this")
	}
	if !d.known(r) {
		return nil, serve.Refuse(http.StatusUnauthorized, "open the link that overlayctl page has printed; when it was used already, end overlayctl page and start it again")
	}
	return r, nil
}

// local reports whether a Host header names this host. The port is another one
// behind ssh -L.
func local(host string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	if strings.EqualFold(name, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(strings.Trim(name, "[]"))
	return err == nil && ip.IsLoopback()
}

// known reports whether a request has the cookie.
func (d *Door) known(r *http.Request) bool {
	c, err := r.Cookie(d.cookie)
	return err == nil && same(c.Value, d.secret)
}

func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// welcome leads on to the page. It is no redirect: the browser would count one as
// coming from where the link was clicked, and send no strict cookie with it.
const welcome = `<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,"><meta http-equiv="refresh" content="0; url=/"><title>Overlay network</title><p><a href="/">The page</a></p></html>
`

// open swaps the link for a cookie, once.
func (d *Door) open(w http.ResponseWriter, r *http.Request) error {
	if strings.Contains(r.Header.Get("Sec-Purpose")+r.Header.Get("Purpose"), "prefetch") {
		return serve.Refuse(http.StatusServiceUnavailable, "the link works once, and is kept for when somebody follows it")
	}
	if !d.known(r) {
		if !same(r.PathValue("link"), d.link) {
			return serve.Refuse(http.StatusForbidden, "this is not the link that overlayctl page has printed")
		}
		d.mu.Lock()
		used := d.opened
		d.opened = true
		d.mu.Unlock()
		if used {
			return serve.Refuse(http.StatusForbidden, "this link was used already; if that was not you, somebody else sees the page: end overlayctl page, and start it again")
		}
		http.SetCookie(w, &http.Cookie{Name: d.cookie, Value: d.secret, Path: "/", HttpOnly: true, SameSite: http.SameSiteStrictMode})
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = io.WriteString(w, welcome) // an error means that the browser is gone
	return nil
}

// answered are the headers of an answer that go on to the browser.
var answered = []string{"Content-Type", "Etag", "Cache-Control"}

// pass asks the coordinator the same, and hands on what it says as it comes.
func (d *Door) pass(ended context.Context, w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(ended, cancel)()
	path := r.URL.EscapedPath()
	if r.URL.RawQuery != "" {
		path += "?" + r.URL.RawQuery
	}
	resp, err := d.Client.Pass(ctx, path, r.Header)
	var refusal *api.Error
	switch {
	case errors.As(err, &refusal):
		return refusal
	case err != nil:
		return serve.Refuse(http.StatusBadGateway, "no coordinator answers: %v", err)
	}
	defer resp.Body.Close()
	for _, name := range answered {
		if v := resp.Header.Get(name); v != "" {
			w.Header().Set(name, v)
		}
	}
	w.WriteHeader(resp.StatusCode)
	control := http.NewResponseController(w)
	if control.Flush() != nil { // a stream begins before it says something
		return nil
	}
	buffer := make([]byte, 64<<10)
	for {
		n, err := resp.Body.Read(buffer)
		if n > 0 {
			if _, err := w.Write(buffer[:n]); err != nil {
				return nil
			}
			if control.Flush() != nil {
				return nil
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			panic(http.ErrAbortHandler) // half an answer must not look like a whole one
		}
	}
}
