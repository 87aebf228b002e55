package agent

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/fast"
	"overlayd.internal/overlay/overlayd/internal/logging"
	"overlayd.internal/overlay/overlayd/internal/runtimes"
	"overlayd.internal/overlay/overlayd/internal/runtimes/docker"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// Options are what the operator decides.
type Options struct {
	ID string     // empty: the one in StateDir, made at the first start
	IP netip.Addr // underlay address; zero: source address towards the coordinator
	// Second is an underlay address of the other family. Where neither is given, one is
	// looked for, unless OneFamily.
	Second    netip.Addr
	OneFamily bool
	Bridges   []conf.Half // halves the host has bridges for; empty: none

	RunDir     string   // published state and socket
	StateDir   string   // what survives a reboot
	CNIConfDir string   // empty: no CNI files
	UCRConfDir string   // empty: no UCR files
	CNIBinDirs []string // where the runtimes' plugins lie

	DockerHost      string // of the Engine API, unix:///PATH; empty: no Docker
	DockerPluginDir string // where dockerd looks for plugins; empty: where it always does

	Firewall string // one of datapath.FirewallKinds; empty: auto

	Listen  string        // TCP address of the HTTP server; empty: socket only
	Cooling time.Duration // how long a released address rests; 0: not at all
	// BlockIdle is how long a further block has to be empty before it is given back.
	BlockIdle time.Duration

	Datapath fast.Mode    // empty: auto
	Routing  conf.Routing // empty: vxlan

	Coordinator     *api.Client
	CoordinatorURLs []string // what Coordinator talks to; tells the agent IP
	// Identify is told the agent id before anything is asked with it, and may
	// refuse it; nil: nobody has to know.
	Identify func(id string) error
	// KeepIdentity writes key and certificate anew, after the state directory was
	// removed; nil: there are none.
	KeepIdentity func() error
	SocketGroup  int // that may talk to the agent beside root; 0: none
	// Beat is called by the control loop when it has started, with what was
	// stored already applied, and then every few seconds; nil: nobody waits.
	Beat func()
	// Started is called when the agent has learnt what it learns at its start, before
	// it gives back the memory that took, and at later times like that; nil: nobody waits.
	Started func()

	Log      *slog.Logger
	LogLevel *logging.Level // nil: it cannot be changed
	Version  string
}

// New checks the options and reports everything that is wrong with them. It
// has no side effect.
func New(o Options) (*Agent, error) {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if o.ID != "" {
		if err := conf.CheckAgentID(o.ID); err != nil {
			bad("agent id %w", err)
		}
	}
	if o.IP.IsValid() {
		if err := cmp.Or(conf.CheckAgentIP(o.IP), checkGivenIP(o.IP)); err != nil {
			bad("agent IP: %w", err)
		}
	}
	if err := o.checkSecond(); err != nil {
		bad("second agent IP: %w", err)
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
	if o.BlockIdle < 0 {
		bad("block idle time %s: must not be negative", o.BlockIdle)
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
	o.Datapath, o.Routing = cmp.Or(o.Datapath, fast.Auto), cmp.Or(o.Routing, conf.RoutingVXLAN)
	a := &Agent{opts: o, log: o.Log, timing: defaultTiming, counts: newCounts(o.Version), firewall: make(chan struct{}, 1), containers: make(chan struct{}, 1), told: make(chan struct{}, 1), fast: fast.New(o.Datapath, o.Log)}
	if o.DockerHost != "" {
		var err error
		a.docker, err = docker.New(docker.Options{
			Host: o.DockerHost, PluginDir: cmp.Or(o.DockerPluginDir, docker.DefaultPluginDir), RunDir: o.RunDir,
			Log: o.Log, FirewallChanged: func() { kick(a.firewall) }, ContainersChanged: func() { kick(a.containers) },
		})
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return a, nil
}

func (o Options) checkSecond() error {
	if !o.Second.IsValid() {
		return nil
	}
	if !o.IP.IsValid() || o.IP.Is4() == o.Second.Is4() {
		return fmt.Errorf("%s beside %s: want one of each family", o.Second, o.IP)
	}
	return cmp.Or(conf.CheckAgentIP(o.Second), checkGivenIP(o.Second))
}

// seeksSecond reports whether there may be a second agent IP.
func (o Options) seeksSecond() bool {
	return !o.OneFamily && (o.Second.IsValid() || !o.IP.IsValid())
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

// runtimeFiles are the directories of the runtimes on this host.
func (o Options) runtimeFiles(log *slog.Logger) runtimes.Files {
	return runtimes.Files{
		CNIConfDir: o.CNIConfDir, UCRConfDir: o.UCRConfDir,
		RunDir: o.RunDir, CNIBinDirs: o.CNIBinDirs, Log: log,
	}
}
