package attach

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/veth"
	"overlayd.internal/overlay/ipam"
)

// binaries are the programs under test, built once per test run.
var binaries = sync.OnceValues(func() (string, error) { return build() })

// crashing are the same programs with crash points.
var crashing = sync.OnceValues(func() (string, error) { return build("-tags", "crashpoints") })

var buildRoot string

func TestMain(m *testing.M) {
	var err error
	if buildRoot, err = os.MkdirTemp("", "attach-test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(buildRoot)
	os.Exit(code)
}

func build(flags ...string) (string, error) {
	dir, err := os.MkdirTemp(buildRoot, "bin-")
	if err != nil {
		return "", err
	}
	args := append([]string{"build", "-trimpath", "-ldflags", "-s -w", "-o", dir + "/"}, flags...)
	args = append(args, "overlayd.internal/overlay/plugins/m-overlay", "overlayd.internal/overlay/plugins/d-overlay", "overlayd.internal/overlay/ipam/overlay-ipam")
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return dir, nil
}

// machine is a host with an agent's work done: bridges, and a published state.
//
//	dcos   9.0.1.0/24                      mesos 9.0.1.0/25    docker 9.0.1.128/25
//	dcos6  fd01:b::/80                     mesos fd01:b::/81   docker fd01:b::8000:0:0/81
//	both   9.1.1.0/24, fd01:c::/80
//	tiny   9.2.0.0/29                      mesos 9.2.0.0/30: one container
type machine struct {
	t     testing.TB
	host  namespace
	run   string
	bin   string
	path  []string // CNI_PATH besides bin
	state conf.State
}

const testMTU = 1450

func newMachine(t testing.TB) *machine {
	t.Helper()
	needRoot(t)
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	boot, err := conf.BootID()
	if err != nil {
		t.Fatal(err)
	}
	lease := conf.Lease{
		AgentID: "a1", AgentIP: netip.MustParseAddr("172.17.0.3"), Epoch: 1, Bridges: conf.Halves[:],
		VTEP: conf.VTEP{IP: netip.MustParsePrefix("44.128.0.1/20"), IP6: netip.MustParsePrefix("fd01:a::1/64")},
	}
	grant := func(name, all, all6, subnet, subnet6 string) {
		g := conf.Grant{Overlay: conf.Overlay{Name: name}}
		if subnet != "" {
			g.Overlay.Subnet, g.Subnet = netip.MustParsePrefix(all), netip.MustParsePrefix(subnet)
			g.Overlay.Prefix = g.Subnet.Bits()
		}
		if subnet6 != "" {
			g.Overlay.Subnet6, g.Subnet6 = netip.MustParsePrefix(all6), netip.MustParsePrefix(subnet6)
			g.Overlay.Prefix6 = g.Subnet6.Bits()
		}
		lease.Grants = append(lease.Grants, g)
	}
	grant("dcos", "9.0.0.0/16", "", "9.0.1.0/24", "")
	grant("dcos6", "", "fd01:b::/64", "", "fd01:b::/80")
	grant("both", "9.1.0.0/16", "fd01:c::/64", "9.1.1.0/24", "fd01:c::/80")
	grant("tiny", "9.2.0.0/24", "", "9.2.0.0/29", "")

	ok := map[string]conf.OverlayStatus{}
	for _, g := range lease.Grants {
		ok[g.Overlay.Name] = conf.OverlayStatus{Status: conf.StatusOK}
	}
	m := &machine{t: t, host: newNamespace(t), run: runDir(t), bin: bin}
	m.state = conf.State{
		AgentID: "a1", BootID: boot, IP: lease.AgentIP, MTU: testMTU, CoolingSeconds: 150, Version: "test",
		Lease:    conf.LeaseState{Epoch: 1, ExpiresBoottime: int64(conf.Boottime() + time.Hour)},
		Overlays: lease.AgentOverlays(ok),
	}
	m.publish()
	for _, o := range m.state.Overlays {
		for _, h := range conf.Halves {
			var gateways []netip.Prefix
			for _, r := range []netip.Prefix{o.Bridge(h).IP, o.Bridge(h).IP6} {
				if r.IsValid() {
					gateways = append(gateways, conf.GatewayPrefix(r))
				}
			}
			m.host.addBridge(t, o.Bridge(h).Name, testMTU, gateways...)
		}
	}
	vtep := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: conf.VTEPName, TxQLen: -1}, VxlanId: conf.VNI, Port: conf.VXLANPort}
	if err := m.host.LinkAdd(vtep); err != nil {
		t.Fatalf("add %s: %v", conf.VTEPName, err)
	}
	m.host.up(t, "lo", conf.VTEPName)
	return m
}

