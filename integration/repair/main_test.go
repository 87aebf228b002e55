package repair

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

var (
	docFile = flag.String("doc", "", "write what was measured to this file; with -full")
	full    = flag.Bool("full", false, "every fault with every firewall")
)

// top is the top of the tree, seen from this package.
const top = "../.."

// binDir has the programs as users get them, built once: the race detector would
// be measured as well.
var binDir string

func TestMain(m *testing.M) {
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "repair:", err)
		code = 1
	}
	os.Exit(code)
}

func buildAndRun(m *testing.M) (int, error) {
	flag.Parse()
	if os.Geteuid() != 0 { // everything will skip
		return m.Run(), nil
	}
	dir, err := os.MkdirTemp("", "overlay-repair-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	binDir = dir
	if err := build(top, binDir); err != nil {
		return 0, err
	}
	return m.Run(), nil
}

// build builds the programs of a tree.
func build(tree, dir string) error {
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/",
		"./overlayd", "./overlayd/overlayctl", "./plugins/m-overlay", "./plugins/d-overlay", "./ipam/overlay-ipam", "github.com/containernetworking/cni/cnitool")
	cmd.Dir = tree
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return nil
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// firewalls are the implementations and the flavours of iptables.
var firewalls = []string{"nftables", "iptables-nft", "iptables-legacy"}

// useFirewall makes the agents of the test use a firewall.
func useFirewall(t *testing.T, name string) {
	kind, flavour, ok := strings.Cut(name, "-")
	t.Setenv("OVERLAYD_FIREWALL", kind)
	if !ok {
		return
	}
	dir := t.TempDir()
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, suffix := range []string{"", "-save", "-restore"} {
			path, err := exec.LookPath(name + "-" + flavour + suffix)
			must(t, err)
			must(t, os.Symlink(path, filepath.Join(dir, name+suffix)))
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// site is two hosts with a container each in an IPv4 and an IPv6 overlay.
type site struct {
	*lab.Seed
	t     *testing.T
	h     *lab.Host // that is broken
	a, a6 *lab.Container
	b, b6 *lab.Container // on the other host
	env   []string       // what scripts know of the host
}

// newSite starts everything with a firewall and the kernel's forwarding, which
// the faults are about.
func newSite(t *testing.T, firewall string) *site {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	useFirewall(t, firewall)
	config, err := os.ReadFile(filepath.Join(top, "conf/examples/overlay.yaml"))
	must(t, err)
	s, err := lab.NewSeed(t.Context(), lab.Options{Bin: binDir, CNITool: filepath.Join(binDir, "cnitool")}, string(config))
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			s.Logs(t.Output(), 40)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, h := range s.Hosts() {
		h.Datapath = "kernel"
	}
	must(t, s.Up(t.Context()))
	for _, h := range s.Agents { // with the files of the runtimes
		must(t, h.WaitReady(t.Context()))
	}
	x := &site{Seed: s, t: t, h: s.Agents[0]}
	for _, c := range []struct {
		to            **lab.Container
		agent         int
		name          string
		overlay, half string
	}{
		{&x.a, 0, "a", "dcos", lab.Docker}, {&x.b, 1, "b", "dcos", lab.Mesos},
		{&x.a6, 0, "a6", "dcos6", lab.Docker}, {&x.b6, 1, "b6", "dcos6", lab.Mesos},
	} {
		*c.to, err = s.Place(t.Context(), lab.Placement{Agent: c.agent, Name: c.name, Overlay: c.overlay, Half: c.half})
		must(t, err)
	}
	x.describe()
	return x
}

// describe fills in what scripts know of the host.
func (x *site) describe() {
	x.t.Helper()
	out := x.sh(`
own4=$(ip -4 -o addr show d-dcos | awk '{print $4}')
own6=$(ip -6 -o addr show d-dcos6 scope global | awk '{print $4}')
echo GW=${own4%/*} GWNET=$own4 GW6=${own6%/*} GW6NET=$own6
ip route show proto kernel dev d-dcos | awk '{print "NET=" $1}'
ip -6 route show proto kernel dev d-dcos6 | awk '!/fe80/ {print "NET6=" $1}'
ip route show type blackhole proto 44 | awk '{print "OWN=" $2}'
ip -o link show master d-dcos | sed -n 's/.*: \(vd[^@]*\)@.*/PORT=\1/p'
ip -4 -o addr show vtep1024 | awk '{print "VTEP=" $4}'`)
	x.env = strings.Fields(out)
	peer, err := x.Agents[1].Published()
	must(x.t, err)
	vtep, _, err := x.Agents[1].VTEP()
	must(x.t, err)
	x.env = append(x.env,
		"PEER="+peer.Overlays[0].Subnet.String(), "PEER6="+peer.Overlays[1].Subnet6.String(),
		"PEERVTEP="+vtep.String(), "PEERIP="+x.Agents[1].IP.String(), "A="+x.a.Addr().String(),
		fmt.Sprint("AGENT=", x.h.Proc.Pid()))
	mac := x.sh("ip neigh show " + vtep.String() + " dev vtep1024 | awk '{print $3}'")
	x.env = append(x.env, "PEERMAC="+strings.TrimSpace(mac))
	for _, name := range []string{"GW", "GWNET", "GW6NET", "NET", "NET6", "OWN", "PORT", "VTEP", "PEERMAC"} {
		if !slices.ContainsFunc(x.env, func(e string) bool { return strings.HasPrefix(e, name+"=") && len(e) > len(name)+1 }) {
			x.t.Fatalf("scripts lack %s: %q", name, x.env)
		}
	}
}

// try runs a script on the host, and returns what it printed and, with an error,
// what it complained of: ip(8) does so of namespaces that go meanwhile.
func (x *site) try(script string) (string, error) {
	cmd := x.h.Command(x.t.Context(), "sh", "-ec", script)
	cmd.Env = append(os.Environ(), x.env...)
	var complaints strings.Builder
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		return string(out) + complaints.String(), err
	}
	return string(out), nil
}

func (x *site) sh(script string) string {
	x.t.Helper()
	out, err := x.try(script)
	if err != nil {
		x.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

// wait polls until f says nothing.
func (x *site) wait(what string, within time.Duration, f func() error) {
	x.t.Helper()
	must(x.t, lab.Wait(x.t.Context(), what, within, f))
}
