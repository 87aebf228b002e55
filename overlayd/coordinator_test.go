package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/coordinator"
)

// A file that was applied is not said to be refused because the state directory takes
// no writes.
func TestAppliedFileThatCannotBeWrittenDown(t *testing.T) {
	dir := t.TempDir()
	const file = `dcos_overlay_network: {vtep_subnet: 44.128.0.0/20, vtep_mac_oui: "70:B3:D5:00:00:00", overlays: [{name: dcos, subnet: 9.0.0.0/8, prefix: 24}]}`
	f := coordinatorFlags{config: filepath.Join(dir, "overlay.yaml"), stateDir: filepath.Join(dir, "state")}
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(f.config, file)
	network, err := loadNetwork(f.config)
	if err != nil {
		t.Fatal(err)
	}
	s, _, err := f.store.open(t.Context(), filepath.Join(dir, "store"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c, err := coordinator.New(t.Context(), coordinator.Options{Network: network, Store: s, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- c.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	}()

	write(f.stateDir, "a file in the place of the directory")
	write(f.config, strings.Replace(file, "9.0.0.0/8", "9.0.0.0/9", 1))
	var log bytes.Buffer
	f.applyFile(ctx, c, slog.New(slog.NewTextHandler(&log, nil)))
	if plan := c.PlanNetwork(network); len(plan.Changes) != 1 {
		t.Errorf("%+v: the file was not applied", plan)
	}
	if got := log.String(); strings.Contains(got, "was not applied") || !strings.Contains(got, "changes=1") || !strings.Contains(got, "send SIGHUP again") {
		t.Errorf("logged:\n%s", got)
	}
}
