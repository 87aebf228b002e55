package cni

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/calls"
)

// supportedVersions are the versions of the specification we speak, oldest first.
var supportedVersions = [...]string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

const (
	defaultVersion = "0.1.0" // of a configuration without cniVersion
	newestVersion  = "1.1.0"
)

// A verb is one CNI_COMMAND.
type verb struct {
	deadline time.Duration
	since    string // the configuration must be of this version or newer
	config   bool   // needs a configuration on stdin
	run      func(ctx context.Context, p Plugin, c *Call, stdout io.Writer) error
}

var verbs = map[string]verb{
	"ADD":     {deadline: 10 * time.Second, config: true, run: add},
	"DEL":     {deadline: 10 * time.Second, config: true, run: func(ctx context.Context, p Plugin, c *Call, _ io.Writer) error { return p.Del(ctx, c) }},
	"CHECK":   {deadline: 5 * time.Second, config: true, since: "0.4.0", run: func(ctx context.Context, p Plugin, c *Call, _ io.Writer) error { return p.Check(ctx, c) }},
	"GC":      {deadline: 10 * time.Second, config: true, since: "1.1.0", run: func(ctx context.Context, p Plugin, c *Call, _ io.Writer) error { return p.GC(ctx, c) }},
	"STATUS":  {deadline: time.Second, config: true, since: "1.1.0", run: func(ctx context.Context, p Plugin, c *Call, _ io.Writer) error { return p.Status(ctx, c) }},
	"VERSION": {deadline: time.Second, run: printVersions},
}

// Main runs the program once and exits.
func Main(p Plugin) {
	growStack(0)
	os.Exit(Run(context.Background(), p, os.LookupEnv, &descriptor{fd: 0}, stdout(), &descriptor{fd: 2}))
}

// Run is Main with everything it touches as an argument. It returns the exit
// status and has written one JSON document, or nothing, to stdout.
func Run(ctx context.Context, p Plugin, env func(string) (string, bool), stdin io.Reader, stdout, stderr io.Writer) int {
	command, _ := env("CNI_COMMAND")
	if command == "" {
		about(p, stderr)
		return 0
	}
	v, known := verbs[command]
	most := time.Second
	if known {
		most = v.deadline
	}
	began := time.Now()
	limited := &deadline{Context: ctx, at: began.Add(most)}
	defer limited.stop()
	ctx = limited

	out := &counter{w: stdout}
	c := &Call{Command: command, Stderr: stderr}
	version := newestVersion
	err := func() (err error) {
		defer func() {
			if r := recover(); r != nil {
				fmt.Fprintf(stderr, "%s: panic: %v\n%s", p.Name, r, debug.Stack())
				err = Errorf(ErrCodeInternal, "%s %s: %v (a defect of the program; its trace is on stderr)", p.Name, command, r)
			}
		}()
		if version, err = prepare(ctx, p, c, v, env, stdin); err != nil {
			return err
		}
		return v.run(ctx, p, c, out)
	}()
	if v.config {
		record(p, c, began, err)
	}
	if err == nil {
		return 0
	}
	if out.n > 0 { // the output broke in the middle of the result
		fmt.Fprintf(stderr, "%s: %v\n", p.Name, err)
		return 1
	}
	if perr := printError(stdout, version, err); perr != nil {
		fmt.Fprintf(stderr, "%s: %v\n%s: print the error: %v\n", p.Name, err, p.Name, perr)
	}
	return 1
}

// record leaves what became of the call where people and the agent find it. It is
// left out where the configuration does not say where that is.
func record(p Plugin, c *Call, began time.Time, err error) {
	if c.Conf.Name == "" || checkPlace(c) != nil {
		return
	}
	r := calls.Call{
		Program: p.Name, Verb: c.Command, Network: c.Conf.Name, ContainerID: c.ContainerID, IfName: c.IfName,
		Began: began, Took: time.Since(began),
	}
	if err != nil {
		e := asError(err)
		r.Code, r.Error = e.Code, e.Msg
	}
	calls.Record(c.Conf.RunDirectory(), r)
}

