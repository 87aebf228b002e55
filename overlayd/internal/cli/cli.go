// Package cli is what the command lines of overlayd and overlayctl share: where
// the value of a flag comes from, the kinds of values there are, and exit codes.
// Parsing, help and completion are cobra's.
//
// A flag takes its value from the command line, else from the environment
// (OVERLAYD_ and its name), else from the configuration file of its command, else
// it has its default. ADR 0032.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Exit codes.
const (
	ExitOK      = 0
	ExitFailure = 1
	ExitUsage   = 2 // a mistake in the command line, the environment or a configuration
)

// LookupEnv returns the value of an environment variable, like os.LookupEnv.
type LookupEnv func(name string) (value string, ok bool)

// UsageError is a mistake in the command line, the environment or a
// configuration file. The program exits with ExitUsage.
type UsageError struct{ error }

func (e UsageError) Unwrap() error { return e.error }

// Usage makes err a UsageError; nil stays nil.
func Usage(err error) error {
	if err == nil {
		return nil
	}
	return UsageError{err}
}

// Usagef is a UsageError with a text.
func Usagef(format string, args ...any) error { return UsageError{fmt.Errorf(format, args...)} }

// ErrReported makes the program exit with ExitFailure without a message: the
// command has printed already what is wrong.
var ErrReported = errors.New("what is wrong has been printed")

// daemon is the annotation of a command that works until it is stopped.
const daemon = "overlayd.daemon"

// Daemon marks a command that works until it is stopped: that it was stopped is no
// failure, also where it was still starting.
func Daemon(cmd *cobra.Command) *cobra.Command {
	cmd.Annotations = map[string]string{daemon: ""}
	return cmd
}

// Run executes a command line and returns the exit code. Errors of root's
// commands are printed once, on stderr. What was interrupted has failed, but for
// a Daemon.
func Run(ctx context.Context, root *cobra.Command, args []string, env LookupEnv, stdout, stderr io.Writer) int {
	parsed := false
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetArgs(append([]string{}, args...)) // nil would stand for os.Args
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.InitDefaultCompletionCmd(args...) // after SetOut, whose writer it keeps
	addMan(root)
	prepare(root)
	root.SetFlagErrorFunc(flagError)
	root.SetHelpCommand(helpCommand())
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if err := fillFlags(cmd.Flags(), env); err != nil {
			return err
		}
		parsed = true
		return nil
	}
	cmd, err := root.ExecuteContextC(ctx)
	switch {
	case err == nil:
		return ExitOK
	case errors.Is(err, ErrReported):
		return ExitFailure
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		if _, ok := cmd.Annotations[daemon]; ok {
			return ExitOK
		}
		fmt.Fprintf(stderr, "%s: interrupted\n", cmd.CommandPath())
		return ExitFailure
	}
	fmt.Fprintf(stderr, "%s: %s\n", cmd.CommandPath(), Printable(err))
	if !parsed || errors.As(err, new(UsageError)) {
		return ExitUsage
	}
	return ExitFailure
}

// Printable is what an error says. It may repeat what hosts and containers say, and
// that cannot steer the terminal.
func Printable(err error) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) && r != '\n' && r != '\t' {
			return ' '
		}
		return r
	}, err.Error())
}

// prepare gives every command of the tree what is the same for all of them:
// flags in the order they were declared in, and for commands that only have
// commands below them an error that lists these.
func prepare(cmd *cobra.Command) {
	cmd.DisableFlagsInUseLine = true
	cmd.Flags().SortFlags, cmd.PersistentFlags().SortFlags = false, false
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Args, cmd.RunE = cobra.ArbitraryArgs, needCommand
	}
	for _, c := range cmd.Commands() {
		prepare(c)
	}
}

// needCommand runs where a command below cmd is missing.
func needCommand(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return Usagef("unknown command %q%s; %s --help lists the commands", args[0], suggestion(cmd, args[0]), cmd.CommandPath())
	}
	if cmd.HasParent() {
		return Usagef("command missing; %s --help lists the commands", cmd.CommandPath())
	}
	cmd.SetOut(cmd.ErrOrStderr())
	if err := cmd.Help(); err != nil {
		return err
	}
	return UsageError{errors.New("command missing")}
}

func suggestion(cmd *cobra.Command, typed string) string {
	cmd.SuggestionsMinimumDistance = 2
	if names := cmd.SuggestionsFor(typed); len(names) > 0 {
		return ", did you mean " + strings.Join(names, " or ") + "?"
	}
	return ""
}

// helpCommand is cobra's, but for an unknown command it fails.
func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND...]", Short: "show what a command does",
		RunE: func(cmd *cobra.Command, args []string) error {
			found, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return Usagef("unknown command %q; %s --help lists the commands", strings.Join(args, " "), cmd.Root().Name())
			}
			found.InitDefaultHelpFlag()
			return found.Help()
		},
	}
}

// flagError says in our words what is wrong with the flags on the command line.
// It does not repeat what stands behind a '=': that may be a secret.
func flagError(cmd *cobra.Command, err error) error {
	var bad *pflag.InvalidValueError
	var unknown *pflag.NotExistError
	switch {
	case errors.Is(err, pflag.ErrHelp):
		return err
	case errors.As(err, &bad):
		return Usagef("--%s: %w", bad.GetFlag().Name, explain(bad.GetFlag(), bad.GetValue(), bad.Unwrap()))
	case errors.As(err, &unknown) && len(unknown.GetSpecifiedShortnames()) > 1:
		name, _, _ := strings.Cut(unknown.GetSpecifiedShortnames(), "=")
		return Usagef("unknown flag: -%s; flags are written with two dashes, as in --%s; %s --help lists them", name, name, cmd.CommandPath())
	}
	return Usagef("%w; %s --help lists the flags", err, cmd.CommandPath())
}
