package lab

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// CoordinatorPort is where the lab's coordinator listens.
const CoordinatorPort = 6440

// Host is a node with directories of its own, on which an agent runs.
type Host struct {
	*Node
	Lab  *Lab
	Dir  string // parent of the others
	Proc *Proc  // the agent, once started

	FindsIP  bool   // the agent is not told its IP
	Bin      string // directory of the programs of another build; empty: those of the lab
	Datapath string // which way traffic takes (--datapath); empty: what OVERLAY_DATAPATH says, or else the agent decides
	Routing  string // how it sends to other hosts (--routing); empty: as by default
	// Later is by how much CLOCK_BOOTTIME is ahead for agent and CNI programs, from
	// their next start on: the host has slept for as long.
	Later time.Duration
	// Env are further variables of the agent's environment, from its next start on.
	Env []string

	RunDir, StateDir, CNIConfDir, UCRConfDir string
	cniCache                                 string
}

// Host makes a node and its directories; see Node.
func (l *Lab) Host(ctx context.Context, name string, n byte) (*Host, error) {
	node, err := l.Node(ctx, name, n)
	if err != nil {
		return nil, err
	}
	h := &Host{Node: node, Lab: l, Dir: filepath.Join(l.Dir, name)}
	for p, sub := range map[*string]string{
		&h.RunDir: "run", &h.StateDir: "state", &h.CNIConfDir: "net.d", &h.UCRConfDir: "ucr", &h.cniCache: "cni-cache",
	} {
		*p = filepath.Join(h.Dir, sub)
		if err := os.MkdirAll(*p, 0o755); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// Coordinator is a running coordinator.
type Coordinator struct {
	*Proc
	node *Node
	URL  string
	Args []string // further ones, from the next start on
	Env  []string // variables of its environment, likewise
	name string
	dir  string // of its state
	file string // the cluster configuration
	argv []string
	lab  *Lab
}

// StartCoordinator starts a coordinator on a node and waits until it is ready.
// Its store survives a restart.
func (l *Lab) StartCoordinator(ctx context.Context, n *Node, config string) (*Coordinator, error) {
	dir := l.coordinatorDir()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	c := l.newCoordinator(n, "coordinator", dir)
	c.file = filepath.Join(dir, "overlay.yaml")
	c.argv = append([]string{
		filepath.Join(l.Bin, "overlayd"), "coordinator", fmt.Sprintf("--insecure=%v", !l.secure), "--config", c.file,
		"--listen", fmt.Sprintf("[::]:%d", CoordinatorPort),
		"--store", c.Store(), "--state-dir", dir,
	}, c.StoreArgs()...)
	return c, c.Reconfigure(ctx, config)
}

func (l *Lab) newCoordinator(n *Node, name, dir string) *Coordinator {
	return &Coordinator{node: n, lab: l, name: name, dir: dir, URL: l.scheme() + netip.AddrPortFrom(n.Underlay(), CoordinatorPort).String()}
}

// File is where its cluster configuration lies.
func (c *Coordinator) File() string { return c.file }

// Reconfigure starts the coordinator, which must not run, with another cluster
// configuration.
func (c *Coordinator) Reconfigure(ctx context.Context, config string) error {
	if err := os.WriteFile(c.file, []byte(config), 0o644); err != nil {
		return err
	}
	return c.Restart(ctx)
}

// Restart starts the coordinator again after Kill or Stop and waits until it is
// ready.
func (c *Coordinator) Restart(ctx context.Context) error {
	if err := c.Start(); err != nil {
		return err
	}
	return Wait(ctx, "the coordinator to be ready", time.Minute, func() error {
		_, err := c.Get(ctx, "/readyz")
		return err
	})
}

// Start is Restart for a coordinator that may end before it is ready.
func (c *Coordinator) Start() (err error) {
	c.Proc, err = c.lab.Start(c.node.Netns, c.name, withEnv(c.Env, slices.Concat(c.argv, c.Args))...)
	return err
}

// Get fetches one of the coordinator's pages, as its operator.
func (c *Coordinator) Get(ctx context.Context, path string) ([]byte, error) {
	if c.lab.secure {
		return get(ctx, c.Operator(), "http://coordinator"+path)
	}
	return c.node.Get(ctx, c.URL+path)
}

// Get fetches a page from inside the namespace.
func (n *Netns) Get(ctx context.Context, url string) ([]byte, error) {
	return get(ctx, n.HTTP(), url)
}

func get(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", url, res.Status, b)
	}
	return b, err
}

// MasterState is what the tests read of GET /overlay-master/state.
type MasterState struct {
	Agents []struct {
		IP       netip.Addr
		Overlays []OverlayState
	}
}

// OverlayState is one overlay of an agent, in the coordinator's state and in
// the document the agent publishes.
type OverlayState struct {
	Backend struct {
		VXLAN struct {
			VTEPIP  netip.Prefix `json:"vtep_ip"`
			VTEPIP6 netip.Prefix `json:"vtep_ip6"`
		}
	}
	Info            struct{ Name string }
	State           struct{ Status, Error string }
	Subnet, Subnet6 netip.Prefix
}

// State reads GET /overlay-master/state.
func (c *Coordinator) State(ctx context.Context) (s MasterState, err error) {
	b, err := c.Get(ctx, "/overlay-master/state")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

// StartAgent starts the host's agent. Arguments are added to those that place
// it in the lab; of a flag given twice the last counts.
func (h *Host) StartAgent(coordinator string, args ...string) (err error) {
	identity, err := h.identity(coordinator)
	if err != nil {
		return err
	}
	bin := cmp.Or(h.Bin, h.Lab.Bin)
	argv := append([]string{
		filepath.Join(bin, "overlayd"), "agent", identity, "--coordinator", coordinator, "--listen", "",
		"--run-dir", h.RunDir, "--state-dir", h.StateDir, "--cni-conf-dir", h.CNIConfDir, "--ucr-conf-dir", h.UCRConfDir,
		"--cni-bin-dir", bin,
		// The nodes of a lab share the directory of the machine's Docker.
		"--docker-host", "",
	}, args...)
	if !h.FindsIP {
		argv = append(argv, "--agent-ip", h.Underlay().String())
	}
	if datapath := cmp.Or(h.Datapath, os.Getenv("OVERLAY_DATAPATH")); datapath != "" {
		argv = append(argv, "--datapath", datapath)
	}
	if h.Routing != "" {
		argv = append(argv, "--routing", h.Routing)
	}
	h.Proc, err = h.Lab.Start(h.Netns, "agent-"+filepath.Base(h.Dir), withEnv(h.Env, h.later(argv))...)
	return err
}

// withEnv has a program run with further variables in its environment.
func withEnv(env, argv []string) []string {
	if len(env) == 0 {
		return argv
	}
	return slices.Concat([]string{"env"}, env, argv)
}

// Command is described with Netns.Command; what it runs is Later.
func (h *Host) Command(ctx context.Context, argv ...string) *exec.Cmd {
	return h.Netns.Command(ctx, h.later(argv)...)
}

// later has a program run in a time namespace of its own.
func (h *Host) later(argv []string) []string {
	if h.Later == 0 {
		return argv
	}
	return append([]string{"unshare", "--fork", "--kill-child", "-T", "--boottime", fmt.Sprint(int64(h.Later.Seconds())), "--"}, argv...)
}

// WaitRegistered waits until the coordinator shows the host with every overlay
// STATUS_OK.
func (h *Host) WaitRegistered(ctx context.Context, c *Coordinator) error {
	return Wait(ctx, fmt.Sprintf("agent %s to be STATUS_OK", h.Underlay()), time.Minute, func() error {
		s, err := c.State(ctx)
		if err != nil {
			return err
		}
		for _, a := range s.Agents {
			if a.IP != h.Underlay() {
				continue
			}
			for _, o := range a.Overlays {
				if o.State.Status != "STATUS_OK" {
					return fmt.Errorf("overlay %s: %q %s", o.Info.Name, o.State.Status, o.State.Error)
				}
			}
			if len(a.Overlays) > 0 {
				return nil
			}
		}
		return h.alive(errors.New("not registered"))
	})
}

// Get fetches a page of the agent, over its socket.
func (h *Host) Get(ctx context.Context, path string) ([]byte, error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(h.RunDir, "overlayd.sock"))
		},
	}}
	return get(ctx, client, "http://agent"+path)
}

