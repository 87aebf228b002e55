package main

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

var exampleConfig = filepath.Join("..", "conf", "examples", "overlay.yaml")

func TestExitCodes(t *testing.T) {
	dir := t.TempDir()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	badConfig := writeFile(t, "bad.yaml", "overlays: []\n")
	foreign := writeFile(t, "foreign.db", strings.Repeat("not a database ", 1000))
	coordinator := func(more ...string) []string {
		return append([]string{"coordinator", "--config", exampleConfig, "--listen", "127.0.0.1:0", "--state-dir", dir}, more...)
	}
	// A command that starts although it should not is not to touch this host.
	elsewhere := map[string]string{
		"OVERLAYD_RUN_DIR": filepath.Join(dir, "run"), "OVERLAYD_STATE_DIR": filepath.Join(dir, "state"), "OVERLAYD_LISTEN": "127.0.0.1:0",
		"OVERLAYD_CNI_CONF_DIR": filepath.Join(dir, "cni"), "OVERLAYD_DOCKER_HOST": "",
	}
	tests := []struct {
		name   string
		args   []string
		env    map[string]string
		code   int
		stdout string // part of it
		stderr string // part of it
	}{
		{"nothing", nil, nil, 2, "", "overlayd [command]"},
		{"help", []string{"help"}, nil, 0, "overlayd [command]", ""},
		{"unknown command", []string{"colour"}, nil, 2, "", `overlayd: unknown command "colour"; overlayd --help lists the commands`},
		{"help with an unknown command", []string{"help", "colour"}, nil, 2, "", `unknown command "colour"`},
		{"a command almost right", []string{"agnet"}, nil, 2, "", "did you mean agent?"},
		{"version", []string{"version"}, nil, 0, "overlayd dev go", ""},

		{"check-config help", []string{"check-config", "--help"}, nil, 0, "Usage:\n  overlayd check-config FILE", ""},
		{"check-config of nothing", []string{"check-config"}, nil, 2, "", "want one argument, the file"},
		{"check-config of no file", []string{"check-config", "/nonexistent"}, nil, 2, "", "/nonexistent: no such file"},
		{"check-config of an empty file", []string{"check-config", os.DevNull}, nil, 2, "", "/dev/null: the file is empty"},

		{"coordinator help", []string{"coordinator", "--help"}, nil, 0, "--state-dir DIR", ""},
		{"coordinator without a configuration", []string{"coordinator", "--insecure"}, nil, 2, "", "--config is missing"},
		{"coordinator with a bad configuration", []string{"coordinator", "--insecure", "--config", badConfig}, nil, 2, "",
			badConfig + ": 3 problems\n  vtep_subnet: missing"},
		{"coordinator with an argument", coordinator("--insecure", "now"), nil, 2, "", `unknown command "now" for "overlayd coordinator"`},
		{"coordinator with a token that is none", coordinator("--join-token", "secret"), nil, 2, "", "--join-token: this is no join token"},
		{"coordinator with a token and without identity", coordinator("--insecure", "--join-token", someToken), nil, 2, "", "--join-token and --insecure"},
		{"coordinator with a CA and without identity", coordinator("--insecure", "--pki-dir", dir), nil, 2, "", "--pki-dir and --insecure"},
		{"coordinator with a CA that is not there", coordinator("--pki-dir", dir), nil, 1, "", "ca.crt: no such file"},
		{"coordinator with a token on an empty store", coordinator("--join-token", someToken), nil, 1, "", "the store holds no cluster that could be joined"},
		{"coordinator that advertises a URL", coordinator("--advertise", "https://a:6440"), nil, 2, "", `--advertise "https://a:6440": want addresses and names`},
		{"coordinator on etcd without a host", coordinator("--insecure", "--store", "etcd:http:///overlay"), nil, 2, "", "no host in it"},
		{"coordinator on etcd by another protocol", coordinator("--insecure", "--store", "etcd:ftp://10.0.0.1"), nil, 2, "", "want http:// or https://"},
		{"coordinator on etcd, half a certificate", coordinator("--insecure", "--store", "etcd:https://10.0.0.1", "--store-key", "k"), nil, 1, "",
			"a certificate and its key go together"},
		{"coordinator on a file with a certificate", coordinator("--insecure", "--store-ca", "ca.pem"), nil, 2, "", "are for etcd"},
		{"coordinator on nothing known", coordinator("--insecure"), map[string]string{"OVERLAYD_STORE": "redis:x"}, 2, "",
			`--store "redis:x": want bbolt:PATH`},
		{"coordinator on a file without a name", coordinator("--insecure", "--store", "bbolt:"), nil, 2, "", `--store "bbolt:": want bbolt:PATH`},
		{"coordinator on no directory", coordinator("--insecure", "--state-dir", ""), nil, 2, "", "--state-dir is empty"},
		{"coordinator on a foreign file", coordinator("--insecure", "--store", "bbolt:"+foreign), nil, 1, "", foreign},
		{"coordinator on a port in use", coordinator("--insecure", "--listen", busy.Addr().String()), nil, 1, "", "address already in use"},
		{"coordinator on a bad port", coordinator("--insecure", "--listen", "127.0.0.1:99999"), nil, 2, "", `--listen: "127.0.0.1:99999": want an address and a port`},
		{"coordinator on no address", coordinator("--insecure", "--listen", ""), nil, 2, "", `--listen: "": want an address and a port`},

		{"agent help", []string{"agent", "--help"}, nil, 0, "--cooling DURATION", ""},
		{"agent without a coordinator", []string{"agent", "--insecure"}, nil, 2, "", "--coordinator is missing; give the URL"},
		{"agent with an argument", []string{"agent", "now"}, nil, 2, "", `unknown command "now" for "overlayd agent"`},
		{"agent with a bad URL", []string{"agent", "--insecure", "--coordinator", "10.0.0.1:6440"}, nil, 2, "", "--coordinator: "},
		{"agent with http and identity", []string{"agent", "--coordinator", "http://127.0.0.1:1"}, nil, 2, "", "write https://, or, in a laboratory, start coordinator and agents with --insecure"},
		{"agent with https and without identity", []string{"agent", "--insecure", "--coordinator", "https://127.0.0.1:1"}, nil, 2, "", "leave --insecure out and give --join-token"},
		{"agent that has not joined", []string{"agent", "--coordinator", "https://127.0.0.1:1"}, nil, 2, "", "this host has not joined the cluster: there is no certificate in"},
		{"agent with two tokens", []string{"agent", "--coordinator", "https://127.0.0.1:1", "--join-token", someToken, "--join-token-file", "/x"}, nil, 2, "", "give one of them"},
		{"agent that serves to everybody", []string{"agent", "--coordinator", "https://127.0.0.1:1", "--join-token", someToken, "--listen", "0.0.0.0:6441"}, nil, 2, "", "want a loopback address"},
		{"agent with a bad variable", []string{"agent", "--insecure"}, map[string]string{"OVERLAYD_COOLING": "soon"}, 2, "", `OVERLAYD_COOLING: "soon": want a time`},
		{"agent with a token that is none", []string{"agent", "--insecure", "--coordinator", "http://127.0.0.1:1"}, map[string]string{"OVERLAYD_JOIN_TOKEN": "secret"}, 2, "",
			"OVERLAYD_JOIN_TOKEN: this is no join token"},
		{"agent with a token and without identity", []string{"agent", "--insecure", "--coordinator", "http://127.0.0.1:1"}, map[string]string{"OVERLAYD_JOIN_TOKEN": someToken}, 2, "",
			"a join token and --insecure"},
		{"agent with a bad id", []string{"agent", "--insecure", "--coordinator", "http://127.0.0.1:1", "--agent-id", "a/b"}, nil, 2, "", "a/b"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			var stdout, stderr strings.Builder
			env := maps.Clone(elsewhere)
			maps.Copy(env, tt.env)
			code := run(ctx, tt.args, environment(env), &stdout, &stderr)
			if code != tt.code || !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) {
				t.Errorf("exit code %d, want %d\nstdout: %s\nwant in it: %s\nstderr: %s\nwant in it: %s",
					code, tt.code, stdout.String(), tt.stdout, stderr.String(), tt.stderr)
			}
			if tt.code == 0 && stderr.Len() > 0 || tt.code != 0 && stdout.Len() > 0 {
				t.Errorf("exit code %d, and both stdout %q and stderr %q", code, stdout.String(), stderr.String())
			}
		})
	}
}

