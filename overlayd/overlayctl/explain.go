package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/audit/doctor"
	"overlayd.internal/overlay/overlayd/internal/audit/explain"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

func (e *env) explainCommand() *cobra.Command {
	return &cobra.Command{
		Use: "explain A B", Short: "the way from a container of this host to another address, and where it stops",
		Long: `The way from a container of this host to another address, and where it stops.

A and B are container ids of this host, the beginning of one, or addresses; B may
be on another host or outside. Walks lease, isolation, forwarding, firewall, VTEP,
route and neighbour, and sends probes with the overlay's own encapsulation.

The exit code is 0 if B is reached, else 1.`,
		Example: "  overlayctl explain 3f2c 9.0.2.130\n  overlayctl explain 9.0.1.2 192.0.2.1 -o json",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return cli.Usagef("want two arguments: container ids or addresses")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return e.runExplain(cmd.Context(), args[0], args[1]) },
	}
}

func (e *env) runExplain(ctx context.Context, a, b string) error {
	r, err := explain.Walk(ctx, doctor.Options{RunDir: e.runDir, StateDir: e.agentStateDir()}, a, b)
	if err != nil {
		return err
	}
	if e.structured() {
		err = e.print(r)
	} else {
		var rows [][]string
		for _, s := range r.Steps {
			mark := "ok"
			if !s.OK {
				mark = "STOP"
			}
			rows = append(rows, []string{mark, s.Name, s.Text})
		}
		if err = e.printTable([]string{"", "STEP", "SEEN"}, rows); err == nil && r.Reachable {
			_, err = fmt.Fprintf(e.stdout, "\n%s reaches %s\n", printable(a), printable(b))
		}
	}
	if err == nil && !r.Reachable {
		err = cli.ErrReported
	}
	return err
}
