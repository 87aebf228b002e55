package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit/explain"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

// reported is cluster, whose first two agents have told what they have.
func reported(t *testing.T) (url string) {
	t.Helper()
	url = cluster(t)
	client, err := api.NewClient([]string{url}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, id := range []string{"host-1", "host-2"} {
		ip := func(last byte) []netip.Addr { return []netip.Addr{netip.AddrFrom4([4]byte{9, 0, byte(i), last})} }
		put := []api.Attachment{
			{Network: "dcos", ID: strings.Repeat("0123456789abcdef", 4), IfName: "eth0", Overlay: "dcos", Half: conf.Docker, Addresses: ip(130), Since: 1_790_000_000, Runtime: "containerd", Name: "web"},
			{Network: "dcos", ID: "task\x1b[31m." + id, IfName: "eth0", Overlay: "dcos", Half: conf.Mesos, Addresses: ip(2), Since: 1_790_000_000},
		}
		count := api.Count{Total: 125, Used: 100 + uint64(25*i), Cooling: 1, Free: 24 - uint64(24*i)}
		_, err := client.ReportAttachments(t.Context(), api.AttachmentReport{AgentID: id, Instance: "i", Sequence: 1, Snapshot: true, Put: put,
			Usage: []api.HalfUsage{{Overlay: "dcos", Half: conf.Docker, Subnet: netip.MustParsePrefix("9.0.0.128/25"), Count: count}, {Overlay: "dcos", Half: conf.Mesos, Count: api.Count{Total: 125, Used: 1, Free: 124}}}})
		if err != nil {
			t.Fatal(err)
		}
	}
	return url
}

func TestClusterTables(t *testing.T) {
	url := reported(t)
	since := "SINCE"
	for _, tt := range []struct{ command, want string }{
		{"containers --all", `
CONTAINER          NAME  OVERLAY  HALF    ADDRESSES  HOST        SINCE
task [31m.host-1   -     dcos     mesos   9.0.0.2    172.17.0.2  SINCE
0123456789ab       web   dcos     docker  9.0.0.130  172.17.0.2  SINCE
task [31m.host-2   -     dcos     mesos   9.0.1.2    172.17.0.3  SINCE
0123456789ab       web   dcos     docker  9.0.1.130  172.17.0.3  SINCE
`},
		{"containers 9.0.1.13 --host host-2", `
CONTAINER     NAME  OVERLAY  HALF    ADDRESSES  HOST        SINCE
0123456789ab  web   dcos     docker  9.0.1.130  172.17.0.3  SINCE
`},
		{"ipam show --all", `
OVERLAY  HALF    USED  COOLING  FREE  TOTAL  LEVEL
dcos     mesos   2     0        248   250    ok
dcos     docker  225   2        24    250    NEARLY FULL

HOST        OVERLAY  HALF    SUBNET        USED  COOLING  FREE  TOTAL  LEVEL        AGENT
172.17.0.2  dcos     docker  9.0.0.128/25  100   1        24    125    NEARLY FULL  host-1
172.17.0.3  dcos     docker  9.0.0.128/25  125   1        0     125    FULL         host-2
`},
	} {
		code, stdout, stderr := ctl(t, nil, append(strings.Fields(tt.command), "--coordinator", url)...)
		stdout = regexp.MustCompile(`20\d\d-\d\d-\d\d \d\d:\d\d:\d\d`).ReplaceAllString(stdout, since)
		tidy := func(s string) string { return regexp.MustCompile(` +`).ReplaceAllString(s, " ") }
		if diff := cmp.Diff(tidy(strings.TrimPrefix(tt.want, "\n")), tidy(stdout)); diff != "" || code != 0 || stderr != "" {
			t.Errorf("%s: code %d, %s\n(-want +got):\n%s", tt.command, code, stderr, diff)
		}
	}
	// A name with a mistake in it is no empty host.
	for _, command := range []string{"containers", "ipam show"} {
		for flag, want := range map[string]string{"--host host-7": `no host of the cluster has the agent id or the agent IP "host-7"`, "--overlay docs": `the cluster has no overlay "docs"`} {
			if code, stdout, stderr := ctl(t, nil, append(strings.Fields(command+" -o json "+flag), "--coordinator", url)...); code != 1 || stdout != "" || !strings.Contains(stderr, want) {
				t.Errorf("%s %s: code %d\n%s%s", command, flag, code, stdout, stderr)
			}
		}
	}
	if code, _, stderr := ctl(t, nil, "containers", "--host", "host-1", "--overlay", "dcos", "nothing", "--coordinator", url); code != 0 {
		t.Errorf("nothing on a host that there is: code %d, %s", code, stderr)
	}
	var all api.Containers
	if code, stdout, _ := ctl(t, nil, "containers", "--all", "-o", "json", "--coordinator", url); code != 0 || json.Unmarshal([]byte(stdout), &all) != nil || all.Total != 4 || len(all.Containers) != 4 {
		t.Errorf("code %d\n%s", code, stdout)
	}
}

// A coordinator that ends in the middle of a survey does not take with it what was
// measured, and nothing is measured in its place.
func TestMatrixCut(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/x-ndjson")
		fmt.Fprintln(w, `{"asked": 2}`)
		fmt.Fprintln(w, `{"report": {"agent_id": "one", "id": "x", "ways": [{"from": "10.0.0.1", "to": "10.0.0.2", "sent": 5, "received": 5, "rtt_avg_ms": 0.125, "path_mtu": 1450, "mtu": 1450}]}}`)
	}))
	t.Cleanup(server.Close)
	code, stdout, stderr := ctl(t, nil, "ping", "--all", "--coordinator", server.URL)
	if code != 1 || !strings.Contains(stdout, "0.125") || !strings.Contains(stderr, "1 of 2 hosts had answered") || strings.Contains(stderr, "this host alone") {
		t.Errorf("code %d\n%s%s", code, stdout, stderr)
	}
}