// someToken has the form of a token.
const someToken = "ovl1_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa_aaaaaaaa_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

// daemon is a run of overlayd in this process.
type daemon struct {
	stop context.CancelFunc
	exit chan int
	log  *bufio.Scanner
	addr string

	read     chan struct{} // closed at the end of the log
	warnings []string      // without the one about --insecure; until read is closed its reader's
}

// startCoordinator waits until it listens.
func startCoordinator(t *testing.T, stateDir string) *daemon {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	r, w := io.Pipe()
	d := &daemon{stop: stop, exit: make(chan int, 1), log: bufio.NewScanner(r), read: make(chan struct{})}
	go func() {
		args := []string{"coordinator", "--config", exampleConfig, "--listen", "127.0.0.1:0", "--state-dir", stateDir, "--insecure"}
		d.exit <- run(ctx, args, environment(nil), io.Discard, w)
		w.Close()
	}()
	t.Cleanup(stop)
	warned := false
	for d.addr == "" && d.log.Scan() {
		line := d.log.Text()
		warned = warned || strings.Contains(line, "level=WARN") && strings.Contains(line, "INSECURE")
		if _, addr, ok := strings.Cut(line, "msg=listening addr="); ok {
			d.addr = addr
		}
	}
	if d.addr == "" {
		t.Fatalf("the coordinator ended with exit code %d before it listened", <-d.exit)
	}
	if !warned {
		t.Error("no loud warning about --insecure")
	}
	go func() { // the writer of the log waits for its reader
		defer close(d.read)
		for d.log.Scan() {
			if line := d.log.Text(); !strings.Contains(line, "level=INFO") {
				d.warnings = append(d.warnings, line)
			}
		}
	}()
	return d
}

