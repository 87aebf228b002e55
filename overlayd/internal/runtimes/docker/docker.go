// Package docker makes the overlays of a host usable with docker run --net. It
// serves an IPAM driver, which draws from the same address stores as the CNI
// plugins, and keeps one Docker network for each overlay.
//
//	dockerd --- IPAM driver "overlay" ---> addresses of the Docker half
//	   ^                                      (<run-dir>/ipam/<overlay>.db)
//	   +------- Engine API ------ networks <overlay> on the bridges d-<overlay>
//
// dockerd may be absent, slow, killed or restarted at any time. Nothing here is
// kept in memory that a restart of either side would need: the driver's pool
// IDs say all there is to know, and what Docker has is asked from Docker.
package docker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/problems"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// Driver is the name of the IPAM driver.
const Driver = "overlay"

// DefaultPluginDir is where dockerd looks for the sockets of its plugins.
const DefaultPluginDir = "/run/docker/plugins"

// Options say where Docker is and what it is told.
type Options struct {
	Host      string // of the Engine API: unix:///var/run/docker.sock
	PluginDir string // for the driver's socket, overlay.sock
	RunDir    string // where the agent publishes
	Log       *slog.Logger
	// FirewallChanged is called when Docker may have put rules before ours. It
	// must not block.
	FirewallChanged func()
	// ContainersChanged is called when Containers has become another. It must not
	// block.
	ContainersChanged func()
}

// Docker is made by New and lives in Run.
type Docker struct {
	o      Options
	log    *slog.Logger
	client *client
	driver *driver
	timing timing
	wake   chan struct{} // Set was called
	look   chan struct{} // LookSoon was called

	problems   *problems.Set
	containers atomic.Pointer[known]

	mu     sync.Mutex
	wanted *wanted // nil: Set was not called yet

	// Of the goroutine that follows dockerd.
	missing map[conf.Key]suspect // records of addresses that no container has
	there   map[string]bool      // networks at the last look
	removed map[string]time.Time // networks that somebody removed, and when
	unnamed bool                 // a container has got an address since the last look
	named   time.Time            // when that was
}

// wanted is what the agent leases.
type wanted struct {
	overlays []conf.AgentOverlay
	mtu      int
}

// timing is how long things take. Tests in this package shorten it.
type timing struct {
	request  time.Duration // most that one request to dockerd takes
	coalesce time.Duration // events that come together are one
	look     time.Duration // between two looks at networks and addresses
	names    time.Duration // between two looks at who has got an address
	grace    time.Duration // in which somebody who removed a network may put his own in its place
	retryMin time.Duration // of what failed, and of dockerd that is not there
	retryMax time.Duration
	stale    time.Duration // how long an address without a container is kept
}

var defaultTiming = timing{
	request:  20 * time.Second,
	coalesce: 200 * time.Millisecond,
	look:     30 * time.Second,
	names:    time.Second,
	grace:    500 * time.Millisecond,
	retryMin: 250 * time.Millisecond,
	retryMax: 3 * time.Second,
	stale:    time.Minute,
}

// New checks the options. It has no side effect.
func New(o Options) (*Docker, error) {
	c, err := newClient(o.Host)
	if err != nil {
		return nil, fmt.Errorf("docker host: %w", err)
	}
	if !filepath.IsAbs(o.PluginDir) {
		return nil, fmt.Errorf("docker plugin directory %q: want an absolute path", o.PluginDir)
	}
	if n := len(filepath.Join(o.PluginDir, socketFile)); n > serve.MaxSocketPath {
		return nil, fmt.Errorf("docker plugin directory %s: the socket's path would have %d bytes, at most %d fit", o.PluginDir, n, serve.MaxSocketPath)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.FirewallChanged == nil {
		o.FirewallChanged = func() {}
	}
	if o.ContainersChanged == nil {
		o.ContainersChanged = func() {}
	}
	d := &Docker{
		o: o, log: o.Log, client: c, timing: defaultTiming,
		driver:   newDriver(o.RunDir, c, o.Log),
		wake:     make(chan struct{}, 1),
		look:     make(chan struct{}, 1),
		problems: problems.New(o.Log),
		missing:  map[conf.Key]suspect{},
		there:    map[string]bool{},
		removed:  map[string]time.Time{},
	}
	d.driver.unfiled = d.LookSoon
	return d, nil
}

// Set says which overlays there should be networks for, and their MTU. It does
// not block. Before it was called no network is touched.
func (d *Docker) Set(overlays []conf.AgentOverlay, mtu int) {
	w := &wanted{overlays: overlays, mtu: mtu}
	d.mu.Lock()
	same := reflect.DeepEqual(d.wanted, w)
	d.wanted = w
	d.mu.Unlock()
	if same {
		return
	}
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// Problems lists what does not work, one line each. That there is no dockerd, or
// that Podman stands in for it, is no problem.
func (d *Docker) Problems() []string { return d.problems.Lines() }

// note reports what a round found out, and returns whether it was fine. A
// round that was cut short says nothing.
func (d *Docker) note(ctx context.Context, what string, err error) bool {
	if errors.Is(ctx.Err(), context.Canceled) {
		return false
	}
	d.problems.Report(what, err)
	return err == nil
}

// onlyProblems forgets the problems with networks that are not among those; of
// none, all that a dockerd can have.
func (d *Docker) onlyProblems(networks map[string]bool) {
	d.problems.Forget(func(what string) bool {
		name, ok := strings.CutPrefix(what, networkProblem)
		return ok && !networks[name] || networks == nil && what == addressesProblem
	})
}

// What problems are about.
const (
	driverProblem    = "docker IPAM driver"
	engineProblem    = "docker engine"
	addressesProblem = "docker addresses"
	networkProblem   = "docker network "
)

// Run works until ctx is done, then returns nil. Whatever fails is tried again.
func (d *Docker) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		// The socket has to be there before dockerd starts, so it is made
		// whether or not there is a dockerd.
		path := filepath.Join(d.o.PluginDir, socketFile)
		for pause := d.timing.retryMin; ; pause = min(2*pause, 10*d.timing.retryMax) {
			err := d.driver.serve(ctx, path, func() { d.problems.Report(driverProblem, nil) })
			if ctx.Err() != nil {
				return nil
			}
			d.problems.Report(driverProblem, err)
			sleep(ctx, pause)
		}
	})
	group.Go(func() error {
		d.follow(ctx)
		return nil
	})
	return group.Wait()
}

