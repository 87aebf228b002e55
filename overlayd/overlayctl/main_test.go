package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/netns"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store/bbolt"
)

// ctl runs overlayctl.
func ctl(t *testing.T, environ map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	lookup := func(key string) (string, bool) { v, ok := environ[key]; return v, ok }
	code = run(t.Context(), args, lookup, &out, &errs)
	return code, out.String(), errs.String()
}

// cluster is a real coordinator with three agents, one of which has reported a
// failure and one nothing.
func cluster(t *testing.T) (url string) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	s, err := bbolt.Open(filepath.Join(t.TempDir(), "coordinator.db"), log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	var network conf.Network
	if err := json.Unmarshal([]byte(`{"vtep_subnet": "44.128.0.0/20", "vtep_mac_oui": "70:B3:D5:00:00:00",
		"overlays": [{"name": "dcos", "subnet": "9.0.0.0/23", "prefix": 24}, {"name": "off", "enabled": false, "subnet6": "fd01:b::/64", "prefix6": 80}]}`), &network); err != nil {
		t.Fatal(err)
	}
	c, err := coordinator.New(t.Context(), coordinator.Options{Network: network, Store: s, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
	for i, bridges := range [][]conf.Half{nil, {conf.Mesos, conf.Docker}, {conf.Docker}} {
		_, err := c.Register(t.Context(), api.RegisterRequest{
			AgentID: fmt.Sprintf("host-%d", i+1), AgentIP: netip.MustParseAddr(fmt.Sprintf("172.17.0.%d", i+2)), Bridges: bridges, Version: "1.0",
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for id, s := range map[string]conf.OverlayStatus{
		"host-1": {Status: conf.StatusOK},
		"host-2": {Status: conf.StatusFailed, Error: "no\tsuch\x1b[31m device"},
	} {
		if err := c.Report(t.Context(), api.StatusReport{AgentID: id, Overlays: map[string]conf.OverlayStatus{"dcos": s}}); err != nil {
			t.Fatal(err)
		}
	}
	server := httptest.NewServer(c.Handler())
	t.Cleanup(server.Close)
	return server.URL
}

func TestTables(t *testing.T) {
	url := cluster(t)
	for _, tt := range []struct{ command, want string }{
		{"state", `
AGENT IP    OVERLAY  AGENT SUBNET  VTEP           VTEP MAC           STATUS
172.17.0.2  dcos     9.0.0.0/24    44.128.0.1/20  70:b3:d5:80:00:01  ok
172.17.0.3  dcos     9.0.1.0/24    44.128.0.2/20  70:b3:d5:80:00:02  failed: no such [31m device
172.17.0.4  -        -             -              -                  -
`},
		{"agents", `
AGENT   AGENT IP    VTEP        BRIDGES       EPOCH  LAST SEEN  VERSION  STATUS
host-1  172.17.0.2  44.128.0.1  -             2      0s ago     1.0      ok
host-2  172.17.0.3  44.128.0.2  mesos,docker  3      0s ago     1.0      dcos failed: no such [31m device
host-3  172.17.0.4  44.128.0.3  docker        4      0s ago     1.0      overlay dcos: no free agent subnet: all 2 /24 of 9.0.0.0/23 are leased; delete agents that are gone, or configure a larger subnet
`},
		{"overlays", `
OVERLAY  SUBNET       LEASES  IPV4 POOL  IPV6 POOL   NOTE
dcos     9.0.0.0/23   2       2 of 2     -           -
off      fd01:b::/64  0       -          0 of 65536  disabled; no new leases
`},
	} {
		code, stdout, stderr := ctl(t, map[string]string{cli.EnvName("coordinator"): url}, tt.command)
		stdout = regexp.MustCompile(`\b\ds ago`).ReplaceAllString(stdout, "0s ago")
		if diff := cmp.Diff(strings.TrimPrefix(tt.want, "\n"), stdout); diff != "" || code != 0 || stderr != "" {
			t.Errorf("%s: code %d, %s\n(-want +got):\n%s", tt.command, code, stderr, diff)
		}
	}
}

// JSON is what the coordinator serves, and flags stand where one likes.
func TestJSONAndFlags(t *testing.T) {
	url := cluster(t)
	for _, args := range [][]string{
		{"-o", "json", "--coordinator", url, "state"},
		{"state", "-o", "json", "--coordinator", url},
		{"-o=json", "state", "--coordinator=" + url},
		{"--coordinator", "http://127.0.0.1:1," + url, "state", "-o", "json"},
	} {
		code, stdout, stderr := ctl(t, map[string]string{cli.EnvName("coordinator"): "http://127.0.0.1:1"}, args...)
		var state conf.MasterState
		if err := json.Unmarshal([]byte(stdout), &state); err != nil || code != 0 || len(state.Agents) != 3 {
			t.Errorf("%v: code %d, %v, %s %s", args, code, err, stdout, stderr)
		}
	}
	for _, command := range []string{"agents", "overlays"} {
		var rows []map[string]any
		if code, stdout, _ := ctl(t, nil, command, "--coordinator", url, "-o", "json"); code != 0 || json.Unmarshal([]byte(stdout), &rows) != nil || len(rows) < 2 {
			t.Errorf("%s: code %d, %s", command, code, stdout)
		}
	}
}

func TestUsage(t *testing.T) {
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{nil, 2, "every overlay and how much of it is leased"},
		{[]string{"-o", "json"}, 2, "overlayctl [command]"},
		{[]string{"help"}, 0, "overlayctl [command]"},
		{[]string{"-h"}, 0, "overlayctl [command]"},
		{[]string{"state", "-h"}, 0, "Usage:\n  overlayctl state"},
		{[]string{"stat"}, 2, `unknown command "stat", did you mean state or status?`},
		{[]string{"--wrong", "state"}, 2, "--wrong"},
		{[]string{"state", "--wrong"}, 2, "overlayctl state --help"},
		{[]string{"state", "extra"}, 2, `"extra"`},
		{[]string{"ipam", "what"}, 2, `unknown command "what"`},
		{[]string{"version"}, 0, "overlayctl dev go"},
		{[]string{"completion", "bash"}, 0, "complete"},
		{[]string{"completion", "tcsh"}, 2, `unknown command "tcsh"`},
		{[]string{"ipam", "--run-dir", "/nonexistent"}, 1, "run directory: stat /nonexistent: no such file"},
		{[]string{"ipam", "check", "--run-dir", "/nonexistent"}, 1, "run directory: stat /nonexistent: no such file"},
		{[]string{"state", "-o", "xml"}, 2, `--output: "xml": want table or wide or json or yaml`},
		{[]string{"state", "--coordinator", "10.0.0.1"}, 2, "scheme is missing"},
		{[]string{"state", "--coordinator", "http://127.0.0.1:1"}, 1, "refused"},
	} {
		code, stdout, stderr := ctl(t, nil, tt.args...)
		if code != tt.code || !strings.Contains(stdout+stderr, tt.says) {
			t.Errorf("%v: code %d, want %d; %q does not say %q", tt.args, code, tt.code, stdout+stderr, tt.says)
		}
		if (code == 0) != (stderr == "") {
			t.Errorf("%v: code %d and stderr %q", tt.args, code, stderr)
		}
	}
}

// agent serves a state on the socket of a run directory.
func agent(t *testing.T, state conf.State) (runDir string) {
	t.Helper()
	runDir = t.TempDir()
	l, err := net.Listen("unix", filepath.Join(runDir, conf.SocketFile))
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.PathAgentOverlay, func(w http.ResponseWriter, _ *http.Request) { json.NewEncoder(w).Encode(state) })
	s := &http.Server{Handler: mux}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return runDir
}

func TestStatus(t *testing.T) {
	url := cluster(t)
	state := conf.State{
		AgentID: "host-2", IP: netip.MustParseAddr("172.17.0.3"), MTU: 1450, Version: "1.0",
		Datapath: conf.DatapathState{Mode: "auto", Taken: "kernel", Reason: "nftables has chain f"},
		Lease:    conf.LeaseState{Epoch: 3, ExpiresBoottime: int64(conf.Boottime() + time.Hour)},
		Overlays: []conf.AgentOverlay{{
			Info: conf.Overlay{Name: "dcos"}, Subnet: netip.MustParsePrefix("9.0.1.0/24"), State: &conf.OverlayStatus{Status: conf.StatusOK},
			MesosBridge: &conf.Bridge{Name: "m-dcos", IP: netip.MustParsePrefix("9.0.1.0/25")},
		}},
	}
	want := `agent        running, version 1.0
agent id     host-2
agent IP     172.17.0.3
MTU          1450
lease        epoch 3
datapath     kernel (auto): nftables has chain f
coordinator  ` + url + ` reachable

OVERLAY  AGENT SUBNET  MESOS BRIDGE       DOCKER BRIDGE  STATUS
dcos     9.0.1.0/24    m-dcos 9.0.1.0/25  -              ok
`
	code, stdout, stderr := ctl(t, nil, "status", "--run-dir", agent(t, state), "--coordinator", url)
	if diff := cmp.Diff(want, stdout); diff != "" || code != 0 {
		t.Errorf("code %d %s (-want +got):\n%s", code, stderr, diff)
	}
	// It is the agent's, unless another one is asked for.
	state.Coordinators = []string{"http://127.0.0.1:1", url}
	want = strings.Replace(want, url, "http://127.0.0.1:1,"+url, 1)
	code, stdout, stderr = ctl(t, nil, "status", "--run-dir", agent(t, state))
	if diff := cmp.Diff(want, stdout); diff != "" || code != 0 {
		t.Errorf("code %d %s (-want +got):\n%s", code, stderr, diff)
	}
	published := t.TempDir()
	if err := conf.WriteJSON(filepath.Join(published, conf.StateFile), state, 0o644); err != nil {
		t.Fatal(err)
	}
	if code, stdout, stderr := ctl(t, map[string]string{cli.EnvName("run-dir"): published}, "agents"); code != 0 || !strings.Contains(stdout, "host-3") {
		t.Errorf("agents, asked of the published coordinators: code %d\n%s%s", code, stdout, stderr)
	}
	if code, _, stderr := ctl(t, map[string]string{cli.EnvName("run-dir"): published}, "agents", "--coordinator", "http://127.0.0.1:2"); code != 1 || !strings.Contains(stderr, "127.0.0.1:2") {
		t.Errorf("agents, asked of another coordinator: code %d\n%s", code, stderr)
	}
	// The coordinator may be away; containers are attached all the same.
	if code, stdout, _ := ctl(t, nil, "status", "--run-dir", agent(t, state), "--coordinator", "http://127.0.0.1:1"); code != 0 || !strings.Contains(stdout, "NOT REACHABLE") {
		t.Errorf("without coordinator: code %d\n%s", code, stdout)
	}

	// Nor is renewal needed as long as the term lasts.
	late := state
	late.Lease.Error = "agent id is in use"
	if code, stdout, _ := ctl(t, nil, "status", "--run-dir", agent(t, late), "--coordinator", url); code != 0 || !strings.Contains(stdout, "epoch 3, NOT RENEWED, good for another 59m") || !strings.Contains(stdout, "agent id is in use") {
		t.Errorf("a lease that is not renewed: code %d\n%s", code, stdout)
	}

	// What was put back, and what works though somebody should look at it, is no failure.
	repaired := state
	repaired.Drift = &conf.DriftState{Counts: []conf.DriftCount{{Kind: "link", Objects: 1}, {Kind: "route", Objects: 2}}, Last: "link set m-dcos up", LastAt: "1970-01-01T00:00:00Z"}
	repaired.Notices = []string{"bridge d-old is left"}
	if code, stdout, _ := ctl(t, nil, "status", "--run-dir", agent(t, repaired), "--coordinator", url); code != 0 ||
		!strings.Contains(stdout, "repaired     1 link, 2 route; last at 1970-01-01T00:00:00Z: link set m-dcos up\n") || !strings.Contains(stdout, "notice       bridge d-old is left\n") {
		t.Errorf("a host that was repaired: code %d\n%s", code, stdout)
	}

	failed := state
	failed.Overlays = []conf.AgentOverlay{{Info: conf.Overlay{Name: "dcos"}, State: &conf.OverlayStatus{Status: conf.StatusFailed, Error: "no VTEP"}}}
	lost := state
	lost.Lease.Lost = "granted to another"
	none := state
	none.Lease, none.Overlays = conf.LeaseState{Lost: "there is no lease yet", Error: "no free VTEP address"}, nil
	over := state
	over.Lease.Error, over.Lease.ExpiresBoottime = "connection refused", int64(conf.Boottime()-time.Second)
	for words, s := range map[string]conf.State{
		"failed: no VTEP": failed, "LOST: granted to another": lost, "NONE YET: no free VTEP address": none,
		"RUN OUT, no new containers until it is renewed: connection refused": over,
	} {
		if code, stdout, _ := ctl(t, nil, "status", "--run-dir", agent(t, s), "--coordinator", url); code != 1 || !strings.Contains(stdout, words) {
			t.Errorf("code %d, want 1 and %q\n%s", code, words, stdout)
		}
	}

	// Without an agent what it published last is shown.
	dir := t.TempDir()
	if code, stdout, _ := ctl(t, nil, "status", "--run-dir", dir, "--coordinator", url); code != 1 || !strings.Contains(stdout, "nothing published") {
		t.Errorf("code %d\n%s", code, stdout)
	}
	if err := conf.WriteJSON(filepath.Join(dir, conf.StateFile), state, 0o644); err != nil {
		t.Fatal(err)
	}
	code, stdout, _ = ctl(t, nil, "status", "--run-dir", dir, "--coordinator", url)
	if code != 1 || !strings.Contains(stdout, "NOT RUNNING") || !strings.Contains(stdout, "m-dcos") {
		t.Errorf("code %d\n%s", code, stdout)
	}
	var asJSON hostStatus
	_, stdout, _ = ctl(t, nil, "-o", "json", "status", "--run-dir", dir, "--coordinator", url)
	if err := json.Unmarshal([]byte(stdout), &asJSON); err != nil || asJSON.Running || asJSON.Agent.AgentID != "host-2" || !asJSON.Coordinator.Reachable {
		t.Errorf("%v\n%s", err, stdout)
	}
}

// A host that has just joined is waited for, not longer than was said.
func TestStatusWaits(t *testing.T) {
	ready := conf.State{
		AgentID: "host-2", IP: netip.MustParseAddr("172.17.0.3"), MTU: 1450,
		Lease: conf.LeaseState{Epoch: 3, ExpiresBoottime: int64(conf.Boottime() + time.Hour)},
	}
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, conf.SocketFile))
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int32
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		state := conf.State{AgentID: "host-2", Lease: conf.LeaseState{Error: ""}}
		if asked.Add(1) > 2 {
			state = ready
		}
		json.NewEncoder(w).Encode(state)
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	url := "--coordinator=" + cluster(t)
	code, stdout, stderr := ctl(t, nil, "status", "--run-dir", dir, url)
	if code != 1 || !strings.Contains(stdout, "NONE YET") || strings.Contains(stdout, "invalid") || strings.Contains(stdout, "MTU") {
		t.Errorf("before there is a lease: code %d %s\n%s", code, stderr, stdout)
	}
	if code, stdout, stderr := ctl(t, nil, "status", "--run-dir", dir, url, "--wait", "1m"); code != 0 || !strings.Contains(stdout, "172.17.0.3") || asked.Load() != 3 {
		t.Errorf("waiting: code %d, asked %d times %s\n%s", code, asked.Load(), stderr, stdout)
	}
	if code, _, _ := ctl(t, nil, "status", "--run-dir", t.TempDir(), url, "--wait", "300ms"); code != 1 {
		t.Errorf("of a host without agent: code %d, want 1", code)
	}
	if code, _, _ := ctl(t, nil, "status", "--run-dir", dir, url, "--wait", "-1s"); code != 2 {
		t.Errorf("of a negative time: code %d, want 2", code)
	}
}

// Halves that nobody has attached to are listed as empty, and get no address
// store from being looked at.
func TestUnusedHalves(t *testing.T) {
	prefix := netip.MustParsePrefix
	lease := conf.Lease{Bridges: conf.Halves[:], Grants: []conf.Grant{
		{Overlay: conf.Overlay{Name: "two"}, Subnet: prefix("9.0.1.0/24"), Subnet6: prefix("fd01:b::/125")},
		{Overlay: conf.Overlay{Name: "one"}, Subnet: prefix("10.0.0.0/29")},
	}}
	dir := t.TempDir()
	if err := conf.WriteJSON(filepath.Join(dir, conf.StateFile), conf.State{Overlays: lease.AgentOverlays(nil)}, 0o644); err != nil {
		t.Fatal(err)
	}
	want := `OVERLAY  HALF    RANGE          USED  COOLING  TOTAL  REUSED EARLY
one      mesos   10.0.0.0/30    0     0        1      0
one      docker  10.0.0.4/30    0     0        1      0
two      mesos   9.0.1.0/25     0     0        125    0
two      mesos   fd01:b::/126   0     0        2      0
two      docker  9.0.1.128/25   0     0        125    0
two      docker  fd01:b::4/126  0     0        2      0

OVERLAY  HALF  ADDRESSES  CONTAINER  IFNAME  NETWORK  INTERFACE
`
	code, stdout, stderr := ctl(t, nil, "ipam", "--run-dir", dir)
	if diff := cmp.Diff(want, stdout); diff != "" || code != 0 {
		t.Errorf("code %d %s (-want +got):\n%s", code, stderr, diff)
	}
	if _, err := os.Stat(filepath.Join(dir, conf.IPAMDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("looking made a directory: %v", err)
	}
	if code, stdout, _ := ctl(t, nil, "ipam", "--run-dir", t.TempDir(), "-o", "json"); code != 0 || !strings.Contains(stdout, `"usage": []`) {
		t.Errorf("nothing published: code %d, %s", code, stdout)
	}
}

// The addresses of a container that is gone are given back, those of one that is
// attached are not.
func TestRelease(t *testing.T) {
	dir := t.TempDir()
	s, err := ipam.Open(t.Context(), ipam.Options{Dir: filepath.Join(dir, conf.IPAMDir), Overlay: "dcos"})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"gone", "here"} {
		r := ipam.Request{Attachment: conf.Attachment{Network: "dcos", ContainerID: id, IfName: "eth0"}, Half: conf.Mesos,
			Ranges: []netip.Prefix{netip.MustParsePrefix("9.0.1.0/25")}}
		if id == "here" { // with a namespace that exists
			r.NetNS = netns.Look("/proc/self/ns/net")
		}
		if _, err := s.Allocate(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"nobody"}, 1, "no address store of this host has the container nobody"},
		{[]string{"gone"}, 0, "9.0.1.2\n"},
		{[]string{"here"}, 1, "is attached to overlay dcos"},
		{[]string{"here", "--force"}, 0, "9.0.1.3\n"},
	} {
		code, stdout, stderr := ctl(t, nil, append([]string{"ipam", "release", "--run-dir", dir}, tt.args...)...)
		if code != tt.code || !strings.Contains(stdout+stderr, tt.says) {
			t.Errorf("%v: code %d, %q, want %d and %q", tt.args, code, stdout+stderr, tt.code, tt.says)
		}
	}
}
