package attach

import (
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/mark"
)

// mesosArgs is what Mesos adds to the configuration for a host port.
func mesosArgs() map[string]any {
	return map[string]any{"org.apache.mesos": map[string]any{"network_info": map[string]any{
		"name": "both", "ip_addresses": []map[string]any{{"protocol": "IPv4"}},
		"port_mappings": []map[string]any{{"host_port": 31005, "container_port": 80}},
	}}}
}

func TestMesosPorts(t *testing.T) {
	m := newMachine(t)
	container := newNamespace(t)
	c := call{plugin: "m-overlay", command: "ADD", netns: container.path, conf: m.config("both", "", "args", mesosArgs())}

	m.refused(c, cni.ErrCodeDelegate, "plugin portmap is in none of the directories of CNI_PATH")
	m.wantNothing(container)
	m.ok(call{plugin: "m-overlay", command: "DEL", conf: c.conf})

	m.script("portmap", `[ $CNI_COMMAND = DEL ] || cp "$0.stdin" "$0.add"; [ "$CNI_COMMAND" = DEL ] || cat "$0.add"`)
	m.ok(c)
	b, err := os.ReadFile(filepath.Join(m.path[0], "portmap.add"))
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		CNIVersion, Name string
		RuntimeConfig    any
		PrevResult       struct{ IPs []struct{ Address string } }
	}
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"portMappings": []any{map[string]any{"hostPort": 31005.0, "containerPort": 80.0, "protocol": "tcp"}}}
	if diff := cmp.Diff(want, got.RuntimeConfig); diff != "" || got.CNIVersion != "1.0.0" || got.Name != "both" || len(got.PrevResult.IPs) != 2 {
		t.Errorf("portmap got %s\n%s", b, diff)
	}
	m.ok(call{plugin: "m-overlay", command: "DEL", conf: c.conf})
	if diff := cmp.Diff([]string{"ADD c1 eth0", "DEL c1 eth0"}, m.calls("portmap")); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	m.wantNothing(container)
}

func TestMesosPortsFail(t *testing.T) {
	m := newMachine(t)
	container := newNamespace(t)
	m.script("portmap", `[ $CNI_COMMAND = DEL ] || { echo '{"code":999,"msg":"no iptables"}'; exit 1; }`)
	c := call{plugin: "m-overlay", command: "ADD", netns: container.path, conf: m.config("both", "", "args", mesosArgs())}
	m.refused(c, cni.ErrCodeDelegate, "plugin portmap: ADD: no iptables")
	if diff := cmp.Diff([]string{"ADD c1 eth0", "DEL c1 eth0"}, m.calls("portmap")); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	m.wantNothing(container)

	// Nor does it keep the rest from being taken back.
	m.path = nil
	m.script("portmap", `echo '{"code":999,"msg":"no iptables"}'; exit 1`)
	m.refused(c, cni.ErrCodeDelegate, "plugin portmap: ADD: no iptables")
	m.wantNothing(container)
}

// keepsPorts is a portmap that takes no port away until it is mended.
const keepsPorts = `[ "$CNI_COMMAND" = DEL ] || cat "$0.stdin"
[ "$CNI_COMMAND" != DEL ] || [ -e "$0.mended" ] || { echo '{"code":999,"msg":"no iptables"}'; exit 1; }`

