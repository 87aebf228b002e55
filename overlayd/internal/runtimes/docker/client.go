package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/overlayd/internal/serve"
)

// newestAPI is the newest version of the Engine API that we know. It came with
// Docker 28.
const newestAPI = "1.48"

// maxAnswer is the most that is read of one answer of dockerd.
const maxAnswer = 16 << 20

// Reasons to have nothing to do.
var (
	// errNoEngine: nobody listens on the socket.
	errNoEngine = errors.New("dockerd is not running")
	// errPodman: Podman, which finds the overlays through its own files, serves
	// Docker's API.
	errPodman = errors.New("it is Podman that serves in place of dockerd")
)

// client talks to the Engine API on a unix socket.
type client struct {
	http *http.Client
	host string
	used atomic.Pointer[string] // version of the API; nil: not negotiated yet
}

func newClient(host string) (*client, error) {
	path, ok := strings.CutPrefix(host, "unix://")
	if !ok || !filepath.IsAbs(path) {
		return nil, fmt.Errorf("%q: want unix:///PATH, as in unix:///var/run/docker.sock", host)
	}
	if len(path) > serve.MaxSocketPath {
		return nil, fmt.Errorf("%q: the path has %d bytes, at most %d fit", host, len(path), serve.MaxSocketPath)
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
	return &client{host: host, http: &http.Client{Transport: &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 2}}}, nil
}

// apiError is a refusal by dockerd.
type apiError struct {
	status  int
	message string
}

func (e *apiError) Error() string { return e.message }

func isStatus(err error, status int) bool {
	var e *apiError
	return errors.As(err, &e) && e.status == status
}

