// Package agent is the one control loop of a host. It leases from the
// coordinator, tells the datapath what the kernel should look like, publishes
// the result for the CNI programs and keeps the runtimes' files.
//
//	registrar --lease, error--> +------+ --Config--> datapath --> kernel
//	watcher   --peers---------> | loop | --State---> state.json, HTTP
//	datapath  --change--------> |      | --overlays-> runtimes' files
//	                            +------+ --status--> reporter --> coordinator
//
// The loop alone owns what the agent knows. The others are goroutines of their
// own because they wait for the network; they hand it values and never share
// any. What the agent knows survives in the state directory, so that a host
// starts, forwards and attaches containers without the coordinator.
//
// The agent takes nothing down when it ends: containers go on talking.
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/datapath"
	"overlayd.internal/overlay/overlayd/internal/runtimes"
	"overlayd.internal/overlay/overlayd/internal/runtimes/docker"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// Options are what the operator decides.
type Options struct {
	ID      string      // empty: the one in StateDir, made at the first start
	IP      netip.Addr  // underlay address; zero: source address towards the coordinator
	Bridges []conf.Half // halves the host has bridges for; empty: none

	RunDir     string   // published state and socket
	StateDir   string   // what survives a reboot
	CNIConfDir string   // empty: no CNI files
	UCRConfDir string   // empty: no UCR files
	CNIBinDirs []string // where the runtimes' plugins lie

	DockerHost      string // of the Engine API, unix:///PATH; empty: no Docker
	DockerPluginDir string // where dockerd looks for plugins; empty: where it always does

	Listen  string        // TCP address of the HTTP server; empty: socket only
	Cooling time.Duration // how long a released address rests; 0: not at all

	Coordinator     *api.Client
	CoordinatorURLs []string // what Coordinator talks to; tells the agent IP
	Log             *slog.Logger
	Version         string
}

var idRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`)

// Agent is made by New and lives in Run.
type Agent struct {
	opts   Options
	log    *slog.Logger
	timing timing
	served atomic.Pointer[served] // what HTTP shows; the loop replaces it
	peers  atomic.Int64           // that are programmed; the loop counts them
	docker *docker.Docker         // nil: no Docker
	// firewall announces that Docker may have put rules before ours.
	firewall chan struct{}
}

// New checks the options and reports everything that is wrong with them. It
// has no side effect.
func New(o Options) (*Agent, error) {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if o.ID != "" && !idRE.MatchString(o.ID) {
		bad("agent id %q: use 1 to 64 letters, digits, '_', '.' and '-', starting with a letter or digit", o.ID)
	}
	if o.IP.IsValid() {
		if err := checkAgentIP(o.IP); err != nil {
			bad("agent IP: %w", err)
		}
	}
	for _, h := range o.Bridges {
		if _, err := conf.ParseHalf(string(h)); err != nil {
			bad("bridges: %w", err)
		}
	}
	// In address order, each once, as leases carry them.
	o.Bridges = slices.DeleteFunc(slices.Clone(conf.Halves[:]), func(h conf.Half) bool { return !slices.Contains(o.Bridges, h) })

	errs = append(errs, o.checkDirs()...)
	if o.Listen != "" {
		if _, _, err := net.SplitHostPort(o.Listen); err != nil {
			bad("listen address %q: want HOST:PORT, or nothing for the socket only", o.Listen)
		}
	}
	if o.Cooling < 0 {
		bad("cooling %s: must not be negative", o.Cooling)
	}
	if o.Coordinator == nil {
		bad("coordinator: missing")
	}
	if !o.IP.IsValid() && len(o.CoordinatorURLs) == 0 {
		bad("agent IP: give it, or the coordinator's URL it can be told from")
	}
	for _, u := range o.CoordinatorURLs {
		if p, err := url.Parse(u); err != nil || p.Hostname() == "" {
			bad("coordinator %q: want a URL, as in http://10.0.0.1:6440", u)
		}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	a := &Agent{opts: o, log: o.Log, timing: defaultTiming, firewall: make(chan struct{}, 1)}
	if o.DockerHost != "" {
		var err error
		a.docker, err = docker.New(docker.Options{
			Host: o.DockerHost, PluginDir: cmp.Or(o.DockerPluginDir, docker.DefaultPluginDir), RunDir: o.RunDir,
			Log: o.Log, FirewallChanged: func() { kick(a.firewall) },
		})
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return a, nil
}

// checkDirs makes the directories absolute, because the CNI programs run
// somewhere else, and says what is wrong with them.
func (o *Options) checkDirs() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, d := range []struct {
		what     string
		dir      *string
		required bool
	}{
		{"run directory", &o.RunDir, true},
		{"state directory", &o.StateDir, true},
		{"CNI configuration directory", &o.CNIConfDir, false},
		{"UCR configuration directory", &o.UCRConfDir, false},
	} {
		if *d.dir == "" {
			if d.required {
				bad("%s: missing", d.what)
			}
			continue
		}
		abs, err := filepath.Abs(*d.dir)
		if err != nil {
			bad("%s %s: %w", d.what, *d.dir, err)
			continue
		}
		*d.dir = abs
	}
	if o.RunDir != "" && o.RunDir == o.StateDir {
		bad("run and state directory are both %s: the state survives a reboot, the other must not", o.RunDir)
	}
	if path := filepath.Join(o.RunDir, conf.SocketFile); len(path) > serve.MaxSocketPath {
		bad("run directory: %s has %d bytes, a socket's path at most %d; choose a shorter one", path, len(path), serve.MaxSocketPath)
	}
	return errs
}

// Run works until ctx is done, then returns nil. It returns an error when the
// agent cannot start: directories, identity, sockets, kernel. The coordinator
// may be away at any time.
func (a *Agent) Run(ctx context.Context) error {
	files, err := openFiles(a.opts.RunDir, a.opts.StateDir, a.log)
	if err != nil {
		return err
	}
	defer files.close()
	id, err := files.identity(a.opts.ID)
	if err != nil {
		return err
	}
	bootID, err := conf.BootID()
	if err != nil {
		return err
	}
	socket := serve.Socket{Path: filepath.Join(a.opts.RunDir, conf.SocketFile), Perm: 0o660, Look: a.timing.socket}
	listeners, err := listen(ctx, socket, a.opts.Listen)
	if err != nil {
		return err
	}
	defer listeners.close()
	dp, err := datapath.New(a.log)
	if err != nil {
		return err
	}
	defer dp.Close()

	log := a.log.With("agent", id)
	group, ctx := errgroup.WithContext(ctx)
	l := a.newLoop(loopParts{id: id, bootID: bootID, log: log, files: files, dp: dp, group: group})
	l.recall()

	group.Go(func() error { return listeners.serve(ctx, a.handler(), a.log) })
	group.Go(func() error { return l.registrar.run(ctx) })
	group.Go(func() error { return l.reporter.run(ctx) })
	group.Go(func() error { return a.newSweeper(log).run(ctx) })
	if a.docker != nil {
		group.Go(func() error { return a.docker.Run(ctx) })
	}
	changes := dp.Changes(ctx)
	group.Go(func() error { return l.run(ctx, changes) })
	log.Info("agent started", "version", a.opts.Version, "run_dir", a.opts.RunDir, "state_dir", a.opts.StateDir)
	err = group.Wait()
	for range changes { // closed when the last goroutine has ended
	}
	return err
}

// timing is how long things take. Tests in this package shorten it.
type timing struct {
	renew       time.Duration // between renewals; jitter is added
	findIP      time.Duration // how long finding the agent IP may take
	firstIP     time.Duration // the same at the start, when the datapath waits for it
	backoffMin  time.Duration // of registrations and watches that fail
	backoffMax  time.Duration
	catchUp     time.Duration // how long what was missed takes to come once it does
	kernel      time.Duration // so are changes in the kernel
	kernelPause time.Duration // least time between two repairs, so that we fight nobody at full speed
	resync      time.Duration // between two looks at the whole kernel state
	retryMin    time.Duration // of a configuration that failed
	savePeers   time.Duration // between two writes of the peers
	tidy        time.Duration // from the start, or from a write of the peers, to giving back memory
	sweep       time.Duration // between two looks for abandoned addresses
	socket      time.Duration // between two looks at whether our socket is there
	abandoned   time.Duration // how long a container must be gone before its addresses are released
}

var defaultTiming = timing{
	renew:       30 * time.Second,
	findIP:      5 * time.Second,
	firstIP:     500 * time.Millisecond,
	backoffMin:  200 * time.Millisecond,
	backoffMax:  15 * time.Second,
	catchUp:     20 * time.Millisecond,
	kernel:      100 * time.Millisecond,
	kernelPause: time.Second,
	resync:      time.Minute,
	retryMin:    500 * time.Millisecond,
	savePeers:   2 * time.Second,
	tidy:        10 * time.Second,
	sweep:       30 * time.Second,
	socket:      2 * time.Second,
	abandoned:   time.Minute,
}

// runtimeFiles are the directories of the runtimes on this host.
func (o Options) runtimeFiles(log *slog.Logger) *runtimes.Files {
	return &runtimes.Files{
		CNIConfDir: o.CNIConfDir, UCRConfDir: o.UCRConfDir,
		RunDir: o.RunDir, CNIBinDirs: o.CNIBinDirs, Log: log,
	}
}
