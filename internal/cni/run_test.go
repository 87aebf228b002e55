package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// A recorder is a plugin that says which of its functions ran.
type recorder struct {
	ran    []string
	call   *Call
	result *types100.Result
	err    error
	undone int
	during func(ctx context.Context)
}

func (r *recorder) plugin() Plugin {
	verb := func(name string) func(context.Context, *Call) error {
		return func(ctx context.Context, c *Call) error {
			r.ran, r.call = append(r.ran, name), c
			if r.during != nil {
				r.during(ctx)
			}
			return r.err
		}
	}
	add := verb("ADD")
	return Plugin{
		Name: "test-plugin",
		Add: func(ctx context.Context, c *Call) (*types100.Result, func(), error) {
			if err := add(ctx, c); err != nil {
				return nil, nil, err
			}
			return r.result, func() { r.undone++ }, nil
		},
		Del: verb("DEL"), Check: verb("CHECK"), GC: verb("GC"), Status: verb("STATUS"),
	}
}

func newRecorder() *recorder {
	ranges := []netip.Prefix{netip.MustParsePrefix("9.0.1.0/25")}
	r := &types100.Result{CNIVersion: "1.1.0"}
	r.IPs, r.Routes = Addresses(ranges, []netip.Addr{netip.MustParseAddr("9.0.1.2")}, nil)
	return &recorder{result: r}
}

// printed is what may be on stdout: one JSON object or nothing.
type printed struct {
	CNIVersion string `json:"cniVersion"`
	Code       uint   `json:"code"`
	Msg        string `json:"msg"`
	Details    string `json:"details"`
}

type outcome struct {
	exit           int
	stdout, stderr string
	doc            printed
}

func environment(pairs ...string) map[string]string {
	env := map[string]string{"CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_NETNS": "/nowhere"}
	for _, p := range pairs {
		k, v, _ := strings.Cut(p, "=")
		env[k] = v
	}
	return env
}

func run(t *testing.T, p Plugin, env map[string]string, stdin string) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	exit := Run(t.Context(), p, func(k string) (string, bool) { v, ok := env[k]; return v, ok }, strings.NewReader(stdin), &stdout, &stderr)
	o := outcome{exit: exit, stdout: stdout.String(), stderr: stderr.String()}
	if stdout.Len() > 0 {
		dec := json.NewDecoder(&stdout)
		if err := dec.Decode(&o.doc); err != nil {
			t.Fatalf("stdout is not JSON: %v\n%s", err, o.stdout)
		}
		if _, err := dec.Token(); err != io.EOF {
			t.Fatalf("stdout has more than one document:\n%s", o.stdout)
		}
	}
	return o
}

const basic = `{"cniVersion":"1.1.0","name":"dcos","type":"x"}`

func TestVerbs(t *testing.T) {
	for _, verb := range []string{"ADD", "DEL", "CHECK", "GC", "STATUS"} {
		r := newRecorder()
		o := run(t, r.plugin(), environment("CNI_COMMAND="+verb), basic)
		if o.exit != 0 || !slices.Equal(r.ran, []string{verb}) {
			t.Errorf("%s: exit %d, ran %v\n%s", verb, o.exit, r.ran, o.stdout)
		}
		if (o.stdout != "") != (verb == "ADD") {
			t.Errorf("%s printed %q", verb, o.stdout)
		}
	}
}

