package main

import (
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
)

// A socket that a killed coordinator has left keeps nobody from the coordinators that
// the agent of this host has published.
func TestSocketLeftBehind(t *testing.T) {
	url := cluster(t)
	runDir, stateDir := t.TempDir(), t.TempDir()
	if err := conf.WriteJSON(filepath.Join(runDir, conf.StateFile), conf.State{Coordinators: []string{url}}, 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(stateDir, socketFile), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, given := range []bool{false, true} {
		var stderr strings.Builder
		e := &env{stdout: io.Discard, stderr: &stderr, runDir: runDir, stateDir: stateDir, stateDirGiven: func() bool { return given }}
		client, err := e.client(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.Agents(t.Context()); (err != nil) != given || strings.Contains(stderr.String(), "was left behind") == given {
			t.Errorf("the state directory is named: %v: %v, %s", given, err, &stderr)
		}
	}
}
