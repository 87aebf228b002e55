package conformance

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// cluster is the configuration of the tests: one overlay for each kind of
// addresses, some with room for a single container in each half. The coordinator gives the first agent the
// lowest agent subnet, so the addresses are known.
const cluster = `
vtep_subnet: 44.128.0.0/20
vtep_subnet6: fd01:a::/64
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
  - {name: v4, subnet: 9.0.0.0/8, prefix: 24, blocks_per_agent: 1}
  - {name: v6, subnet6: "fd01:b::/64", prefix6: 80}
  - {name: dual, subnet: 10.1.0.0/16, prefix: 24, subnet6: "fd01:c::/64", prefix6: 80}
  - {name: tiny, subnet: 10.2.0.0/16, prefix: 29, blocks_per_agent: 1}
  - {name: duo, subnet: 10.3.0.0/16, prefix: 29, subnet6: "fd01:d::/64", prefix6: 80, blocks_per_agent: 1}
  - {name: small, subnet: 10.4.0.0/16, prefix: 28, blocks_per_agent: 1}
`

// host is a lab host with a mount namespace of its own, in which the boot id is
// a file of ours. Namespaces and files that are made outside show up inside.
type host struct {
	*lab.Host
	lab         *lab.Lab
	coordinator *lab.Coordinator
	mounts      *lab.Proc // keeps the mount namespace
	bootFile    string
	ids         atomic.Int64

	mu   sync.Mutex
	pool []*lab.Netns // with nothing in them
}

// newHost brings up one host with coordinator and agent.
func newHost(t testing.TB, agentArgs ...string) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	ctx := context.Background()
	l, err := lab.New(ctx, lab.Options{Bin: binDir, CNITool: filepath.Join(binDir, "cnitool")})
	must(t, err)
	h := &host{lab: l}
	t.Cleanup(func() {
		if t.Failed() {
			l.Logs(t.Output(), 15)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	h.Host, err = l.Host(ctx, "h", 2)
	must(t, err)
	h.bootFile = filepath.Join(h.Dir, "boot_id")
	must(t, os.WriteFile(h.bootFile, []byte("11111111-1111-4111-8111-111111111111\n"), 0o644))
	h.mounts, err = l.Start(h.Netns, "mounts", "unshare", "--mount", "--propagation", "slave", "sh", "-c",
		`mount --bind "$0" /proc/sys/kernel/random/boot_id && echo mounted && exec sleep infinity`, h.bootFile)
	must(t, err)
	must(t, lab.Wait(ctx, "the mount namespace", time.Minute, func() error { return h.mounts.LogContains("mounted") }))
	h.coordinator, err = l.StartCoordinator(ctx, h.Node, cluster)
	must(t, err)
	h.startAgent(t, agentArgs...)
	return h
}

// startAgent starts the agent in the host's mount namespace and waits for its
// state of this boot.
func (h *host) startAgent(t testing.TB, args ...string) {
	t.Helper()
	// Should there be a Docker on this machine, it is not this host's.
	argv := append([]string{"nsenter", "--mount=" + h.mountsPath(), "--", "env", "OVERLAYD_DOCKER_HOST=", filepath.Join(binDir, "overlayd"), "agent",
		"--insecure", "--coordinator", h.coordinator.URL, "--agent-ip", h.Underlay().String(), "--listen", "",
		"--run-dir", h.RunDir, "--state-dir", h.StateDir, "--cni-conf-dir", h.CNIConfDir, "--ucr-conf-dir", h.UCRConfDir,
		"--cni-bin-dir", binDir, "--datapath", cmp.Or(os.Getenv("OVERLAY_DATAPATH"), "auto")}, args...)
	var err error
	h.Proc, err = h.lab.Start(h.Netns, "agent", argv...)
	must(t, err)
	boot := h.bootID(t)
	must(t, lab.Wait(context.Background(), "the agent to publish", time.Minute, func() error {
		if fate := h.Proc.Fate(); fate != "running" {
			t.Fatalf("the agent ended: %s", fate)
		}
		b, err := os.ReadFile(filepath.Join(h.RunDir, "state.json"))
		if err == nil && (!bytes.Contains(b, []byte(boot)) || strings.Count(string(b), `"STATUS_OK"`) < strings.Count(cluster, "{name:")) {
			err = errors.New("not every overlay is ready in this boot")
		}
		return err
	}))
	must(t, h.WaitReady(context.Background()))
}

func (h *host) mountsPath() string { return fmt.Sprintf("/proc/%d/ns/mnt", h.mounts.Pid()) }

// inside is where this process finds a file of the host's mount namespace.
func (h *host) inside(path string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", h.mounts.Pid()), path)
}

func (h *host) bootID(t testing.TB) string {
	b, err := os.ReadFile(h.bootFile)
	must(t, err)
	return strings.TrimSpace(string(b))
}

// command is a program in the host's namespaces; its environment is ours.
func (h *host) command(ctx context.Context, argv ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + h.Path, "--mount=" + h.mountsPath(), "--"}, argv...)...)
}

