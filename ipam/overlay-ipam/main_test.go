package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

var update = flag.Bool("update", false, "write the golden file anew")

// binary is the program, built once.
var binary string

func TestMain(m *testing.M) {
	flag.Parse()
	dir, err := os.MkdirTemp("", "overlay-ipam-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "overlay-ipam")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// A host is a run directory with a published state.
type host struct {
	t   testing.TB
	dir string
}

func newHost(t testing.TB, change func(*conf.State)) *host {
	t.Helper()
	h := &host{t: t, dir: tmpfs(t)}
	h.publish(change)
	return h
}

func tmpfs(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "ovl-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func (h *host) publish(change func(*conf.State)) {
	h.t.Helper()
	boot, err := conf.BootID()
	if err != nil {
		h.t.Fatal(err)
	}
	lease := conf.Lease{
		Bridges: conf.Halves[:],
		VTEP:    conf.VTEP{IP: netip.MustParsePrefix("44.128.0.1/20")},
		Grants: []conf.Grant{
			grant("dcos", "9.0.1.0/24", ""),
			grant("dcos6", "", "fd01:b::/80"),
			grant("both", "9.1.1.0/24", "fd01:c::/80"),
			grant("tiny", "9.2.1.0/28", ""), // halves of five addresses
			{Overlay: conf.Overlay{Name: "dry"}, Error: "the pool of overlay dry is exhausted"},
		},
	}
	s := conf.State{
		AgentID: "a", BootID: boot, CoolingSeconds: 150, IP: netip.MustParseAddr("172.17.0.2"), MTU: 1450,
		Lease:    conf.LeaseState{Epoch: 1, ExpiresBoottime: int64(conf.Boottime() + time.Hour)},
		Overlays: lease.AgentOverlays(map[string]conf.OverlayStatus{"dry": {Status: conf.StatusFailed, Error: "the pool of overlay dry is exhausted"}}),
	}
	if change != nil {
		change(&s)
	}
	if err := conf.WriteJSON(filepath.Join(h.dir, conf.StateFile), s, 0o644); err != nil {
		h.t.Fatal(err)
	}
}

func grant(name, subnet, subnet6 string) conf.Grant {
	g := conf.Grant{Overlay: conf.Overlay{Name: name}}
	if subnet != "" {
		g.Subnet = netip.MustParsePrefix(subnet)
	}
	if subnet6 != "" {
		g.Subnet6 = netip.MustParsePrefix(subnet6)
	}
	return g
}

// config is what bridge passes on, with more keys merged in.
func (h *host) config(version, overlay, half string, more ...string) string {
	m := map[string]any{
		"name": "net-" + overlay, "type": "bridge",
		"ipam": map[string]any{"type": "overlay-ipam", "overlay": overlay, "half": half, "runDir": h.dir},
	}
	if version != "" {
		m["cniVersion"] = version
	}
	for _, s := range more {
		if err := json.Unmarshal([]byte(s), &m); err != nil {
			h.t.Fatal(err)
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

type answer struct {
	exit           int
	stdout, stderr string
	doc            struct {
		CNIVersion string `json:"cniVersion"`
		Code       uint   `json:"code"`
		Msg        string `json:"msg"`
		IPs        []struct {
			Address string `json:"address"`
			Gateway string `json:"gateway"`
		} `json:"ips"`
	}
}

func (a answer) addr() string {
	if len(a.doc.IPs) == 0 {
		return ""
	}
	return a.doc.IPs[0].Address
}

// call runs the program as a runtime does: nothing in the environment but CNI's.
func (h *host) call(verb, id, stdin string, env ...string) answer {
	h.t.Helper()
	cmd := exec.Command(binary)
	cmd.Dir = "/"
	cmd.Env = append([]string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_IFNAME=eth0", "CNI_NETNS=/nowhere"}, env...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		h.t.Fatal(err)
	}
	a := answer{exit: cmd.ProcessState.ExitCode(), stdout: stdout.String(), stderr: stderr.String()}
	if stdout.Len() > 0 {
		dec := json.NewDecoder(&stdout)
		if err := dec.Decode(&a.doc); err != nil {
			h.t.Fatalf("%s: stdout is not JSON: %v\n%s", verb, err, a.stdout)
		}
		if _, err := dec.Token(); err != io.EOF {
			h.t.Fatalf("%s: more than one document:\n%s", verb, a.stdout)
		}
	}
	return a
}

func (h *host) must(verb, id, stdin string, env ...string) answer {
	h.t.Helper()
	a := h.call(verb, id, stdin, env...)
	if a.exit != 0 {
		h.t.Fatalf("%s %s: %s%s", verb, id, a.stdout, a.stderr)
	}
	if verb != "ADD" && verb != "VERSION" && a.stdout != "" {
		h.t.Errorf("%s printed %s", verb, a.stdout)
	}
	return a
}

func (h *host) refused(verb, id, stdin string, code uint, msg string, env ...string) {
	h.t.Helper()
	a := h.call(verb, id, stdin, env...)
	if a.exit == 0 || a.doc.Code != code || !strings.Contains(a.doc.Msg, msg) {
		h.t.Errorf("%s %s: exit %d, code %d, %q; want %d and %q", verb, id, a.exit, a.doc.Code, a.doc.Msg, code, msg)
	}
}

// store looks into the store, and verifies it.
func (h *host) store(overlay string) []ipam.Record {
	h.t.Helper()
	s, err := ipam.Open(h.t.Context(), ipam.Options{Dir: filepath.Join(h.dir, conf.IPAMDir), Overlay: overlay})
	if err != nil {
		h.t.Fatal(err)
	}
	defer s.Close()
	if problems, err := s.Verify(h.t.Context()); err != nil || problems != nil {
		h.t.Errorf("verify: %v %q", err, problems)
	}
	recs, err := s.List(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	return recs
}

func TestResultsOfEveryVersion(t *testing.T) {
	var got bytes.Buffer
	for _, version := range []string{"", "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for _, overlay := range []string{"dcos", "dcos6", "both"} {
			h := newHost(t, nil)
			a := h.must("ADD", "c1", h.config(version, overlay, "docker"))
			fmt.Fprintf(&got, "-- %s %s --\n%s", version, overlay, a.stdout)
		}
	}
	path := filepath.Join("testdata", "results.golden")
	if *update {
		if err := os.WriteFile(path, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got.String()); d != "" {
		t.Errorf("results changed (-want +got); -update if that is right:\n%s", d)
	}
}

func TestAddDelAdd(t *testing.T) {
	h := newHost(t, nil)
	c := h.config("1.1.0", "dcos", "mesos")
	if got := h.must("ADD", "c1", c).addr(); got != "9.0.1.2/25" {
		t.Errorf("first: %s", got)
	}
	if got := h.must("ADD", "c1", c).addr(); got != "9.0.1.2/25" {
		t.Errorf("the same attachment: %s", got)
	}
	if got := h.must("ADD", "c1", c, "CNI_IFNAME=eth1").addr(); got != "9.0.1.3/25" {
		t.Errorf("another interface: %s", got)
	}
	if got := h.must("ADD", "c1", h.config("1.1.0", "dcos", "docker")).addr(); got != "9.0.1.130/25" {
		t.Errorf("the other half: %s", got)
	}
	for range 10 {
		h.must("DEL", "c1", c)
	}
	recs := h.store("dcos")
	if len(recs) != 1 || recs[0].IfName != "eth1" {
		t.Errorf("DEL of eth0 left %v", recs)
	}
	if got := h.must("ADD", "c1", c).addr(); got != "9.0.1.4/25" {
		t.Errorf("the released address must cool: %s", got)
	}
}

// DEL needs neither the published state nor a sensible configuration.
func TestDelAlone(t *testing.T) {
	h := newHost(t, nil)
	h.must("ADD", "c1", h.config("", "dcos", "mesos"))
	if err := os.Remove(filepath.Join(h.dir, conf.StateFile)); err != nil {
		t.Fatal(err)
	}
	h.must("DEL", "c1", h.config("", "dcos", "sideways", `{"prevResult":"nonsense","runtimeConfig":7}`), "CNI_NETNS=")
	if recs := h.store("dcos"); len(recs) > 0 {
		t.Errorf("left: %v", recs)
	}
	// Never added, nor any store: nothing is made.
	empty := &host{t: t, dir: tmpfs(t)}
	empty.must("DEL", "c1", empty.config("", "dcos", "mesos"))
	empty.must("DEL", "c1", empty.config("", "an-overlay-name-that-is-too-long", "mesos"))
	if names, err := os.ReadDir(empty.dir); err != nil || len(names) > 0 {
		t.Errorf("DEL made %v %v", names, err)
	}
}

func TestNotReady(t *testing.T) {
	status := func(h *host, code uint, msg string) {
		t.Helper()
		h.refused("STATUS", "", h.config("1.1.0", "dcos", "mesos"), code, msg)
	}
	for _, tt := range []struct {
		name      string
		change    func(*conf.State)
		overlay   string
		half      string
		add, stat uint
		msg       string
	}{
		{"reboot", func(s *conf.State) { s.BootID = "earlier" }, "dcos", "mesos", 11, 50, "from before the last reboot"},
		{"ended", func(s *conf.State) { s.Lease.ExpiresBoottime = 1 }, "dcos", "mesos", 11, 51, "has run out"},
		{"lost", func(s *conf.State) { s.Lease.Lost = "granted to agent b" }, "dcos", "mesos", 108, 51, "the lease of this host is lost: granted to agent b"},
		{"no overlay", nil, "other", "mesos", 101, 50, "overlay other is not known"},
		{"no subnet", nil, "dry", "mesos", 11, 50, "the pool of overlay dry is exhausted"},
		{"no bridges", func(s *conf.State) { s.Overlays[0].MesosBridge = nil }, "dcos", "mesos", 101, 50, "has no bridge for the mesos half"},
		{"no half", nil, "dcos", "", 7, 7, `half "": must be "mesos" or "docker"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t, tt.change)
			c := h.config("1.1.0", tt.overlay, tt.half)
			h.refused("ADD", "c1", c, tt.add, tt.msg)
			h.refused("STATUS", "", c, tt.stat, tt.msg)
			h.must("DEL", "c1", c)
			if _, err := os.Stat(filepath.Join(h.dir, conf.IPAMDir)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("something was made: %v", err)
			}
		})
	}
	h := &host{t: t, dir: tmpfs(t)}
	h.refused("ADD", "c1", h.config("1.1.0", "dcos", "mesos"), 11, `has not published yet; see that "overlayd agent" runs, with --run-dir `+h.dir)
	status(h, 50, "has not published yet")
	if err := os.WriteFile(filepath.Join(h.dir, conf.StateFile), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	h.refused("ADD", "c1", h.config("1.1.0", "dcos", "mesos"), 100, "published state")
	status(h, 50, "published state")
}

func TestExhausted(t *testing.T) {
	h := newHost(t, nil)
	c := h.config("1.1.0", "tiny", "docker")
	for i := range 5 {
		h.must("STATUS", "", c)
		h.must("ADD", fmt.Sprint("c", i), c)
	}
	const text = "overlay tiny: no address left in the docker half 9.2.1.8/29: 5 used, 0 cooling, 5 in all; remove containers or give the overlay a shorter prefix"
	h.refused("ADD", "late", c, 11, text)
	h.refused("STATUS", "", c, 50, text)
	h.must("STATUS", "", h.config("1.1.0", "tiny", "mesos"))
	h.must("DEL", "c2", c)
	h.must("STATUS", "", c) // a cooling address is used early rather than fail
	if got := h.must("ADD", "late", c).addr(); got != "9.2.1.12/29" {
		t.Errorf("early: %s", got)
	}
}

func TestRequestedAddresses(t *testing.T) {
	h := newHost(t, nil)
	for i, tt := range []struct{ more, args, want string }{
		{`{"runtimeConfig":{"ips":["9.0.1.50/25"]}}`, "", "9.0.1.50/25"},
		{`{"args":{"cni":{"ips":["9.0.1.51"]}}}`, "IP=9.0.1.99", "9.0.1.51/25"},
		{`{}`, "IgnoreUnknown=1;IP=9.0.1.52", "9.0.1.52/25"},
		{`{"args":{"org.apache.mesos":{"network_info":{"ip_addresses":[{"protocol":"IPv4","ip_address":"9.0.1.53"}]}}}}`, "", "9.0.1.53/25"},
	} {
		if got := h.must("ADD", fmt.Sprint("c", i), h.config("1.0.0", "dcos", "mesos", tt.more), "CNI_ARGS="+tt.args).addr(); got != tt.want {
			t.Errorf("%s %s: %s", tt.more, tt.args, got)
		}
	}
	for addr, msg := range map[string]string{
		"9.0.1.50":  "requested address 9.0.1.50 is in use by net-dcos/c0/eth0",
		"9.0.1.1":   "is the gateway of 9.0.1.0/25",
		"9.0.1.200": "is outside 9.0.1.0/25",
		"fd01::1":   "is of a family that overlay does not have here",
	} {
		h.refused("ADD", "no", h.config("1.0.0", "dcos", "mesos"), 102, msg, "CNI_ARGS=IP="+addr)
	}
	h.refused("ADD", "no", h.config("1.0.0", "dcos", "mesos"), 7, `address "nine"`, "CNI_ARGS=IP=nine")
	if recs := h.store("dcos"); len(recs) != 4 {
		t.Errorf("%d records", len(recs))
	}
}

func TestCheck(t *testing.T) {
	h := newHost(t, nil)
	for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		id := "c" + version
		prev := h.must("ADD", id, h.config(version, "both", "mesos")).stdout
		with := func(prev string) string { return h.config(version, "both", "mesos", `{"prevResult":`+prev+`}`) }
		h.must("CHECK", id, with(prev))
		h.refused("CHECK", "another", with(prev), 105, "has no address in the mesos half")
		h.refused("CHECK", id, h.config(version, "both", "docker", `{"prevResult":`+prev+`}`), 105, "has no address in the docker half")
		h.refused("CHECK", id, with(strings.ReplaceAll(prev, "9.1.1.", "9.1.7.")), 105, "which prevResult does not list")
		h.refused("CHECK", id, h.config(version, "both", "mesos"), 7, "prevResult: missing")
		h.must("DEL", id, with(prev))
		h.refused("CHECK", id, with(prev), 105, "has no address")
	}
}

func TestGC(t *testing.T) {
	h := newHost(t, nil)
	c := h.config("1.1.0", "dcos", "mesos")
	for i := range 3 {
		h.must("ADD", fmt.Sprint("c", i), c)
	}
	gc := func(list string) string {
		return h.config("1.1.0", "dcos", "mesos", `{"cni.dev/valid-attachments":`+list+`}`)
	}
	h.refused("GC", "", c, 7, "valid-attachments: missing")
	h.must("GC", "", gc(`[]`))
	if n := len(h.store("dcos")); n != 3 {
		t.Errorf("attachments of this minute were released, %d are left", n)
	}
	h.age("dcos")
	other := h.config("1.1.0", "dcos", "mesos", `{"name":"other"}`)
	h.must("GC", "", h.config("1.1.0", "dcos", "docker", `{"cni.dev/valid-attachments":[]}`))
	h.must("GC", "", h.config("1.1.0", "dcos", "mesos", `{"name":"other","cni.dev/valid-attachments":[]}`))
	if n := len(h.store("dcos")); n != 3 {
		t.Errorf("another network's or half's GC released ours, %d are left", n)
	}
	h.must("ADD", "o", other)
	h.must("GC", "", gc(`[{"containerID":"c1","ifname":"eth0"},{"containerID":"zz","ifname":"eth0"}]`))
	var ids []string
	for _, r := range h.store("dcos") {
		ids = append(ids, r.ContainerID)
	}
	slices.Sort(ids)
	if want := []string{"c1", "o"}; !slices.Equal(ids, want) {
		t.Errorf("left %v, want %v", ids, want)
	}
}

// age makes every record of the overlay two minutes old, by making the store
// anew with the records it has.
func (h *host) age(overlay string) {
	h.t.Helper()
	recs := h.store(overlay)
	for i := range recs {
		recs[i].Since -= 2 * time.Minute
	}
	dir := filepath.Join(h.dir, conf.IPAMDir)
	if err := os.Remove(filepath.Join(dir, overlay+".db")); err != nil {
		h.t.Fatal(err)
	}
	s, err := ipam.Open(h.t.Context(), ipam.Options{Dir: dir, Overlay: overlay, Rebuild: func(context.Context) (ipam.Known, error) { return ipam.Known{Records: recs}, nil }})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		h.t.Fatal(err)
	}
}

// A store that stays locked: a clear answer within the deadline.
func TestLocked(t *testing.T) {
	h := newHost(t, nil)
	s, err := ipam.Open(t.Context(), ipam.Options{Dir: filepath.Join(h.dir, conf.IPAMDir), Overlay: "dcos"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	start := time.Now()
	h.refused("STATUS", "", h.config("1.1.0", "dcos", "mesos"), 50, "address store is busy")
	if d := time.Since(start); d > 1500*time.Millisecond {
		t.Errorf("STATUS took %s", d)
	}
	if a := h.must("VERSION", "", ""); a.doc.CNIVersion != "1.1.0" {
		t.Errorf("VERSION: %s", a.stdout)
	}
	if !testing.Short() {
		h.refused("ADD", "c1", h.config("1.1.0", "dcos", "mesos"), 11, "address store is busy")
	}
}

func TestDamaged(t *testing.T) {
	h := newHost(t, nil)
	c := h.config("1.1.0", "dcos", "mesos")
	h.must("ADD", "c1", c)
	path := filepath.Join(h.dir, conf.IPAMDir, "dcos.db")
	if err := os.Truncate(path, 20_000); err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"ADD", "DEL"} {
		h.refused(verb, "c1", c, 104, "address store is damaged")
	}
	h.refused("STATUS", "", c, 50, "address store is damaged")
	if st, err := os.Stat(path); err != nil || st.Size() != 20_000 {
		t.Errorf("the file was touched: %v", err)
	}
}

// Standard streams that are closed, an odd umask: as if it were a normal day,
// or undone.
func TestOddSurroundings(t *testing.T) {
	h := newHost(t, nil)
	c := filepath.Join(h.dir, "conf")
	if err := os.WriteFile(c, []byte(h.config("1.1.0", "dcos", "mesos")), 0o644); err != nil {
		t.Fatal(err)
	}
	sh := func(line string) (string, error) {
		cmd := exec.Command("/bin/sh", "-c", line)
		cmd.Env = []string{"CNI_COMMAND=ADD", "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0", "CNI_NETNS=/nowhere", "B=" + binary, "C=" + c}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := sh(`$B <$C >&-`); err == nil || !strings.Contains(out, "detached again") {
		t.Errorf("closed stdout: %v %s", err, out)
	}
	if recs := h.store("dcos"); len(recs) > 0 {
		t.Errorf("closed stdout left %v", recs)
	}
	// Python and Node give a program such a one when its output is not wanted.
	if out, err := sh(`$B <$C 1<>/dev/null`); err == nil || !strings.Contains(out, "detached again") || !strings.Contains(out, "standard output is closed, or /dev/null opened for reading and writing") {
		t.Errorf("stdout as if closed: %v %s", err, out)
	}
	if recs := h.store("dcos"); len(recs) > 0 {
		t.Errorf("stdout as if closed left %v", recs)
	}
	if out, err := h.withoutReader(c); err == nil || !strings.Contains(out, "broken pipe") {
		t.Errorf("reader gone: %v %s", err, out)
	}
	if recs := h.store("dcos"); len(recs) > 0 {
		t.Errorf("a reader that is gone left %v", recs)
	}
	if out, err := sh(`$B <&-`); err == nil || !strings.Contains(out, `"code": 6`) {
		t.Errorf("closed stdin: %v %s", err, out)
	}
	if out, err := sh(`umask 0777; $B <$C 2>&-`); err != nil || !strings.Contains(out, "9.0.1.") {
		t.Errorf("umask and closed stderr: %v %s", err, out)
	}
	if n := len(h.store("dcos")); n != 1 {
		t.Errorf("%d records", n)
	}
}

// withoutReader adds c1 with a standard output that nobody reads.
func (h *host) withoutReader(config string) (stderr string, err error) {
	h.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		h.t.Fatal(err)
	}
	defer w.Close()
	if err := r.Close(); err != nil {
		h.t.Fatal(err)
	}
	stdin, err := os.Open(config)
	if err != nil {
		h.t.Fatal(err)
	}
	defer stdin.Close()
	var out bytes.Buffer
	cmd := exec.Command(binary)
	cmd.Env = []string{"CNI_COMMAND=ADD", "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0", "CNI_NETNS=/nowhere"}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, w, &out
	err = cmd.Run()
	return out.String(), err
}

// Called by hand, or by Nomad to learn the version.
func TestAbout(t *testing.T) {
	cmd := exec.Command(binary)
	cmd.Env = []string{}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "CNI plugin overlay-ipam v") {
		t.Errorf("%v %s", err, out)
	}
}

func TestFiftyAtOnce(t *testing.T) {
	h := newHost(t, nil)
	c := h.config("1.1.0", "both", "docker")
	all := func(verb string) []string {
		out := make([]string, 50)
		var wg sync.WaitGroup
		start := time.Now()
		for i := range out {
			wg.Go(func() {
				a := h.call(verb, fmt.Sprint("c", i), c)
				if a.exit != 0 {
					t.Errorf("%s: %s", verb, a.stdout)
				}
				out[i] = a.addr()
			})
		}
		wg.Wait()
		t.Logf("50 %s: %s", verb, time.Since(start).Round(time.Millisecond))
		return out
	}
	got := all("ADD")
	slices.Sort(got)
	if n := len(slices.Compact(got)); n != 50 {
		t.Errorf("%d different addresses", n)
	}
	all("DEL")
	if recs := h.store("both"); len(recs) > 0 {
		t.Errorf("left %v", recs)
	}
}

// The program starts for every container: what it links it pays for each time.
func TestLinksLittle(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.Lines(string(out)) {
		dep = strings.TrimSpace(dep)
		for _, banned := range []string{"net/http", "log/slog", "crypto/tls", "go.yaml.in", "go.etcd.io/etcd", "spf13/cobra", "vishvananda", "google.golang.org", "os/exec"} {
			if strings.Contains(dep, banned) {
				t.Errorf("links %s", dep)
			}
		}
	}
}

// Under a main plugin that is not ours, where it is installed.
func TestUnderPtp(t *testing.T) {
	var ptp string
	for _, dir := range []string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"} {
		if _, err := os.Stat(filepath.Join(dir, "ptp")); err == nil {
			ptp = filepath.Join(dir, "ptp")
		}
	}
	if ptp == "" || os.Getuid() != 0 {
		t.Skip("needs root and the reference plugin ptp in /opt/cni/bin, /usr/lib/cni or /usr/libexec/cni")
	}
	h := newHost(t, nil)
	c := h.config("1.0.0", "dcos", "docker", `{"type":"ptp"}`)
	// ptp makes links in its own namespace, so it gets one.
	inNetNS(t, func(container string) {
		call := func(verb string) {
			t.Helper()
			cmd := exec.Command(ptp)
			cmd.Env = []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0", "CNI_NETNS=" + container,
				"CNI_PATH=" + filepath.Dir(binary), "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
			cmd.Stdin = strings.NewReader(c)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", verb, err, out)
			} else if verb == "ADD" && !bytes.Contains(out, []byte(`"9.0.1.130/25"`)) {
				t.Errorf("ADD: %s", out)
			}
		}
		call("ADD")
		if recs := h.store("dcos"); len(recs) != 1 {
			t.Errorf("stored: %v", recs)
		}
		call("DEL")
		if recs := h.store("dcos"); len(recs) != 0 {
			t.Errorf("left: %v", recs)
		}
	})
}

// inNetNS runs f on a thread in a network namespace of its own, with the path of
// a second one.
func inNetNS(t *testing.T, f func(container string)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread dies with it
		made, release := make(chan string), make(chan struct{})
		defer close(release)
		go func() {
			runtime.LockOSThread()
			if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
				t.Errorf("unshare: %v", err)
			}
			made <- fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), syscall.Gettid())
			<-release
		}()
		container := <-made
		if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
			t.Errorf("unshare: %v", err)
			return
		}
		f(container)
	}()
	<-done
}

func BenchmarkAddDel(b *testing.B) {
	h := newHost(b, nil)
	c := h.config("1.1.0", "both", "docker")
	for _, verb := range []string{"ADD", "DEL"} {
		b.Run(verb, func(b *testing.B) {
			i := 0
			for b.Loop() {
				h.must(verb, fmt.Sprint("c", i%100), c)
				i++
			}
		})
	}
}
