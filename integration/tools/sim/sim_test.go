package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestSmall goes through everything with 2,000 agents, and expects what is
// expected of 65,536.
func TestSmall(t *testing.T) {
	dir := t.TempDir()
	overlayd := filepath.Join(dir, "overlayd")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", dir, "../../../overlayd", "../../../overlayd/overlayctl").CombinedOutput(); err != nil {
		t.Fatalf("build overlayd: %v\n%s", err, out)
	}
	r, err := simulate(t.Context(), config{
		overlayd: overlayd, agents: 2000, watchers: 64, joiners: 16, cold: 16, idle: 64, conns: 64, plain: 50, containers: 20, secure: true, rounds: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	r.print(&b)
	t.Log(b.String())
	if n := r.missed(); n > 0 {
		t.Errorf("%d goals missed", n)
	}
}
