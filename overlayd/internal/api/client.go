package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"overlayd.internal/overlay/conf"
)

const (
	// RequestTimeout bounds one request to one coordinator.
	RequestTimeout = 10 * time.Second
	// HeartbeatInterval is how often a coordinator says something on a watch
	// on which nothing happens.
	HeartbeatInterval = 10 * time.Second
	// WatchTimeout ends a watch on which nothing was received, not even a heartbeat.
	WatchTimeout = 3 * HeartbeatInterval
)

// dialTimeout bounds a connection attempt, so that a request that meets a host
// that is gone leaves time for the next coordinator.
const dialTimeout = 3 * time.Second

// maxErrorBody is how much of an answer that says no is read. A list of problems
// may be long.
const maxErrorBody = 4 << 20

// Client talks to a coordinator. It knows one or more URLs and stays with the
// one that worked last; when that does not answer it tries the others in turn.
// It is safe for concurrent use.
//
// An answer that says no is an *Error. It comes from a coordinator that is
// alive, so the others are not asked, unless it is 502, 503 or 504.
type Client struct {
	urls  []string
	order []int // indexes of urls, in the order in which they are tried
	hc    *http.Client
	good  atomic.Uint32 // index in order of the one that worked last
	// moveOn is how long each but the last of them may take.
	moveOn time.Duration
	// ahead is how far the clock of the last answer was ahead of ours, in
	// nanoseconds.
	ahead atomic.Int64
}

// NewClient checks the URLs (http or https, a host, nothing behind it) and
// connects to nothing yet. hc may be nil; its Timeout must be zero, because a
// watch has no end.
func NewClient(urls []string, hc *http.Client) (*Client, error) {
	if len(urls) == 0 {
		return nil, errors.New("no coordinator URL given; want one such as http://10.0.0.1:6440")
	}
	if hc == nil {
		// A proxy, which the default transport would take from the environment, is
		// none of the cluster's.
		hc = &http.Client{Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}).DialContext,
			MaxIdleConnsPerHost: 4, IdleConnTimeout: 90 * time.Second,
		}}
	}
	c := &Client{hc: hc, moveOn: MoveOnTimeout}
	for _, u := range urls {
		base, err := checkURL(u)
		if err != nil {
			return nil, err
		}
		c.order = append(c.order, len(c.urls))
		c.urls = append(c.urls, base)
	}
	return c, nil
}

// checkURL returns scheme://host of a coordinator URL.
func checkURL(s string) (string, error) {
	s = strings.TrimSpace(s)
	fail := func(what string) (string, error) {
		return "", fmt.Errorf("coordinator URL %q: %s; want one such as http://10.0.0.1:6440", s, what)
	}
	u, err := url.Parse(s)
	switch {
	case s == "":
		return fail("empty")
	case !strings.Contains(s, "://"):
		return fail("the scheme is missing")
	case err != nil:
		var reason *url.Error
		if errors.As(err, &reason) {
			err = reason.Err
		}
		return fail(err.Error())
	case u.Scheme != "http" && u.Scheme != "https":
		return fail(fmt.Sprintf("scheme %q is neither http nor https", u.Scheme))
	case u.Hostname() == "":
		return fail("the host is missing")
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "":
		return fail("nothing may stand beside scheme, host and port")
	}
	if strings.Contains(u.Hostname(), "%") {
		// Without the escape, which url.Parse took away, it would be no URL.
		if ip, err := netip.ParseAddr(u.Hostname()); err != nil || !ip.IsLinkLocalUnicast() {
			return fail("only a link-local address has a zone, as in http://[fe80::1%25eth0]:6440")
		}
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host}).String(), nil
}

// URLs returns the coordinators the client knows.
func (c *Client) URLs() []string { return append([]string(nil), c.urls...) }

// Register asks for a lease or renews it.
func (c *Client) Register(ctx context.Context, req RegisterRequest) (lease conf.Lease, err error) {
	err = c.do(ctx, http.MethodPost, PathRegister, req, &lease)
	return lease, err
}

// Report tells what the agent has made of its lease.
func (c *Client) Report(ctx context.Context, report StatusReport) error {
	return c.do(ctx, http.MethodPost, PathStatus, report, nil)
}

// State returns GET /overlay-master/state.
func (c *Client) State(ctx context.Context) (state conf.MasterState, err error) {
	err = c.do(ctx, http.MethodGet, PathMasterState, nil, &state)
	return state, err
}

// Agents lists every agent that has a lease.
func (c *Client) Agents(ctx context.Context) (agents []Agent, err error) {
	err = c.do(ctx, http.MethodGet, PathAgents, nil, &agents)
	return agents, err
}

// Overlays lists every overlay that is configured or leased.
func (c *Client) Overlays(ctx context.Context) (overlays []Overlay, err error) {
	err = c.do(ctx, http.MethodGet, PathOverlays, nil, &overlays)
	return overlays, err
}

