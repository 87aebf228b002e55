package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containernetworking/cni/pkg/types"

	"overlayd.internal/overlay/conf/document"
	"overlayd.internal/overlay/internal/netns"
)

const (
	maxStdin       = 1 << 20
	maxNetworkName = 255
	maxContainerID = 1024
	maxIfName      = 15 // IFNAMSIZ less the terminating zero
)

// A variable is one row of what may be in the environment.
type variable struct {
	name     string
	required string // verbs, each in spaces
	check    func(string) error
	set      func(*Call, string)
}

var variables = [...]variable{
	{"CNI_CONTAINERID", " ADD DEL CHECK ", checkContainerID, func(c *Call, s string) { c.ContainerID = s }},
	{"CNI_IFNAME", " ADD DEL CHECK ", checkIfName, func(c *Call, s string) { c.IfName = s }},
	{"CNI_NETNS", " ADD CHECK ", nil, func(c *Call, s string) { c.NetNS = s }},
	{"CNI_ARGS", "", nil, func(c *Call, s string) { c.Args = parseArgs(s) }},
	{"CNI_PATH", "", nil, func(c *Call, s string) { c.Path = filepath.SplitList(s) }},
}

// readEnv names every variable that is missing or wrong at once. A verb that
// does not need a variable does not look at it.
func readEnv(c *Call, v verb, env func(string) (string, bool)) error {
	if v.run == nil {
		return Errorf(types.ErrInvalidEnvironmentVariables, "CNI_COMMAND: %q is not one of ADD, DEL, CHECK, GC, STATUS, VERSION", c.Command)
	}
	var problems []string
	for _, row := range variables {
		value, _ := env(row.name)
		required := strings.Contains(row.required, " "+c.Command+" ")
		switch {
		case value == "" && required:
			problems = append(problems, row.name+": missing")
			continue
		case value == "":
			continue
		case required && row.check != nil:
			if err := row.check(value); err != nil {
				problems = append(problems, fmt.Sprintf("%s: %v", row.name, err))
				continue
			}
		}
		row.set(c, value)
	}
	if len(c.Path) == 0 {
		if exe, err := os.Executable(); err == nil {
			c.Path = []string{filepath.Dir(exe)}
		}
	}
	if problems != nil {
		return Errorf(types.ErrInvalidEnvironmentVariables, "%s", strings.Join(problems, "; "))
	}
	return nil
}

// checkName is the specification's rule for network names and container ids.
func checkName(s string, most int) error {
	if len(s) > most {
		return fmt.Errorf("has %d bytes, at most %d are allowed", len(s), most)
	}
	for i := range len(s) {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || !strings.ContainsRune("_.-", rune(c))) {
			return fmt.Errorf("%q must be letters, digits, '_', '.' and '-', starting with a letter or digit", s)
		}
	}
	return nil
}

func checkContainerID(s string) error { return checkName(s, maxContainerID) }

// checkIfName keeps out what the kernel refuses, and what it accepts and
// changes: "eth%d" becomes eth0.
func checkIfName(s string) error {
	switch {
	case len(s) > maxIfName:
		return fmt.Errorf("%q has %d bytes, a device name holds %d", s, len(s), maxIfName)
	case s == "." || s == "..", strings.HasPrefix(s, "-"):
		return fmt.Errorf("%q is not a device name", s)
	case !utf8.ValidString(s):
		return fmt.Errorf("%q is not UTF-8", s)
	}
	for _, r := range s {
		if strings.ContainsRune("/:%", r) || unicode.IsSpace(r) || unicode.IsControl(r) {
			return fmt.Errorf("%q has a character that is not allowed in a device name: %q", s, r)
		}
	}
	return nil
}

