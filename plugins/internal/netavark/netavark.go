// Package netavark is the whole of overlay-netavark. Podman 5 no longer knows
// CNI; its network program, netavark, runs plugins with a protocol of its own:
//
//	info                what the plugin is
//	create              complete and check the definition of a network
//	setup <netns>       attach a container
//	teardown <netns>    detach it
//
// with JSON on stdin and stdout, and {"error": text} with exit status 1 for what
// does not work. All the work is d-overlay's: this translates.
package netavark

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/plugins/internal/attach"
)

// Driver is the name of the program, which is the network's driver in Podman.
const Driver = "overlay-netavark"

// apiVersion is that of netavark's plugin interface; there is only one.
const apiVersion = "1.0.0"

// maxInput is the most that is read from stdin.
const maxInput = 1 << 20

// pluginDirs is where portmap is looked for; where we lie ourselves comes first.
var pluginDirs = [...]string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"}

// Main runs the program once and exits.
func Main() {
	// A reader that goes away must be an error of the write, not the end of the
	// process: the container is detached again then.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	os.Exit(Run(context.Background(), os.Args[1:], os.LookupEnv, os.Stdin, os.Stdout, os.Stderr))
}

// Run is Main with everything it touches as an argument. It returns the exit
// status and has written one JSON document, or nothing, to stdout.
func Run(ctx context.Context, args []string, env func(string) (string, bool), stdin io.Reader, stdout, stderr io.Writer) int {
	p := program{env: env, stdout: stdout, stderr: stderr}
	status, err := p.run(ctx, args, io.LimitReader(stdin, maxInput))
	if err == nil {
		return status
	}
	if perr := printJSON(stdout, failure{err.Error()}); perr != nil {
		fmt.Fprintf(stderr, "%s: %v; print the error: %v\n", Driver, err, perr)
	}
	return 1
}

// failure is the document of what does not work.
type failure struct {
	Error string `json:"error"`
}

