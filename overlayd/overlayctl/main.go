// Overlayctl shows what the overlay network does: on this host, and in the
// cluster.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

const (
	defaultCoordinator = "http://127.0.0.1:6440"
	envCoordinator     = "OVERLAYD_COORDINATOR"
	envRunDir          = "OVERLAYD_RUN_DIR"
)

// commands is the table of what can be typed. A new command is a file of its
// own and a line here.
func commands() []command {
	return []command{
		statusCommand(),
		stateCommand(),
		agentsCommand(),
		overlaysCommand(),
		ipamCommand(),
	}
}

// command is one word after overlayctl.
type command struct {
	name, args, summary string
	// flags adds flags of its own beside the common ones; may be nil.
	flags func(*flag.FlagSet)
	run   func(ctx context.Context, e *env, args []string) error
}

// env is what every command gets.
type env struct {
	stdout, stderr io.Writer
	coordinator    string // one URL or several, separated by commas; "": those of the agent of this host
	runDir         string
	output         string // table or json
}

// client is a client of the coordinator: the one asked for, or else that of the
// agent of this host.
func (e *env) client(ctx context.Context) (*api.Client, error) {
	if e.coordinator != "" {
		return e.clientOr(nil)
	}
	state, err := askAgent(ctx, e.runDir)
	if err != nil {
		state, _ = lastPublished(e.runDir) // it need not be there
	}
	return e.clientOr(state.Coordinators)
}

// clientOr is client, with the agent's coordinators known.
func (e *env) clientOr(agents []string) (*api.Client, error) {
	urls := []string{defaultCoordinator}
	switch {
	case e.coordinator != "":
		urls = strings.Split(e.coordinator, ",")
	case len(agents) > 0:
		urls = agents
	}
	c, err := api.NewClient(urls, nil)
	if err != nil {
		return nil, usageError{fmt.Errorf("--coordinator: %w", err)}
	}
	return c, nil
}

// usageError is an error of the one who typed; the exit code is 2.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// errNoCommand: what there is to type has been listed; the exit code is 2.
var errNoCommand = errors.New("no command")

// errUnhealthy: everything has been said already; the exit code is 1.
var errUnhealthy = errors.New("not everything is in order")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, commands(), os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit code: 0 ok, 1 failure, 2 usage.
func run(ctx context.Context, table []command, args []string, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	e := &env{stdout: stdout, stderr: stderr}
	err := dispatch(ctx, table, e, args, lookup)
	var usage usageError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errNoCommand):
		return 2
	case errors.Is(err, errUnhealthy):
		return 1
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "overlayctl: %v\n", err)
		return 2
	}
	fmt.Fprintf(stderr, "overlayctl: %v\n", err)
	return 1
}

func dispatch(ctx context.Context, table []command, e *env, args []string, lookup func(string) (string, bool)) error {
	for key, at := range map[string]*string{envCoordinator: &e.coordinator, envRunDir: &e.runDir} {
		if v, ok := lookup(key); ok {
			*at = v
		}
	}
	if e.runDir == "" {
		e.runDir = conf.DefaultRunDir
	}
	e.output = "table"

	before, err := parse(e, table, nil, args, true)
	if err != nil {
		return err
	}
	if len(before) == 0 {
		list(e.stderr, table)
		return errNoCommand
	}
	if before[0] == "help" {
		list(e.stdout, table)
		return nil
	}
	for i := range table {
		if c := &table[i]; c.name == before[0] {
			rest, err := parse(e, table, c, before[1:], false)
			if err != nil {
				return err
			}
			if e.output != "table" && e.output != "json" {
				return usagef("-o %q: want table or json", e.output)
			}
			return c.run(ctx, e, rest)
		}
	}
	return usagef("no command %q; the commands are %s", before[0], strings.Join(names(table), ", "))
}

// parse reads the common flags, and those of c if it is not nil, and returns
// the other arguments. Flags may stand anywhere; with untilCommand everything
// from the first argument that is no flag on is left alone.
func parse(e *env, table []command, c *command, args []string, untilCommand bool) ([]string, error) {
	name := "overlayctl"
	if c != nil {
		name += " " + c.name
	}
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&e.coordinator, "coordinator", e.coordinator, "`URL` of the coordinator, several separated by commas (default: that of the agent on this host, or "+defaultCoordinator+")")
	fs.StringVar(&e.runDir, "run-dir", e.runDir, "run `directory` of the agent on this host")
	fs.StringVar(&e.output, "o", e.output, "output, `table or json`")
	if c != nil && c.flags != nil {
		c.flags(fs)
	}
	var rest []string
	for {
		if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
			help(e.stdout, table, c, fs)
			return nil, err
		} else if err != nil {
			return nil, usagef("%w; see %s -h", err, name)
		}
		dashes := len(args) > fs.NArg() && args[len(args)-fs.NArg()-1] == "--"
		args = fs.Args()
		if len(args) == 0 || untilCommand || dashes {
			return append(rest, args...), nil
		}
		rest, args = append(rest, args[0]), args[1:]
	}
}

func names(table []command) (out []string) {
	for _, c := range table {
		out = append(out, c.name)
	}
	return out
}

// list prints the commands.
func list(w io.Writer, table []command) {
	fmt.Fprint(w, "overlayctl shows what the overlay network does.\n\nusage: overlayctl COMMAND [--coordinator URL] [--run-dir DIR] [-o table|json]\n\n")
	tw := newTable(w)
	for _, c := range table {
		fmt.Fprintf(tw, "  %s\t%s\n", strings.TrimSpace(c.name+" "+c.args), c.summary)
	}
	tw.Flush()
	fmt.Fprintf(w, "\nWithout --coordinator the one of this host's agent is asked, or %s.\n%s and %s stand for the first two flags.\n", defaultCoordinator, envCoordinator, envRunDir)
}

func help(w io.Writer, table []command, c *command, fs *flag.FlagSet) {
	if c == nil {
		list(w, table)
		return
	}
	fmt.Fprintf(w, "usage: %s [flags]\n\n%s\n\n", strings.TrimSpace("overlayctl "+c.name+" "+c.args), c.summary)
	fs.SetOutput(w)
	fs.PrintDefaults()
}

// noArgs refuses arguments of a command that takes none.
func noArgs(args []string) error {
	if len(args) > 0 {
		return usagef("unexpected argument %q", args[0])
	}
	return nil
}

func newTable(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 0, 8, 2, ' ', 0) }