// listed is a coordinator that lists containers, two a page.
func listed(t *testing.T, all []api.Container) (url string) {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		at, _ := strconv.Atoi(r.URL.Query().Get("after"))
		end := min(at+2, len(all))
		page := api.Containers{Total: len(all), Containers: all[at:end]}
		if end < len(all) {
			page.Next = strconv.Itoa(end)
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(page)
	}))
	t.Cleanup(server.Close)
	return server.URL
}

// What may be a container of this host and one of another host as well is refused, with
// both; where nobody can say what others there are, that is said.
func TestOnlyOne(t *testing.T) {
	here := netip.MustParsePrefix("9.0.1.0/27")
	runDir := t.TempDir()
	s, err := ipam.Open(t.Context(), ipam.Options{Dir: filepath.Join(runDir, conf.IPAMDir), Overlay: "dcos"})
	if err != nil {
		t.Fatal(err)
	}
	var all []api.Container
	for _, id := range []string{"aaaa1", "aabb1", "cccc1", "dddd1", "dddd12", "eeee1"} {
		a, err := s.Allocate(t.Context(), ipam.Request{Attachment: conf.Attachment{Network: "dcos", ContainerID: id, IfName: "eth0"}, Half: conf.Mesos, Ranges: []netip.Prefix{here}})
		if err != nil {
			t.Fatal(err)
		}
		if id != "eeee1" { // which was not told yet
			all = append(all, api.Container{ID: id, AgentIP: netip.MustParseAddr("10.0.0.1"), Addresses: a.Addrs})
		}
	}
	s.Close()
	there := netip.MustParseAddr("10.0.0.2")
	all = append(all, api.Container{ID: "ffff1", Name: "cccc", AgentIP: there}, api.Container{ID: "eeee2", AgentIP: there})
	url := listed(t, all)
	for name, refused := range map[string]string{
		"9.0.1.2": "", "aaaa": "", "dddd1": "", "dddd12": "", "ffff": "", "nobody": "",
		"aa":   "any of 2 containers, so name one by its address or id: aaaa1 on host 10.0.0.1, aabb1 on host 10.0.0.1",
		"cccc": "ffff1 on host 10.0.0.2, cccc1 on this host",
		"eee":  "eeee2 on host 10.0.0.2, eeee1 on this host",
	} {
		code, stdout, stderr := ctl(t, nil, "explain", name, "192.0.2.1", "--run-dir", runDir, "--coordinator", url)
		if code != 1 || strings.Contains(stderr, "any of") != (refused != "") || !strings.Contains(stderr, refused) {
			t.Errorf("%s: code %d, %s%s; want %q", name, code, stdout, stderr, refused)
		}
	}
	if _, _, stderr := ctl(t, nil, "explain", "aaaa", "192.0.2.1", "--run-dir", runDir, "--coordinator", "http://127.0.0.1:1"); !strings.Contains(stderr, "whether others are called so is not known") {
		t.Errorf("without a coordinator: %s", stderr)
	}
}

