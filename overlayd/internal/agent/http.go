package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// served is what HTTP shows at one moment. It is never changed, only replaced.
type served struct {
	document []byte // state, as in the published file
	state    conf.State
	routes   []netip.Prefix // see datapath.Report
	// notReady says why new containers cannot be attached; empty: they can,
	// until CLOCK_BOOTTIME expires.
	notReady string
	expires  time.Duration
	late     string // why it may not have been renewed in time
	now      func() time.Duration
}

func (s *served) reason() string {
	if s.notReady == "" && s.now() >= s.expires {
		return "the lease could not be renewed in time: " + s.late
	}
	return s.notReady
}

// handler serves GET, and root the change of the log level.
func (a *Agent) handler() http.Handler {
	get := func(path string, h serve.Handler) serve.Route {
		return serve.Route{Method: http.MethodGet, Path: path, Handler: h}
	}
	routes := []serve.Route{
		get(api.PathAgentOverlay, a.serveDocument),
		get(api.PathAgentOverlays, a.serveDocument),
		get(api.PathHealth, func(w http.ResponseWriter, _ *http.Request) error {
			_, err := fmt.Fprintln(w, "ok")
			return err
		}),
		get(api.PathReady, a.serveReady),
		get(api.PathMetrics, a.serveMetrics),
	}
	if a.opts.LogLevel != nil {
		level, setLevel := serve.LogLevel(a.opts.LogLevel)
		routes = append(routes, get(api.PathLogLevel, level),
			serve.Route{Method: http.MethodPost, Path: api.PathLogLevel, Handler: serve.ByRoot(setLevel)})
	}
	return serve.API{Name: "the agent of a host of the overlay network", Routes: routes, Log: a.log}.Handler()
}

func (a *Agent) serveDocument(w http.ResponseWriter, _ *http.Request) error {
	serve.WriteDocument(w, http.StatusOK, a.served.Load().document)
	return nil
}

func (a *Agent) serveReady(w http.ResponseWriter, _ *http.Request) error {
	if reason := a.served.Load().reason(); reason != "" {
		return serve.Refuse(http.StatusServiceUnavailable, "%s", reason)
	}
	fmt.Fprintln(w, "ok")
	for _, problem := range a.served.Load().state.Problems { // new containers are not concerned
		fmt.Fprintln(w, problem)
	}
	return nil
}

// listeners are the sockets of the HTTP server.
type listeners struct {
	unix *serve.SocketListener
	tcp  []net.Listener // at most one
}

// listen opens the unix socket and, if addr is not empty, the TCP socket, so
// that an address in use is a start-up error.
func listen(ctx context.Context, socket serve.Socket, addr string) (*listeners, error) {
	l, err := socket.Listen(ctx)
	if err != nil {
		return nil, err
	}
	ls := &listeners{unix: l}
	if addr == "" {
		return ls, nil
	}
	tcp, err := serve.ListenTCP(ctx, addr)
	if err != nil {
		ls.close()
		return nil, err
	}
	ls.tcp = append(ls.tcp, tcp)
	return ls, nil
}

// close closes what serve did not get to; closing twice is harmless.
func (ls *listeners) close() {
	ls.unix.Close()
	for _, l := range ls.tcp {
		l.Close()
	}
}

// serve answers until ctx is done, then lets requests in progress finish and
// returns nil.
func (ls *listeners) serve(ctx context.Context, h http.Handler, log *slog.Logger) error {
	s := serve.Server{
		Handler: h, Log: log,
		HeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second,
		IdleTimeout: time.Minute, Grace: 2 * time.Second, ConnContext: serve.PeerConn,
	}
	return s.ServeSocket(ctx, ls.unix, ls.tcp...)
}
