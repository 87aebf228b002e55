// Overlayd is the daemon of the overlay: "overlayd coordinator" leases subnets
// to the hosts of a cluster, "overlayd agent" makes the networks on one host.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"
)

// version is set when the program is built.
var version = "dev"

const usage = `usage: overlayd <command> [flags]

  coordinator        lease VTEP addresses and subnets to the agents of a cluster
  agent              make the overlays on this host
  check-config FILE  say what a cluster configuration would do, or what is wrong with it
  version            print the version

overlayd <command> --help lists the flags of a command.
`

func main() {
	ends := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as by nohup
		ends = append(ends, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	context.AfterFunc(ctx, stop) // a second signal kills
	os.Exit(run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

// run executes one command line and returns its exit code: 0 ok, 1 failure,
// 2 wrong usage or configuration.
func run(ctx context.Context, args []string, env func(string) (string, bool), stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	}
	command, args := args[0], args[1:]
	var err error
	switch command {
	case "coordinator":
		err = runCoordinator(ctx, args, env, stdout, stderr)
	case "agent":
		err = runAgent(ctx, args, env, stdout, stderr)
	case "check-config":
		err = checkConfig(args, stdout)
	case "version", "--version":
		_, err = fmt.Fprintf(stdout, "overlayd %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	case "help", "--help", "-h":
		_, err = fmt.Fprint(stdout, usage)
	default:
		err = usagef("unknown command; overlayd help lists them")
	}
	switch {
	case err == nil || errors.Is(err, errHelp):
		return 0
	case ctx.Err() != nil && errors.Is(err, context.Canceled): // stopped while starting
		return 0
	case errors.As(err, new(usageError)):
		fmt.Fprintf(stderr, "overlayd %s: %v\n", command, err)
		return 2
	default:
		fmt.Fprintf(stderr, "overlayd %s: %v\n", command, err)
		return 1
	}
}
