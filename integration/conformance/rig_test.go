package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/integration/lab"
)

// program is one of the programs under test.
type program struct {
	name  string
	half  string
	links bool // it makes interfaces, and runs other plugins for addresses
}

var programs = []program{
	{name: "m-overlay", half: lab.Mesos, links: true},
	{name: "d-overlay", half: lab.Docker, links: true},
	{name: "overlay-ipam", half: lab.Docker},
}

var versions = []string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// codes are the error codes a program may answer: those of the specification
// that it uses, and its own.
var codes = []struct {
	code int
	what string
}{
	{1, "cniVersion is not supported, or has no such verb"},
	{4, "a CNI_ variable is missing or wrong; all of them are named"},
	{5, "stdin cannot be read, or stdout not written"},
	{6, "the configuration is not one JSON object, is larger than 1 MiB or too deep"},
	{7, "the configuration makes no sense"},
	{11, "passes by itself: nothing published yet, lease run out, store busy, disk full, no address left"},
	{50, "STATUS: no container can be attached now"},
	{51, "STATUS: nor are those that are attached safe: lease lost, bridge or VTEP missing"},
	{100, "the published state cannot be read"},
	{101, "the overlay is not leased on this host, or has no bridge of this half"},
	{102, "an address asked for by name is refused"},
	{103, "the interface is there already"},
	{104, "the address store is damaged"},
	{105, "CHECK: something that ADD made is gone or differs"},
	{106, "a delegated plugin failed or is absent"},
	{107, "the kernel refused; the message names the step"},
	{108, "the lease is lost to another host"},
	{109, "a defect of the program"},
}

// rig is one test of one program.
type rig struct {
	testing.TB
	*host
	p          program
	ids        map[string]call // what may have been attached
	namespaces []*lab.Netns
	net        string // the overlay calls are made for
	dir        string // run directory they are made with
	parallel   bool
}

func newRig(t testing.TB, h *host, p program) *rig {
	r := &rig{TB: t, host: h, p: p, ids: map[string]call{}, net: "v4", dir: h.RunDir}
	t.TempDir() // the first call has it removed, and that after cleanUp
	t.Cleanup(r.cleanUp)
	return r
}

// cleanUp detaches what the test has left and asks the oracle.
func (r *rig) cleanUp() {
	for _, c := range r.ids {
		c = c.as("DEL").without()
		c.netns, c.wrap, c.bin, c.stdin, c.env = "", nil, "", nil, nil
		if out := r.host.run(r, c); out.status != 0 {
			r.Errorf("clean up: DEL %s: %s%s", c.id, out.stdout, out.stderr)
		}
	}
	for _, n := range r.namespaces {
		r.freeNetns(r, n)
	}
	if r.dir != r.RunDir && r.parallel {
		return // others work at the same time
	}
	if d := r.check(r); d != "" {
		r.Errorf("overlayctl ipam check:\n%s", d)
	}
	left, _ := r.list(r, r.RunDir)
	for _, a := range left { // and keep it from failing the tests that follow
		r.Errorf("left attached: %v", a)
		r.host.run(r, call{program: "overlay-ipam", command: "DEL", id: a.ContainerID, ifname: a.IfName,
			conf: map[string]any{"name": a.Network, "overlay": a.Overlay, "runDir": r.RunDir}})
	}
}

// config is a network configuration for the rig's overlay and program.
func (r *rig) config(version string) map[string]any {
	conf := map[string]any{"name": r.net, "type": r.p.name, "runDir": r.dir, "ipam": map[string]any{"type": "overlay-ipam"}}
	if !r.p.links { // as a main plugin of others passes it on
		conf = map[string]any{"name": r.net, "type": "bridge", "ipam": map[string]any{"type": "overlay-ipam", "half": r.p.half, "runDir": r.dir}}
	}
	if version != "" {
		conf["cniVersion"] = version
	}
	return conf
}

// call is an ADD of a new container.
func (r *rig) call() call {
	r.Helper()
	c := call{program: r.p.name, command: "ADD", id: r.newID(), ifname: "eth0", conf: r.config("1.1.0")}
	c.netns = r.netns().Path
	return c
}

// netns is an empty network namespace, until the end of the test.
func (r *rig) netns() *lab.Netns {
	r.Helper()
	n := r.newNetns(r)
	r.namespaces = append(r.namespaces, n)
	return n
}