// A coordinator that takes what is sent and says nothing is waited for once, for all
// names and for the host of B together; the answer says for each what is not known.
func TestExplainSilentCoordinator(t *testing.T) {
	runDir := t.TempDir()
	s, err := ipam.Open(t.Context(), ipam.Options{Dir: filepath.Join(runDir, conf.IPAMDir), Overlay: "dcos"})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"aaaa1", "bbbb1"} {
		if _, err := s.Allocate(t.Context(), ipam.Request{Attachment: conf.Attachment{Network: "dcos", ContainerID: id, IfName: "eth0"}, Half: conf.Mesos,
			Ranges: []netip.Prefix{netip.MustParsePrefix("9.0.1.0/27")}}); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		<-r.Context().Done()
	}))
	t.Cleanup(server.Close)
	var stdout, stderr strings.Builder
	e := &env{stdout: &stdout, stderr: &stderr, runDir: runDir, output: outputJSON, coordinator: []string{server.URL}}
	o := e.others()
	o.coordinator.all = 200 * time.Millisecond
	unsure, err := o.onlyThese(t.Context(), "aaaa", "bbbb")
	if err != nil {
		t.Fatal(err)
	}
	if said := stderr.String(); len(unsure) != 2 || said != strings.Join(unsure, "\n")+"\n" ||
		strings.Count(said, "is not known: ") != 2 || strings.Count(said, "the coordinator has not answered within 200ms\n") != 2 || strings.Contains(said, "context") {
		t.Error(said)
	}
	near := api.Explanation{ToHost: netip.MustParseAddr("10.0.0.2"), Reachable: true, NamesUnknown: strings.Join(unsure, "; ")}
	if err := o.tell(t.Context(), near, "aaaa", "bbbb"); err != nil {
		t.Fatal(err)
	}
	var told api.Explanation
	if err := json.Unmarshal([]byte(stdout.String()), &told); err != nil || told.Far != nil || told.NamesUnknown != near.NamesUnknown ||
		told.FarUnknown != "it was not asked again, because the coordinator has not answered within 200ms" {
		t.Errorf("%v: %s", err, &stdout)
	}
	if _, err := o.explainElsewhere(t.Context(), "aaaa", "bbbb", &explain.Elsewhere{Host: near.ToHost, A: "aaaa", B: "bbbb"}); err == nil || !strings.Contains(err.Error(), "was not asked again") {
		t.Error(err)
	}
	if n := asked.Load(); n > 1 { // none, if the machine is slow
		t.Errorf("asked %d times", n)
	}
}

// Of three coordinators two that say nothing do not keep the third from being asked.
func TestExplainThirdCoordinator(t *testing.T) {
	silent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	t.Cleanup(silent.Close)
	third := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, `{}`) }))
	t.Cleanup(third.Close)
	o := (&env{stderr: &strings.Builder{}, coordinator: []string{silent.URL, silent.URL, third.URL}}).others()
	o.coordinator.all = 3 * time.Second
	if _, err := o.candidates(t.Context(), "aaaa"); err != nil {
		t.Error(err)
	}
}

// A coordinator that has asked a host is waited for no longer than hosts are, and its
// silence is theirs.
func TestExplainSilentHost(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/x-ndjson")
		fmt.Fprintln(w, `{"asked": 1}`)
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}))
	t.Cleanup(server.Close)
	o := (&env{stderr: &strings.Builder{}, coordinator: []string{server.URL}}).others()
	o.coordinator.all, o.hosts.all = time.Minute, 50*time.Millisecond
	r := api.Explanation{ToHost: netip.MustParseAddr("10.0.0.2")}
	o.askFar(t.Context(), &r)
	if want := "the hosts that the coordinator asked have not answered within 50ms"; r.Far != nil || r.FarUnknown != want {
		t.Errorf("%q; want %q", r.FarUnknown, want)
	}
	if o.coordinator.spent >= o.coordinator.all || o.hosts.spent < o.hosts.all {
		t.Errorf("spent %+v", o)
	}
}

