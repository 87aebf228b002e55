// Package doctor looks for what is wrong on a host: kernel objects, settings,
// other software in the way, files, addresses, the way to other hosts and to the
// coordinators. It changes nothing; a Finding names the command that does. On a
// healthy host it finds nothing.
//
// A new check is a function in the file of its subject and a line in checks.
package doctor

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/rtnl"
)

// Severity says how bad a finding is.
type Severity string

// The severities.
const (
	Error   Severity = "error"   // containers are cut off, or cannot be attached
	Warning Severity = "warning" // it works, and will not for long or not for all
)

// Finding is one thing that is wrong.
type Finding struct {
	Check    string   `json:"check"`
	Severity Severity `json:"severity"`
	What     string   `json:"what"`     // what is wrong, and what comes of it
	Evidence string   `json:"evidence"` // what was seen, where
	Fix      string   `json:"fix"`      // a command, or a sentence where there is none

	// Object is what is wrong: a device, a container id, the agent IP of a host, a
	// prefix. Empty: the whole host.
	Object string `json:"-"`

	safe bool // Fix is a command that can be run without asking
}

// Fixable reports whether Repair would do something.
func (f Finding) Fixable() bool { return f.safe }

// Repair runs the command of a fixable finding.
func (f Finding) Repair(ctx context.Context) error {
	if !f.safe {
		return nil
	}
	out, err := exec.CommandContext(ctx, "sh", "-ec", f.Fix).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", f.Fix, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Coordinator is what one coordinator answered.
type Coordinator struct {
	URL     string
	Err     error         // it does not answer, or is not ready
	Version string        // empty: it did not say
	Ahead   time.Duration // of its clock before ours
}

// Options say which host to look at: that of the calling thread's network
// namespace, with this run directory.
type Options struct {
	RunDir   string
	StateDir string // empty: the one that the agent has published
	// Root is where files of the system are looked up, "" for /. For tests.
	Root string
	// Coordinators asks the coordinators of the published state; nil: they are not
	// asked.
	Coordinators func(ctx context.Context, urls []string) []Coordinator
	Version      string // of this program
	// Beside is only what an agent runs beside its work: the address stores and the peers
	// are not read.
	Beside bool
}

// checks are all there are. Those of hosts that nothing was published on run
// first.
func checks() []check {
	return []check{
		{name: "agent", run: checkAgent},
		{name: "lease", run: checkLease},
		{name: "overlay", run: checkOverlays},
		{name: "vtep", run: checkVTEP},
		{name: "mac-policy", run: checkMACs, beside: true},
		{name: "vxlan-conflict", run: checkOtherVXLAN, beside: true},
		{name: "vxlan-port", run: checkPort},
		{name: "bridge", run: checkBridges},
		{name: "bridge-port", run: checkPorts},
		{name: "rp-filter", run: checkRPFilter},
		{name: "forwarding", run: checkForwarding},
		{name: "underlay-family", run: checkFamilies},
		{name: "route", run: checkRoutes},
		{name: "neighbour", run: checkNeighbours},
		{name: "drift", run: checkDrift}, // behind those above, which name more plainly what it finds
		{name: "forward-policy", run: checkForwardPolicy},
		{name: "vxlan-input", run: checkInput},
		{name: "docker-options", run: checkDocker, beside: true},
		{name: "firewalld", run: checkFirewalld, beside: true},
		{name: "ufw", run: checkUFW},
		{name: "iptables-flavours", run: checkFlavours, beside: true},
		{name: "network-manager", run: checkNetworkManager, beside: true},
		{name: "networkd", run: checkNetworkd, beside: true},
		{name: "conntrack-full", run: checkConntrack, beside: true},
		{name: "neighbour-thresholds", run: checkNeighbourTable, beside: true},
		{name: "path-mtu", run: checkPathMTU},
		{name: "direct", run: checkDirect},
		{name: "checksum-offload", run: checkChecksums, beside: true},
		{name: "cni-order", run: checkCNIOrder, beside: true},
		{name: "portmap", run: checkPortmap, beside: true},
		{name: "plugins", run: checkPlugins, beside: true},
		{name: "plugin-versions", run: checkPluginVersions, beside: true},
		{name: "address-use", run: checkUse},
		{name: "addresses", run: checkAddresses},
		{name: "certificate", run: checkCertificates, beside: true},
		{name: "coordinator", run: checkCoordinators},
		{name: "clock", run: checkClock},
		{name: "version", run: checkVersions},
	}
}

type check struct {
	name string
	run  func(*host) []Finding
	// beside: an agent runs it beside its work: it sends nothing to others, and is
	// about what the agent neither repairs nor reports by itself.
	beside bool
}

// Names are the names of all checks, in their order.
func Names() (out []string) {
	for _, c := range checks() {
		out = append(out, c.name)
	}
	return out
}

// lasts is how long a finding has to last: an ADD, a DEL or a repair by the agent
// may be under way, and the agent writes its peers within two seconds.
const lasts = 2500 * time.Millisecond

// Examine runs every check. What is found has lasted for some seconds.
func Examine(ctx context.Context, o Options) ([]Finding, error) {
	first, err := once(ctx, o)
	if err != nil || len(first) == 0 {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-time.After(lasts):
	}
	again, err := once(ctx, o)
	if err != nil {
		return nil, err
	}
	before := map[string]bool{}
	for _, f := range first {
		before[f.Check+"\x00"+f.What] = true
	}
	var out []Finding
	for _, f := range again {
		if before[f.Check+"\x00"+f.What] {
			out = append(out, f)
		}
	}
	return out, nil
}

// Look is Examine at this moment, with what is only under way.
func Look(ctx context.Context, o Options) ([]Finding, error) { return once(ctx, o) }

func once(ctx context.Context, o Options) (out []Finding, err error) {
	h, err := read(ctx, o)
	if err != nil {
		return nil, err
	}
	defer h.conn.Close()
	if o.Beside && h.stateErr != nil {
		return nil, nil
	}
	for _, c := range checks() {
		if o.Beside && !c.beside {
			continue
		}
		found := c.run(h)
		for i := range found {
			found[i].Check = c.name
		}
		out = append(out, found...)
		h.found = out
		if c.name == "agent" && h.stateErr != nil {
			return out, nil // there is nothing to compare with
		}
	}
	return out, context.Cause(ctx)
}

// Devices is what is wrong with the devices that the containers of a host hang
// on, at this moment. Where nothing is published there is nothing to compare with.
func Devices(ctx context.Context, runDir string) (out []Finding, err error) {
	h := &host{Options: Options{RunDir: runDir}, ctx: ctx, links: map[string]rtnl.Link{}, addresses: map[int][]netip.Prefix{}}
	if err := conf.ReadJSON(filepath.Join(runDir, conf.StateFile), &h.state); err != nil {
		return nil, nil // audit.Check says so
	}
	if h.conn, err = rtnl.Open(); err != nil {
		return nil, err
	}
	defer h.conn.Close()
	if err := h.readLinks(); err != nil {
		return nil, err
	}
	for _, check := range []func(*host) []Finding{checkVTEP, checkBridges, checkPorts} {
		out = append(out, check(h)...)
	}
	return out, nil
}