// runDir is a directory in memory, as the real one is: a commit to disk would
// take most of the time.
func runDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ovl-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// publish writes the state as the agent does.
func (m *machine) publish() {
	m.t.Helper()
	if err := conf.WriteJSON(filepath.Join(m.run, conf.StateFile), m.state, 0o644); err != nil {
		m.t.Fatal(err)
	}
}

// call is one invocation of a plugin, as a runtime makes it.
type call struct {
	plugin  string // d-overlay
	command string // ADD
	id      string // c1
	ifName  string // eth0
	netns   string // empty: CNI_NETNS is not set
	conf    map[string]any
	env     []string
}

// config is a network configuration; more are keys and values.
func (m *machine) config(overlay, version string, more ...any) map[string]any {
	c := map[string]any{"name": overlay, "type": "d-overlay", "runDir": m.run}
	if version != "" {
		c["cniVersion"] = version
	}
	for i := 0; i < len(more); i += 2 {
		c[more[i].(string)] = more[i+1]
	}
	return c
}

// outcome is what became of an invocation.
type outcome struct {
	stdout, stderr string
	status         int // -1: killed by a signal
}

// exec runs a plugin in the host's namespace with nothing in its environment
// but what a runtime must set.
func (m *machine) exec(c call) outcome {
	m.t.Helper()
	stdin, err := json.Marshal(c.conf)
	if err != nil {
		m.t.Fatal(err)
	}
	id, ifName := c.id, c.ifName
	if id == "" {
		id = "c1"
	}
	if ifName == "" {
		ifName = "eth0"
	}
	plugin := c.plugin
	if plugin == "" {
		plugin = "d-overlay"
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(m.bin, plugin))
	cmd.Env = append([]string{
		"CNI_COMMAND=" + c.command, "CNI_CONTAINERID=" + id, "CNI_IFNAME=" + ifName,
		"CNI_PATH=" + strings.Join(append([]string{m.bin}, m.path...), ":"),
	}, c.env...)
	if c.netns != "" {
		cmd.Env = append(cmd.Env, "CNI_NETNS="+c.netns)
	}
	cmd.Dir = "/"
	cmd.Stdin = bytes.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var runErr error
	m.host.inside(m.t, func() error { runErr = cmd.Run(); return nil })
	if runErr != nil && !errors.As(runErr, new(*exec.ExitError)) {
		m.t.Fatalf("%s %s: %v", plugin, c.command, runErr)
	}
	return outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// ok runs a plugin that must succeed and returns what it printed.
func (m *machine) ok(c call) string {
	m.t.Helper()
	out := m.exec(c)
	if out.status != 0 {
		m.t.Fatalf("%s %s: exit %d\n%s%s", c.plugin, c.command, out.status, out.stdout, out.stderr)
	}
	return out.stdout
}

// add is ok for an ADD of version 1.1.0 and reads its result.
func (m *machine) add(c call) *types100.Result {
	m.t.Helper()
	c.command = "ADD"
	var r types100.Result
	text := m.ok(c)
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		m.t.Fatalf("ADD printed %q: %v", text, err)
	}
	return &r
}

// refused runs a plugin that must fail with a code and words.
func (m *machine) refused(c call, code uint, words string) {
	m.t.Helper()
	out := m.exec(c)
	var e types.Error
	if err := json.Unmarshal([]byte(out.stdout), &e); err != nil {
		m.t.Fatalf("%s %s: exit %d, stdout %q is no error document: %v\n%s", c.plugin, c.command, out.status, out.stdout, err, out.stderr)
	}
	if out.status != 1 || e.Code != code || !strings.Contains(e.Msg, words) {
		m.t.Errorf("%s: exit %d, code %d: %s\nwant exit 1, code %d and %q", c.command, out.status, e.Code, e.Msg, code, words)
	}
}

// footprint is everything a host has of containers.
type footprint struct {
	links   []string
	records []ipam.Record
}

func (f footprint) empty() bool { return len(f.links) == 0 && len(f.records) == 0 }

// left reads the host's footprint.
func (m *machine) left() (f footprint) {
	m.t.Helper()
	for _, l := range m.host.links(m.t) {
		if strings.HasPrefix(l, "v") && l != conf.VTEPName {
			f.links = append(f.links, l)
		}
	}
	for _, o := range m.state.Overlays {
		f.records = append(f.records, m.records(o.Info.Name)...)
	}
	return f
}

