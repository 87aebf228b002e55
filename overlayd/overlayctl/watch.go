package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/cli"
)

// watchEvery is the time between two looks.
const watchEvery = 2 * time.Second

// watchable gives a command that shows something the flag --watch.
func (e *env) watchable(cmd *cobra.Command) *cobra.Command {
	watch := false
	cmd.Flags().BoolVar(&watch, "watch", false, "show it again every two seconds, until interrupted")
	once := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !watch {
			return once(cmd, args)
		}
		ctx := cmd.Context()
		for {
			if terminal(e.stdout) {
				fmt.Fprint(e.stdout, "\x1b[H\x1b[2J")
			}
			if e.output == outputYAML {
				fmt.Fprintln(e.stdout, "---") // a document each time
			}
			if err := once(cmd, args); err != nil && ctx.Err() == nil && !errors.Is(err, cli.ErrReported) {
				fmt.Fprintln(e.stderr, cli.Printable(err)) // it may be well again the next time
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(watchEvery):
			}
		}
	}
	return cmd
}
