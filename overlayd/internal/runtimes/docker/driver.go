package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// socketFile is the driver's socket in the plugin directory: dockerd finds a
// driver by the name of its socket.
const socketFile = Driver + ".sock"

// socketLook is the time between two looks at whether the socket is still
// there. dockerd tries for 15 seconds to find it.
const socketLook = 2 * time.Second

const (
	typeOption  = "RequestAddressType"
	gatewayType = "com.docker.network.gateway"
	// overlayOption names the overlay: --ipam-opt overlay=dcos.
	overlayOption = "overlay"
)

// driver is Docker's IPAM driver. Its requests carry all it needs to know.
type driver struct {
	stores stores
	client *client
	log    *slog.Logger

	started  time.Time
	patience time.Duration // after started, with an agent that has not published
	look     time.Duration // between two looks at the socket
	unfiled  func()        // a store waits until Docker's addresses are filed; it does not block

	mu sync.Mutex
	up bool // dockerd is there and answers
	// While it is not: see confirm.
	silent  time.Time // it did not answer then
	granted map[conf.Attachment]bool
}

func newDriver(runDir string, c *client, log *slog.Logger) *driver {
	return &driver{
		stores: stores{runDir: runDir}, client: c, log: log,
		started: time.Now(), patience: patience, look: socketLook, granted: map[conf.Attachment]bool{}, unfiled: func() {},
	}
}

// connected says whether dockerd is there.
func (d *driver) connected(up bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.up, d.silent, d.granted = up, time.Time{}, map[conf.Attachment]bool{}
}

// serve answers dockerd on the socket at path until ctx is done, and returns
// the reason where it cannot, or can no longer. ready is called once it listens.
func (d *driver) serve(ctx context.Context, path string, ready func()) error {
	// Root alone talks to plugins, as to dockerd itself.
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("make the directory for Docker plugins: %w", err)
	}
	l, err := serve.Socket{Path: path, Perm: 0o600, Look: d.look}.Listen(ctx)
	if err != nil {
		return err
	}
	s := serve.Server{
		Handler: d.handler(), Log: d.log, HeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, Grace: 2 * time.Second,
	}
	ready()
	served, stop := context.WithCancel(ctx)
	defer stop()
	removed := make(chan bool, 1)
	go func() {
		removed <- l.Removed(served)
		stop()
	}()
	err = s.Serve(served, l)
	stop()
	if gone := <-removed; err == nil && gone && ctx.Err() == nil {
		err = errors.New("somebody removed the socket")
	}
	if err == nil || ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve on %s: %w", path, err)
}

func (d *driver) handler() http.Handler {
	mux := http.NewServeMux()
	fixed := func(answer any) func(context.Context, struct{}) (any, error) {
		return func(context.Context, struct{}) (any, error) { return answer, nil }
	}
	handle(mux, d, "Plugin.Activate", fixed(map[string][]string{"Implements": {"IpamDriver"}}))
	// With replay dockerd asks for its pools again when it starts, which tells
	// the user in its log when the lease has changed.
	handle(mux, d, "IpamDriver.GetCapabilities", fixed(map[string]bool{"RequiresMACAddress": false, "RequiresRequestReplay": true}))
	handle(mux, d, "IpamDriver.GetDefaultAddressSpaces", fixed(map[string]string{
		"LocalDefaultAddressSpace": "OverlayLocal", "GlobalDefaultAddressSpace": "OverlayGlobal",
	}))
	handle(mux, d, "IpamDriver.RequestPool", d.requestPool)
	handle(mux, d, "IpamDriver.ReleasePool", fixed(struct{}{}))
	handle(mux, d, "IpamDriver.RequestAddress", d.requestAddress)
	handle(mux, d, "IpamDriver.ReleaseAddress", d.releaseAddress)
	return mux
}

// handle serves one method of Docker's plugin protocol: JSON in, JSON out, and
// an error as {"Err": text}.
func handle[In any](mux *http.ServeMux, d *driver, method string, f func(context.Context, In) (any, error)) {
	mux.HandleFunc("POST /"+method, func(w http.ResponseWriter, r *http.Request) {
		var in In
		var out any
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&in)
		if err == nil || r.ContentLength == 0 {
			out, err = f(r.Context(), in)
		} else {
			err = fmt.Errorf("read the request: %w", err)
		}
		w.Header().Set("Content-Type", "application/vnd.docker.plugins.v1.2+json")
		if err != nil {
			d.log.Debug("refused dockerd", logkey.Method, method, logkey.Request, in, logkey.Err, err)
			w.WriteHeader(http.StatusInternalServerError)
			// One key for the plugin client, one for the IPAM client behind it.
			out = map[string]string{"Err": err.Error(), "Error": err.Error()}
		} else {
			d.log.Debug("answered dockerd", logkey.Method, method, logkey.Request, in, logkey.Answer, out)
		}
		json.NewEncoder(w).Encode(out)
	})
}