// end stops the daemon and returns its exit code.
func (d *daemon) end(t *testing.T) int {
	t.Helper()
	d.stop()
	select {
	case code := <-d.exit:
		<-d.read
		return code
	case <-time.After(10 * time.Second):
		t.Fatal("the coordinator does not end")
		return -1
	}
}

// TestCoordinator starts one, asks for its state, opens a watch, and stops it
// while the watch is open; what it knew is there after the next start.
func TestCoordinator(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	d := startCoordinator(t, dir)

	client, err := api.NewClient([]string{"http://" + d.addr}, nil)
	if err != nil {
		t.Fatal(err)
	}
	request := api.RegisterRequest{AgentID: "one", AgentIP: netip.MustParseAddr("172.17.0.2"), Bridges: []conf.Half{conf.Mesos}, Version: "test"}
	first, err := client.Register(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	watching, watched := make(chan struct{}), make(chan error, 1)
	go func() {
		opened := false
		watched <- client.Watch(t.Context(), "one", api.Known{}, func(api.PeerEvent) error {
			if !opened {
				close(watching)
			}
			opened = true
			return nil
		})
	}()
	select {
	case <-watching:
	case err := <-watched:
		t.Fatalf("the watch ended: %v", err)
	case <-time.After(10 * time.Second):
		t.Fatal("no snapshot on the watch")
	}

	before := time.Now()
	if code := d.end(t); code != 0 {
		t.Errorf("exit code %d after a signal, want 0", code)
	}
	if took := time.Since(before); took > 4*time.Second {
		t.Errorf("stopping took %v: it waited for the watch", took)
	}
	if len(d.warnings) > 0 { // among them: the kernel does not let it limit dead connections
		t.Errorf("warnings without a reason:\n%s", strings.Join(d.warnings, "\n"))
	}
	select {
	case <-watched:
	case <-time.After(10 * time.Second):
		t.Error("the watch is still open")
	}

	d = startCoordinator(t, dir)
	resp, err := http.Get("http://" + d.addr + api.PathMasterState)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var state conf.MasterState
	if err := json.NewDecoder(resp.Body).Decode(&state); err != nil {
		t.Fatal(err)
	}
	if len(state.Agents) != 1 || len(state.Agents[0].Overlays) != 2 {
		t.Fatalf("state after the restart: %+v", state)
	}
	if diff := cmp.Diff(first.Grants[0].Subnet.String(), state.Agents[0].Overlays[0].Subnet.String()); diff != "" {
		t.Errorf("subnet (-before +after the restart):\n%s", diff)
	}
	if code := d.end(t); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
}

// A configuration that takes leased subnets away is a mistake in it, like any
// other.
func TestMisfitExitCode(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	d := startCoordinator(t, dir)
	client, err := api.NewClient([]string{"http://" + d.addr}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Register(t.Context(), api.RegisterRequest{AgentID: "one", AgentIP: netip.MustParseAddr("172.17.0.2"), Version: "test"}); err != nil {
		t.Fatal(err)
	}
	if code := d.end(t); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	b, err := os.ReadFile(exampleConfig)
	if err != nil {
		t.Fatal(err)
	}
	other := writeFile(t, "other.yaml", strings.Replace(string(b), "9.0.0.0/8", "10.0.0.0/8", 1))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var stdout, stderr strings.Builder
	args := []string{"coordinator", "--config", other, "--listen", "127.0.0.1:0", "--state-dir", dir, "--insecure"}
	code := run(ctx, args, environment(nil), &stdout, &stderr)
	if want := other + ": the configuration does not fit what is leased: overlay dcos: "; code != 2 || !strings.Contains(stderr.String(), want) {
		t.Errorf("exit code %d, want 2; stderr: %s", code, stderr.String())
	}
}
