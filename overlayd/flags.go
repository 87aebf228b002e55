package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"text/tabwriter"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/clusterfile"
)

// option is one flag of a command. A new flag is one more line in the
// command's table.
type option struct {
	name string // without dashes; in the environment OVERLAYD_NAME
	arg  string // what the help calls its value; empty: a switch
	def  string // default
	help string
	list string // separates the items of a list; empty: not a list
	set  func(value string) error
}

// errHelp: help was asked for and has been printed.
var errHelp = errors.New("help requested")

// usageError is a mistake of whoever wrote the command line, the environment or
// a configuration file.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// parse sets every option: from the command line, else from the environment,
// else from the configuration file, else to its default. configFile names the
// option that holds the path of that file; empty: the command has none. It
// returns the arguments behind the flags.
func parse(command string, options []option, configFile string, args []string, env func(string) (string, bool), help io.Writer) ([]string, error) {
	given, rest, err := commandLine(options, args)
	if errors.Is(err, flag.ErrHelp) {
		printHelp(help, command, options)
		return nil, errHelp
	}
	if err != nil {
		return nil, usagef("%w; overlayd %s --help lists the flags", err, command)
	}
	fromFile := map[string]string{}
	if configFile != "" {
		path, ok := given[configFile]
		if !ok {
			path, ok = env(envName(configFile))
		}
		if ok && path != "" {
			if fromFile, err = readConfig(path, options, configFile); err != nil {
				return nil, err
			}
		}
	}
	for _, o := range options {
		value, source := o.def, "default of --"+o.name
		if v, ok := given[o.name]; ok {
			value, source = v, "--"+o.name
		} else if v, ok := env(envName(o.name)); ok {
			value, source = v, envName(o.name)
		} else if v, ok := fromFile[o.name]; ok {
			value, source = v, o.name+" in the configuration file"
		}
		if err := o.set(value); err != nil {
			return nil, usagef("%s: %w", source, err)
		}
	}
	return rest, nil
}

func envName(flag string) string {
	return "OVERLAYD_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// commandLine returns the flags that are given, and what stands behind them.
func commandLine(options []option, args []string) (map[string]string, []string, error) {
	fs := flag.NewFlagSet("", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	for _, o := range options {
		if o.arg == "" {
			fs.Bool(o.name, false, o.help)
		} else {
			fs.String(o.name, o.def, o.help)
		}
	}
	if err := fs.Parse(args); err != nil {
		return nil, nil, err
	}
	given := map[string]string{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = f.Value.String() })
	return given, fs.Args(), nil
}

// readConfig reads a configuration file with the names of flags as keys; self
// is the flag that names the file.
func readConfig(path string, options []option, self string) (map[string]string, error) {
	var known []string
	for _, o := range options {
		if o.name != self {
			known = append(known, o.name)
		}
	}
	values, problems, err := clusterfile.LoadFlags(path, known)
	if err != nil {
		return nil, usageError{err}
	}
	out := map[string]string{}
	for _, o := range options {
		items, ok := values[o.name]
		if !ok {
			continue
		}
		if len(items) != 1 && o.list == "" {
			problems = append(problems, conf.Problem{Path: o.name, Text: "want one value, not a list"})
		}
		out[o.name] = strings.Join(items, o.list)
	}
	return out, asError(path, problems)
}

// asError makes one error of all problems of a file, or nil.
func asError(path string, problems []conf.Problem) error {
	if len(problems) == 0 {
		return nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %d problem", path, len(problems))
	if len(problems) > 1 {
		b.WriteByte('s')
	}
	for _, p := range problems {
		b.WriteString("\n  " + p.String())
	}
	return usageError{errors.New(b.String())}
}

func printHelp(w io.Writer, command string, options []option) {
	fmt.Fprintf(w, "usage: overlayd %s [flags]\n\n", command)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, o := range options {
		line := "  --" + o.name
		if o.arg != "" {
			line += " " + o.arg
		}
		line += "\t" + o.help
		if o.def != "" && o.arg != "" {
			line += " (default " + o.def + ")"
		}
		fmt.Fprintln(t, line)
	}
	t.Flush()
	fmt.Fprintf(w, "\nEach can be set in the environment too, as in %s.\n", envName(options[len(options)-1].name))
}

// The setters of the kinds of values there are.

func setString(to *string) func(string) error {
	return func(s string) error {
		*to = s
		return nil
	}
}

func setBool(to *bool) func(string) error {
	return func(s string) (err error) {
		if *to, err = strconv.ParseBool(s); err != nil {
			return fmt.Errorf("%q: want true or false", s)
		}
		return nil
	}
}

// setListen reads an address to listen on.
func setListen(to *string) func(string) error {
	return func(s string) error {
		_, port, err := net.SplitHostPort(s)
		if err == nil {
			_, err = net.LookupPort("tcp", port)
		}
		if err != nil || port == "" {
			return fmt.Errorf("%q: want an address and a port, as in 0.0.0.0:6440", s)
		}
		*to = s
		return nil
	}
}

// optional lets a value be empty.
func optional(to *string, set func(*string) func(string) error) func(string) error {
	return func(s string) error {
		if s == "" {
			*to = ""
			return nil
		}
		return set(to)(s)
	}
}

// setList reads items with a separator between them; no item may be empty.
func setList(to *[]string, separator string) func(string) error {
	return func(s string) error {
		*to = nil
		if s == "" {
			return nil
		}
		for item := range strings.SplitSeq(s, separator) {
			if item == "" {
				return fmt.Errorf("%q: an item between two %q is empty", s, separator)
			}
			*to = append(*to, item)
		}
		return nil
	}
}
