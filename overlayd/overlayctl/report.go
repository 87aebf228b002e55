package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/audit/doctor"
	"overlayd.internal/overlay/overlayd/internal/audit/report"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

func (e *env) reportCommand() *cobra.Command {
	return &cobra.Command{
		Use: "report [FILE]", Short: "one archive with all that somebody needs who looks at this host from afar", Args: cobra.MaximumNArgs(1),
		Long: `One archive with all that somebody needs who looks at this host from afar: what
the agent published and stored, the kernel's tables, firewalls, settings, logs,
what doctor finds, and the cluster's state if a coordinator answers.

Keys and certificates are left out; tokens, passwords and the like are removed
from all that is in it. FILE is overlay-report-TIME.tar.gz in the current
directory if it is not given, and standard output if it is "-".`,
		Example: "  overlayctl report\n  overlayctl report - | ssh help@example.org 'cat > report.tar.gz'",
		RunE: func(cmd *cobra.Command, args []string) error {
			path := "overlay-report-" + time.Now().UTC().Format("20060102T150405Z") + ".tar.gz"
			if len(args) > 0 {
				path = args[0]
			}
			return e.runReport(cmd.Context(), path)
		},
	}
}

func (e *env) runReport(ctx context.Context, path string) (err error) {
	o := report.Options{RunDir: e.runDir, Documents: map[string]any{}}
	state, _ := lastPublished(e.runDir) // the archive says so too
	o.Dirs = state.Directories
	o.Dirs.State = e.agentStateDir()
	if terminal(e.stderr) {
		o.Progress = func(name string) { fmt.Fprintf(e.stderr, "\r\x1b[K%s", name) }
		defer fmt.Fprint(e.stderr, "\r\x1b[K")
	}
	e.documents(ctx, o.Documents)
	if path == "-" {
		return report.Write(ctx, e.stdout, o)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return cli.Usage(err)
	}
	if err := report.Write(ctx, f, o); err != nil {
		f.Close()
		os.Remove(path) // half of it helps nobody
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	_, err = fmt.Fprintln(e.stdout, path)
	return err
}

// documents adds what doctor, agent and coordinator say.
func (e *env) documents(ctx context.Context, to map[string]any) {
	either := func(name string, v any, err error) {
		if err != nil {
			v = err
		}
		to[name] = v
	}
	findings, err := doctor.Examine(ctx, doctor.Options{RunDir: e.runDir, StateDir: e.agentStateDir(), Coordinators: e.probe, Version: version})
	either("doctor.json", findings, err)
	state, err := askAgent(ctx, e.runDir)
	either("agent.json", state, err)
	client, err := e.client(ctx)
	if err != nil {
		to["cluster.txt"] = err
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 3*probeTimeout)
	defer cancel()
	master, err := client.State(ctx)
	either("cluster/state.json", master, err)
	agents, err := client.Agents(ctx)
	either("cluster/agents.json", agents, err)
	overlays, err := client.Overlays(ctx)
	either("cluster/overlays.json", overlays, err)
}

// terminal reports whether people look at w.
func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	fi, err := f.Stat()
	return err == nil && fi.Mode()&os.ModeCharDevice != 0
}
