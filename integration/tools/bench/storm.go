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

// storm has the simulator drive one coordinator with 65,536 agents, and takes
// over what it measured and its verdicts. With -base it compares both builds, and
// TLS with none.
func storm(ctx context.Context, c *config) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	file := filepath.Join(c.lab.Dir, "sim.json")
	args := []string{"-overlayd", filepath.Join(c.bin, "overlayd"), "-json", file}
	if c.base != "" {
		args = append(args, "-base", filepath.Join(c.base, "overlayd"), "-secure")
	}
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
