// Overlayctl shows what the overlay network does: on this host, and in the
// cluster.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

// version is set when the program is built.
var version = "dev"

// commands is what can be typed. A new command is a file of its own and a line
// here; flags of its own are declared there.
func (e *env) commands() []*cobra.Command {
	return []*cobra.Command{
		e.watchable(e.statusCommand()),
		e.watchable(e.stateCommand()),
		e.watchable(e.agentsCommand()),
		e.watchable(e.overlaysCommand()),
		e.ipamCommand(),
		e.storeCommand(),
		e.backupCommand(),
		e.restoreCommand(),
		e.importStateCommand(),
		e.tokenCommand(),
		e.caCommand(),
		e.loginCommand(),
		e.watchable(e.peersCommand()),
		e.watchable(e.containersCommand()),
		e.eventsCommand(),
		e.doctorCommand(),
		e.explainCommand(),
		e.pingCommand(),
		e.logLevelCommand(),
		e.reportCommand(),
		e.pageCommand(),
		e.versionCommand(),
	}
}

// env is what every command gets: the flags that all have.
type env struct {
	stdout      io.Writer
	stderr      io.Writer
	coordinator []string // URLs; empty: those of the agent of this host
	runDir      string
	stateDir    string
	// stateDirGiven reports whether somebody has named the state directory.
	stateDirGiven func() bool
	output        string // one of outputs
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // who waits for what does not end by itself interrupts twice
	code := run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit code: 0 ok, 1 failure, 2 usage.
func run(ctx context.Context, args []string, lookup cli.LookupEnv, stdout, stderr io.Writer) int {
	return cli.Run(ctx, rootCommand(&env{stdout: stdout, stderr: stderr}), args, lookup, stdout, stderr)
}

func rootCommand(e *env) *cobra.Command {
	root := &cobra.Command{
		Use:     "overlayctl",
		Short:   "see and change what the overlay network does",
		Version: version,
		Long: `See and change what the overlay network does: on this host, and in the cluster.

Without --coordinator the coordinator that runs on this host is asked, as root,
or those of this host's agent, or those of the login (overlayctl login), or
` + defaultCoordinator + `. A flag takes its value from the command line, else from
the environment, as in OVERLAYD_COORDINATOR.`,
	}
	fs := root.PersistentFlags()
	fs.Var(cli.List(&e.coordinator, ",", "", "URL[,URL...]"), "coordinator", "the coordinators (default: those of the agent on this host)")
	fs.Var(cli.String(&e.runDir, conf.DefaultRunDir, "DIR"), "run-dir", "run directory of the agent on this host")
	fs.Var(cli.String(&e.stateDir, conf.DefaultStateDir, "DIR"), "state-dir", "state directory: of the coordinator on this host, where root is operator, and of the agent")
	e.stateDirGiven = func() bool { return e.stateDir != conf.DefaultStateDir }
	fs.VarP(cli.Choice(&e.output, outputTable, outputs...), "output", "o", "how to print")
	root.AddCommand(e.commands()...)
	return root
}
