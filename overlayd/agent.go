package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/agent"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// agentFlags are the flags of overlayd agent.
type agentFlags struct {
	agent.Options
	config   string
	insecure bool
}

func (f *agentFlags) options() []option {
	cooling := (conf.DefaultCoolingSeconds * time.Second).String()
	return []option{
		{name: "coordinator", arg: "URL[,URL...]", list: ",", set: setList(&f.CoordinatorURLs, ","),
			help: "where the coordinator serves, as in http://10.0.0.1:6440; required"},
		{name: "agent-ip", arg: "IP", set: setAddr(&f.IP),
			help: "underlay address of this host (default: the one it reaches the coordinator from)"},
		{name: "agent-id", arg: "ID", set: setString(&f.ID),
			help: "identity of this host (default: made once and kept in the state directory)"},
		{name: "bridges", arg: "HALF[,HALF]|none", def: "mesos,docker", list: ",", set: setBridges(&f.Bridges),
			help: "halves to make bridges for"},
		{name: "run-dir", arg: "DIR", def: conf.DefaultRunDir, set: setString(&f.RunDir),
			help: "published state, address stores and socket; on tmpfs"},
		{name: "state-dir", arg: "DIR", def: conf.DefaultStateDir, set: setString(&f.StateDir),
			help: "what survives a reboot"},
		{name: "cni-conf-dir", arg: "DIR", def: "/etc/cni/net.d", set: setString(&f.CNIConfDir),
			help: "where CNI network lists are written"},
		{name: "ucr-conf-dir", arg: "DIR", set: setString(&f.UCRConfDir),
			help: "where network files for Mesos UCR are written (default: none are)"},
		{name: "cni-bin-dir", arg: "DIR[:DIR...]", def: "/opt/cni/bin:/usr/lib/cni:/usr/libexec/cni", list: ":", set: setList(&f.CNIBinDirs, ":"),
			help: "where the CNI plugins lie"},
		{name: "docker-host", arg: "URL", def: "unix:///var/run/docker.sock", set: setString(&f.DockerHost),
			help: "where dockerd serves its API; empty: no Docker"},
		{name: "listen", arg: "ADDR", def: "127.0.0.1:6441", set: optional(&f.Listen, setListen),
			help: "address and port to serve the state on; empty: only the socket in the run directory"},
		{name: "cooling", arg: "DURATION", def: cooling, set: setCooling(&f.Cooling),
			help: "how long a released address rests before it is used again; 0: not at all"},
		{name: "join-token", arg: "TOKEN", set: refuseJoinToken,
			help: "not available yet; leave it out"},
		{name: "config", arg: "FILE", set: setString(&f.config),
			help: "YAML file with the names of these flags as keys"},
		{name: "insecure", def: "false", set: setBool(&f.insecure),
			help: "plain HTTP, anybody may join; at present the only mode"},
	}
}

func runAgent(ctx context.Context, args []string, env func(string) (string, bool), stdout, stderr io.Writer) error {
	var f agentFlags
	rest, err := parse("agent", f.options(), "config", args, env, stdout)
	if err != nil {
		return err
	}
	if len(rest) > 0 {
		return usagef("%q: takes flags only", rest[0])
	}
	if len(f.CoordinatorURLs) == 0 {
		return usagef("--coordinator is missing; give the URL of the coordinator, as in http://10.0.0.1:6440")
	}
	client, err := api.NewClient(f.CoordinatorURLs, nil)
	if err != nil {
		return usagef("--coordinator: %w", err)
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	if err := insecure(f.insecure, log); err != nil {
		return err
	}
	f.Coordinator, f.Log, f.Version = client, log, version
	a, err := agent.New(f.Options)
	if err != nil {
		return usageError{err}
	}
	if err := a.Run(ctx); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

func setAddr(to *netip.Addr) func(string) error {
	return func(s string) error {
		if s == "" {
			*to = netip.Addr{}
			return nil
		}
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" || a.Is4In6() {
			return fmt.Errorf("%q: want an IPv4 or IPv6 address, as in 10.0.0.1", s)
		}
		*to = a
		return nil
	}
}

// refuseJoinToken says so rather than let anybody believe that a token keeps
// others out. The message does not repeat a secret.
func refuseJoinToken(s string) error {
	if s == "" {
		return nil
	}
	return errors.New("join tokens are not available yet; leave it out: with --insecure every host that reaches the coordinator may join")
}

func setBridges(to *[]conf.Half) func(string) error {
	return func(s string) error {
		*to = nil
		if s == "none" {
			return nil
		}
		for item := range strings.SplitSeq(s, ",") {
			half, err := conf.ParseHalf(item)
			if err != nil || slices.Contains(*to, half) {
				return fmt.Errorf("%q: want mesos,docker or one of them, or none", s)
			}
			*to = append(*to, half)
		}
		return nil
	}
}

func setCooling(to *time.Duration) func(string) error {
	return func(s string) error {
		d, err := time.ParseDuration(s)
		if err != nil || d < 0 || d%time.Second != 0 {
			return fmt.Errorf("%q: want a time in whole seconds, as in 150s or 5m, or 0", s)
		}
		*to = d
		return nil
	}
}