// As long as a host port leads to an address, the address is nobody else's: not in the
// store, and not with another IPAM plugin. The DEL that takes the port away releases it,
// though the link has gone before.
func TestDelKeepsTheAddressOfAPort(t *testing.T) {
	m := newMachine(t)
	container := newNamespace(t)
	m.script("portmap", keepsPorts)
	c := call{plugin: "m-overlay", command: "ADD", netns: container.path, conf: m.config("both", "", "args", mesosArgs())}
	m.ok(c)
	c.command = "DEL"
	given := c
	given.conf = m.config("both", "", "args", mesosArgs(), "ipam", map[string]any{"type": m.script("other", "")})
	m.refused(given, cni.ErrCodeDelegate, "plugin portmap: DEL: no iptables")
	if _, err := os.Stat(filepath.Join(m.path[1], "other.calls")); err == nil {
		t.Error("the IPAM plugin was told to release the address")
	}
	for range 2 {
		m.refused(c, cni.ErrCodeDelegate, "plugin portmap: DEL: no iptables")
		if f := m.left(); len(f.links) != 0 || len(f.records) != 1 {
			t.Errorf("left: %+v, want the address without the link", f)
		}
	}
	if err := os.WriteFile(filepath.Join(m.path[0], "portmap.mended"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.ok(c)
	m.wantNothing(container)
}

// Where neither the host ports nor the interface can be taken away, DEL says both: who
// mends the one would not learn of the other before the next DEL.
func TestDelSaysOfPortsAndInterface(t *testing.T) {
	m := newMachine(t)
	container := newNamespace(t)
	m.script("portmap", keepsPorts)
	c := call{plugin: "m-overlay", command: "ADD", netns: container.path, conf: m.config("both", "", "args", mesosArgs())}
	m.ok(c)
	c.command = "DEL"
	whole := m.bin
	m.bin = t.TempDir()
	text := "#!/bin/sh\nexec /usr/bin/setpriv --bounding-set -net_admin --inh-caps -net_admin " + whole + "/m-overlay\n"
	if err := os.WriteFile(filepath.Join(m.bin, "m-overlay"), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	m.refused(c, cni.ErrCodeKernel, "delete interface vm")
	m.refused(c, cni.ErrCodeKernel, "plugin portmap: DEL: no iptables")
	if f := m.left(); len(f.links) != 1 || len(f.records) != 1 {
		t.Errorf("left: %+v, want interface and address", f)
	}
	m.bin = whole
	if err := os.WriteFile(filepath.Join(m.path[0], "portmap.mended"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.ok(c)
	m.wantNothing(container)
}

// TestMesosPortsForReal: through the reference plugin, Debian's and a newer one,
// in both families, from another host.
func TestMesosPortsForReal(t *testing.T) {
	for name, p := range map[string]struct {
		dir    string
		checks bool
	}{
		"Debian": {"/usr/lib/cni", false},
		"newer":  {"../../../bin/tools/engines/plugins", true},
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := filepath.Abs(p.dir)
			if err == nil {
				_, err = os.Stat(dir + "/portmap")
			}
			if err != nil {
				t.Skipf("needs portmap, which scripts/engines installs: %v", err)
			}
			testPorts(t, dir, p.checks)
		})
	}
}

func testPorts(t *testing.T, dir string, checks bool) {
	m := newMachine(t)
	m.path = []string{dir}
	container, client := newNamespace(t), newNamespace(t)
	m.connect(client)
	hostPorts := []string{"10.99.0.1:31005", "[fd99::1]:31005"}
	dial := func(address string) (err error) {
		client.inside(t, func() error {
			var conn net.Conn
			if conn, err = net.DialTimeout("tcp", address, 5*time.Second); err == nil {
				conn.Close()
			}
			return nil
		})
		return err
	}

	c := call{plugin: "m-overlay", command: "ADD", netns: container.path, conf: m.config("both", "", "args", mesosArgs()),
		env: []string{"PATH=" + os.Getenv("PATH")}}
	c.conf = m.config("both", "1.0.0", "args", mesosArgs())
	var result any
	if err := json.Unmarshal([]byte(m.ok(c)), &result); err != nil {
		t.Fatal(err)
	}
	container.inside(t, func() error { return listen(t, ":80") })
	for _, address := range hostPorts {
		if err := dial(address); err != nil {
			t.Errorf("host port %s: %v", address, err)
		}
	}
	check := c
	check.command, check.conf = "CHECK", m.config("both", "1.0.0", "args", mesosArgs(), "prevResult", result)
	m.ok(check)
	m.host.inside(t, func() error { return exec.Command("ip6tables", "-t", "nat", "-F", "CNI-HOSTPORT-DNAT").Run() })
	if checks {
		m.refused(check, cni.ErrCodeDelegate, "plugin portmap: CHECK")
	} else {
		m.ok(check)
	}
	c.command, c.netns = "DEL", ""
	m.ok(c)
	m.wantNothing(container)
	for _, address := range hostPorts {
		if err := dial(address); err == nil {
			t.Errorf("host port %s is still there after DEL", address)
		}
	}
}

// listen accepts connections in the namespace of the calling thread. Each family
// has a socket of its own, because Go finds out in the namespace it asks first
// whether one can serve both.
func listen(t *testing.T, address string) error {
	for _, network := range []string{"tcp4", "tcp6"} {
		l, err := net.Listen(network, address)
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				conn.Close()
			}
		}()
	}
	return nil
}

// connect makes another host a neighbour of the machine: 10.99.0.1 and fd99::1
// here, .2 and ::2 there.
func (m *machine) connect(other namespace) {
	m.t.Helper()
	m.host.ip(m.t, "link", "add", "uplink", "type", "veth", "peer", "name", "eth0", "netns", filepath.Base(other.path))
	for _, end := range []struct {
		ns   namespace
		dev  string
		last string
	}{{m.host, "uplink", "1"}, {other, "eth0", "2"}} {
		end.ns.ip(m.t, "addr", "add", "10.99.0."+end.last+"/24", "dev", end.dev)
		end.ns.ip(m.t, "addr", "add", "fd99::"+end.last+"/64", "dev", end.dev, "nodad")
		end.ns.ip(m.t, "link", "set", end.dev, "up")
	}
	m.host.inside(m.t, func() error {
		for _, sysctl := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			if err := os.WriteFile("/proc/sys/net/"+sysctl, []byte("1"), 0); err != nil {
				return err
			}
		}
		return nil
	})
}

