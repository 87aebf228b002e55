package doctor

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall/foreign"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/audit"
)

// host is what was read of a host, once for all checks.
type host struct {
	Options
	ctx   context.Context
	conn  *rtnl.Conn
	books audit.Host

	state    conf.State
	stateErr error
	dirs     conf.Directories
	running  error // why the agent does not answer; nil: it does
	peers    []conf.Peer
	peersErr error

	links        map[string]rtnl.Link // by name
	addresses    map[int][]netip.Prefix
	rules        foreign.Rules // of others
	coordinators []Coordinator

	found []Finding // by the checks before
}

func read(ctx context.Context, o Options) (*host, error) {
	h := &host{Options: o, ctx: ctx, links: map[string]rtnl.Link{}, addresses: map[int][]netip.Prefix{}}
	readBooks := func() (audit.Host, error) { return audit.Read(ctx, o.RunDir) }
	if o.Beside { // no check that runs then asks for more
		readBooks = func() (audit.Host, error) { return audit.ReadState(o.RunDir) }
	}
	var err error
	if h.books, err = readBooks(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	} else if err != nil {
		h.books.StateErr = err
	}
	h.state, h.stateErr = h.books.State, h.books.StateErr
	h.running = dial(ctx, filepath.Join(o.RunDir, conf.SocketFile))
	h.dirs = h.state.Directories
	if o.StateDir != "" {
		h.dirs.State = o.StateDir
	}
	if !o.Beside {
		h.peers, h.peersErr = audit.StoredPeers(h.dirs.State)
	}
	if h.conn, err = rtnl.Open(); err != nil {
		return nil, err
	}
	if err := h.readLinks(); err != nil {
		h.conn.Close()
		return nil, err
	}
	h.rules = foreign.Read(ctx)
	if h.Coordinators != nil && h.stateErr == nil {
		h.coordinators = h.Coordinators(ctx, h.state.Coordinators)
	}
	return h, nil
}

func (h *host) readLinks() error {
	links, err := h.conn.Links()
	if err != nil {
		return err
	}
	for _, l := range links {
		h.links[l.Name] = l
	}
	addresses, err := h.conn.Addresses(0)
	if err != nil {
		return err
	}
	for _, a := range addresses {
		h.addresses[a.Index] = append(h.addresses[a.Index], a.Prefix)
	}
	return nil
}

// dial reports why nobody listens on a socket of ours.
func dial(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return err
	}
	return c.Close()
}

// bridge is one that should be there.
type bridge struct {
	name, overlay string
	gateways      []netip.Prefix
	ranges        []netip.Prefix
}

// bridges are those of the overlays that the agent says are set up.
func (h *host) bridges() (out []bridge) {
	for _, o := range h.healthy() {
		for _, pool := range o.Pools() {
			want := bridge{name: pool.Bridge.Name, overlay: o.Info.Name}
			for _, r := range pool.Ranges {
				want.ranges = append(want.ranges, r)
				want.gateways = append(want.gateways, conf.GatewayPrefix(r))
			}
			out = append(out, want)
		}
	}
	return out
}

// healthy are the overlays that the agent does not itself say to be failing.
func (h *host) healthy() (out []conf.AgentOverlay) {
	for _, o := range h.state.Overlays {
		if o.State == nil || o.State.Status == conf.StatusOK {
			out = append(out, o)
		}
	}
	return out
}

// has6 reports whether an overlay of the host has IPv6.
func (h *host) has6() bool {
	for _, o := range h.healthy() {
		if o.Subnet6.IsValid() {
			return true
		}
	}
	return false
}

// vtep is what the state says about the VTEP. ok is false without an overlay.
func (h *host) vtep() (v conf.VXLAN, ok bool) {
	for _, o := range h.healthy() {
		return o.Backend.VXLAN, true
	}
	return v, false
}

// devices are the names of the VTEP and the bridges that are there.
func (h *host) devices() (out []string) {
	for _, name := range []string{conf.VTEPName, mark.SecondVTEP} {
		if _, ok := h.links[name]; ok {
			out = append(out, name)
		}
	}
	for _, b := range h.bridges() {
		if _, ok := h.links[b.name]; ok {
			out = append(out, b.name)
		}
	}
	return out
}

// linkName is the name of the link with an index.
func (h *host) linkName(index int) string {
	for name, l := range h.links {
		if l.Index == index {
			return name
		}
	}
	return "interface " + strconv.Itoa(index)
}

// path is that of a file of the system.
func (h *host) path(elements ...string) string {
	return filepath.Join(append([]string{h.Root + "/"}, elements...)...)
}

// sysctl reads a setting by its path below /proc/sys. ok is false where there is
// none.
func (h *host) sysctl(key string) (value string, ok bool) {
	b, err := os.ReadFile(h.path("proc/sys", key))
	return strings.TrimSpace(string(b)), err == nil
}

func (h *host) sysctlNumber(key string) (n int, ok bool) {
	text, ok := h.sysctl(key)
	n, err := strconv.Atoi(text)
	return n, ok && err == nil
}

// output is what a command prints; ok is false where it is not there or fails.
func output(ctx context.Context, name string, args ...string) (text string, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout = &out
	err := cmd.Run()
	return out.String(), err == nil
}
