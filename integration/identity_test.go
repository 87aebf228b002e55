package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// says waits until a command prints some words.
func says(t *testing.T, words string, command func() *exec.Cmd) {
	t.Helper()
	wait(t, fmt.Sprintf("%q", words), 20*time.Second, func() error {
		out, err := command().CombinedOutput() // its status may well be 1
		if !strings.Contains(string(out), words) {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	})
}

// TestIdentity: what becomes of hosts whose identity ends, or is that of another
// host, and of those who have none, with the programs as people run them.
func TestIdentity(t *testing.T) {
	t.Parallel()
	s := upSeed(t, seedConfig(t))
	ctx := t.Context()
	a := place(t, s, 0, "a", "dcos", lab.Mesos)
	b := place(t, s, 1, "b", "dcos", lab.Docker)
	h := s.Agents[0]
	status := func() *exec.Cmd {
		return h.Command(ctx, filepath.Join(binDir, "overlayctl"), "status", "--run-dir", h.RunDir)
	}
	talk := func(t *testing.T) {
		t.Helper()
		_, err := a.Ping(ctx, b.Addr(), 2)
		must(t, err)
	}
	says(t, "reachable", status)

	t.Run("nobody", func(t *testing.T) {
		for url, want := range map[string]string{
			s.Coordinator.URL + "/overlay-master/state": "401", s.Coordinator.URL + "/readyz": "200",
			strings.Replace(s.Coordinator.URL, "https", "http", 1) + "/readyz": "400",
		} {
			says(t, want, func() *exec.Cmd {
				return h.Command(ctx, "curl", "--silent", "--insecure", "--output", os.DevNull, "--write-out", "%{http_code}", url)
			})
		}
		says(t, "asks for identity, and this side has none", func() *exec.Cmd {
			return h.Command(ctx, filepath.Join(binDir, "overlayctl"), "agents", "--coordinator", strings.Replace(s.Coordinator.URL, "https", "http", 1))
		})
	})

	t.Run("files", func(t *testing.T) {
		for path, want := range map[string]os.FileMode{
			filepath.Join(h.StateDir, "pki"): os.ModeDir | 0o700, filepath.Join(h.StateDir, "pki", "identity.pem"): 0o600,
			filepath.Join(h.RunDir, "overlayd.sock"): os.ModeSocket | 0o660, filepath.Join(h.RunDir, "ca.pem"): 0o644,
		} {
			if fi, err := os.Stat(path); err != nil || fi.Mode() != want {
				t.Errorf("%s: %v %v, want %v", path, fi, err, want)
			}
		}
	})

	t.Run("revoked", func(t *testing.T) {
		id, err := os.ReadFile(filepath.Join(h.StateDir, "agent-id"))
		must(t, err)
		_, err = s.Overlayctl(ctx, "agents", "revoke", strings.TrimSpace(string(id)))
		must(t, err)
		says(t, "was revoked at", status)
		talk(t)
		must(t, h.Proc.Stop())
		token, err := s.Token(ctx)
		must(t, err)
		must(t, h.StartAgent(s.Coordinator.URL, "--join-token", token))
		wait(t, "the host to be back", 20*time.Second, func() error {
			out, err := status().CombinedOutput()
			if err == nil && strings.Contains(string(out), "NOT RENEWED") {
				err = fmt.Errorf("%s", out)
			}
			return err
		})
		talk(t)
	})

	t.Run("CA rotated and the old one retired", func(t *testing.T) {
		before, err := os.ReadFile(filepath.Join(h.RunDir, "ca.pem"))
		must(t, err)
		_, err = s.Overlayctl(ctx, "ca", "rotate")
		must(t, err)
		for _, h := range s.Hosts() {
			// It hears of it with a request, asks for it within 30 s, and does so with
			// another request; there is one every 30 s.
			wait(t, h.Name+" to know the new CA", 2*time.Minute, func() error {
				now, err := os.ReadFile(filepath.Join(h.RunDir, "ca.pem"))
				if err == nil && len(now) <= len(before) {
					err = fmt.Errorf("it knows the old one alone")
				}
				return err
			})
		}
		_, err = s.Overlayctl(ctx, "ca", "rotate", "--retire")
		must(t, err)
		for _, h := range s.Hosts() {
			wait(t, h.Name+" to be connected", 20*time.Second, func() error {
				out, err := s.Overlayctl(ctx, "agents", "-o", "json")
				if err == nil && strings.Count(out, `"connected": true`) != len(s.Hosts()) {
					err = fmt.Errorf("%s", out)
				}
				return err
			})
		}
		talk(t)
	})
}