// follow talks to dockerd whenever there is one.
func (d *Docker) follow(ctx context.Context) {
	pause := d.timing.retryMin
	for ctx.Err() == nil {
		lasted, err := d.session(ctx)
		if ctx.Err() != nil {
			return
		}
		if lasted {
			d.log.Info("dockerd has gone; waiting for it to come back")
			pause = d.timing.retryMin
		}
		if errors.Is(err, errNoEngine) || errors.Is(err, errPodman) {
			err = nil
		}
		d.problems.Report(engineProblem, err)
		sleep(ctx, pause)
		pause = min(2*pause, d.timing.retryMax)
	}
}

// session follows one dockerd until it goes. lasted reports whether it was
// there at all.
func (d *Docker) session(ctx context.Context) (lasted bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	version, events, err := d.connect(ctx, cancel)
	if err != nil {
		return false, err
	}
	defer func() {
		cancel()
		for range events { // until its goroutine has ended
		}
	}()
	d.problems.Report(engineProblem, nil)
	d.driver.connected(true)
	defer func() {
		d.driver.connected(false)
		d.onlyProblems(nil) // with what is gone
	}()
	d.log.Info("dockerd found", logkey.Version, version.Version, logkey.API, d.client.api())
	// It has put its rules before ours, and before it answered.
	d.o.FirewallChanged()

	clear(d.missing)
	clear(d.there)
	clear(d.removed)
	d.keep(ctx, events)
	return true, nil
}

// keep keeps networks and addresses until dockerd goes.
func (d *Docker) keep(ctx context.Context, events <-chan event) {
	var next, look time.Time // of the networks, and of the addresses as well: at once
	pause := d.timing.retryMin
	timer := time.NewTimer(0)
	defer timer.Stop()
	in := func(delay time.Duration) {
		if at := time.Now().Add(delay); next.IsZero() || at.Before(next) {
			next = at
			timer.Reset(delay)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-events:
			if !ok {
				return
			}
			if e.changesFirewall() {
				d.o.FirewallChanged()
			}
			d.unnamed = d.unnamed || e.attaches()
			in(d.timing.coalesce)
		case <-d.wake:
			in(0)
		case <-d.look:
			look = time.Time{}
			in(0)
		case <-timer.C:
			next = time.Time{}
			addresses := !time.Now().Before(look)
			if addresses {
				look = time.Now().Add(d.timing.look)
			}
			maps.DeleteFunc(d.removed, func(_ string, at time.Time) bool { return time.Since(at) >= d.timing.grace })
			fine := d.sync(ctx, addresses)
			if wait := d.nameContainers(ctx); wait > 0 {
				in(wait)
			}
			if len(d.removed) > 0 {
				in(d.timing.grace)
			}
			if fine {
				pause = d.timing.retryMin
				in(time.Until(look))
				continue
			}
			in(pause)
			pause = min(2*pause, d.timing.look)
		}
	}
}

// connect finds out whom we talk to and subscribes to events. giveUp cancels
// ctx: a dockerd that is starting takes connections and does not answer.
func (d *Docker) connect(ctx context.Context, giveUp func()) (version, <-chan event, error) {
	late := time.AfterFunc(d.timing.request, giveUp)
	v, err := d.client.negotiate(ctx)
	var events <-chan event
	if err == nil {
		events, err = d.client.events(ctx)
	}
	if !late.Stop() {
		err = fmt.Errorf("dockerd at %s takes connections and does not answer", d.o.Host)
		if events != nil {
			for range events {
			}
		}
	}
	return v, events, err
}

func sleep(ctx context.Context, pause time.Duration) {
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
