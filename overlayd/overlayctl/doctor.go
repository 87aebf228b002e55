package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/audit/doctor"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

func (e *env) doctorCommand() *cobra.Command {
	o := doctor.Options{Coordinators: e.probe, Version: version}
	fix := false
	cmd := &cobra.Command{
		Use: "doctor", Short: "what is wrong on this host, and the command that cures it", Args: cobra.NoArgs,
		Long: `What is wrong on this host, and the command that cures it.

Looks at kernel objects and settings, firewalls, other software that gets in the
way, files, addresses, the way to other hosts and to the coordinators. Prints
nothing and exits with 0 where all is well, and with 1 otherwise. What lasts for
less than two seconds is left out: it is under way.

--fix runs the commands of those findings that can be cured without asking, and
looks again.`,
		Example: "  overlayctl doctor\n  overlayctl doctor --fix\n  overlayctl doctor -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.RunDir, o.StateDir = e.runDir, e.agentStateDir()
			return e.runDoctor(cmd.Context(), o, fix)
		},
	}
	cmd.Flags().BoolVar(&fix, "fix", false, "run the commands that need no decision")
	return cmd
}

func (e *env) runDoctor(ctx context.Context, o doctor.Options, fix bool) error {
	findings, err := doctor.Examine(ctx, o)
	if err != nil {
		return err
	}
	if fix {
		if findings, err = e.repair(ctx, o, findings); err != nil {
			return err
		}
	}
	if e.structured() {
		err = e.print(append([]doctor.Finding{}, findings...))
	} else {
		for i, f := range findings {
			if i > 0 {
				fmt.Fprintln(e.stdout)
			}
			if _, err = fmt.Fprintf(e.stdout, "%s (%s): %s\n  seen: %s\n  fix:  %s\n", f.Check, f.Severity, printable(f.What), printable(f.Evidence), f.Fix); err != nil {
				break
			}
		}
	}
	if err == nil && len(findings) > 0 {
		err = cli.ErrReported
	}
	return err
}

// repair runs what can be run and returns what is wrong afterwards.
func (e *env) repair(ctx context.Context, o doctor.Options, findings []doctor.Finding) ([]doctor.Finding, error) {
	done := 0
	for _, f := range findings {
		if !f.Fixable() {
			continue
		}
		fmt.Fprintf(e.stderr, "%s: %s\n", f.Check, f.Fix)
		if err := f.Repair(ctx); err != nil {
			fmt.Fprintf(e.stderr, "%s: %s\n", f.Check, cli.Printable(err)) // the next look shows it too
			continue
		}
		done++
	}
	if done == 0 {
		return findings, nil
	}
	return doctor.Examine(ctx, o)
}

// probeTimeout is how long a coordinator may take to answer.
const probeTimeout = 3 * time.Second

// probe asks each coordinator on its own, all at the same time.
func (e *env) probe(ctx context.Context, urls []string) []doctor.Coordinator {
	if len(e.coordinator) > 0 {
		urls = e.coordinator
	}
	out := make([]doctor.Coordinator, len(urls))
	var all sync.WaitGroup
	for i, url := range urls {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, probeTimeout)
			defer cancel()
			one := *e
			one.coordinator = []string{url}
			out[i].URL = url
			client, err := one.clientOr(nil)
			if err == nil {
				err = client.Ready(ctx)
				out[i].Ahead = client.Ahead()
			}
			out[i].Err = err
		})
	}
	all.Wait()
	return out
}