func TestErrors(t *testing.T) {
	deep := func(n int) string {
		return `{"cniVersion":"1.1.0","name":"dcos","x":` + strings.Repeat("[", n) + strings.Repeat("]", n) + `}`
	}
	for _, tt := range []struct {
		name, verb string
		env        []string
		stdin      string
		code       uint
		version    string
		msg        string // a part of it
	}{
		{"P05 version", "ADD", nil, `{"cniVersion":"9.9.9","name":"dcos"}`, 1, "9.9.9", `cniVersion "9.9.9" is not supported`},
		{"P06 all missing", "ADD", []string{"CNI_CONTAINERID=", "CNI_IFNAME=", "CNI_NETNS="}, basic, 4, "1.1.0", "CNI_CONTAINERID: missing; CNI_IFNAME: missing; CNI_NETNS: missing"},
		{"P06 missing and invalid", "DEL", []string{"CNI_CONTAINERID=../x", "CNI_IFNAME="}, basic, 4, "1.1.0", `CNI_CONTAINERID: "../x" must be`},
		{"P10 no JSON", "ADD", nil, `{"name":`, 6, "1.1.0", "ends too early"},
		{"P10 empty", "ADD", nil, ``, 6, "1.1.0", "ends too early"},
		{"P10 array", "ADD", nil, `[]`, 6, "1.1.0", "want a JSON object"},
		{"P10 two documents", "ADD", nil, basic + basic, 6, "1.1.0", "follows the JSON object"},
		{"P11 type", "ADD", nil, `{"cniVersion":"1.1.0","name":"dcos","mtu":"big"}`, 7, "1.1.0", "mtu: a JSON string cannot stand here"},
		{"P13 unknown command", "FROB", nil, basic, 4, "1.1.0", `CNI_COMMAND: "FROB"`},
		{"P13 lower case", "add", nil, basic, 4, "1.1.0", `CNI_COMMAND: "add"`},
		{"P16 no name", "ADD", nil, `{"cniVersion":"0.4.0"}`, 7, "0.4.0", "name: missing"},
		{"P16 bad name", "ADD", nil, `{"cniVersion":"0.4.0","name":"../x"}`, 7, "0.4.0", `name: "../x"`},
		{"P16 long name", "ADD", nil, `{"cniVersion":"0.4.0","name":"` + strings.Repeat("n", 256) + `"}`, 7, "0.4.0", "256 bytes"},
		{"P17 overlay name", "ADD", nil, `{"name":"dcos","overlay":"longer-than-thirteen"}`, 7, "0.1.0", "overlay: "},
		{"P17 long id", "ADD", []string{"CNI_CONTAINERID=" + strings.Repeat("x", 1025)}, basic, 4, "1.1.0", "1025 bytes"},
		{"P24 big", "ADD", nil, `{"name":"dcos","x":"` + strings.Repeat("y", 1<<20) + `"}`, 6, "1.1.0", "more than 1048576 bytes"},
		{"P24 deep", "ADD", nil, deep(65), 6, "1.1.0", "more than 64 deep"},
		{"P24 twice", "ADD", nil, `{"name":"a","name":"b"}`, 7, "1.1.0", `key "name" after "name"`},
		{"P24 case", "ADD", nil, `{"name":"a","NAME":"b"}`, 7, "1.1.0", `key "NAME" after "name"`},
		{"P24 folded", "ADD", nil, `{"ips":1,"ipſ":2,"name":"a"}`, 7, "1.1.0", `after "ips"`},
		{"P24 in args", "ADD", nil, `{"name":"a","args":{"cni":{"ips":[],"IPS":[]}}}`, 7, "1.1.0", "/args/cni/"},
		{"P24 in Mesos' address", "ADD", nil, `{"name":"a","args":{"org.apache.mesos":{"network_info":{"ip_addresses":[{"ip_address":"1.1.1.1","IP_address":""}]}}}}`, 7, "1.1.0", "/ip_addresses/"},
		{"run directory", "ADD", nil, `{"name":"dcos","runDir":"run"}`, 7, "0.1.0", `runDir: "run"`},
		{"V06 CHECK", "CHECK", nil, `{"cniVersion":"0.3.1","name":"dcos"}`, 1, "0.3.1", "0.3.1 has no CHECK"},
		{"V06 GC", "GC", nil, `{"cniVersion":"1.0.0","name":"dcos"}`, 1, "1.0.0", "1.0.0 has no GC"},
		{"V06 STATUS", "STATUS", nil, `{"name":"dcos"}`, 1, "0.1.0", "0.1.0 has no STATUS"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRecorder()
			o := run(t, r.plugin(), environment(append(tt.env, "CNI_COMMAND="+tt.verb)...), tt.stdin)
			if o.exit == 0 || r.ran != nil {
				t.Fatalf("exit %d, ran %v", o.exit, r.ran)
			}
			if o.doc.Code != tt.code || o.doc.CNIVersion != tt.version || !strings.Contains(o.doc.Msg, tt.msg) {
				t.Errorf("got %+v, want code %d version %s and %q", o.doc, tt.code, tt.version, tt.msg)
			}
		})
	}
}

func TestUnsupportedVersions(t *testing.T) {
	for _, v := range []string{"0.5.0", "1.2.0", "2.0.0", "1.1", "v1.1.0", "abc"} {
		r := newRecorder()
		o := run(t, r.plugin(), environment("CNI_COMMAND=ADD"), `{"cniVersion":"`+v+`","name":"dcos"}`)
		if o.doc.Code != 1 || r.ran != nil || o.doc.Details != "supported: 0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0" {
			t.Errorf("%s: %+v", v, o.doc)
		}
	}
}