// printJSON writes one document in one piece.
func printJSON(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

type program struct {
	env            func(string) (string, bool)
	stdout, stderr io.Writer
}

// run returns the exit status of a program that has said all there is to say,
// or an error.
func (p program) run(ctx context.Context, args []string, stdin io.Reader) (int, error) {
	verb := "info"
	if len(args) > 0 {
		verb = args[0]
	}
	wants := map[string]int{"info": 0, "create": 0, "setup": 1, "teardown": 1}
	n, known := wants[verb]
	switch {
	case !known:
		return 1, fmt.Errorf("command %q is not one of info, create, setup, teardown", verb)
	case len(args) > 0 && len(args)-1 != n:
		return 1, fmt.Errorf("%s takes %d arguments, got %d; setup and teardown take the path of a network namespace", verb, n, len(args)-1)
	case verb == "info":
		return 0, printJSON(p.stdout, map[string]string{
			"version": version(), "api_version": apiVersion, "description": "attaches containers to overlays",
		})
	}
	input, err := io.ReadAll(stdin)
	if err != nil {
		return 1, fmt.Errorf("read stdin: %w", err)
	}
	if verb == "create" {
		completed, err := create(input)
		if err != nil {
			return 1, err
		}
		return 0, printJSON(p.stdout, completed)
	}
	var c container
	if err := json.Unmarshal(input, &c); err != nil {
		return 1, fmt.Errorf("read the container from stdin: %w", err)
	}
	if verb == "setup" {
		return p.cni(ctx, "ADD", args[1], c)
	}
	return p.cni(ctx, "DEL", args[1], c)
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && strings.HasPrefix(info.Main.Version, "v") {
		return info.Main.Version
	}
	return "v0.0.0"
}

// container is what setup and teardown are told.
type container struct {
	ContainerID  string        `json:"container_id"`
	Name         string        `json:"container_name"`
	PortMappings []portMapping `json:"port_mappings"`
	Network      network       `json:"network"`
	Options      struct {
		InterfaceName string   `json:"interface_name"`
		StaticIPs     []string `json:"static_ips"`
		StaticMAC     string   `json:"static_mac"`
	} `json:"network_options"`
}

// portMapping is a number of host ports from one on.
type portMapping struct {
	HostIP        string `json:"host_ip"`
	HostPort      int    `json:"host_port"`
	ContainerPort int    `json:"container_port"`
	Protocol      string `json:"protocol"` // tcp, udp, or both with a comma
	Range         int    `json:"range"`
}

// status is what setup answers.
type status struct {
	DNSSearchDomains []string        `json:"dns_search_domains"`
	DNSServerIPs     []string        `json:"dns_server_ips"`
	Interfaces       map[string]link `json:"interfaces"`
}

type link struct {
	MACAddress string   `json:"mac_address"`
	Subnets    []subnet `json:"subnets"`
}

type subnet struct {
	IPNet   string `json:"ipnet"`
	Gateway string `json:"gateway,omitempty"`
}

// cni runs d-overlay in process.
func (p program) cni(ctx context.Context, command, netns string, c container) (int, error) {
	input, err := c.netConf()
	if err != nil && command != "DEL" { // which takes what can be read
		return 1, err
	}
	vars := map[string]string{
		"CNI_COMMAND": command, "CNI_CONTAINERID": c.ContainerID, "CNI_IFNAME": c.Options.InterfaceName,
		"CNI_NETNS": netns, "CNI_PATH": p.path(),
	}
	env := func(name string) (string, bool) { v, ok := vars[name]; return v, ok }
	out := &translator{to: p.stdout, ifName: c.Options.InterfaceName}
	plugin := attach.New(conf.Docker)
	plugin.Name = Driver // in the log and the counters of calls
	plugin.Origin = conf.Origin{Runtime: conf.RuntimePodman, Name: c.Name}
	return cni.Run(ctx, plugin, env, bytes.NewReader(input), out, p.stderr), nil
}

// A translator writes a document of CNI, which comes in one piece, as netavark
// wants it. When that cannot be written, whoever wrote the result takes it back.
type translator struct {
	to     io.Writer
	ifName string
}

func (t *translator) Write(document []byte) (int, error) {
	var in struct {
		Code         uint
		Msg, Details string

		Interfaces []struct{ Name, MAC, Sandbox string }
		IPs        []struct{ Address, Gateway string }
		DNS        struct{ Nameservers, Search []string }
	}
	if err := json.Unmarshal(document, &in); err != nil {
		return 0, fmt.Errorf("translate the result: %w", err)
	}
	var out any
	if in.Code != 0 {
		if in.Details != "" {
			in.Msg += "; " + in.Details
		}
		out = failure{in.Msg}
	} else {
		l := link{Subnets: []subnet{}}
		for _, i := range in.Interfaces {
			if i.Sandbox != "" {
				l.MACAddress = i.MAC
			}
		}
		for _, ip := range in.IPs {
			l.Subnets = append(l.Subnets, subnet{IPNet: ip.Address, Gateway: ip.Gateway})
		}
		out = status{
			DNSSearchDomains: append([]string{}, in.DNS.Search...),
			DNSServerIPs:     append([]string{}, in.DNS.Nameservers...),
			Interfaces:       map[string]link{t.ifName: l},
		}
	}
	if err := printJSON(t.to, out); err != nil {
		return 0, err
	}
	return len(document), nil
}

// path is the CNI_PATH in which portmap is looked for.
func (p program) path() string {
	if path, ok := p.env("CNI_PATH"); ok {
		return path
	}
	dirs := pluginDirs[:]
	if exe, err := os.Executable(); err == nil {
		dirs = append([]string{filepath.Dir(exe)}, dirs...)
	}
	return strings.Join(dirs, string(os.PathListSeparator))
}

// netConf is the configuration that d-overlay would get from a CNI runtime. With
// an error it has what could be read.
func (c container) netConf() ([]byte, error) {
	s, bad := c.Network.settings()
	ports, wrong := c.ports()
	out := map[string]any{
		"cniVersion": "1.0.0", "name": c.Network.Name, "type": "d-overlay",
		"overlay": s.overlay, "runDir": s.runDir, "mtu": s.mtu, "capabilities": map[string]bool{"portMappings": true},
		"runtimeConfig": map[string]any{"ips": c.Options.StaticIPs, "mac": c.Options.StaticMAC, "portMappings": ports},
	}
	if s.hairpin != nil {
		out["hairpinMode"] = *s.hairpin
	}
	b, err := json.Marshal(out)
	return b, errors.Join(bad, wrong, err)
}

// ports are the port mappings one by one.
func (c container) ports() ([]conf.PortMapping, error) {
	var out []conf.PortMapping
	for _, m := range c.PortMappings {
		count := max(m.Range, 1)
		if m.HostPort < 1 || m.ContainerPort < 1 || m.HostPort+count > 1<<16 || m.ContainerPort+count > 1<<16 {
			return nil, fmt.Errorf("port mapping %d:%d, %d ports: ports are from 1 to 65535", m.HostPort, m.ContainerPort, count)
		}
		protocols := m.Protocol
		if protocols == "" {
			protocols = "tcp"
		}
		for protocol := range strings.SplitSeq(protocols, ",") {
			for i := range count {
				out = append(out, conf.PortMapping{HostPort: m.HostPort + i, ContainerPort: m.ContainerPort + i, Protocol: protocol, HostIP: m.HostIP})
			}
		}
	}
	return out, nil
}