func (r *rig) newID() string { return fmt.Sprintf("c%d", r.host.ids.Add(1)) }

// run executes a call and holds it to what is true of every call: one JSON
// document or nothing on stdout, an error document if it failed, a known code.
func (r *rig) run(c call) outcome {
	r.Helper()
	out := r.host.run(r, c)
	if c.command == "ADD" && out.status <= 0 { // one that was refused has to leave nothing by itself
		r.ids[c.id+"/"+c.ifname+"/"+fmt.Sprint(c.conf["name"])] = c
	}
	if n := documents(out.stdout); n > 1 || n < 0 {
		r.Errorf("%s %s: stdout is not one JSON document:\n%s", c.program, c.command, out.stdout)
	}
	if out.status > 0 && out.stdout != "" {
		if f := out.failure(r); !knownCode(f.Code) || f.Msg == "" {
			r.Errorf("%s %s: error document %s", c.program, c.command, out.stdout)
		}
	}
	if out.status == 0 && out.stdout != "" && c.command != "ADD" && c.command != "VERSION" {
		r.Errorf("%s %s: printed on success: %s", c.program, c.command, out.stdout)
	}
	return out
}

// documents counts the JSON documents in a text; -1: it is something else.
func documents(s string) int {
	dec := json.NewDecoder(strings.NewReader(s))
	for n := 0; ; n++ {
		var v any
		switch err := dec.Decode(&v); err {
		case nil:
		case io.EOF:
			return n
		default:
			return -1
		}
	}
}

func knownCode(code int) bool {
	for _, c := range codes {
		if c.code == code {
			return true
		}
	}
	return false
}

func (o outcome) failure(t testing.TB) failure {
	t.Helper()
	var f failure
	dec := json.NewDecoder(strings.NewReader(o.stdout))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		t.Errorf("not an error document: %v: %q (stderr %q)", err, o.stdout, o.stderr)
	}
	return f
}

// ok runs a call that must succeed.
func (r *rig) ok(c call) outcome {
	r.Helper()
	out := r.run(c)
	if out.status != 0 {
		r.Fatalf("%s %s: exit %d\n%s%s", c.program, c.command, out.status, out.stdout, out.stderr)
	}
	return out
}

// refused runs a call that must fail with one of these codes and these words.
func (r *rig) refused(c call, code int, words ...string) failure {
	r.Helper()
	out := r.run(c)
	if out.status <= 0 {
		r.Errorf("%s %s: exit %d, want an error with code %d\n%s%s", c.program, c.command, out.status, code, out.stdout, out.stderr)
		return failure{}
	}
	f := out.failure(r)
	if f.Code != code {
		r.Errorf("%s %s: code %d, want %d: %s", c.program, c.command, f.Code, code, f.Msg)
	}
	for _, w := range words {
		if !strings.Contains(f.Msg+" "+f.Details, w) {
			r.Errorf("%s %s: the error says %q %q, want in it %q", c.program, c.command, f.Msg, f.Details, w)
		}
	}
	return f
}

// result is the result of an ADD, of 1.0.0 or newer.
type result struct {
	CNIVersion string `json:"cniVersion"`
	Interfaces []struct {
		Name, Mac, Sandbox string
		Mtu                int
	}
	IPs []struct {
		Address   netip.Prefix
		Gateway   netip.Addr
		Interface *int
	}
	Routes []struct {
		Dst netip.Prefix
		GW  netip.Addr
	}
	raw map[string]any
}

func (r *rig) parse(out outcome) (res result) {
	r.Helper()
	if err := json.Unmarshal([]byte(out.stdout), &res); err != nil {
		r.Fatalf("result: %v\n%s", err, out.stdout)
	}
	must(r, json.Unmarshal([]byte(out.stdout), &res.raw))
	return res
}

// attach is an ADD that must succeed, and its result.
func (r *rig) attach(c call) result {
	r.Helper()
	res := r.parse(r.ok(c))
	if len(res.IPs) == 0 && !slices.Contains([]string{"0.1.0", "0.2.0"}, res.CNIVersion) {
		r.Fatalf("result without an address: %v", res.raw)
	}
	return res
}

func (res result) addr() netip.Addr { return res.IPs[len(res.IPs)-1].Address.Addr() }

// holds returns the attachments of a container in the store.
func (r *rig) holds(c call) (out []attachment) {
	r.Helper()
	all, _ := r.list(r, r.dir)
	for _, a := range all {
		if a.ContainerID == c.id {
			out = append(out, a)
		}
	}
	return out
}

