package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// storm has the simulator drive one coordinator with 65,536 agents. With -base it
// compares both builds, and TLS with none.
func storm(ctx context.Context, c *config) error {
	if c.base == "" {
		return c.simulate(ctx)
	}
	return c.simulate(ctx, "-base", filepath.Join(c.base, "overlayd"), "-secure")
}

// reports compares the storm of 65,536 agents that report 20 containers each with the
// same without reports.
func reports(ctx context.Context, c *config) error {
	return c.simulate(ctx, "-containers", "20", "-only")
}

// simulate takes over what the simulator measured, and its verdicts.
func (c *config) simulate(ctx context.Context, flags ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	file := filepath.Join(c.lab.Dir, "sim.json")
	args := append(flags, "-overlayd", filepath.Join(c.bin, "overlayd"), "-json", file)
	cmd := exec.CommandContext(ctx, filepath.Join(filepath.Dir(self), "sim"), args...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 1) {
		return fmt.Errorf("sim: %w\n%s", err, indent(string(out)))
	}
	b, err := os.ReadFile(file)
	if err != nil { // it failed; a goal that was missed is in its report
		return fmt.Errorf("sim: %s", strings.TrimSpace(string(out)))
	}
	var measured Report
	if err := json.Unmarshal(b, &measured); err != nil {
		return fmt.Errorf("sim: %w", err)
	}
	for _, r := range measured.Rows {
		r.Part = "65,536 agents: " + r.Part
		c.report.Rows = append(c.report.Rows, r)
	}
	for _, g := range measured.Goals {
		g.Part = "65,536 agents: " + g.Part
		c.report.Goals = append(c.report.Goals, g)
	}
	return nil
}
