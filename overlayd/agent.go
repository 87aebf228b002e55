package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/agent"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/datapath"
	"overlayd.internal/overlay/overlayd/internal/fast"
	"overlayd.internal/overlay/overlayd/internal/logging"
	"overlayd.internal/overlay/overlayd/internal/systemd"
)

// agentFlags are the flags of overlayd agent.
type agentFlags struct {
	agent.Options
	config                   string
	joinToken, joinTokenFile string
	insecure                 bool
	log                      logging.Flags
}

// declare declares the flags. A new flag of the agent is one more line here.
func (f *agentFlags) declare(fs *pflag.FlagSet) {
	fs.Var(cli.List(&f.CoordinatorURLs, ",", "", "URL[,URL...]"), "coordinator",
		"where the coordinator serves, as in https://10.0.0.1:6440; required")
	fs.Var(cli.ListFunc("IP[,IP]", ",", "", setAddrs(&f.IP, &f.Second)), "agent-ip",
		"underlay address of this host, or one of each family, the preferred one first (default: the one it reaches the coordinator from, and one of the other family if there is)")
	fs.BoolVar(&f.OneFamily, "one-family", false, "use the family of the agent IP alone, though the host has addresses of both")
	fs.Var(cli.String(&f.ID, "", "ID"), "agent-id",
		"identity of this host (default: made once and kept in the state directory)")
	fs.Var(cli.ListFunc("HALF[,HALF]|none", ",", "mesos,docker", setBridges(&f.Bridges)), "bridges", "halves to make bridges for")
	fs.Var(cli.String(&f.RunDir, conf.DefaultRunDir, "DIR"), "run-dir", "published state, address stores and socket; on tmpfs")
	fs.Var(cli.String(&f.StateDir, conf.DefaultStateDir, "DIR"), "state-dir", "what survives a reboot")
	fs.Var(cli.String(&f.CNIConfDir, "/etc/cni/net.d", "DIR"), "cni-conf-dir", "where CNI network lists are written")
	fs.Var(cli.String(&f.UCRConfDir, "", "DIR"), "ucr-conf-dir",
		"where network files for Mesos UCR are written (default: none are)")
	fs.Var(cli.List(&f.CNIBinDirs, ":", "/opt/cni/bin:/usr/lib/cni:/usr/libexec/cni", "DIR[:DIR...]"), "cni-bin-dir",
		"where the CNI plugins lie")
	fs.Var(cli.String(&f.DockerHost, "unix:///var/run/docker.sock", "URL"), "docker-host",
		"where dockerd serves its API; empty: no Docker")
	fs.Var(cli.Listen(&f.Listen, "127.0.0.1:6441", true), "listen",
		"address and port to serve the state on; empty: only the socket in the run directory")
	fs.Var(cli.Func("auto|kernel|ebpf", string(fast.Auto), setDatapath(&f.Datapath)), "datapath",
		"which way traffic between hosts takes: past the kernel's VXLAN device by BPF programs, where the host suits it (auto), wherever it can (ebpf) or not (kernel)")
	fs.Var(cli.Func("vxlan|direct", string(conf.RoutingVXLAN), setRouting(&f.Routing)), "routing",
		"how to send to other hosts: all of them in VXLAN, or those on the same link by a plain route (direct), where they are set so as well")
	fs.Var(cli.Func("DURATION", (conf.DefaultCoolingSeconds*time.Second).String(), setCooling(&f.Cooling)), "cooling",
		"how long a released address rests before it is used again; 0: not at all")
	fs.Var(cli.Func("DURATION", "1h0m0s", setCooling(&f.BlockIdle)), "block-idle",
		"how long a further agent subnet has to be empty before it is given back")
	fs.Var(cli.Func("KIND", "auto", setFirewall(&f.Firewall)), "firewall",
		"auto, iptables or nftables: what makes the rules; auto: iptables where it is installed")
	fs.Var(cli.Func("TOKEN", "", setToken(&f.joinToken)), "join-token",
		"what a new host joins with; not needed once it has (overlayctl token create prints one)")
	fs.Var(cli.String(&f.joinTokenFile, "", "FILE"), "join-token-file", "the same, in a file, which processes of others cannot see")
	f.log.Declare(fs)
	cli.ConfigFile(fs, &f.config)
	fs.BoolVar(&f.insecure, "insecure", false, "plain HTTP without any identity, for a laboratory")
}