// People have the walk to read while the host of B is waited for; programs get one
// document.
func TestExplainTell(t *testing.T) {
	near := api.Explanation{
		Host: netip.MustParseAddr("10.0.0.1"), ToHost: netip.MustParseAddr("10.0.0.2"), Reachable: true,
		FromAddress: netip.MustParseAddr("9.0.1.2"), ToAddress: netip.MustParseAddr("9.0.2.2"),
		Steps: []api.Step{{Name: "isolation", Text: "of one overlay", OK: true}},
	}
	for output, first := range map[string]bool{outputTable: true, outputJSON: false} {
		var stdout strings.Builder
		var before string
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			before = stdout.String()
			w.Header().Set("Content-Type", "application/x-ndjson")
			fmt.Fprintln(w, `{"asked": 1}`)
			fmt.Fprintln(w, `{"report": {"agent_id": "two", "id": "x", "explain": {"host": "10.0.0.2", "reachable": false, "stops_at": "firewall: a rule", "steps": [{"name": "firewall", "text": "a rule"}]}}}`)
			fmt.Fprintln(w, `{"done": true}`)
		}))
		e := &env{stdout: &stdout, stderr: &strings.Builder{}, output: output, coordinator: []string{server.URL}}
		err := e.others().tell(t.Context(), near, "a", "b")
		server.Close()
		if all := stdout.String(); !errors.Is(err, cli.ErrReported) || strings.Contains(before, "of one overlay") != first || !first && before != "" ||
			strings.Count(all, "of one overlay") != 1 || !strings.Contains(all, "a rule") || strings.Contains(all, "a reaches b") {
			t.Errorf("%s: %v; before the host of B was asked:\n%s\nin all:\n%s", output, err, before, all)
		}
	}
}

// A container is found by address, id, name or the beginning of an id, in this order,
// on every page, and what may be several is refused with their hosts.
func TestLocate(t *testing.T) {
	var all []api.Container
	add := func(host int, id, name string, addrs ...string) {
		c := api.Container{ID: id, Name: name, AgentID: fmt.Sprintf("host-%d", host), AgentIP: netip.AddrFrom4([4]byte{10, 0, 0, byte(host)})}
		for _, a := range addrs {
			c.Addresses = append(c.Addresses, netip.MustParseAddr(a))
		}
		all = append(all, c)
	}
	add(1, "aaaa1", "9.0.1.2", "9.0.0.2")
	add(1, "bbbb1", "cccc", "9.0.0.3") // its name is the beginning of another's id
	add(1, "dddd1", "eeee1", "9.0.0.4")
	add(1, "ffff1", "web", "9.0.0.5")
	add(2, "ffff2", "web", "9.0.1.2")
	add(2, "cccc1", "", "9.0.1.3")
	add(2, "eeee1", "", "9.0.1.4")
	add(2, "eeee1", "", "9.0.1.5") // its second interface
	add(2, "same", "", "9.0.1.6")
	add(3, "same", "", "9.0.2.6")
	o := (&env{coordinator: []string{listed(t, all)}}).others()
	for _, tt := range []struct{ name, id, refused string }{
		{"9.0.1.2", "ffff2", ""},
		{"::ffff:9.0.1.2", "ffff2", ""},
		{"9.0.1", "", "is no container"},
		{"eeee1", "eeee1", ""},
		{"cccc", "bbbb1", ""},
		{"cccc1", "cccc1", ""},
		{"eee", "eeee1", ""},
		{"web", "", `"web" may be any of 2 containers, so name one by its address or id: ffff1 on host 10.0.0.1, ffff2 on host 10.0.0.2`},
		{"fff", "", "any of 2 containers"},
		{"same", "", "same on host 10.0.0.2, same on host 10.0.0.3"},
	} {
		c, err := o.locate(t.Context(), tt.name)
		if c.ID != tt.id || (err != nil) != (tt.refused != "") || err != nil && !strings.Contains(err.Error(), tt.refused) {
			t.Errorf("%s: %s on %s, %v; want %s, %s", tt.name, c.ID, c.AgentIP, err, tt.id, tt.refused)
		}
		if c.ID == "eeee1" && len(c.Addresses) != 2 {
			t.Errorf("addresses %v", c.Addresses)
		}
	}
}

func TestEventsCommand(t *testing.T) {
	url := reported(t)
	code, stdout, stderr := ctl(t, nil, "events", "--coordinator", url)
	if code != 0 || stderr != "" || strings.Count(stdout, "agent_joined") != 3 || strings.Count(stdout, "addresses_full") != 1 || strings.Contains(stdout, "\x1b") {
		t.Errorf("code %d, %s\n%s", code, stderr, stdout)
	}
	code, stdout, _ = ctl(t, nil, "events", "-o", "json", "--coordinator", url)
	for line := range strings.Lines(stdout) {
		var e api.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.ID == 0 || e.Kind == "" || e.Text == "" || e.Time.IsZero() {
			t.Errorf("%v: %s", err, line)
		}
	}
	if code != 0 || strings.Count(stdout, "\n") < 5 {
		t.Errorf("code %d\n%s", code, stdout)
	}
}