// Delete gives back the leases of agents, named by IP or id, and returns the
// state afterwards.
func (c *Client) Delete(ctx context.Context, agents []string) (state conf.MasterState, err error) {
	if agents == nil {
		agents = []string{}
	}
	err = c.do(ctx, http.MethodPost, PathAgentsDelete, DeleteRequest{Agents: agents}, &state)
	return state, err
}

// Prune gives back leases, and returns the agents that had them.
func (c *Client) Prune(ctx context.Context, req PruneRequest) (agents []Agent, err error) {
	err = c.do(ctx, http.MethodPost, PathPrune, req, &agents)
	return agents, err
}

// Backup writes a copy of everything that is stored to w. The copy says itself
// whether it is whole.
func (c *Client) Backup(ctx context.Context, w io.Writer) error {
	err := c.try(ctx, func(base string, _, _ time.Duration) (bool, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+PathBackup, nil)
		if err != nil {
			return false, err
		}
		resp, err := c.hc.Do(req)
		if err != nil {
			return false, err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return false, readError(resp)
		}
		_, err = io.Copy(w, resp.Body)
		return true, err
	})
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	return nil
}

// Ready asks whether a coordinator can serve.
func (c *Client) Ready(ctx context.Context) error {
	return c.do(ctx, http.MethodGet, PathReady, nil, nil)
}

// Ahead is how far the clock of the coordinator that answered last was ahead of
// ours, give or take the second that HTTP tells.
func (c *Client) Ahead() time.Duration { return time.Duration(c.ahead.Load()) }

// Watch calls fn for every event of the stream that follows what is known
// (nothing: from a snapshot), until ctx ends, fn fails, or the stream breaks. It
// fails when nothing was received for WatchTimeout, or at one of several
// coordinators for MoveOnSilence. It never returns nil: call it
// again with the revision and the run of the last event.
func (c *Client) Watch(ctx context.Context, agentID string, known Known, fn func(PeerEvent) error) error {
	query := url.Values{"agent": {agentID}, "revision": {strconv.FormatUint(known.Revision, 10)}}
	if known.Run != "" {
		query.Set("run", known.Run)
	}
	if known.Instance != "" {
		query.Set("instance", known.Instance)
	}
	err := c.try(ctx, func(base string, limit, silence time.Duration) (received bool, err error) {
		if len(c.order) == 1 {
			limit = silence
		}
		return c.watch(ctx, base+PathWatch+"?"+query.Encode(), limit, silence, fn)
	})
	return fmt.Errorf("watch peers: %w", err)
}

// watch follows one stream. It ends when nothing at all was received for limit,
// or after that nothing for silence.
func (c *Client) watch(ctx context.Context, target string, limit, silence time.Duration, fn func(PeerEvent) error) (received bool, err error) {
	_, err = c.open(ctx, target, "", limit, silence, func(r *receivedReader) error {
		events := json.NewDecoder(r)
		for {
			var e PeerEvent
			if err := events.Decode(&e); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return errEnded
			} else if err != nil {
				return err
			}
			received = true
			r.timer.Stop() // fn may take its time
			if err := fn(e); err != nil {
				return err
			}
			r.timer.Reset(silence)
		}
	})
	return received, err
}

// because replaces the error of a cancelled request by the reason.
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// receivedReader puts off a timer whenever something arrives, so that a long
// snapshot over a slow line is not taken for silence.
type receivedReader struct {
	r       io.Reader
	timer   *time.Timer
	silence time.Duration
}

func (r *receivedReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if n > 0 {
		r.timer.Reset(r.silence)
	}
	return n, err
}

// do makes one request with a JSON body (nil: none) and decodes the answer into
// out (nil: dropped).
func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return fmt.Errorf("%s %s: %w", method, path, err)
		}
	}
	err := c.try(ctx, func(base string, limit, _ time.Duration) (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		return false, c.once(ctx, method, base+path, body, out)
	})
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

func (c *Client) once(ctx context.Context, method, target string, body []byte, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if len(body) > 0 {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.hc.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		c.ahead.Store(int64(time.Until(date)))
	}
	if resp.StatusCode/100 != 2 {
		return readError(resp)
	}
	if out == nil {
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("the answer of %s cannot be read: %w", target, err)
	}
	return nil
}

// readError turns an answer that is not 2xx into an *Error.
func readError(resp *http.Response) error {
	e := &Error{Code: resp.StatusCode}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))         // an unreadable body is an empty one
	if strings.Contains(string(b), "HTTP request to an HTTPS server") { // as net/http says it
		e.Message = fmt.Sprintf("the coordinator at %s asks for identity, and this side has none (http:// and --insecure); write https://, and join with a token (overlayd agent --join-token, overlayctl login --token)", resp.Request.URL.Host)
	} else if json.Unmarshal(b, e) != nil || e.Message == "" {
		e.Message = fmt.Sprintf("%s answered %s; is it a coordinator?", resp.Request.URL.Redacted(), resp.Status)
	}
	return e
}
