package main

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
)

// What was interrupted has not been done, or not been seen: scripts go by the exit
// code. What goes on until it is interrupted has ended well.
func TestInterrupted(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		args string
		code int
	}{
		{"agents", 1}, {"events", 1}, {"state", 1}, {"overlays remove dcos", 1}, {"token create", 1}, {"agents prune", 1}, {"status --wait 1m", 1}, {"status", 1}, {"doctor", 1},
		{"backup " + filepath.Join(dir, "backup"), 1}, {"report " + filepath.Join(dir, "report.tar.gz"), 1}, {"page", 1},
		{"explain 192.0.2.1 192.0.2.2", 1}, {"ping --all", 1},
		{"events --follow", 0}, {"agents --watch", 0},
	} {
		t.Run(tt.args, func(t *testing.T) {
			ctx, interrupt := context.WithCancel(t.Context())
			defer interrupt()
			// Whoever asks is interrupted then, and who asks nobody before.
			coordinator := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body) // only then the server sees that the client has gone
				interrupt()
				<-r.Context().Done()
			}))
			defer coordinator.Close()
			switch tt.args {
			case "doctor", "explain 192.0.2.1 192.0.2.2", "status --wait 1m", "status":
				interrupt()
			}
			var stdout, stderr strings.Builder
			args := append(strings.Fields(tt.args), "--coordinator", coordinator.URL, "--run-dir", dir)
			code := run(ctx, args, func(string) (string, bool) { return "", false }, &stdout, &stderr)
			if code != tt.code || (tt.code == 0) != (stderr.Len() == 0) || stdout.Len() > 0 {
				t.Errorf("exit code %d, want %d\nstdout: %s\nstderr: %s", code, tt.code, stdout.String(), stderr.String())
			}
			left, _ := filepath.Glob(filepath.Join(dir, "*")) // the pattern is ours
			hidden, _ := filepath.Glob(filepath.Join(dir, ".*"))
			if len(left)+len(hidden) > 0 {
				t.Errorf("left: %v %v", left, hidden)
			}
		})
	}
}