type poolRequest struct {
	Pool    string // subnet; empty: ours to choose
	SubPool string // of --ip-range
	Options map[string]string
	V6      bool
}

type poolAnswer struct {
	PoolID string
	Pool   string
	Data   map[string]string
}

// requestPool finds the half that a new network is about. It takes nothing.
func (d *driver) requestPool(_ context.Context, r poolRequest) (any, error) {
	state, err := d.stores.state()
	if err != nil {
		return nil, err
	}
	var want netip.Prefix
	if r.Pool != "" {
		if want, err = parsePrefix(r.Pool); err != nil {
			return nil, fmt.Errorf("subnet %w", err)
		}
		r.V6 = want.Addr().Is6()
	}
	o, err := findOverlay(state, r.Options[overlayOption], want)
	if err != nil {
		return nil, err
	}
	p := pool{overlay: o.Info.Name}
	if p.prefix, err = choosePrefix(o, want, r.V6); err != nil {
		return nil, err
	}
	if r.SubPool != "" {
		if p.part, err = parsePrefix(r.SubPool); err != nil {
			return nil, fmt.Errorf("ip-range %w", err)
		}
		if !within(p.part, p.prefix) {
			return nil, fmt.Errorf("ip-range %s is not a part of %s", p.part, p.prefix)
		}
	}
	return poolAnswer{PoolID: p.id(), Pool: p.prefix.String(), Data: map[string]string{}}, nil
}

// findOverlay is the overlay of that name, or the one that the subnet is of.
func findOverlay(s conf.State, name string, subnet netip.Prefix) (conf.AgentOverlay, error) {
	var usable []string
	for _, o := range s.Overlays {
		if len(halves(o)) == 0 {
			continue
		}
		if o.Info.Name == name || name == "" && slices.Contains(halves(o), subnet) {
			return o, nil
		}
		usable = append(usable, fmt.Sprintf("%s %s", o.Info.Name, join(halves(o))))
	}
	what := "no overlay is named"
	switch {
	case name != "":
		what = fmt.Sprintf("overlay %q has no Docker half on this host", name)
	case subnet.IsValid():
		what = fmt.Sprintf("subnet %s is no overlay's Docker half on this host", subnet)
	}
	there := "there is none here"
	if usable != nil {
		there = "here are: " + strings.Join(usable, "; ")
	}
	return conf.AgentOverlay{}, fmt.Errorf("%s; name one with --ipam-opt overlay=NAME (%s)", what, there)
}

func texts(ps []netip.Prefix) (out []string) {
	for _, p := range ps {
		out = append(out, p.String())
	}
	return out
}

func join(ps []netip.Prefix) string { return strings.Join(texts(ps), " and ") }

// choosePrefix is the half's prefix of a family, which has to be the one that
// was asked for.
func choosePrefix(o conf.AgentOverlay, want netip.Prefix, v6 bool) (netip.Prefix, error) {
	for _, p := range halves(o) {
		if p.Addr().Is6() != v6 {
			continue
		}
		if !want.IsValid() {
			// A subnet that it did not ask for by name dockerd takes only if the
			// host has no route to it, and the bridge has one. It would ask
			// again for ever, without pause.
			return p, fmt.Errorf("a network of overlay %s has to name its subnet: --subnet %s", o.Info.Name, strings.Join(texts(halves(o)), " --subnet "))
		}
		if want != p {
			return p, fmt.Errorf("subnet %s is not the one that overlay %s has on this host for Docker: %s; give that one (for a part of it there is --ip-range)", want, o.Info.Name, p)
		}
		return p, nil
	}
	switch {
	case v6:
		return want, fmt.Errorf("overlay %s has no IPv6 here, only %s; leave --ipv6 out", o.Info.Name, join(halves(o)))
	case want.IsValid() && isBystander(want):
		return want, nil
	}
	return want, fmt.Errorf("overlay %s has no IPv4 here, only %s; an engine that insists on IPv4 may have a part of %s, as in --subnet %s",
		o.Info.Name, join(halves(o)), bystanders, bystander(o.Info.Name, nil))
}
