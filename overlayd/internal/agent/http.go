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
	"time"

	"golang.org/x/sync/errgroup"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// maxSocketPath is what fits into a socket address.
const maxSocketPath = 107

// served is what HTTP shows at one moment. It is never changed, only replaced.
type served struct {
	document []byte // conf.State, as in the published file
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

func (a *Agent) handler() http.Handler {
	mux := http.NewServeMux()
	document := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Write(a.served.Load().document)
	}
	mux.HandleFunc("GET "+api.PathAgentOverlay, document)
	mux.HandleFunc("GET "+api.PathAgentOverlays, document)
	mux.HandleFunc("GET "+api.PathHealth, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET "+api.PathReady, func(w http.ResponseWriter, _ *http.Request) {
		reason := a.served.Load().reason()
		if reason == "" {
			fmt.Fprintln(w, "ok")
			if a.docker != nil { // who uses CNI is not concerned
				for _, problem := range a.docker.Problems() {
					fmt.Fprintln(w, problem)
				}
			}
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusServiceUnavailable)
		json.NewEncoder(w).Encode(api.Error{Message: reason})
	})
	return mux
}

// listeners are the sockets of the HTTP server.
type listeners []net.Listener

// listen opens the unix socket and, if addr is not empty, the TCP socket, so
// that an address in use is a start-up error. The caller holds the lock of the
// run directory: a socket that lies there is nobody's.
func listen(ctx context.Context, socket, addr string) (listeners, error) {
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
	var ls listeners
	var config net.ListenConfig
	l, err := config.Listen(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	ls = append(ls, l)
	if err := os.Chmod(socket, 0o660); err != nil {
		ls.close()
		return nil, fmt.Errorf("listen: %w", err)
	}
	if addr == "" {
		return ls, nil
	}
	if l, err = config.Listen(ctx, "tcp", addr); err != nil {
		ls.close()
		return nil, err
	}
	return append(ls, l), nil
}

// close closes what serve did not get to; closing twice is harmless.
func (ls listeners) close() {
	for _, l := range ls {
		l.Close()
	}
}

// serve answers until ctx is done, then lets requests in progress finish and
// returns nil.
func (ls listeners) serve(ctx context.Context, h http.Handler) error {
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    64 << 10,
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, l := range ls {
		group.Go(func() error {
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve on %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
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