// records are the addresses of an overlay in use.
func (m *machine) records(overlay string) []ipam.Record {
	m.t.Helper()
	dir := filepath.Join(m.run, conf.IPAMDir)
	if _, err := os.Stat(filepath.Join(dir, overlay+".db")); err != nil {
		return nil
	}
	s, err := ipam.Open(m.t.Context(), ipam.Options{Dir: dir, Overlay: overlay, Cooling: 150 * time.Second})
	if err != nil {
		m.t.Fatal(err)
	}
	defer s.Close()
	recs, err := s.List(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	return recs
}

// wantNothing fails unless host and container have nothing of ours.
func (m *machine) wantNothing(containers ...namespace) {
	m.t.Helper()
	if f := m.left(); !f.empty() {
		m.t.Errorf("left on the host: links %v, records %v", f.links, f.records)
	}
	if s := m.sources(); strings.Contains(s, "elements") {
		m.t.Errorf("left of what containers may send from:\n%s", s)
	}
	for _, c := range containers {
		if links := c.links(m.t); len(links) != 0 {
			m.t.Errorf("left in the container: %v", links)
		}
	}
}

// ping sends one packet and waits a second for its answer.
func ping(t testing.TB, from namespace, to netip.Addr) {
	t.Helper()
	from.inside(t, func() error {
		out, err := exec.Command("ping", "-n", "-c1", "-W1", to.String()).CombinedOutput()
		if err != nil {
			t.Errorf("ping %s: %v\n%s", to, err, out)
		}
		return nil
	})
}

func addrsOf(r *types100.Result) (out []netip.Addr) {
	for _, ip := range r.IPs {
		out = append(out, addrOf(ip.Address.IP))
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// ip runs the ip command in the namespace.
func (n namespace) ip(t testing.TB, args ...string) {
	t.Helper()
	n.inside(t, func() error {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return nil
	})
}

// age makes an attachment look two minutes older, in the store and the alias.
func (m *machine) age(overlay, id string) {
	m.t.Helper()
	var links []veth.Link
	m.host.inside(m.t, func() (err error) { links, err = veth.List(); return err })
	older := func(d time.Duration) time.Duration { return max(0, d-2*time.Minute) }
	for _, l := range links {
		if l.Overlay != overlay || l.Attachment.ContainerID != id {
			continue
		}
		l.Since = older(l.Since)
		link, err := m.host.LinkByIndex(l.Index)
		if err == nil {
			err = m.host.LinkSetAlias(link, l.Alias.String())
		}
		if err != nil {
			m.t.Fatal(err)
		}
	}
	m.rewrite(overlay, func(r *ipam.Record) bool {
		if r.ContainerID == id {
			r.Since = older(r.Since)
		}
		return true
	})
}

// forget takes an attachment out of the store alone.
func (m *machine) forget(overlay, id string) {
	m.t.Helper()
	m.rewrite(overlay, func(r *ipam.Record) bool { return r.ContainerID != id })
}

// rewrite makes the store anew with the records that edit keeps.
func (m *machine) rewrite(overlay string, edit func(*ipam.Record) bool) {
	m.t.Helper()
	records := m.records(overlay)
	if len(records) == 0 {
		return
	}
	var kept []ipam.Record
	for _, r := range records {
		if edit(&r) {
			kept = append(kept, r)
		}
	}
	dir := filepath.Join(m.run, conf.IPAMDir)
	if err := os.Remove(filepath.Join(dir, overlay+".db")); err != nil {
		m.t.Fatal(err)
	}
	s, err := ipam.Open(m.t.Context(), ipam.Options{Dir: dir, Overlay: overlay, Cooling: 150 * time.Second,
		Rebuild: func(context.Context) (ipam.Known, error) { return ipam.Known{Records: kept}, nil }})
	if err != nil {
		m.t.Fatal(err)
	}
	s.Close()
}

// track puts a connection between two addresses into the host's tracking.
func (m *machine) track(from, to netip.Addr) {
	m.t.Helper()
	tuple := func(a, b netip.Addr, sport, dport uint16) netlink.IPTuple {
		return netlink.IPTuple{SrcIP: a.AsSlice(), DstIP: b.AsSlice(), SrcPort: sport, DstPort: dport, Protocol: 17}
	}
	flow := &netlink.ConntrackFlow{FamilyType: 2, TimeOut: 60, Forward: tuple(from, to, 1000, 53), Reverse: tuple(to, from, 53, 1000)}
	if err := m.host.ConntrackCreate(netlink.ConntrackTable, 2, flow); err != nil {
		m.t.Fatalf("create connection: %v", err)
	}
}

// tracked counts the connections an address takes part in.
func (m *machine) tracked(a netip.Addr) (n int) {
	m.t.Helper()
	flows, err := m.host.ConntrackTableList(netlink.ConntrackTable, 2)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, f := range flows {
		if addrOf(f.Forward.SrcIP) == a || addrOf(f.Forward.DstIP) == a {
			n++
		}
	}
	return n
}
