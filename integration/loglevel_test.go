package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// TestLogLevel: what the daemons log is changed while they run, by root alone, and
// by a signal.
func TestLogLevel(t *testing.T) {
	s := upSeed(t, seedConfig(t))
	h, ctx := s.Agents[0], t.Context()
	levels := func(args ...string) string {
		t.Helper()
		out, err := h.Run(ctx, append([]string{filepath.Join(binDir, "overlayctl"), "log-level", "-o", "json", "--run-dir", h.RunDir}, args...)...)
		must(t, err)
		var rows []struct{ Daemon, Level string }
		must(t, json.Unmarshal([]byte(out), &rows))
		return fmt.Sprint(rows)
	}
	logs := func(p *lab.Proc, text ...string) {
		t.Helper()
		must(t, lab.Wait(ctx, "a line in the log", 10*time.Second, func() error { return p.LogContains(text...) }))
	}
	if got := levels(); got != "[{agent info}]" {
		t.Errorf("at first: %s", got)
	}
	if got := levels("debug"); got != "[{agent debug}]" {
		t.Errorf("set: %s", got)
	}
	logs(h.Proc, `msg="the log level has changed" from=info to=debug`)
	signal := func(p *lab.Proc, text string) {
		t.Helper()
		must(t, syscall.Kill(p.Pid(), syscall.SIGUSR1))
		logs(p, text)
	}
	signal(h.Proc, "from=debug to=info")
	if got := levels(); got != "[{agent info}]" {
		t.Errorf("after the signal: %s", got)
	}
	out, err := s.Overlayctl(ctx, "log-level", "error", "--of", "coordinator")
	if err != nil || !strings.Contains(out, "coordinator  error") {
		t.Errorf("%v\n%s", err, out)
	}
	signal(s.Coordinator.Proc, "from=error to=debug")
	if _, err := s.Coordinator.Get(ctx, "/nothing"); err == nil {
		t.Error("there is something at /nothing")
	}
	logs(s.Coordinator.Proc, "level=DEBUG", "path=/nothing")
	signal(s.Coordinator.Proc, "from=debug to=info")

	must(t, h.Proc.Stop())
	must(t, h.StartAgent(s.Coordinator.URL, "--listen", "127.0.0.1:6441"))
	must(t, h.WaitReady(ctx))
	// Not over TCP, and not by another user who may use the socket.
	res, err := h.HTTP().Post("http://127.0.0.1:6441/v1/log-level", "application/json", strings.NewReader(`{"level":"debug"}`))
	must(t, err)
	res.Body.Close()
	if res.StatusCode != http.StatusForbidden {
		t.Errorf("over TCP: %s", res.Status)
	}
	socket := filepath.Join(h.RunDir, "overlayd.sock")
	must(t, os.Chmod(socket, 0o666))
	for p := h.RunDir; p != os.TempDir(); p = filepath.Dir(p) {
		must(t, os.Chmod(p, 0o755))
	}
	curl := exec.CommandContext(ctx, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
		"curl", "--silent", "--unix-socket", socket, "--data", `{"level":"debug"}`, "http://agent/v1/log-level")
	if answer, err := curl.CombinedOutput(); err != nil || !strings.Contains(string(answer), "is for root") {
		t.Errorf("as nobody: %v, %s", err, answer)
	}
	if got := levels(); got != "[{agent info}]" {
		t.Errorf("at last: %s", got)
	}
	for args, status := range map[string]int{"loud": 2, "debug --of everything": 2, "--run-dir /nonexistent --state-dir /nonexistent": 1} {
		if out, got := program(t, append([]string{"overlayctl", "log-level"}, strings.Fields(args)...)...); got != status {
			t.Errorf("log-level %s: status %d, want %d: %s", args, got, status, out)
		}
	}
}

