package agent

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// Behind nginx as it is installed, which collects answers before it passes them
// on, peers are learnt as they come.
func TestBehindNginx(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.behind(startNginx(t, c.addr, ""))
	h.start()
	h.ready()
	c.join("peer", "172.17.0.3")
	before := time.Now()
	eventually(t, "peer", func() error { return hasRoute(prefix("9.0.1.0/24")) })
	if took := time.Since(before); took > 2*time.Second {
		t.Errorf("a peer was learnt after %s", took)
	}
	h.statusAt("status", allOK)
	if got := h.document().Problems; got != nil {
		t.Errorf("problems %q", got)
	}
}

// A proxy that holds the events back all the same leaves a host without peers,
// which says so; when the proxy is taken away it says no more.
func TestBehindProxyThatBuffers(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.tune = func(t *timing) { t.follow = 300 * time.Millisecond }
	direct := h.opts
	h.behind(startNginx(t, c.addr, "proxy_ignore_headers X-Accel-Buffering;"))
	h.start()
	h.notReady("hosts that join or move are not learnt, although the coordinator answers")
	problem := ""
	eventually(t, "it is in the document", func() error {
		_, body, err := h.get(api.PathAgentOverlay)
		if err == nil && !strings.Contains(body, `"problems":["following the peers: `) {
			err = errors.New(body)
		}
		problem = body
		return err
	})
	if n := strings.Count(h.log.String(), `msg="degraded; trying again"`); n != 1 {
		t.Errorf("%d problems logged, want one: %s", n, problem)
	}
	h.stop()
	h.opts.Coordinator, h.opts.CoordinatorURLs = direct.Coordinator, direct.CoordinatorURLs
	h.start()
	h.ready()
	if got := h.document().Problems; got != nil {
		t.Errorf("problems %q", got)
	}
}

// behind has the agent reach the coordinator at another address.
func (h *testHost) behind(addr string) {
	h.t.Helper()
	h.opts.CoordinatorURLs = []string{"http://" + addr}
	transport := &http.Transport{}
	h.t.Cleanup(transport.CloseIdleConnections)
	client, err := api.NewClient(h.opts.CoordinatorURLs, &http.Client{Transport: transport})
	must(h.t, err)
	h.opts.Coordinator = client
}

// startNginx runs Debian's nginx on this host, with the settings it has when it
// is installed and more of them for the one location, and returns its address.
func startNginx(t *testing.T, upstream, more string) string {
	t.Helper()
	path, err := exec.LookPath("nginx")
	if err != nil {
		t.Fatalf("%v; scripts/setup installs it", err)
	}
	dir := t.TempDir()
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	addr := socket.Addr().String()
	must(t, socket.Close())
	config := fmt.Sprintf(`
daemon off; master_process off; pid %[1]s/pid; error_log stderr;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
	gzip on;
	server { listen %[2]s; location / { proxy_pass http://%[3]s; %[4]s } }
}
`, dir, addr, upstream, more)
	file := filepath.Join(dir, "nginx.conf")
	must(t, os.WriteFile(file, []byte(config), 0o600))
	cmd := exec.Command(path, "-c", file, "-p", dir)
	log := &lockedBuffer{}
	cmd.Stderr, cmd.SysProcAttr = log, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("log of nginx:\n%s", log)
		}
	})
	eventually(t, "nginx answers", func() error {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
		}
		return err
	})
	return addr
}