func TestAccepted(t *testing.T) {
	for name, tt := range map[string]struct {
		env   []string
		stdin string
	}{
		"P15 unknown keys":    {nil, `{"name":"dcos","zzz":{"A":1,"a":2},"args":{"labels":[{"x":1,"X":2}]}}`},
		"P15 annotations":     {nil, `{"name":"dcos","runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"App":"1","app":"2"}}}`},
		"P17 nested id":       {[]string{"CNI_CONTAINERID=2d0a.91c3-7f.x_y"}, basic},
		"P17 long id":         {[]string{"CNI_CONTAINERID=" + strings.Repeat("x", 1024)}, basic},
		"P19 odd CNI_ARGS":    {[]string{"CNI_ARGS=;;=;A;B==;K8S=a=b;IgnoreUnknown=1;" + strings.Repeat("x", 1<<16)}, basic},
		"V07 cniVersions":     {nil, `{"cniVersion":"1.0.0","cniVersions":["1.0.0","1.1.0"],"name":"dcos"}`},
		"long network name":   {nil, `{"overlay":"dcos","name":"` + strings.Repeat("n", 255) + `"}`},
		"spaces around":       {nil, "\n " + basic + "\n\n"},
		"Mesos' labels":       {nil, `{"name":"dcos","args":{"org.apache.mesos":{"network_info":{"name":"dcos","labels":{"labels":[{"key":"a"},{"key":"b"}]}}}}}`},
		"empty ids elsewhere": {[]string{"CNI_ARGS=", "CNI_PATH="}, basic},
	} {
		r := newRecorder()
		if o := run(t, r.plugin(), environment(append(tt.env, "CNI_COMMAND=ADD")...), tt.stdin); o.exit != 0 {
			t.Errorf("%s: %+v", name, o.doc)
		}
	}
}

// What a verb does not need may be missing or wrong.
func TestVerbsWithoutContainer(t *testing.T) {
	for _, verb := range []string{"GC", "STATUS", "VERSION"} {
		for _, env := range []map[string]string{
			{"CNI_COMMAND": verb},
			{"CNI_COMMAND": verb, "CNI_CONTAINERID": "../..", "CNI_IFNAME": strings.Repeat("x", 99)},
		} {
			r := newRecorder()
			if o := run(t, r.plugin(), env, basic); o.exit != 0 {
				t.Errorf("%s: %+v", verb, o.doc)
			}
		}
	}
	r := newRecorder()
	env := environment("CNI_COMMAND=DEL")
	delete(env, "CNI_NETNS")
	if o := run(t, r.plugin(), env, basic); o.exit != 0 {
		t.Errorf("DEL without a namespace: %+v", o.doc)
	}
}

// DEL works with a configuration that was broken after ADD.
func TestDelWithBrokenConfiguration(t *testing.T) {
	for _, stdin := range []string{
		`{"name":"dcos","ipam":7}`,
		`{"name":"dcos","ipam":{"type":[],"half":5},"mtu":"x"}`,
		`{"name":"dcos","prevResult":[1,2]}`,
		`{"name":"dcos","prevResult":null,"args":7}`,
		`{"name":"dcos","overlay":"much-too-long-name","runDir":"relative"}`,
	} {
		r := newRecorder()
		if o := run(t, r.plugin(), environment("CNI_COMMAND=DEL"), stdin); o.exit != 0 || r.call.Conf.Name != "dcos" {
			t.Errorf("%s: %+v", stdin, o.doc)
		}
	}
}

func TestIfNames(t *testing.T) {
	for _, name := range []string{"eth0", "a", "fifteen-bytes-x", "veth.1@2", "ü"} {
		if err := checkIfName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"sixteen-bytes-xx", ".", "..", "a/b", "a:b", "a b", "eth%d", "-j", "a\x00b", "a\x7f", "a\xff", "a\u00a0b", "a\n"} {
		if err := checkIfName(name); err == nil {
			t.Errorf("%q: accepted", name)
		}
	}
}