// WaitReady waits until the agent says that its host is set up.
func (h *Host) WaitReady(ctx context.Context) error {
	return Wait(ctx, "the agent of "+h.Name+" to be ready", time.Minute, func() error {
		_, err := h.Get(ctx, "/readyz")
		if err != nil {
			return h.alive(err)
		}
		return nil
	})
}

// alive adds to err that the agent has ended, if it has.
func (h *Host) alive(err error) error {
	if h.Proc != nil && h.Proc.Fate() != "running" {
		return fmt.Errorf("%w; the agent has ended: %s", err, h.Proc.Fate())
	}
	return err
}

// Published reads the document the agent publishes.
func (h *Host) Published() (s struct {
	IP       netip.Addr
	MTU      int
	Overlays []OverlayState
}, err error) {
	b, err := os.ReadFile(filepath.Join(h.RunDir, "state.json"))
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

// VTEP returns the VTEP addresses the agent published; the zero Addr for a
// family it does not have.
func (h *Host) VTEP() (v4, v6 netip.Addr, err error) {
	s, err := h.Published()
	if err != nil || len(s.Overlays) == 0 {
		return v4, v6, errors.Join(err, h.alive(errors.New("no overlay published")))
	}
	v := s.Overlays[0].Backend.VXLAN
	return v.VTEPIP.Addr(), v.VTEPIP6.Addr(), nil
}

// BridgePorts are the names of the links on the host's bridges: one for each
// attached container.
func (h *Host) BridgePorts(ctx context.Context) ([]string, error) {
	out, err := h.Run(ctx, "ip", "-json", "link", "show", "type", "veth")
	if err != nil {
		return nil, err
	}
	var links []struct{ IfName, Master string }
	if err := json.Unmarshal([]byte(out), &links); err != nil {
		return nil, fmt.Errorf("%s: ip -json link: %w", h.Name, err)
	}
	var ports []string
	for _, l := range links {
		if l.IfName != "eth0" { // the underlay
			ports = append(ports, l.IfName)
		}
	}
	return ports, nil
}

// WaitMesh waits until every host has what it needs to reach every agent subnet
// of every other: the kernel picks the VTEP for its first address, and knows the
// next hop's MAC and where that MAC lives.
func WaitMesh(ctx context.Context, hosts ...*Host) error {
	for _, h := range hosts {
		if err := h.waitDatapath(ctx); err != nil {
			return err
		}
		for _, to := range hosts {
			if h == to {
				continue
			}
			err := Wait(ctx, fmt.Sprintf("%s to reach the subnets of %s", h.Name, to.Name), time.Minute, func() error {
				s, err := to.Published()
				if err != nil {
					return to.alive(err)
				}
				for _, o := range s.Overlays {
					for _, p := range []netip.Prefix{o.Subnet, o.Subnet6} {
						if !p.IsValid() {
							continue
						}
						if err := h.leadsTo(ctx, p.Addr().Next(), to); err != nil {
							return h.alive(err)
						}
					}
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// waitDatapath waits until the agent has decided which way traffic takes: where it is
// the fast path, the device to the other hosts drops a packet when the first filter
// comes, in the first second of the first agent of a host.
func (h *Host) waitDatapath(ctx context.Context) error {
	return Wait(ctx, h.Name+" to choose a datapath", time.Minute, func() error {
		var s struct{ Datapath struct{ Reason string } }
		b, err := os.ReadFile(filepath.Join(h.RunDir, "state.json"))
		if err == nil {
			err = json.Unmarshal(b, &s)
		}
		if err == nil && s.Datapath.Reason == "not looked at yet" {
			err = errors.New("it was not looked at yet")
		}
		if err != nil {
			return h.alive(err)
		}
		return nil
	})
}

// leadsTo checks the way to an address of another host: by the VTEP or, where both
// are told to send direct and the underlay is of the address's family, without.
func (h *Host) leadsTo(ctx context.Context, addr netip.Addr, to *Host) error {
	route, err := h.Run(ctx, "ip", "route", "get", addr.String())
	if err != nil {
		return err
	}
	f := strings.Fields(route)
	hop := field(f, "via")
	if under := to.Underlay(); h.Routing == "direct" && to.Routing == "direct" && under.Is6() == addr.Is6() {
		if hop != under.String() {
			return fmt.Errorf("the route is %q, not via %s", strings.TrimSpace(route), under)
		}
		return nil
	}
	if field(f, "dev") != "vtep1024" || hop == "" {
		return fmt.Errorf("the route is %q", strings.TrimSpace(route))
	}
	neigh, err := h.Run(ctx, "ip", "neigh", "show", "to", hop, "dev", "vtep1024")
	if err != nil {
		return err
	}
	mac := field(strings.Fields(neigh), "lladdr")
	if mac == "" {
		return fmt.Errorf("no neighbour %s on vtep1024", hop)
	}
	fdb, err := h.Run(ctx, "bridge", "fdb", "show", "dev", "vtep1024")
	if err != nil {
		return err
	}
	if !strings.Contains(fdb, mac) {
		return fmt.Errorf("no forwarding entry for %s on vtep1024", mac)
	}
	return nil
}

// field returns the word after key.
func field(words []string, key string) string {
	for i, w := range words[:max(0, len(words)-1)] {
		if w == key {
			return words[i+1]
		}
	}
	return ""
}
