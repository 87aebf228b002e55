package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/agent"
	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/fast"
	"overlayd.internal/overlay/overlayd/internal/logging"
	"overlayd.internal/overlay/overlayd/internal/store/location"
)

// environment is a lookup in a map.
func environment(m map[string]string) cli.LookupEnv {
	return func(name string) (string, bool) {
		v, ok := m[name]
		return v, ok
	}
}

func writeFile(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// parse fills the flags that declare declares, as the commands do.
func parse(declare func(*pflag.FlagSet), args []string, env map[string]string) error {
	cmd := &cobra.Command{Use: "overlayd", Args: cobra.NoArgs, Run: func(*cobra.Command, []string) {}}
	declare(cmd.Flags())
	var stderr strings.Builder
	if code := cli.Run(context.Background(), cmd, args, environment(env), io.Discard, &stderr); code != cli.ExitOK {
		return fmt.Errorf("exit code %d: %s", code, stderr.String())
	}
	return nil
}

func parseAgent(args []string, env map[string]string) (agentFlags, error) {
	var f agentFlags
	err := parse(f.declare, args, env)
	return f, err
}

var agentDefaults = agentFlags{Options: agent.Options{
	Bridges: []conf.Half{conf.Mesos, conf.Docker},
	RunDir:  "/run/overlay", StateDir: "/var/lib/overlay", CNIConfDir: "/etc/cni/net.d",
	CNIBinDirs: []string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"},
	DockerHost: "unix:///var/run/docker.sock", Listen: "127.0.0.1:6441", Cooling: 150 * time.Second, BlockIdle: time.Hour, Firewall: "auto", Datapath: fast.Auto, Routing: conf.RoutingVXLAN,
}, log: logging.Flags{Level: "info", Format: "text"}}

var compareFlags = cmp.Options{
	cmp.AllowUnexported(agentFlags{}, coordinatorFlags{}, storeFlags{}, location.Identity{}), cmpopts.EquateComparable(netip.Addr{}),
	cmpopts.IgnoreFields(agent.Options{}, "Coordinator", "Log"),
}

func TestAgentDefaults(t *testing.T) {
	got, err := parseAgent(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(agentDefaults, got, compareFlags); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestCoordinatorDefaults(t *testing.T) {
	var got coordinatorFlags
	if err := parse(got.declare, nil, nil); err != nil {
		t.Fatal(err)
	}
	want := coordinatorFlags{listen: "0.0.0.0:6440", stateDir: "/var/lib/overlay", log: logging.Flags{Level: "info", Format: "text"}}
	if diff := cmp.Diff(want, got, compareFlags); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestAgentExample(t *testing.T) {
	path := filepath.Join("..", "conf", "examples", "agent.yaml")
	got, err := parseAgent([]string{"--config", path}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := agentDefaults
	want.config = path
	want.joinTokenFile = "/etc/overlay/join-token"
	want.CoordinatorURLs = []string{"https://10.10.0.120:6440"}
	want.IP = netip.MustParseAddr("10.10.0.117")
	want.UCRConfDir = "/etc/mesos/cni"
	if diff := cmp.Diff(want, got, compareFlags); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// The command lines of the units are understood as they stand.
func TestUnitExamples(t *testing.T) {
	for _, unit := range []string{"agent", "coordinator"} {
		b, err := os.ReadFile(filepath.Join("..", "conf", "examples", "systemd", "overlayd-"+unit+".service"))
		if err != nil {
			t.Fatal(err)
		}
		_, line, _ := strings.Cut(string(b), "\nExecStart=")
		line, _, ok := strings.Cut(line, "\n")
		argv := strings.Fields(line)
		if !ok || len(argv) < 3 || argv[0] != "overlayd" || argv[1] != unit {
			t.Fatalf("%s: ExecStart=%s", unit, line)
		}
		if unit == "agent" {
			if diff := cmp.Diff([]string{"--config", "/etc/overlay/agent.yaml"}, argv[2:]); diff != "" {
				t.Errorf("agent:\n%s", diff)
			}
			continue
		}
		var got coordinatorFlags
		err = parse(got.declare, argv[2:], nil)
		want := coordinatorFlags{config: "/etc/overlay/overlay.yaml", listen: "0.0.0.0:6440", stateDir: "/var/lib/overlay", log: logging.Flags{Level: "info", Format: "text"}}
		if err != nil {
			t.Fatalf("coordinator: %v", err)
		}
		if diff := cmp.Diff(want, got, compareFlags); diff != "" {
			t.Errorf("coordinator (-want +got):\n%s", diff)
		}
	}
}

// TestWhatOverrides sets the same flag in all four places and takes them away
// one after the other.
func TestWhatOverrides(t *testing.T) {
	file := writeFile(t, "agent.yaml", "cooling: 3s\nlisten: file:1\n")
	tests := []struct {
		name    string
		args    []string
		env     map[string]string
		cooling time.Duration
	}{
		{"flag", []string{"--config", file, "--cooling", "1s"}, map[string]string{"OVERLAYD_COOLING": "2s"}, time.Second},
		{"environment", []string{"--config", file}, map[string]string{"OVERLAYD_COOLING": "2s"}, 2 * time.Second},
		{"file", []string{"--config", file}, nil, 3 * time.Second},
		{"file named by the environment", nil, map[string]string{"OVERLAYD_CONFIG": file}, 3 * time.Second},
		{"default", nil, nil, 150 * time.Second},
		{"no file, said by the environment", nil, map[string]string{"OVERLAYD_CONFIG": ""}, 150 * time.Second},
		{"no file after all", []string{"--config", ""}, map[string]string{"OVERLAYD_CONFIG": file}, 150 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseAgent(tt.args, tt.env)
			if err != nil || got.Cooling != tt.cooling {
				t.Errorf("cooling %v, %v; want %v", got.Cooling, err, tt.cooling)
			}
		})
	}
	t.Run("an empty value is a value", func(t *testing.T) {
		got, err := parseAgent([]string{"--config", file}, map[string]string{"OVERLAYD_LISTEN": "", "OVERLAYD_JOIN_TOKEN": ""})
		if err != nil || got.Listen != "" {
			t.Errorf("listen %q, %v; want it empty", got.Listen, err)
		}
	})
}

func TestAgentValues(t *testing.T) {
	got, err := parseAgent([]string{
		"--coordinator", "http://a:1,http://b:2", "--agent-ip=fd00::1,10.0.0.1", "--one-family", "--agent-id=x", "--bridges", "none", "--cni-bin-dir", "/a:/b",
		"--cooling=0", "--block-idle=5m", "--listen", "", "--insecure", "--run-dir=/r", "--state-dir=/s", "--cni-conf-dir=/c", "--ucr-conf-dir=/u", "--docker-host=", "--firewall=nftables", "--datapath=ebpf", "--routing=direct", "--log-level=warn", "--log-format=json",
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := agentFlags{insecure: true, log: logging.Flags{Level: "warn", Format: "json"}, Options: agent.Options{
		CoordinatorURLs: []string{"http://a:1", "http://b:2"}, IP: netip.MustParseAddr("fd00::1"), Second: netip.MustParseAddr("10.0.0.1"), OneFamily: true, ID: "x",
		CNIBinDirs: []string{"/a", "/b"}, RunDir: "/r", StateDir: "/s", CNIConfDir: "/c", UCRConfDir: "/u", Firewall: "nftables", Datapath: fast.EBPF, Routing: conf.RoutingDirect, BlockIdle: 5 * time.Minute,
	}}
	if diff := cmp.Diff(want, got, compareFlags); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestParseRefuses(t *testing.T) {
	bad := writeFile(t, "agent.yaml", "colour: red\nconfig: x\nlisten: [a, b]\ninsecure: []\n")
	token := writeFile(t, "agent.yaml", "join-token: secret\n")
	badValue := writeFile(t, "agent.yaml", "agent-ip: here\n")
	tests := []struct {
		name string
		args []string
		env  map[string]string
		want string // part of the message
	}{
		{"unknown flag", []string{"--colour"}, nil, "unknown flag: --colour; overlayd --help lists the flags"},
		{"flag with one dash", []string{"-agent-ip=secret"}, nil, "unknown flag: -agent-ip; flags are written with two dashes, as in --agent-ip"},
		{"flag without a value", []string{"--agent-ip"}, nil, "flag needs an argument: --agent-ip"},
		{"bad flag value", []string{"--agent-ip", "here"}, nil, `--agent-ip: "here": want an IPv4 or IPv6 address`},
		{"two addresses of a family", []string{"--agent-ip", "10.0.0.1,10.0.0.2"}, nil, "want one address, or one of each family"},
		{"three addresses", []string{"--agent-ip", "10.0.0.1,fd00::1,fd00::2"}, nil, "want an IPv4 or IPv6 address"},
		{"address with a zone", []string{"--agent-ip", "fe80::1%eth0"}, nil, "want an IPv4 or IPv6 address"},
		{"bad environment value", nil, map[string]string{"OVERLAYD_AGENT_IP": "here"}, `OVERLAYD_AGENT_IP: "here": want an IPv4`},
		{"bad value in the file", []string{"--config", badValue}, nil, `agent-ip in the configuration file: "here": want an IPv4`},
		{"listen without a port", []string{"--listen", "127.0.0.1"}, nil, `--listen: "127.0.0.1": want an address and a port, as in 0.0.0.0:6440`},
		{"listen on no port", []string{"--listen", "127.0.0.1:"}, nil, "want an address and a port"},
		{"bad switch", nil, map[string]string{"OVERLAYD_INSECURE": "yes please"}, `OVERLAYD_INSECURE: "yes please": want true or false`},
		{"unknown half", []string{"--bridges", "podman"}, nil, `--bridges: "podman": want mesos,docker or one of them, or none`},
		{"no half", []string{"--bridges", ""}, nil, `--bridges: "": want mesos,docker`},
		{"half twice", []string{"--bridges", "mesos,mesos"}, nil, `want mesos,docker`},
		{"none and a half", []string{"--bridges", "none,mesos"}, nil, `want mesos,docker`},
		{"negative cooling", []string{"--cooling", "-1s"}, nil, `--cooling: "-1s": want a time in whole seconds`},
		{"cooling without a unit", []string{"--cooling", "150"}, nil, "want a time in whole seconds, as in 150s or 5m, or 0"},
		{"cooling of less than a second", []string{"--cooling", "1500ms"}, nil, "want a time in whole seconds"},
		{"empty item", []string{"--coordinator", "http://a:1,"}, nil, `an item between two "," is empty`},
		{"join token", []string{"--join-token", "secret"}, nil, "--join-token: this is no join token"},
		{"join token in the environment", nil, map[string]string{"OVERLAYD_JOIN_TOKEN": "secret"}, "OVERLAYD_JOIN_TOKEN: this is no join token"},
		{"join token in the file", []string{"--config", token}, nil, "join-token in the configuration file: this is no join token"},
		{"file that is not there", []string{"--config", "/nonexistent/agent.yaml"}, nil, "/nonexistent/agent.yaml: no such file"},
		{"all problems of a file", []string{"--config", bad}, nil,
			bad + ": 4 problems\n" +
				"  colour: unknown key; the keys are coordinator, agent-ip, one-family, agent-id, bridges, run-dir, state-dir, cni-conf-dir, ucr-conf-dir, cni-bin-dir, docker-host, listen, datapath, routing, cooling, block-idle, firewall, join-token, join-token-file, log-level, log-format, insecure (line 1)\n" +
				"  config: unknown key; the keys are coordinator, agent-ip, one-family, agent-id, bridges, run-dir, state-dir, cni-conf-dir, ucr-conf-dir, cni-bin-dir, docker-host, listen, datapath, routing, cooling, block-idle, firewall, join-token, join-token-file, log-level, log-format, insecure (line 2)\n" +
				"  listen: want one value, not a list\n" +
				"  insecure: want one value, not a list"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := parseAgent(tt.args, tt.env)
			if err == nil || !strings.HasPrefix(err.Error(), "exit code 2: ") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("parse = %v\nwant a usage error with %s", err, tt.want)
			} else if strings.Contains(err.Error(), "secret") {
				t.Errorf("parse = %v, which tells the secret", err)
			}
		})
	}
}

func TestHelp(t *testing.T) {
	for _, command := range rootCommand(environment(nil)).Commands() {
		var out strings.Builder
		code := run(t.Context(), []string{command.Name(), "--help"}, environment(nil), &out, io.Discard)
		if code != 0 || !strings.Contains(out.String(), command.Short) {
			t.Errorf("%s: exit code %d\n%s", command.Name(), code, out.String())
		}
		command.Flags().VisitAll(func(f *pflag.Flag) {
			if !strings.Contains(out.String(), "--"+f.Name+" ") || !strings.Contains(out.String(), f.Usage) {
				t.Errorf("the help of %s lacks --%s", command.Name(), f.Name)
			}
		})
	}
}