// parseArgs picks what we know out of CNI_ARGS, a list K=V;K=V. Runtimes put
// all sorts of things there, so nothing in it is an error.
func parseArgs(s string) Args {
	var a Args
	for pair := range strings.SplitSeq(s, ";") {
		key, value, _ := strings.Cut(pair, "=")
		switch {
		case value == "":
		case key == "IP":
			a.IP = strings.Split(value, ",")
		case key == "MAC":
			a.MAC = value
		case key == "K8S_POD_NAMESPACE":
			a.PodNamespace = value
		case key == "K8S_POD_NAME":
			a.PodName = value
		case key == "NERDCTL_CNI_DHCP_HOSTNAME":
			a.Hostname = value
		}
	}
	return a
}

// checkNetNS proves that CNI_NETNS is a network namespace and not the one we are
// in, before anything is done.
func checkNetNS(path string) error {
	if err := netns.Check(path); err != nil {
		return Errorf(types.ErrInvalidEnvironmentVariables, "CNI_NETNS: %w", err)
	}
	return nil
}

// readConf reads the configuration and checks what concerns every program. The
// version it returns is the one to answer in.
func readConf(ctx context.Context, c *Call, v verb, stdin io.Reader) (version string, err error) {
	b, err := readStdin(ctx, stdin)
	if err != nil {
		return newestVersion, err
	}
	c.Stdin = b
	if !v.config && len(bytes.TrimSpace(b)) == 0 {
		return newestVersion, nil
	}
	malformed, err := document.ReadConf(b, &c.Conf)
	if malformed != nil {
		code := types.ErrDecodingFailure
		if errors.As(malformed, new(*document.AmbiguousError)) {
			code = types.ErrInvalidNetworkConfig
		}
		return newestVersion, Errorf(code, "configuration: %w", malformed)
	}
	version = c.Conf.CNIVersion
	if version == "" {
		version = defaultVersion
	}
	if !v.config {
		return version, nil
	}
	// DEL has to work with a configuration that was broken after ADD: a value of
	// a wrong type leaves its own field empty and no other.
	var wrongType *json.UnmarshalTypeError
	if errors.As(err, &wrongType) {
		if c.Command != "DEL" {
			return version, Errorf(types.ErrInvalidNetworkConfig, "configuration: %s: a JSON %s cannot stand here", wrongType.Field, wrongType.Value)
		}
	} else if err != nil {
		return version, Errorf(types.ErrInvalidNetworkConfig, "configuration: %w", err)
	}
	return version, checkConf(c, v, version)
}

func checkConf(c *Call, v verb, version string) error {
	if !slices.Contains(supportedVersions[:], version) {
		return types.NewError(types.ErrIncompatibleCNIVersion,
			fmt.Sprintf("configuration: cniVersion %q is not supported", version),
			"supported: "+strings.Join(supportedVersions[:], ", "))
	}
	if v.since != "" && olderThan(version, v.since) {
		return types.NewError(types.ErrIncompatibleCNIVersion,
			fmt.Sprintf("configuration: cniVersion %s has no %s", version, c.Command),
			fmt.Sprintf("%s needs %s or newer", c.Command, v.since))
	}
	if c.Conf.Name == "" {
		return Errorf(types.ErrInvalidNetworkConfig, "configuration: name: missing")
	}
	if err := checkName(c.Conf.Name, maxNetworkName); err != nil {
		return Errorf(types.ErrInvalidNetworkConfig, "configuration: name: %w", err)
	}
	if c.Command == "DEL" { // what could never be added is not there
		return nil
	}
	return checkPlace(c)
}

// readStdin reads everything, within bounds of size and time.
func readStdin(ctx context.Context, stdin io.Reader) ([]byte, error) {
	b, err := readAll(ctx, stdin, maxStdin+1)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, Errorf(types.ErrIOFailure, "read the configuration: stdin was not closed in time")
	case err != nil:
		return nil, Errorf(types.ErrIOFailure, "read the configuration: %w", err)
	case len(b) > maxStdin:
		return nil, Errorf(types.ErrDecodingFailure, "read the configuration: more than %d bytes", maxStdin)
	}
	return b, nil
}
