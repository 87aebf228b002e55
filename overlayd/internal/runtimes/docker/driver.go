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
	"overlayd.internal/overlay/internal/conntrack"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// socketFile is the driver's socket in the plugin directory: dockerd finds a
// driver by the name of its socket.
const socketFile = Driver + ".sock"

// How long dockerd may take to say whether an address that it asks for again is
// in use. It is waiting for the driver, and asks for one address after the other
// while it starts: then it is not to wait for each.
const (
	probeTime      = 5 * time.Second        // of a dockerd that is there
	probeStartTime = 300 * time.Millisecond // of one that may be starting
	probePause     = 3 * time.Second        // between two of those
)

// How long a request waits for an agent that has just started, and how often it
// looks.
const (
	patience  = 15 * time.Second
	pollPause = 50 * time.Millisecond
)

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

	mu sync.Mutex
	up bool // dockerd is there and answers
	// While it is not: see confirm.
	silent  time.Time // it did not answer then
	granted map[conf.Attachment]bool
}

func newDriver(runDir string, c *client, log *slog.Logger) *driver {
	return &driver{
		stores: stores{runDir: runDir}, client: c, log: log,
		started: time.Now(), patience: patience, look: socketLook, granted: map[conf.Attachment]bool{},
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
			d.log.Debug("refused dockerd", "method", method, "request", in, "err", err)
			w.WriteHeader(http.StatusInternalServerError)
			// One key for the plugin client, one for the IPAM client behind it.
			out = map[string]string{"Err": err.Error(), "Error": err.Error()}
		} else {
			d.log.Debug("answered dockerd", "method", method, "request", in, "answer", out)
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

type addressRequest struct {
	PoolID  string
	Address string // empty: ours to choose
	Options map[string]string
}

type addressAnswer struct {
	Address string // with the pool's length
	Data    map[string]string
}

func (d *driver) requestAddress(ctx context.Context, r addressRequest) (any, error) {
	p, err := parsePool(r.PoolID)
	if err != nil {
		return nil, err
	}
	var want netip.Addr
	if r.Address != "" {
		all, err := conf.ParseAddrs([]string{r.Address})
		if err != nil {
			return nil, err
		}
		want = all[0]
	}
	answer := func(a netip.Addr) (any, error) {
		return addressAnswer{Address: netip.PrefixFrom(a, p.prefix.Bits()).String(), Data: map[string]string{}}, nil
	}
	if r.Options[typeOption] == gatewayType {
		// The host has it, on the bridge, for ever.
		gateway := conf.Gateway(p.prefix)
		if want.IsValid() && want != gateway {
			return nil, fmt.Errorf("gateway %s: that of %s is %s in every overlay; give that one, or none", want, p.prefix, gateway)
		}
		return answer(gateway)
	}
	got, err := d.allocate(ctx, p, want)
	if err != nil {
		return nil, err
	}
	return answer(got)
}

// allocate takes an address of the pool.
func (d *driver) allocate(ctx context.Context, p pool, want netip.Addr) (netip.Addr, error) {
	state, o, err := d.ready(ctx, p)
	if err != nil {
		return netip.Addr{}, err
	}
	r := ipam.SingleRequest{
		Half: conf.Docker, Ranges: rangesFor(o, p.prefix), From: p.from(), Want: want,
		Name: func(a netip.Addr) conf.Attachment { return conf.DockerAttachment(p.overlay, a) },
	}
	got, err := d.take(ctx, state, p.overlay, r)
	if refused := new(*ipam.UnavailableError); errors.As(err, refused) && d.confirm(ctx, p.overlay, want) {
		return want, nil
	}
	if err != nil {
		return netip.Addr{}, err
	}
	if err := conntrack.Forget(got.Flush); err != nil {
		return netip.Addr{}, errors.Join(err, d.release(ctx, p.overlay, got.Addrs[0]))
	}
	return got.Addrs[0], nil
}

func (d *driver) take(ctx context.Context, state conf.State, overlay string, r ipam.SingleRequest) (ipam.Allocation, error) {
	s, err := d.stores.open(ctx, overlay, cooling(state))
	if err != nil {
		return ipam.Allocation{}, err
	}
	defer s.Close()
	return s.AllocateSingle(ctx, r)
}

// ready is what is published, and the pool's overlay in it. When a host boots,
// dockerd starts its containers once, and the agent may not have published yet:
// after its own start the driver waits for that.
func (d *driver) ready(ctx context.Context, p pool) (conf.State, conf.AgentOverlay, error) {
	for {
		state, err := d.stores.state()
		var o conf.AgentOverlay
		if err == nil {
			o, err = usable(state, p)
		}
		if err == nil || ctx.Err() != nil || time.Since(d.started) > d.patience {
			return state, o, err
		}
		sleep(ctx, pollPause)
	}
}

// usable is the pool's overlay if containers can be attached to it.
func usable(s conf.State, p pool) (conf.AgentOverlay, error) {
	o, ok := s.Overlay(p.overlay)
	if !ok || len(halves(o)) == 0 {
		return o, fmt.Errorf("overlay %s has no Docker half on this host any more", p.overlay)
	}
	if !slices.Contains(halves(o), p.prefix) && !isBystander(p.prefix) {
		return o, fmt.Errorf("the network was made for %s, and overlay %s has %s on this host now; detach its containers and remove it, the agent makes it anew",
			p.prefix, p.overlay, join(halves(o)))
	}
	if st := o.State; st != nil && st.Status != conf.StatusOK {
		why := st.Error
		if why == "" {
			why = "the agent is still setting it up"
		}
		return o, fmt.Errorf("overlay %s is not ready on this host: %s", p.overlay, why)
	}
	return o, nil
}

// confirm reports whether an address that Docker asks for by name is one that it
// has already, by our books, without a container that uses it: it was killed
// before it could give it back. While dockerd starts it cannot be asked; then
// each address is confirmed once, because starting is when it asks again for
// what its containers have.
func (d *driver) confirm(ctx context.Context, overlay string, a netip.Addr) bool {
	if !a.IsValid() || !d.holds(ctx, overlay, a) {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.up || time.Since(d.silent) > probePause {
		limit := probeStartTime
		if d.up {
			limit = probeTime
		}
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		used, err := d.client.addresses(ctx)
		if err == nil {
			_, inUse := used[a]
			return !inUse
		}
		if d.up {
			return false
		}
		d.silent = time.Now()
	}
	key := conf.DockerAttachment(overlay, a)
	first := !d.granted[key]
	d.granted[key] = true
	return first
}

// holds reports whether an address is one that Docker has.
func (d *driver) holds(ctx context.Context, overlay string, a netip.Addr) bool {
	s, err := d.stores.open(ctx, overlay, 0)
	if err != nil {
		return false
	}
	defer s.Close()
	_, found, err := s.Get(ctx, conf.DockerAttachment(overlay, a))
	return err == nil && found
}

func (d *driver) releaseAddress(ctx context.Context, r addressRequest) (any, error) {
	p, err := parsePool(r.PoolID)
	if err != nil {
		return nil, err
	}
	all, err := conf.ParseAddrs([]string{r.Address})
	if err != nil {
		return nil, err
	}
	return struct{}{}, d.release(ctx, p.overlay, all[0])
}

// release gives an address back; the gateway, and what was never given out, is
// no error.
func (d *driver) release(ctx context.Context, overlay string, a netip.Addr) error {
	if !d.stores.exists(overlay) {
		return nil
	}
	s, err := d.stores.open(ctx, overlay, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	_, err = s.Release(ctx, conf.DockerAttachment(overlay, a))
	return err
}