// The host end is marked for the fast path where it is certain that no host port
// leads to the container.
func TestUnpublished(t *testing.T) {
	ports := []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}
	asked := map[string]any{"portMappings": true}
	mesos := map[string]any{"org.apache.mesos": map[string]any{"network_info": map[string]any{"name": "both"}}}
	for name, tt := range map[string]struct {
		plugin  string
		overlay string
		keys    []any
		marked  bool
	}{
		"nothing is known":                   {"d-overlay", "both", nil, false},
		"none, in a chain":                   {"d-overlay", "both", []any{"capabilities", asked, "hostPorts", false}, true},
		"none, on a link without IPv6":       {"d-overlay", "dcos", []any{"capabilities", asked, "hostPorts", false, "mtu", 1200}, true},
		"one, for portmap":                   {"d-overlay", "both", []any{"capabilities", asked, "hostPorts", false, "runtimeConfig", map[string]any{"portMappings": ports}}, false},
		"none, and held to a rate":           {"d-overlay", "both", []any{"capabilities", asked, "hostPorts", false, "runtimeConfig", map[string]any{"bandwidth": map[string]any{"egressRate": 1000000, "egressBurst": 100000}}}, false},
		"none, and to no rate":               {"d-overlay", "both", []any{"capabilities", asked, "hostPorts", false, "runtimeConfig", map[string]any{"bandwidth": nil}}, true},
		"none, says Mesos":                   {"m-overlay", "both", []any{"args", mesos}, true},
		"one that Mesos' own mapper sees to": {"m-overlay", "both", []any{"args", mesosArgs(), "hostPorts", false}, false},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			for _, datapath := range []conf.DatapathState{
				{Mode: "auto", Taken: "ebpf"}, {Mode: "auto", Taken: "kernel", Reason: conf.NotLookedAt},
				{Mode: "auto", Taken: "kernel", Reason: "a rule"}, {Mode: "kernel", Taken: "kernel"}, {},
			} {
				m.state.Datapath = datapath
				m.publish()
				container := newNamespace(t)
				c := call{plugin: tt.plugin, command: "ADD", netns: container.path, conf: m.config(tt.overlay, "", tt.keys...)}
				m.ok(c) // without a portmap that could be run
				marked, room := m.hostEnd()
				if marked != tt.marked {
					t.Errorf("%+v: marked for the fast path: %v, want %v", datapath, marked, tt.marked)
				}
				// Whoever attached a filter later would have it drop packets.
				if want := tt.marked && datapath.MayFilter(); room != want {
					t.Errorf("%+v: has room for filters: %v, want %v", datapath, room, want)
				}
				c.command = "DEL"
				m.ok(c)
			}
		})
	}
}

// hostEnd says of the one host end there is whether it is marked for the fast path and
// whether it has the qdisc for filters.
func (m *machine) hostEnd() (marked, room bool) {
	m.t.Helper()
	m.host.inside(m.t, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if l.Type() != "veth" {
				continue
			}
			marked = l.Attrs().Group == mark.FastPathGroup
			if l.Attrs().Flags&net.FlagUp == 0 {
				m.t.Errorf("%s is down", l.Attrs().Name)
			}
			qdiscs, err := netlink.QdiscList(l)
			if err != nil {
				return err
			}
			room = slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Type() == "clsact" })
		}
		return err
	})
	return marked, room
}
