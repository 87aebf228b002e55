package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/pki"
)

const (
	defaultCoordinator = "https://127.0.0.1:6440"
	// socketFile is the coordinator's, in its state directory.
	socketFile = "coordinator.sock"
	// startPatience is how long a coordinator that was just started is waited for.
	startPatience = 5 * time.Second
)

// Files of a login, beside key and certificates.
const coordinatorsFile = "coordinators"

// client is a client of the coordinator: the one asked for; or the one that runs
// on this host, for root; or those of this host's agent; or those of the login.
func (e *env) client(ctx context.Context) (*api.Client, error) {
	if len(e.coordinator) > 0 {
		return e.clientOr(nil)
	}
	if _, err := os.Stat(e.socket()); err == nil && !e.leftBehind(ctx) {
		return e.local()
	}
	state, err := askAgent(ctx, e.runDir)
	if err != nil {
		state, _ = lastPublished(e.runDir) // it need not be there
	}
	return e.clientOr(state.Coordinators)
}

// leftBehind reports whether the socket is one that a killed coordinator has left, and says
// so. Where somebody has named the state directory no other coordinator will do.
func (e *env) leftBehind(ctx context.Context) bool {
	if e.stateDirGiven() {
		return false
	}
	c, err := new(net.Dialer).DialContext(ctx, "unix", e.socket())
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return false
	}
	fmt.Fprintf(e.stderr, "the coordinator of this host does not run, its socket %s was left behind; others are asked\n", e.socket())
	return true
}

// clientOr is client where the caller has the coordinators of the agent already.
func (e *env) clientOr(agents []string) (*api.Client, error) {
	urls := []string{defaultCoordinator}
	switch {
	case len(e.coordinator) > 0:
		urls = e.coordinator
	case len(agents) > 0:
		urls = agents
	default:
		if known, err := os.ReadFile(filepath.Join(e.loginDir(), coordinatorsFile)); err == nil {
			urls = strings.Fields(string(known))
		}
	}
	var hc *http.Client
	if slices.ContainsFunc(urls, func(u string) bool { return strings.HasPrefix(strings.ToLower(u), "https://") }) {
		var err error
		if hc, err = e.identified(); err != nil {
			return nil, err
		}
	}
	c, err := api.NewClient(urls, hc)
	if err != nil {
		return nil, cli.Usagef("--coordinator: %w", err)
	}
	return c, nil
}

// identified makes requests as the one who logged in, else as nobody, to
// coordinators of the cluster that this host's agent joined.
func (e *env) identified() (*http.Client, error) {
	m, err := pki.OpenMember(pki.MemberOptions{Dir: e.loginDir()})
	if err != nil {
		return nil, err
	}
	if _, ok := m.Joined(); ok {
		return m.Client(), nil
	}
	for _, path := range []string{filepath.Join(e.runDir, conf.CAFile), filepath.Join(e.stateDir, pki.Dir, "ca.pem")} {
		if ca, err := os.ReadFile(path); err == nil {
			return pki.AnonymousClient(ca)
		}
	}
	return nil, errors.New("the coordinator asks who you are: log in with overlayctl login --token TOKEN --coordinator URL (overlayctl token create --role operator prints a token), " +
		"or be root on a coordinator's host and name its --state-dir")
}

// loginDir is where key and certificate of a person lie.
func (e *env) loginDir() string {
	dir, err := os.UserConfigDir()
	if err != nil {
		dir = "/root/.config"
	}
	return filepath.Join(dir, "overlay")
}

func (e *env) socket() string { return filepath.Join(e.stateDir, socketFile) }

// local is a client of the coordinator of this host, on its socket.
func (e *env) local() (*api.Client, error) {
	path := e.socket()
	return api.NewClient([]string{"http://localhost"}, &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "unix", path)
			if errors.Is(err, fs.ErrPermission) {
				return nil, fmt.Errorf("%s is for root alone: %w", path, err)
			}
			return c, err
		},
	}})
}

// operator is client for what an operator does. With --state-dir it waits a
// moment for the coordinator to start.
func (e *env) operator(ctx context.Context) (*api.Client, error) {
	if !e.stateDirGiven() {
		return e.client(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		c, err := new(net.Dialer).DialContext(ctx, "unix", e.socket())
		if err == nil {
			c.Close()
			return e.local()
		}
		if errors.Is(err, fs.ErrPermission) {
			return nil, fmt.Errorf("%s is for root alone: %w", e.socket(), err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("no coordinator runs with the state directory %s: nobody answers on %s; start it first (overlayd coordinator --state-dir %s), or name one elsewhere with --coordinator",
				e.stateDir, e.socket(), e.stateDir)
		case <-tick.C:
		}
	}
}