// privateKeys are the lines of every private key below a directory.
func privateKeys(t *testing.T, dir string) (lines []string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !strings.Contains(path, "/pki/") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		private := false
		for line := range strings.Lines(string(b)) {
			line = strings.TrimSpace(line)
			if strings.HasPrefix(line, "-----") {
				private = strings.HasPrefix(line, "-----BEGIN") && strings.Contains(line, "PRIVATE")
			} else if private && len(line) > 20 {
				lines = append(lines, line)
			}
		}
		if filepath.Base(path) == "cluster.key" {
			lines = append(lines, strings.TrimSpace(string(b)))
		}
		return nil
	}))
	return lines
}

// TestSecretsAreNotLogged: whatever is logged at the lowest level, in both forms,
// tokens and keys are not in it.
func TestSecretsAreNotLogged(t *testing.T) {
	t.Setenv("OVERLAYD_LOG_LEVEL", "debug")
	o := options()
	o.Secure = true
	s := makeSeed(t, seedConfig(t), o)
	ctx := t.Context()
	must(t, s.StartCoordinator(ctx))
	secrets := map[string]string{}
	token := func(what string, args ...string) string {
		out, err := s.Overlayctl(ctx, append([]string{"token", "create"}, args...)...)
		must(t, err)
		secrets[what] = strings.TrimSpace(out)
		return secrets[what]
	}
	for i, h := range s.Hosts() {
		must(t, h.StartAgent(s.Coordinator.URL, "--join-token="+token(fmt.Sprint("token of ", h.RunDir)), "--log-format", []string{"text", "json"}[i%2]))
		must(t, h.WaitRegistered(ctx, s.Coordinator))
	}
	must(t, s.WaitMesh(ctx))
	place(t, s, 0, "a", "dcos", lab.Mesos)

	h, home := s.Agents[0], t.TempDir()
	login := func(token string) error {
		cmd := h.Command(ctx, filepath.Join(binDir, "overlayctl"), "login", "--coordinator", s.Coordinator.URL, "--token", token)
		cmd.Env = append(os.Environ(), "HOME="+home)
		return cmd.Run()
	}
	must(t, login(token("operator's token", "--role", "operator")))
	used := token("used-up token", "--role", "reader")
	must(t, login(used))
	if login(used) == nil {
		t.Error("a token was good twice")
	}
	revoked := token("revoked token")
	_, err := s.Overlayctl(ctx, "token", "revoke", revoked)
	must(t, err)
	if login(revoked) == nil {
		t.Error("a revoked token was good")
	}
	// A newcomer with a token that is none, and requests with secrets where they do
	// not belong.
	secrets["wrong token"] = used[:len(used)-12] + "aaaaaaaaaaaa"
	if login(secrets["wrong token"]) == nil {
		t.Error("a wrong token was good")
	}
	secrets["header"], secrets["query"] = "planted-in-a-header", "planted-in-a-query"
	_, err = h.Run(ctx, "sh", "-c", fmt.Sprintf(
		`for u in %s/v1/agents http://127.0.0.1:6441/nothing; do curl --silent --insecure --header "Authorization: Bearer %s" --cookie "session=%s" "$u?token=%s"; done; true`,
		s.Coordinator.URL, secrets["header"], secrets["header"], secrets["query"]))
	must(t, err)
	for _, h := range s.Hosts() { // a start with all that is there, and an end
		must(t, h.Proc.Stop())
		must(t, s.StartAgent(h))
		must(t, h.WaitReady(ctx))
	}
	for i, line := range privateKeys(t, s.Dir) {
		secrets[fmt.Sprint("private key, line ", i)] = line
	}
	if len(secrets) < 12 {
		t.Errorf("only %d secrets: %v", len(secrets), secrets)
	}

	logged := 0
	must(t, filepath.WalkDir(s.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !strings.Contains(filepath.Base(path), ".log") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		logged += bytes.Count(b, []byte("DEBUG"))
		for what, secret := range secrets {
			// The secret of a token is its end.
			if bytes.Contains(b, []byte(secret)) || bytes.Contains(b, []byte(secret[len(secret)*2/3:])) {
				t.Errorf("%s has the %s", path, what)
			}
		}
		return nil
	}))
	if logged < 10 {
		t.Errorf("%d lines of debug level; is the level still set by the environment?", logged)
	}
}
