package fleet

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/store/etcdtest"
)

var (
	full = flag.Bool("full", false, "run at full length, which is too long for CI")
	span = flag.Duration("span", 10*time.Minute, "how long hosts renew at full length")
	kill = flag.Duration("kill", 5*time.Minute, "how long they do so at full length while coordinators are killed")
)

// programEnv names the program that the tests run, to the process of Isolate.
const programEnv = "OVERLAY_FLEET_OVERLAYD"

func TestMain(m *testing.M) {
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		code = 1
	}
	os.Exit(code)
}

func buildAndRun(m *testing.M) (int, error) {
	if os.Getenv(programEnv) != "" {
		return etcdtest.Isolate(m), nil
	}
	dir, err := os.MkdirTemp("", "overlay-fleet-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	// As scripts/build does, so that most of it is in the cache.
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", dir+"/", "overlayd.internal/overlay/overlayd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build overlayd: %w: %s", err, out)
	}
	os.Setenv(programEnv, filepath.Join(dir, "overlayd"))
	return etcdtest.Isolate(m), nil
}

// patience is how long a test waits for what must happen.
const patience = time.Minute

const network = `
vtep_subnet: 44.128.0.0/16
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
  - {name: dcos, subnet: 9.0.0.0/8, prefix: 24}
  - {name: other, subnet: 10.0.0.0/8, prefix: 24}
`

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.After(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("still not: %s: %v", what, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// process is a coordinator.
type process struct {
	url, dir string
	argv     []string
	root     *api.Client // its operator
	cmd      *exec.Cmd
	ended    chan struct{}
	used     float64 // seconds of CPU of its lives before
}

// cluster is some coordinators on one store.
type cluster struct {
	t   testing.TB
	all []*process
}

// newCluster starts coordinators: one on a file, or n on an etcd of three members that
// speaks TLS.
func newCluster(t testing.TB, store string, n int) *cluster {
	t.Helper()
	c := &cluster{t: t}
	must(t, exec.Command("ip", "link", "set", "lo", "up").Run())
	dir := t.TempDir()
	config := filepath.Join(dir, "overlay.yaml")
	must(t, os.WriteFile(config, []byte(network), 0o600))
	argv := []string{os.Getenv(programEnv), "coordinator", "--config", config, "--advertise", "127.0.0.1"}
	if store == "etcd" {
		e := etcdtest.NewSecure(t, 3, "etcd")
		argv = append(argv, "--store", "etcd:"+strings.Join(e.Endpoints(), ","),
			"--store-ca", e.CA.File, "--store-cert", e.Client.Cert, "--store-key", e.Client.Key)
	} else {
		n = 1
	}
	for i := range n {
		p := &process{dir: filepath.Join(dir, strconv.Itoa(i)), url: fmt.Sprintf("https://127.0.0.1:%d", 6440+i)}
		must(t, os.Mkdir(p.dir, 0o700))
		p.argv = append(append([]string{}, argv...), "--listen", fmt.Sprintf("127.0.0.1:%d", 6440+i), "--state-dir", p.dir)
		if i > 0 {
			p.argv = append(p.argv, "--join-token", c.token("coordinator", 1))
		}
		socket := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(p.dir, "coordinator.sock"))
		}}}
		var err error
		p.root, err = api.NewClient([]string{"http://localhost"}, socket)
		must(t, err)
		c.all = append(c.all, p)
		t.Cleanup(p.kill)
		must(t, p.start())
		eventually(t, p.url+" is ready", func() error { return p.root.Ready(t.Context()) })
	}
	return c
}

func (c *cluster) token(role string, uses int) string {
	c.t.Helper()
	created, err := c.all[0].root.TokenCreate(c.t.Context(), api.TokenRequest{Role: role, Uses: uses, TTLSeconds: 3600})
	must(c.t, err)
	return created.Token
}

func (c *cluster) urls() (urls []string) {
	for _, p := range c.all {
		urls = append(urls, p.url)
	}
	return urls
}

// start starts it on what it has; it does not wait.
func (p *process) start() error {
	log, err := os.OpenFile(filepath.Join(p.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(p.argv[0], p.argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	p.cmd, p.ended = cmd, ended
	go func() { _ = cmd.Wait(); close(ended) }()
	return nil
}

// kill ends it without a word to anybody.
func (p *process) kill() {
	if p.cmd == nil {
		return
	}
	if now, err := cpuOf(p.cmd.Process.Pid); err == nil {
		p.used += now
	}
	_ = p.cmd.Process.Signal(syscall.SIGKILL)
	<-p.ended
	p.cmd = nil
}

// cpu is what all coordinators have used so far, in seconds.
func (c *cluster) cpu() (sum float64) {
	for _, p := range c.all {
		sum += p.used
		if p.cmd != nil {
			now, err := cpuOf(p.cmd.Process.Pid)
			must(c.t, err)
			sum += now
		}
	}
	return sum
}

// cpuOf is the user and system time of a process in seconds.
func cpuOf(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0, fmt.Errorf("process %d: %q", pid, b)
	}
	user, err1 := strconv.ParseFloat(f[11], 64)
	system, err2 := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100, errors.Join(err1, err2) // USER_HZ, fixed by the kernel's ABI
}

// load is what the machine is busy with besides, as it says of the last minute.
func load(t testing.TB) string {
	b, err := os.ReadFile("/proc/loadavg")
	must(t, err)
	return strings.Fields(string(b))[0]
}