// call sends in, if it is not nil, and reads the answer into out, if that is
// not nil.
func (c *client) call(ctx context.Context, method, path string, in, out any) error {
	res, err := c.do(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err == nil && out != nil {
		err = json.Unmarshal(b, out)
	}
	if err != nil {
		return fmt.Errorf("%s %s: read the answer: %w", method, path, err)
	}
	return nil
}

func (c *client) do(ctx context.Context, method, path string, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", method, path, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, body)
	if err != nil {
		return nil, err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := c.http.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return nil, errNoEngine
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("%s: dockerd at %s did not answer in time", strings.ToLower(method), c.host)
	case err != nil:
		return nil, err
	case res.StatusCode >= 200 && res.StatusCode < 300:
		return res, nil
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(res.Body, 1<<16))
	var refusal struct{ Message string }
	if json.Unmarshal(b, &refusal) != nil || refusal.Message == "" {
		refusal.Message = fmt.Sprintf("%s %s: %s", method, path, res.Status)
	}
	return nil, &apiError{res.StatusCode, strings.TrimSpace(refusal.Message)}
}

// version is what dockerd says about itself.
type version struct {
	Version       string
	APIVersion    string `json:"ApiVersion"`
	MinAPIVersion string
	Components    []struct{ Name string }
}

// negotiate asks dockerd who it is and settles on the newest API version that
// both know.
func (c *client) negotiate(ctx context.Context) (version, error) {
	var v version
	if err := c.call(ctx, http.MethodGet, "/version", nil, &v); err != nil {
		return v, err
	}
	for _, c := range v.Components {
		if strings.HasPrefix(c.Name, "Podman") {
			return v, errPodman
		}
	}
	use := newestAPI
	if older(v.APIVersion, use) {
		use = v.APIVersion
	}
	if older(use, v.MinAPIVersion) {
		use = v.MinAPIVersion
	}
	c.used.Store(&use)
	return v, nil
}

// api is the negotiated version.
func (c *client) api() string {
	if v := c.used.Load(); v != nil {
		return *v
	}
	return newestAPI
}

func (c *client) path(format string, args ...any) string {
	return "/v" + c.api() + fmt.Sprintf(format, args...)
}

// older compares versions such as 1.9 and 1.41.
func older(a, b string) bool {
	parse := func(s string) (major, minor int) {
		x, y, _ := strings.Cut(s, ".")
		major, _ = strconv.Atoi(x)
		minor, _ = strconv.Atoi(y)
		return major, minor
	}
	a1, a2 := parse(a)
	b1, b2 := parse(b)
	return a1 < b1 || a1 == b1 && a2 < b2
}

// network is a Docker network, as far as we look at it, and the form in which
// one is created.
type network struct {
	ID         string `json:"Id,omitempty"`
	Name       string
	Driver     string
	EnableIPv4 *bool `json:",omitempty"`
	EnableIPv6 bool
	Internal   bool
	IPAM       ipamSettings
	Options    map[string]string
	Labels     map[string]string
	Containers map[string]endpoint `json:",omitempty"` // in answers about one network
	// CheckDuplicate keeps older engines from making a second one of that name.
	CheckDuplicate bool `json:",omitempty"`
}

type ipamSettings struct {
	Driver  string
	Options map[string]string
	Config  []ipamConfig
}

type ipamConfig struct {
	Subnet             string
	IPRange            string            `json:",omitempty"`
	Gateway            string            `json:",omitempty"`
	AuxiliaryAddresses map[string]string `json:",omitempty"`
}

// endpoint is a container in a network. The addresses have a prefix length.
type endpoint struct {
	Name        string
	IPv4Address string
	IPv6Address string
}

func (c *client) networks(ctx context.Context) (out []network, err error) {
	return out, c.call(ctx, http.MethodGet, c.path("/networks"), nil, &out)
}

func (c *client) network(ctx context.Context, id string) (out network, err error) {
	return out, c.call(ctx, http.MethodGet, c.path("/networks/%s", url.PathEscape(id)), nil, &out)
}

// containers are the names of all containers of a network, also of stopped ones.
func (c *client) containers(ctx context.Context, network string) ([]string, error) {
	filters, err := json.Marshal(map[string][]string{"network": {network}})
	if err != nil {
		return nil, err
	}
	var list []struct{ Names []string }
	if err := c.call(ctx, http.MethodGet, c.path("/containers/json?all=true&filters=%s", url.QueryEscape(string(filters))), nil, &list); err != nil {
		return nil, err
	}
	var out []string
	for _, l := range list {
		for _, name := range l.Names {
			out = append(out, strings.TrimPrefix(name, "/"))
		}
	}
	return out, nil
}

func (c *client) create(ctx context.Context, n network) error {
	return c.call(ctx, http.MethodPost, c.path("/networks/create"), n, nil)
}

// remove deletes a network; gone is success.
func (c *client) remove(ctx context.Context, id string) error {
	err := c.call(ctx, http.MethodDelete, c.path("/networks/%s", url.PathEscape(id)), nil, nil)
	if isStatus(err, http.StatusNotFound) {
		return nil
	}
	return err
}

// event is something that happened in dockerd.
type event struct{ Type, Action string }

// changesFirewall reports whether Docker inserts rules at the top of FORWARD
// for it.
func (e event) changesFirewall() bool {
	return e.Type == "daemon" || e.Type == "network" && slices.Contains([]string{"create", "destroy", "remove"}, e.Action)
}

// attaches reports whether a container has got an address.
func (e event) attaches() bool { return e.Type == "network" && e.Action == "connect" }

// events follows what happens to networks and dockerd itself until ctx is done
// or dockerd goes; then the channel is closed.
func (c *client) events(ctx context.Context) (<-chan event, error) {
	filters := url.QueryEscape(`{"type":["network","daemon"]}`)
	res, err := c.do(ctx, http.MethodGet, c.path("/events?filters=%s", filters), nil)
	if err != nil {
		return nil, err
	}
	out := make(chan event)
	go func() {
		defer close(out)
		defer res.Body.Close()
		for dec := json.NewDecoder(res.Body); ; {
			var e event
			if dec.Decode(&e) != nil {
				return
			}
			select {
			case out <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}