// prepare fills in the call from environment and stdin. It returns the version
// to answer in, as far as it could be found out, with every error.
func prepare(ctx context.Context, p Plugin, c *Call, v verb, env func(string) (string, bool), stdin io.Reader) (version string, err error) {
	envErr := readEnv(c, v, env)
	version, confErr := readConf(ctx, c, v, stdin)
	if envErr != nil {
		return version, envErr
	}
	if confErr != nil {
		return version, confErr
	}
	if c.Command != "ADD" {
		return version, nil
	}
	if c.Origin = p.Origin; c.Origin == (conf.Origin{}) {
		c.Origin = originOf(c, parentName)
	}
	if p.Interface {
		return version, checkNetNS(c.NetNS)
	}
	return version, nil
}

func add(ctx context.Context, p Plugin, c *Call, stdout io.Writer) error {
	result, undo, err := p.Add(ctx, c)
	if err != nil {
		return err
	}
	warnDropped(c, p, result)
	if err := printResult(stdout, c.Conf.CNIVersion, result); err != nil {
		if undo != nil {
			undo()
		}
		return Errorf(types.ErrIOFailure, "print the result: %w; the container was detached again", err)
	}
	return nil
}

// warnDropped says on stderr which addresses the oldest format has no room for:
// it holds one of each family, the first.
func warnDropped(c *Call, p Plugin, r *types100.Result) {
	if c.Conf.CNIVersion != "" && !olderThan(c.Conf.CNIVersion, "0.3.0") {
		return
	}
	seen := map[bool]bool{}
	for _, ip := range r.IPs {
		v4 := ip.Address.IP.To4() != nil
		if seen[v4] {
			fmt.Fprintf(c.Stderr, "%s: the result does not mention address %s: cniVersion %s has room for one of each family; use 0.3.0 or newer\n",
				p.Name, ip.Address.String(), cmp.Or(c.Conf.CNIVersion, defaultVersion))
		}
		seen[v4] = true
	}
}

func printResult(w io.Writer, version string, r *types100.Result) error {
	if version == "" {
		version = defaultVersion
	}
	converted, err := ForVersion(r, version).GetAsVersion(version)
	if err != nil {
		return err
	}
	if text, ok := resultText(converted); ok {
		_, err := w.Write(text)
		return err
	}
	return printJSON(w, converted)
}

func printVersions(_ context.Context, _ Plugin, c *Call, stdout io.Writer) error {
	version := c.Conf.CNIVersion
	if version == "" {
		version = newestVersion
	}
	return printJSON(stdout, struct {
		CNIVersion        string   `json:"cniVersion"`
		SupportedVersions []string `json:"supportedVersions"`
	}{version, supportedVersions[:]})
}

// about is what a person sees who runs the program by hand, and what Nomad
// reads to learn its version.
func about(p Plugin, stderr io.Writer) {
	version := "v0.0.0"
	if info, ok := debug.ReadBuildInfo(); ok && strings.HasPrefix(info.Main.Version, "v") {
		version = info.Main.Version
	}
	fmt.Fprintf(stderr, "CNI plugin %s %s\nCNI protocol versions supported: %s\n", p.Name, version, strings.Join(supportedVersions[:], ", "))
}

// printJSON writes one document in one piece.
func printJSON(w io.Writer, v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "    ")
	if err := enc.Encode(v); err != nil {
		return err
	}
	_, err := w.Write(b.Bytes())
	return err
}

// A counter knows whether anything went out.
type counter struct {
	w io.Writer
	n int
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += n
	return n, err
}

// Errorf is an error with a CNI code. The format may have %w; the text is kept,
// the chain is not.
func Errorf(code uint, format string, args ...any) *types.Error {
	return types.NewError(code, fmt.Errorf(format, args...).Error(), "")
}

// printError prints the error document. Of several joined errors all are in
// the message and the first one's code counts.
func printError(w io.Writer, version string, err error) error {
	e := asError(err)
	return printJSON(w, struct {
		CNIVersion string `json:"cniVersion"`
		Code       uint   `json:"code"`
		Msg        string `json:"msg"`
		Details    string `json:"details,omitempty"`
	}{version, e.Code, e.Msg, e.Details})
}

func asError(err error) *types.Error {
	var e *types.Error
	switch {
	case errors.As(err, &e):
		if text := err.Error(); text != e.Error() { // wrapped or joined
			return &types.Error{Code: e.Code, Msg: text}
		}
		return e
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return Errorf(types.ErrTryAgainLater, "not done in time: %w", err)
	}
	return Errorf(ErrCodeInternal, "%w", err)
}

// olderThan compares versions of the specification.
func olderThan(version, since string) bool {
	return slices.Index(supportedVersions[:], version) < slices.Index(supportedVersions[:], since)
}