func TestArgs(t *testing.T) {
	got := parseArgs("IgnoreUnknown=1;IP=9.0.1.5,fd01:b::5;;K8S_POD_NAME=x=y;MAC=02:00:00:00:00:01;IP2=z")
	want := Args{IP: []string{"9.0.1.5", "fd01:b::5"}, MAC: "02:00:00:00:00:01", PodName: "x=y"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestAbout(t *testing.T) {
	for _, env := range []map[string]string{{}, {"CNI_COMMAND": ""}} {
		r := newRecorder()
		o := run(t, r.plugin(), env, "")
		if o.exit != 0 || o.stdout != "" || !strings.HasPrefix(o.stderr, "CNI plugin test-plugin v") ||
			!strings.HasSuffix(o.stderr, "supported: 0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0\n") {
			t.Errorf("exit %d, %q, %q", o.exit, o.stdout, o.stderr)
		}
	}
}

func TestVersion(t *testing.T) {
	for stdin, want := range map[string]string{
		"":                        "1.1.0",
		" \n":                     "1.1.0",
		`{"cniVersion":"0.4.0"}`:  "0.4.0",
		`{"cniVersion":"1.0.0"}`:  "1.0.0",
		`{"cniVersion":"99.0.0"}`: "99.0.0",
	} {
		r := newRecorder()
		o := run(t, r.plugin(), map[string]string{"CNI_COMMAND": "VERSION"}, stdin)
		var doc struct {
			CNIVersion        string
			SupportedVersions []string
		}
		if err := json.Unmarshal([]byte(o.stdout), &doc); err != nil {
			t.Fatal(err)
		}
		if o.exit != 0 || doc.CNIVersion != want || len(doc.SupportedVersions) != 7 {
			t.Errorf("%q: %s", stdin, o.stdout)
		}
	}
}

func TestPanic(t *testing.T) {
	r := newRecorder()
	r.during = func(context.Context) { panic("boom") }
	o := run(t, r.plugin(), environment("CNI_COMMAND=DEL"), basic)
	if o.exit == 0 || o.doc.Code != ErrCodeInternal || !strings.Contains(o.doc.Msg, "boom") || !strings.Contains(o.stderr, "goroutine") {
		t.Errorf("%d %+v", o.exit, o.doc)
	}
}

func TestErrorCodes(t *testing.T) {
	coded := Errorf(ErrCodeKernel, "set address: %w", unix.EPERM)
	for _, tt := range []struct {
		err  error
		code uint
		msg  string
	}{
		{coded, 107, "set address: operation not permitted"},
		{fmt.Errorf("attach: %w", coded), 107, "attach: set address: operation not permitted"},
		{errors.Join(coded, errors.New("and more")), 107, "set address: operation not permitted\nand more"},
		{errors.New("what?"), 109, "what?"},
		{context.DeadlineExceeded, 11, "not done in time: context deadline exceeded"},
	} {
		r := newRecorder()
		r.err = tt.err
		o := run(t, r.plugin(), environment("CNI_COMMAND=ADD"), `{"cniVersion":"0.3.1","name":"dcos"}`)
		if o.exit == 0 || o.doc != (printed{CNIVersion: "0.3.1", Code: tt.code, Msg: tt.msg}) {
			t.Errorf("%v: %+v", tt.err, o.doc)
		}
	}
}

func TestDeadline(t *testing.T) {
	for verb, want := range map[string]time.Duration{"ADD": 10 * time.Second, "DEL": 10 * time.Second, "CHECK": 5 * time.Second, "STATUS": time.Second} {
		r := newRecorder()
		r.during = func(ctx context.Context) {
			at, ok := ctx.Deadline()
			if left := time.Until(at); !ok || left > want || left < want-time.Second/2 {
				t.Errorf("%s: %s left", verb, left)
			}
		}
		run(t, r.plugin(), environment("CNI_COMMAND="+verb), basic)
	}
}

type brokenWriter struct{ after int }

func (w *brokenWriter) Write(b []byte) (int, error) {
	n := min(w.after, len(b))
	w.after -= n
	return n, unix.EPIPE
}

// Nobody learnt the address, so it is given back.
func TestResultThatCannotBePrinted(t *testing.T) {
	for _, after := range []int{0, 10} {
		r := newRecorder()
		env := environment("CNI_COMMAND=ADD")
		var stderr bytes.Buffer
		exit := Run(t.Context(), r.plugin(), func(k string) (string, bool) { v, ok := env[k]; return v, ok }, strings.NewReader(basic), &brokenWriter{after}, &stderr)
		if exit == 0 || r.undone != 1 || !strings.Contains(stderr.String(), "broken pipe") {
			t.Errorf("exit %d, undone %d times, %s", exit, r.undone, &stderr)
		}
	}
}

func TestStdinThatCannotBeRead(t *testing.T) {
	r := newRecorder()
	env := environment("CNI_COMMAND=ADD")
	var stdout bytes.Buffer
	exit := Run(t.Context(), r.plugin(), func(k string) (string, bool) { v, ok := env[k]; return v, ok }, iotest.ErrReader(unix.EIO), &stdout, io.Discard)
	if exit == 0 || !strings.Contains(stdout.String(), `"code": 5`) {
		t.Errorf("%d %s", exit, &stdout)
	}
	// Nor may a writer that never closes keep us.
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	env["CNI_COMMAND"] = "STATUS"
	stdout.Reset()
	exit = Run(t.Context(), r.plugin(), func(k string) (string, bool) { v, ok := env[k]; return v, ok }, reader, &stdout, io.Discard)
	if exit == 0 || !strings.Contains(stdout.String(), "stdin was not closed in time") {
		t.Errorf("%d %s", exit, &stdout)
	}
	if err := errors.Join(writer.Close(), reader.Close()); err != nil {
		t.Error(err)
	}
}

// All of this is refused before Add runs.
func TestNetNS(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		os.WriteFile(path("file"), nil, 0o600),
		unix.Mkfifo(path("fifo"), 0o600),
		os.Symlink(path("loop"), path("loop")),
	); err != nil {
		t.Fatal(err)
	}
	for name, netns := range map[string]string{
		"missing": path("missing"), "file": path("file"), "fifo": path("fifo"), "loop": path("loop"), "directory": dir,
		// Not /proc/self: that is the main thread, which may be in a namespace that
		// otherNetNS made.
		"gone process": "/proc/4194305/ns/net", "own": "/proc/thread-self/ns/net", "another kind": "/proc/self/ns/mnt",
	} {
		r := newRecorder()
		p := r.plugin()
		p.Interface = true
		o := run(t, p, environment("CNI_COMMAND=ADD", "CNI_NETNS="+netns), basic)
		if o.exit == 0 || o.doc.Code != types.ErrInvalidEnvironmentVariables || !strings.HasPrefix(o.doc.Msg, "CNI_NETNS: ") || r.ran != nil {
			t.Errorf("%s: %+v", name, o.doc)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("needs root to make a network namespace")
	}
	r := newRecorder()
	p := r.plugin()
	p.Interface = true
	if o := run(t, p, environment("CNI_COMMAND=ADD", "CNI_NETNS="+otherNetNS(t)), basic); o.exit != 0 {
		t.Errorf("a real one: %+v", o.doc)
	}
}

// otherNetNS is a network namespace that lives as long as the test.
func otherNetNS(t *testing.T) string {
	made, done := make(chan string), make(chan struct{})
	go func() { // on a thread that dies with it
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("unshare: %v", err)
		}
		made <- fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		<-done
	}()
	t.Cleanup(func() { close(done) })
	return <-made
}

func TestWantedAddresses(t *testing.T) {
	for _, tt := range []struct {
		name, stdin, args string
		want              string
	}{
		{"none", `{}`, "", "[]"},
		{"capability", `{"runtimeConfig":{"ips":["9.0.1.5/25","fd01:b::5"]}}`, "", "[9.0.1.5 fd01:b::5]"},
		{"args", `{"args":{"cni":{"ips":["9.0.1.5"]}}}`, "", "[9.0.1.5]"},
		{"CNI_ARGS", `{}`, "IP=9.0.1.5", "[9.0.1.5]"},
		{"P20 args outrank CNI_ARGS", `{"args":{"cni":{"ips":["9.0.1.5"]}}}`, "IP=9.0.1.6", "[9.0.1.5]"},
		{"twice the same", `{"runtimeConfig":{"ips":["9.0.1.5"]}}`, "IP=9.0.1.5", "[9.0.1.5]"},
		{"Mesos", `{"args":{"org.apache.mesos":{"network_info":{"ip_addresses":[{"protocol":"IPv4"},{"protocol":"IPv6","ip_address":"fd01:b::9"}]}}}}`, "", "[fd01:b::9]"},
		{"nonsense", `{"runtimeConfig":{"ips":["nine"]}}`, "", `address "nine": want 9.0.1.5 or 9.0.1.5/25`},
	} {
		c := &Call{Args: parseArgs(tt.args)}
		if err := json.Unmarshal([]byte(tt.stdin), &c.Conf); err != nil {
			t.Fatal(err)
		}
		got, err := wantedAddrs(c)
		text := fmt.Sprint(got)
		if err != nil {
			text = err.Error()
		}
		if text != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, text, tt.want)
		}
	}
}

