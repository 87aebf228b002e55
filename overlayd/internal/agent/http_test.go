package agent

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// The sockets: a stale one is replaced, another file is not; an address in use
// is a start-up error.
func TestSockets(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	must(t, os.Mkdir(h.opts.RunDir, 0o755))
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: h.path(conf.SocketFile), Net: "unix"})
	must(t, err)
	stale.SetUnlinkOnClose(false)
	stale.Close()
	h.opts.Listen = "127.0.0.1:6441"
	h.start()
	h.ready()
	fi, err := os.Stat(h.path(conf.SocketFile))
	if err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("socket: %v %v, want mode 0660", fi.Mode(), err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://127.0.0.1:6441" + api.PathAgentOverlay)
	if err != nil || resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/json" {
		t.Errorf("over TCP: %v %v", resp, err)
	}
	resp.Body.Close()
	for _, tt := range []struct {
		method, path string
		code         int
		says         string
	}{
		{"POST", api.PathAgentOverlay, http.StatusMethodNotAllowed, "POST /overlay-agent/overlay: only GET is served here"},
		{"GET", "/overlay-master/state", http.StatusNotFound, "this is the agent"},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tt.method, "http://127.0.0.1:6441"+tt.path, nil)
		must(t, err)
		resp, err := client.Do(req)
		must(t, err)
		var answer api.Error
		err = json.NewDecoder(resp.Body).Decode(&answer)
		resp.Body.Close()
		if err != nil || resp.StatusCode != tt.code || !strings.Contains(answer.Message, tt.says) {
			t.Errorf("%s %s: %d %v %q, want %d and %q", tt.method, tt.path, resp.StatusCode, err, answer.Message, tt.code, tt.says)
		}
		if allow := resp.Header.Get("Allow"); (allow == "GET") != (tt.code == http.StatusMethodNotAllowed) {
			t.Errorf("%s %s: Allow %q", tt.method, tt.path, allow)
		}
	}

	other := newHost(c)
	other.opts.RunDir = h.opts.RunDir
	mustNotStart(t, other.opts, "another agent (process")

	h.stop()
	taken, err := net.Listen("tcp", "127.0.0.1:6441")
	must(t, err)
	defer taken.Close()
	other = newHost(c)
	other.opts.Listen = "127.0.0.1:6441"
	mustNotStart(t, other.opts, "address already in use")
	other.opts.Listen = ""
	must(t, os.WriteFile(other.path(conf.SocketFile), []byte("precious"), 0o600))
	mustNotStart(t, other.opts, "is not a socket; move it away")
	if b, err := os.ReadFile(other.path(conf.SocketFile)); err != nil || string(b) != "precious" {
		t.Errorf("the file is %q now, %v", b, err)
	}
}

func mustNotStart(t *testing.T, o Options, want string) {
	t.Helper()
	a, err := New(o)
	must(t, err)
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Run: %v, want an error with %q", err, want)
	}
}