// Names that exist are completed.
func TestCompletion(t *testing.T) {
	url := reported(t)
	for _, tt := range []struct{ typed, want string }{
		{"containers --host ", "host-2\t172.17.0.3"},
		{"containers --overlay ", "dcos"},
		{"ipam show --host ", "172.17.0.2\thost-1"},
		{"agents revoke ", "host-1\t172.17.0.2"},
	} {
		args := append([]string{"__complete", "--coordinator", url}, strings.Fields(tt.typed)...)
		if _, stdout, _ := ctl(t, nil, append(args, "")...); !strings.Contains(stdout, tt.want+"\n") {
			t.Errorf("%q: %q does not have %q", tt.typed, stdout, tt.want)
		}
	}
}

// A host whose half is nearly full or full says so, with the numbers of the store.
func TestStatusNearlyFull(t *testing.T) {
	url := cluster(t)
	half := netip.MustParsePrefix("9.0.1.0/28")
	state := conf.State{AgentID: "host-2", IP: netip.MustParseAddr("172.17.0.3"), CoolingSeconds: 150, Overlays: []conf.AgentOverlay{{
		Info: conf.Overlay{Name: "dcos"}, Subnet: netip.MustParsePrefix("9.0.1.0/27"), State: &conf.OverlayStatus{Status: conf.StatusOK},
		MesosBridge: &conf.Bridge{Name: "m-dcos", IP: half},
	}}}
	for _, tt := range []struct {
		used int
		want string
	}{
		{10, ""}, // of 13: 77 %
		{11, "NEARLY FULL  the mesos half of overlay dcos: 11 of 13 used, 0 cooling, 2 free\n"},
		{13, "FULL         the mesos half of overlay dcos: 13 of 13 used, 0 cooling, 0 free\n"},
	} {
		runDir := t.TempDir()
		if err := conf.WriteJSON(filepath.Join(runDir, conf.StateFile), state, 0o644); err != nil {
			t.Fatal(err)
		}
		s, err := ipam.Open(t.Context(), ipam.Options{Dir: filepath.Join(runDir, conf.IPAMDir), Overlay: "dcos"})
		if err != nil {
			t.Fatal(err)
		}
		for i := range tt.used {
			if _, err := s.Allocate(t.Context(), ipam.Request{Attachment: conf.Attachment{Network: "dcos", ContainerID: string(rune('a' + i)), IfName: "eth0"}, Half: conf.Mesos, Ranges: []netip.Prefix{half}}); err != nil {
				t.Fatal(err)
			}
		}
		s.Close()
		_, stdout, _ := ctl(t, nil, "status", "--run-dir", runDir, "--coordinator", url)
		if tt.want == "" && strings.Contains(stdout, "FULL") || !strings.Contains(stdout, tt.want) {
			t.Errorf("%d used: want %q\n%s", tt.used, tt.want, stdout)
		}
	}
}

// What a host says stays text in errors as well: it does not steer the terminal of who
// asks for it.
func TestErrorsDoNotSteerTheTerminal(t *testing.T) {
	url := cluster(t)
	client, err := api.NewClient([]string{url}, nil)
	if err != nil {
		t.Fatal(err)
	}
	const steer = "\x1b]0;x\a\u009b31m\r"
	report := api.AttachmentReport{AgentID: "host-2", Instance: "i", Sequence: 1, Snapshot: true}
	for _, id := range []string{"one" + steer, "two" + steer} {
		report.Put = append(report.Put, api.Attachment{Network: "dcos", ID: id, IfName: "eth0", Overlay: "dcos", Half: conf.Mesos, Name: "web"})
	}
	if _, err := client.ReportAttachments(t.Context(), report); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := ctl(t, nil, "explain", "web", "9.0.0.1", "--coordinator", url, "--run-dir", t.TempDir())
	if code != cli.ExitFailure || !strings.Contains(stderr, "may be any of 2 containers") || !strings.Contains(stderr, "one") {
		t.Errorf("%d %q", code, stderr)
	}
	if i := strings.IndexFunc(stderr, func(r rune) bool { return !unicode.IsPrint(r) && r != '\n' }); i >= 0 {
		t.Errorf("the error is printed as %q", stderr)
	}
}