func TestStoreErrors(t *testing.T) {
	for _, tt := range []struct {
		err  error
		code uint
	}{
		{&ipam.ExhaustedError{Overlay: "dcos", Half: conf.Mesos}, 11},
		{&ipam.UnavailableError{Addr: netip.MustParseAddr("9.0.1.1"), Reason: "is the gateway"}, 102},
		{fmt.Errorf("open: %w", ipam.ErrBusy), 11},
		{fmt.Errorf("open: %w", ipam.ErrDamaged), 104},
		{fmt.Errorf("write: %w", unix.ENOSPC), 11},
		{Errorf(105, "x"), 105},
	} {
		var e *types.Error
		if !errors.As(StoreError(tt.err), &e) || e.Code != tt.code || !strings.Contains(e.Msg, tt.err.Error()) {
			t.Errorf("%v: %+v", tt.err, e)
		}
	}
	if StoreError(nil) != nil || StatusError(nil) != nil {
		t.Error("nil became an error")
	}
}

func TestGCKeep(t *testing.T) {
	a, b := conf.ValidAttachment{ContainerID: "a", IfName: "eth0"}, conf.ValidAttachment{ContainerID: "b", IfName: "eth0"}
	list := func(v ...conf.ValidAttachment) *[]conf.ValidAttachment { return &v }
	old := func(id string) ipam.Record {
		return ipam.Record{Attachment: conf.Attachment{Network: "n", ContainerID: id, IfName: "eth0"}, Since: conf.Boottime() - time.Hour}
	}
	for _, tt := range []struct {
		name         string
		list, legacy *[]conf.ValidAttachment
		keepsA       bool
		fails        bool
	}{
		{name: "G02 absent", fails: true},
		{name: "G03 empty", list: list()},
		{name: "listed", list: list(a, b, a), keepsA: true},
		{name: "G04 old spelling", legacy: list(a), keepsA: true},
		{name: "G04 both the same", list: list(a), legacy: list(a), keepsA: true},
		{name: "G04 both, different", list: list(a), legacy: list(b), fails: true},
		{name: "G04 both, one empty", list: list(), legacy: list(b), fails: true},
	} {
		keep, err := GCKeep(&Call{Conf: conf.NetConf{ValidAttachments: tt.list, LegacyValidAttachments: tt.legacy}})
		if (err != nil) != tt.fails {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if tt.fails {
			var e *types.Error
			if !errors.As(err, &e) || e.Code != 7 {
				t.Errorf("%s: %v", tt.name, err)
			}
			continue
		}
		if got := keep(old("a")); got != tt.keepsA {
			t.Errorf("%s: keeps a: %v", tt.name, got)
		}
		young := old("zzz")
		young.Since = conf.Boottime() - 59*time.Second
		if !keep(young) {
			t.Errorf("%s: an attachment of 59 s ago goes", tt.name)
		}
	}
}

// Whatever comes in: one JSON document, and nothing runs on an error.
func FuzzRun(f *testing.F) {
	f.Add("ADD", "c1", "eth0", "IP=1.2.3.4", []byte(basic))
	f.Add("DEL", "../x", "eth%d", ";=;", []byte(`{"name":1}`))
	f.Add("VERSION", "", "", "", []byte(`{"cniVersion":"\u003c"}`))
	f.Add("GC", "", "", "", []byte(`{"cniVersion":"1.1.0","name":"a","cni.dev/valid-attachments":[{}]}`))
	f.Fuzz(func(t *testing.T, verb, id, ifname, args string, stdin []byte) {
		r := newRecorder()
		env := environment("CNI_COMMAND="+verb, "CNI_CONTAINERID="+id, "CNI_IFNAME="+ifname, "CNI_ARGS="+args)
		o := run(t, r.plugin(), env, string(stdin))
		if o.exit != 0 && (r.ran != nil || o.doc.Code == 0 || o.doc.Msg == "") {
			t.Errorf("ran %v and printed %s", r.ran, o.stdout)
		}
	})
}