// gone checks that nothing is left of a container: record, host end, and what
// is in its namespace.
func (r *rig) gone(c call) {
	r.Helper()
	if a := r.holds(c); len(a) > 0 {
		r.Errorf("still in the store: %v", a)
	}
	if c.netns == "" {
		return
	}
	if _, err := os.Stat(c.netns); err == nil {
		if links := r.linksIn(c.netns); len(links) > 1 {
			r.Errorf("left in the container: %v", links)
		}
	}
}

func (r *rig) linksIn(netns string) []string {
	r.Helper()
	out, err := namespace(netns).Run(context.Background(), "ip", "-o", "link")
	must(r, err)
	var names []string
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		name, _, _ := strings.Cut(strings.TrimSuffix(f[1], ":"), "@")
		names = append(names, name)
	}
	return names
}

func namespace(path string) *lab.Netns { return &lab.Netns{Name: filepath.Base(path), Path: path} }

// unchanged runs f and checks that it changed nothing: not the kernel, on the
// host and in these namespaces, not the store, not the files.
func (r *rig) unchanged(f func(), namespaces ...string) {
	r.Helper()
	before := r.everything(namespaces)
	f()
	if diff := cmp.Diff(before, r.everything(namespaces)); diff != "" {
		r.Errorf("something changed (-before +after):\n%s", diff)
	}
}

func (r *rig) everything(namespaces []string) string {
	var b strings.Builder
	for _, ns := range append([]string{r.Path}, namespaces...) {
		b.WriteString(r.kernel(r, ns))
	}
	attachments, usages := r.list(r, r.dir)
	for i := range usages {
		usages[i].Cooling = 0 // time alone changes it
	}
	fmt.Fprintln(&b, attachments, usages)
	must(r, filepath.WalkDir(r.dir, func(path string, d os.DirEntry, err error) error {
		if name := filepath.Base(path); err == nil && !strings.HasPrefix(name, "cni.log") && name != "cni.counters" { // every call is logged
			fmt.Fprintln(&b, path)
		}
		return err
	}))
	return b.String()
}

// forge gives the rig a run directory of its own with a changed copy of the
// published state.
func (r *rig) forge(change func(state map[string]any)) {
	r.Helper()
	r.dir = r.TempDir()
	r.publish(change)
}

func (r *rig) publish(change func(state map[string]any)) {
	r.Helper()
	b, err := os.ReadFile(filepath.Join(r.RunDir, "state.json"))
	must(r, err)
	var state map[string]any
	must(r, json.Unmarshal(b, &state))
	if change != nil {
		change(state)
	}
	b, err = json.Marshal(state)
	must(r, err)
	must(r, os.WriteFile(filepath.Join(r.dir, "state.json"), b, 0o644))
}

// past runs programs as if that many seconds before now.
func past(seconds int) []string {
	return []string{"unshare", "--time", "--boottime", fmt.Sprint(-seconds)}
}

// script makes a plugin of a shell script in a directory of its own, and has the
// call find it after ours. It writes each call's verb and environment to
// <name>.calls and the last stdin to <name>.stdin beside it.
func (r *rig) script(c call, name, body string) (_ call, dir string) {
	r.Helper()
	dir = r.TempDir()
	text := fmt.Sprintf("#!/bin/sh\ncat > %[1]s/%[2]s.stdin\necho $CNI_COMMAND >> %[1]s/%[2]s.calls\nenv > %[1]s/%[2]s.env\n%[3]s\n", dir, name, body)
	must(r, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755))
	c.path = binDir + ":" + dir
	return c.set("ipam", map[string]any{"type": name, "half": r.p.half, "runDir": r.dir}), dir
}

// calls are the verbs a script was called with.
func (r *rig) calls(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name+".calls"))
	if err != nil && !os.IsNotExist(err) {
		r.Error(err)
	}
	return strings.Join(strings.Fields(string(b)), " ")
}

// eventually waits for a condition.
func (r *rig) eventually(what string, f func() error) {
	r.Helper()
	must(r, lab.Wait(context.Background(), what, 15*time.Second, f))
}

func unmarshal(s string, v any) error { return json.Unmarshal([]byte(s), v) }

// rawJSON is a value that is already text.
func rawJSON(s string) json.RawMessage { return json.RawMessage(s) }
