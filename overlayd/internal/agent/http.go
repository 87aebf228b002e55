package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// maxSocketPath is what fits into a socket address.
const maxSocketPath = 107

// served is what HTTP shows at one moment. It is never changed, only replaced.
type served struct {
	document []byte // state, as in the published file
	state    conf.State
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

// handler serves GET only. Every error is {"error": "..."}, as the
// coordinator's.
func (a *Agent) handler() http.Handler {
	routes := []struct {
		path  string
		serve http.HandlerFunc
	}{
		{api.PathAgentOverlay, a.serveDocument},
		{api.PathAgentOverlays, a.serveDocument},
		{api.PathHealth, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") }},
		{api.PathReady, a.serveReady},
		{api.PathMetrics, a.serveMetrics},
	}
	mux := http.NewServeMux()
	var paths []string
	for _, r := range routes {
		mux.HandleFunc("GET "+r.path, r.serve)
		mux.HandleFunc(r.path, func(w http.ResponseWriter, req *http.Request) {
			w.Header().Set("Allow", http.MethodGet)
			refuse(w, http.StatusMethodNotAllowed, "%s %s: only GET is served here", req.Method, r.path)
		})
		paths = append(paths, r.path)
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, req *http.Request) {
		refuse(w, http.StatusNotFound, "there is nothing at %.200q; this is the agent of a host of the overlay network and serves: %s",
			req.URL.Path, strings.Join(paths, ", "))
	})
	return mux
}

func refuse(w http.ResponseWriter, code int, format string, args ...any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(api.Error{Message: fmt.Sprintf(format, args...)})
}

func (a *Agent) serveDocument(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.Write(a.served.Load().document)
}

func (a *Agent) serveReady(w http.ResponseWriter, _ *http.Request) {
	if reason := a.served.Load().reason(); reason != "" {
		refuse(w, http.StatusServiceUnavailable, "%s", reason)
		return
	}
	fmt.Fprintln(w, "ok")
	if a.docker != nil { // who uses CNI is not concerned
		for _, problem := range a.docker.Problems() {
			fmt.Fprintln(w, problem)
		}
	}
}

// listeners are the sockets of the HTTP server.
type listeners struct {
	unix *net.UnixListener
	tcp  net.Listener // nil: none
	path string       // of the unix socket
}

// listen opens the unix socket and, if addr is not empty, the TCP socket, so
// that an address in use is a start-up error. The caller holds the lock of the
// run directory: a socket that lies there is nobody's.
func listen(ctx context.Context, socket, addr string) (*listeners, error) {
	l, err := listenUnix(ctx, socket)
	if err != nil {
		return nil, err
	}
	ls := &listeners{unix: l, path: socket}
	if addr == "" {
		return ls, nil
	}
	if ls.tcp, err = new(net.ListenConfig).Listen(ctx, "tcp", addr); err != nil {
		ls.close()
		return nil, err
	}
	return ls, nil
}

func listenUnix(ctx context.Context, socket string) (*net.UnixListener, error) {
	fi, err := os.Lstat(socket)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("listen: %w", err)
	case fi.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("listen: %s is not a socket; move it away", socket)
	default:
		if err := os.Remove(socket); err != nil {
			return nil, fmt.Errorf("listen: replace the old socket: %w", err)
		}
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(socket, 0o660); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen: %w", err)
	}
	return l.(*net.UnixListener), nil
}

// close closes what serve did not get to; closing twice is harmless.
func (ls *listeners) close() {
	ls.unix.Close()
	if ls.tcp != nil {
		ls.tcp.Close()
	}
}

// serve answers until ctx is done, then lets requests in progress finish and
// returns nil.
func (ls *listeners) serve(ctx context.Context, h http.Handler, look time.Duration) error {
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    64 << 10,
	}
	group, ctx := errgroup.WithContext(ctx)
	if ls.tcp != nil {
		group.Go(func() error {
			if err := s.Serve(ls.tcp); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve on %s: %w", ls.tcp.Addr(), err)
			}
			return nil
		})
	}
	group.Go(func() error { return serveUnix(ctx, s, ls.unix, ls.path, look) })
	group.Go(func() error {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if s.Shutdown(grace) != nil {
			s.Close()
		}
		return nil
	})
	return group.Wait()
}

// serveUnix serves on l until s is shut down, and on another socket at path when
// somebody removed that of l. It looks for that now and then.
func serveUnix(ctx context.Context, s *http.Server, l *net.UnixListener, path string, look time.Duration) error {
	for {
		served, stop := context.WithCancel(ctx)
		removed := make(chan bool, 1)
		go func() {
			gone := socketRemoved(served, path, look)
			if gone {
				l.SetUnlinkOnClose(false) // nothing of ours is at path
				l.Close()
			}
			removed <- gone
		}()
		err := s.Serve(l)
		stop()
		gone := <-removed
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		if !gone {
			return fmt.Errorf("serve on %s: %w", path, err)
		}
		if l, err = listenAgain(ctx, path, look); err != nil {
			return nil // ctx is done
		}
	}
}

// socketRemoved waits until the socket is no longer the one that is there now,
// or, with false, ctx is done.
func socketRemoved(ctx context.Context, path string, look time.Duration) bool {
	made, err := os.Lstat(path)
	if err != nil {
		return ctx.Err() == nil
	}
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
		if now, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(made, now) {
			return true
		}
	}
}

// listenAgain tries until it has a socket or ctx is done: the directory may
// have to be made first.
func listenAgain(ctx context.Context, path string, look time.Duration) (*net.UnixListener, error) {
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		l, err := listenUnix(ctx, path)
		if err == nil {
			return l, nil
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-tick.C:
		}
	}
}
