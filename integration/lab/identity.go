package lab

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// coordinatorDir has the coordinator's store, keys and socket.
func (l *Lab) coordinatorDir() string { return filepath.Join(l.Dir, "coordinator") }

func (l *Lab) scheme() string {
	if l.secure {
		return "https://"
	}
	return "http://"
}

// Operator speaks HTTP with the coordinator as root of its host, on its socket, which
// does not care for network namespaces.
func (c *Coordinator) Operator() *http.Client {
	return socketClient(filepath.Join(c.dir, "coordinator.sock"))
}

func socketClient(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}
}

// Overlayctl runs overlayctl as root of the coordinator's host and returns what
// it prints.
func (l *Lab) Overlayctl(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(l.Bin, "overlayctl"), append(args, "--state-dir", l.coordinatorDir())...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("overlayctl %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out), nil
}

// Token makes a token for one host.
func (l *Lab) Token(ctx context.Context) (string, error) {
	out, err := l.Overlayctl(ctx, "token", "create")
	return strings.TrimSpace(out), err
}

// identity is the flag by which an agent identifies itself: a token, unless it
// has joined, or --insecure.
func (h *Host) identity(coordinator string) (string, error) {
	if strings.HasPrefix(coordinator, "http://") {
		return "--insecure", nil
	}
	if _, err := os.Stat(filepath.Join(h.StateDir, "pki", "identity.pem")); err == nil {
		return "--insecure=false", nil
	}
	token, err := h.Lab.Token(context.Background())
	return "--join-token=" + token, err
}
