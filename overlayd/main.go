// Overlayd is the daemon of the overlay: "overlayd coordinator" leases subnets
// to the hosts of a cluster, "overlayd agent" makes the networks on one host.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/cli"
)

// version is set when the program is built.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills
	os.Exit(run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

// untilHangup ends with ctx, or when the terminal is closed unless that is ignored, as
// by nohup.
func untilHangup(ctx context.Context) (context.Context, context.CancelFunc) {
	if signal.Ignored(syscall.SIGHUP) {
		return context.WithCancel(ctx)
	}
	return signal.NotifyContext(ctx, syscall.SIGHUP)
}

// run executes one command line and returns its exit code: 0 ok, 1 failure,
// 2 wrong usage or configuration.
func run(ctx context.Context, args []string, env cli.LookupEnv, stdout, stderr io.Writer) int {
	return cli.Run(ctx, rootCommand(env), args, env, stdout, stderr)
}

// rootCommand is the tree of commands. Each command has a file of its own, which
// declares its flags too.
func rootCommand(env cli.LookupEnv) *cobra.Command {
	root := &cobra.Command{
		Use:     "overlayd",
		Short:   "the daemon of the overlay network",
		Version: version,
		Long: `The daemon of the overlay network. One process of a cluster runs "overlayd
coordinator", every host runs "overlayd agent".

A flag takes its value from the command line, else from the environment (as in
OVERLAYD_STATE_DIR), else from the file of --config where a command has one, else
its default.`,
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(coordinatorCommand(env), agentCommand(env), checkConfigCommand(), importStateCommand(), versionCommand())
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "print the version", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "overlayd %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}