// sh runs a shell script on the host and returns what it printed; see lab.Netns.Run.
func (h *host) sh(t testing.TB, script string, args ...string) string {
	t.Helper()
	cmd := h.command(context.Background(), append([]string{"sh", "-euc", script, "sh"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", script, err, out, &stderr)
	}
	return string(out)
}

// newNetns is an empty network namespace; freeNetns takes it back.
func (h *host) newNetns(t testing.TB) *lab.Netns {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if last := len(h.pool) - 1; last >= 0 {
		n := h.pool[last]
		h.pool = h.pool[:last]
		return n
	}
	n, err := h.lab.Netns(context.Background(), fmt.Sprintf("c%d", h.ids.Add(1)))
	must(t, err)
	return n
}

func (h *host) freeNetns(t testing.TB, n *lab.Netns) {
	t.Helper()
	if _, err := os.Stat(n.Path); err != nil {
		return // the test has removed it
	}
	links, err := n.Run(context.Background(), "ip", "-o", "link")
	if err != nil || strings.Count(links, "\n") != 1 {
		t.Errorf("left in the container's namespace: %v\n%s", err, links)
		n.Delete(context.Background())
		return
	}
	h.mu.Lock()
	h.pool = append(h.pool, n)
	h.mu.Unlock()
}

// attachment is one line of `overlayctl ipam`.
type attachment struct {
	Overlay     string
	Network     string
	ContainerID string `json:"container_id"`
	IfName      string `json:"ifname"`
	Half        string
	Addrs       []netip.Addr
	Interface   string
}

// usage is how full a range is.
type usage struct {
	Overlay, Half               string
	Range                       netip.Prefix
	Total, Used, Cooling, Early int
}

// list is `overlayctl ipam list` on a run directory of the host.
func (h *host) list(t testing.TB, runDir string) (attachments []attachment, usages []usage) {
	t.Helper()
	var out struct {
		Usage       []usage
		Attachments []attachment
	}
	cmd := h.command(context.Background(), filepath.Join(binDir, "overlayctl"), "ipam", "list", "-o", "json", "--run-dir", runDir)
	b, err := cmd.Output()
	if err != nil {
		t.Fatalf("overlayctl ipam list: %v\n%s", err, b)
	}
	must(t, json.Unmarshal(b, &out))
	return out.Attachments, out.Usage
}

// use is the usage of one half of an overlay, first family.
func (h *host) use(t testing.TB, overlay, half string) usage {
	t.Helper()
	_, usages := h.list(t, h.RunDir)
	for _, u := range usages {
		if u.Overlay == overlay && u.Half == half {
			return u
		}
	}
	return usage{Overlay: overlay, Half: half}
}

// check is the oracle: what `overlayctl ipam check` finds, "" if nothing.
func (h *host) check(t testing.TB) string {
	t.Helper()
	return h.checkIn(t, h.RunDir)
}

func (h *host) checkIn(t testing.TB, runDir string) string {
	t.Helper()
	cmd := h.command(context.Background(), filepath.Join(binDir, "overlayctl"), "ipam", "check", "--json", "--run-dir", runDir)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	b, err := cmd.Output()
	var out struct {
		Clean       bool
		Differences []struct{ Overlay, Text string }
	}
	if jerr := json.Unmarshal(b, &out); jerr != nil {
		t.Fatalf("overlayctl ipam check: %v %v\n%s%s", err, jerr, b, stderr.Bytes())
	}
	if (err == nil) != out.Clean {
		t.Errorf("overlayctl ipam check: %v, and clean is %v", err, out.Clean)
	}
	var lines []string
	for _, d := range out.Differences {
		lines = append(lines, d.Overlay+": "+d.Text)
	}
	return strings.Join(lines, "\n")
}

// kernel is everything the kernel says about links, addresses, routes and
// forwarding of a namespace, but for what changes by itself when a port of a
// bridge comes or goes.
func (h *host) kernel(t testing.TB, ns string) string {
	t.Helper()
	out, err := exec.Command("nsenter", "--net="+ns, "sh", "-c",
		`{ ip -o link; ip -o addr; ip route show table all; ip -6 route show table all; bridge fdb | grep permanent | grep -v self; ip rule; } |
		grep -Ev 'fe80:|ff00::|proto kernel' | sed -E 's/ (linkdown|tentative|state [A-Z]+)//g; s/NO-CARRIER,|,LOWER_UP//g'`).Output()
	must(t, err)
	return string(out)
}

// call is one invocation of a program as a runtime makes it. It is passed by
// value: changing one makes another.
type call struct {
	program string // file name in CNI_PATH's first directory
	command string
	id      string
	ifname  string
	netns   string // empty: CNI_NETNS is not set
	conf    map[string]any
	stdin   *string // instead of conf
	env     []string
	unset   []string // names left out of the environment
	path    string   // CNI_PATH; empty: bin
	bin     string   // directory of the program
	wrap    []string // command line that gets the program's as arguments
	timeout time.Duration
}

func (c call) as(command string) call { c.command = command; return c }
func (c call) with(env ...string) call {
	c.env = append(append([]string{}, c.env...), env...)
	return c
}
func (c call) without(v ...string) call { c.unset = v; return c }
func (c call) in(wrap ...string) call   { c.wrap = wrap; return c }
func (c call) text(stdin string) call   { c.stdin = &stdin; return c }

func (c call) set(key string, v any) call {
	c.conf = maps.Clone(c.conf)
	if v == nil {
		delete(c.conf, key)
	} else {
		c.conf[key] = v
	}
	return c
}

// outcome is what became of a call.
type outcome struct {
	status         int // -1: killed by a signal
	stdout, stderr string
	took           time.Duration
}

// failure is an error document.
type failure struct {
	CNIVersion string `json:"cniVersion"`
	Code       int    `json:"code"`
	Msg        string `json:"msg"`
	Details    string `json:"details"`
}

// ipam sets one key of the configuration's ipam.
func (c call) ipam(key string, v any) call {
	in, _ := c.conf["ipam"].(map[string]any)
	ipam := maps.Clone(in)
	ipam[key] = v
	return c.set("ipam", ipam)
}

func (c call) environment() []string {
	path := c.path
	if path == "" {
		path = binDir
	}
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "CNI_COMMAND=" + c.command, "CNI_CONTAINERID=" + c.id, "CNI_IFNAME=" + c.ifname, "CNI_PATH=" + path}
	if c.netns != "" {
		env = append(env, "CNI_NETNS="+c.netns)
	}
	env = append(env, c.env...)
	var out []string
	for _, v := range env {
		name, _, _ := strings.Cut(v, "=")
		keep := true
		for _, u := range c.unset {
			keep = keep && u != name
		}
		if keep {
			out = append(out, v)
		}
	}
	return out
}

func (c call) input(t testing.TB) io.Reader {
	if c.stdin != nil {
		return strings.NewReader(*c.stdin)
	}
	b, err := json.Marshal(c.conf)
	must(t, err)
	return bytes.NewReader(b)
}

// run executes a call. Nothing is in the environment but what the call says.
func (h *host) run(t testing.TB, c call) outcome {
	t.Helper()
	timeout := c.timeout
	if timeout == 0 {
		timeout = 30 * time.Second
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	cmd := h.command(ctx, append(append([]string{}, c.wrap...), c.binary())...)
	cmd.Env = c.environment()
	cmd.Dir = "/"
	cmd.Stdin = c.input(t)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Errorf("%s %s: %v", c.program, c.command, err)
		return outcome{status: -2}
	}
	return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String(), time.Since(start)}
}

func (c call) binary() string {
	if c.bin == "" {
		return filepath.Join(binDir, c.program)
	}
	return filepath.Join(c.bin, c.program)
}