func agentCommand(env cli.LookupEnv) *cobra.Command {
	var f agentFlags
	cmd := &cobra.Command{
		Use: "agent [flags]", Short: "make the overlays on this host", Args: cobra.NoArgs,
		Example: "  overlayd agent --config /etc/overlay/agent.yaml",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := untilHangup(cmd.Context())
			defer stop()
			return runAgent(ctx, f, env, cmd.ErrOrStderr())
		},
	}
	f.declare(cmd.Flags())
	cmd.AddCommand(teardownCommand())
	return cli.Daemon(cmd)
}

// teardownCommand takes the flags of the agent, so that its environment and its
// configuration file serve as they are.
func teardownCommand() *cobra.Command {
	var f agentFlags
	force := false
	cmd := &cobra.Command{
		Use: "teardown [flags]", Short: "take everything of the overlays off this host", Args: cobra.NoArgs,
		Long: `Takes everything of the overlays off this host: Docker networks, CNI files, links,
routes, firewall rules, and the sysctls that the agent changed. Nothing else is
touched, and the identity of the host stays. The agent has to be stopped, and so
have the containers, unless --force is given.`,
		Example: "  overlayd agent teardown --config /etc/overlay/agent.yaml",
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.Log = f.log.New(cmd.ErrOrStderr()).Logger
			ctx, stop := untilHangup(cmd.Context())
			defer stop()
			return agent.Teardown(ctx, f.Options, force)
		},
	}
	f.declare(cmd.Flags())
	cmd.Flags().BoolVar(&force, "force", false, "also while containers are attached; they lose the network")
	return cmd
}

// startGCPercent lets garbage lie while an agent starts and learns of all its peers at
// once: with Go's default of 100 collecting it takes a quarter of the processor time
// of a start with 4,000 of them. It ends when the start is over.
const startGCPercent = 300

func runAgent(ctx context.Context, f agentFlags, env cli.LookupEnv, stderr io.Writer) error {
	if len(f.CoordinatorURLs) == 0 {
		return cli.Usagef("--coordinator is missing; give the URL of the coordinator, as in https://10.0.0.1:6440")
	}
	if _, err := api.NewClient(f.CoordinatorURLs, nil); err != nil {
		return cli.Usagef("--coordinator: %w", err)
	}
	if _, set := env("GOGC"); !set {
		usual := debug.SetGCPercent(startGCPercent)
		f.Started = func() { debug.SetGCPercent(usual) }
	}
	leveled := f.log.New(stderr)
	leveled.Level().ToggleOnSignal(ctx)
	log := leveled.Logger
	if f.insecure {
		warnInsecure(ctx, log)
	}
	client, err := f.connect(log)
	if err != nil {
		return err
	}
	f.Coordinator, f.Log, f.LogLevel, f.Version, f.SocketGroup = client, log, leveled.Level(), version, socketGroup()
	f.Beat = systemd.New(log).Beat
	a, err := agent.New(f.Options)
	if err != nil {
		return cli.Usage(err)
	}
	if err := a.Run(ctx); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

func setAddrs(first, second *netip.Addr) func(string) error {
	return func(s string) error {
		*first, *second = netip.Addr{}, netip.Addr{}
		if s == "" {
			return nil
		}
		one, other, two := strings.Cut(s, ",")
		var err error
		if *first, err = parseAddr(one); err != nil || !two {
			return err
		}
		if *second, err = parseAddr(other); err == nil && first.Is4() == second.Is4() {
			err = fmt.Errorf("%q: want one address, or one of each family, as in 10.0.0.1,fd00::1", s)
		}
		return err
	}
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" || a.Is4In6() {
		return netip.Addr{}, fmt.Errorf("%q: want an IPv4 or IPv6 address, as in 10.0.0.1", s)
	}
	return a, nil
}

func setFirewall(to *string) func(string) error {
	return func(s string) error {
		if !slices.Contains(datapath.FirewallKinds, s) {
			return fmt.Errorf("%q: want one of %s", s, strings.Join(datapath.FirewallKinds, ", "))
		}
		*to = s
		return nil
	}
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

func setDatapath(to *fast.Mode) func(string) error {
	return func(s string) (err error) {
		*to, err = fast.ParseMode(s)
		return err
	}
}

func setRouting(to *conf.Routing) func(string) error {
	return func(s string) (err error) {
		*to, err = conf.ParseRouting(s)
		return err
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
