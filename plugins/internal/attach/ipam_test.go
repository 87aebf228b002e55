package attach

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
)

// TestHostLocal: addresses from the reference IPAM plugin.
func TestHostLocal(t *testing.T) {
	var dir string
	for _, d := range []string{"/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"} {
		if _, err := os.Stat(filepath.Join(d, "host-local")); err == nil {
			dir = d
		}
	}
	if dir == "" {
		t.Skip("needs host-local from containernetworking-plugins")
	}
	m := newMachine(t)
	m.path = []string{dir}
	data := t.TempDir()
	a, b := newNamespace(t), newNamespace(t)
	conf := m.config("dcos", "1.0.0", "ipam", map[string]any{"type": "host-local", "dataDir": data,
		"ranges": [][]map[string]any{{{"subnet": "9.0.1.128/25", "rangeStart": "9.0.1.140", "gateway": "9.0.1.129"}}}})
	ra := m.add(call{id: "a", netns: a.path, conf: conf})
	rb := m.add(call{id: "b", netns: b.path, conf: conf})
	if got, want := addrsOf(ra)[0], netip.MustParseAddr("9.0.1.140"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	ping(t, a, addrsOf(rb)[0])
	ping(t, b, netip.MustParseAddr("9.0.1.129"))

	// As UCR calls it: no version, the oldest format between the two programs too.
	delete(conf, "cniVersion")
	c := newNamespace(t)
	old := m.ok(call{command: "ADD", id: "c", netns: c.path, conf: conf})
	if !strings.Contains(old, `"ip": "9.0.1.142/25"`) {
		t.Errorf("without a version: %s", old)
	}
	m.ok(call{command: "DEL", id: "c", conf: conf})
	conf["cniVersion"] = "1.0.0"

	check := call{command: "CHECK", id: "a", netns: a.path, conf: m.config("dcos", "1.0.0", "ipam", conf["ipam"], "prevResult", ra)}
	m.ok(check)
	m.ok(call{command: "DEL", id: "a", conf: conf})
	m.ok(call{command: "DEL", id: "b", conf: conf})
	m.wantNothing(a, b)
	left, err := filepath.Glob(filepath.Join(data, "dcos", "9.*"))
	if err != nil || len(left) != 0 {
		t.Errorf("host-local has %v left, %v", left, err)
	}
}

// TestIPAMPlugin: what is passed to an IPAM plugin of others and taken from it,
// and that its DEL follows when anything fails.
func TestIPAMPlugin(t *testing.T) {
	tests := []struct {
		name, script string
		code         uint // 0: succeeds
		words        string
		calls        []string
	}{
		{"gives an address", `[ $CNI_COMMAND = DEL ] || echo '{"ips":[{"address":"9.0.1.200/25"}],"dns":{"nameservers":["9.0.0.53"]}}'`,
			0, "", []string{"ADD c1 eth0 K=V"}},
		{"fails", `[ $CNI_COMMAND = DEL ] || { echo '{"code":11,"msg":"try later"}'; exit 1; }`,
			types.ErrTryAgainLater, "plugin other: ADD: try later", []string{"ADD c1 eth0 K=V", "DEL c1 eth0 K=V"}},
		{"fails in its own words", `[ $CNI_COMMAND = DEL ] || { echo '{"code":105,"msg":"no"}'; exit 1; }`,
			cni.ErrCodeDelegate, "plugin other: ADD: no", []string{"ADD c1 eth0 K=V", "DEL c1 eth0 K=V"}},
		{"prints garbage", `[ $CNI_COMMAND = DEL ] || echo oops`,
			cni.ErrCodeDelegate, "plugin other: result of ADD", []string{"ADD c1 eth0 K=V", "DEL c1 eth0 K=V"}},
		{"prints null", `[ $CNI_COMMAND = DEL ] || echo null`,
			cni.ErrCodeDelegate, "plugin other: gave no address", []string{"ADD c1 eth0 K=V", "DEL c1 eth0 K=V"}},
		{"prints far too much", `[ $CNI_COMMAND = DEL ] || head -c 3000000 /dev/zero`,
			cni.ErrCodeDelegate, "printed more than", []string{"ADD c1 eth0 K=V", "DEL c1 eth0 K=V"}},
		{"dies", `[ $CNI_COMMAND = DEL ] || kill -9 $$`,
			cni.ErrCodeDelegate, "signal: killed", []string{"ADD c1 eth0 K=V", "DEL c1 eth0 K=V"}},
		{"gives an address of another host", `[ $CNI_COMMAND = DEL ] || echo '{"ips":[{"address":"9.0.2.5/25"}]}'`,
			cni.ErrCodeDelegate, "gave 9.0.2.5, which is outside the docker half of overlay dcos", []string{"ADD c1 eth0 K=V", "DEL c1 eth0 K=V"}},
		{"gives the gateway", `[ $CNI_COMMAND = DEL ] || echo '{"ips":[{"address":"9.0.1.129/25"}]}'`,
			cni.ErrCodeDelegate, "gave 9.0.1.129, which is the network, gateway or broadcast address", []string{"ADD c1 eth0 K=V", "DEL c1 eth0 K=V"}},
		{"gives two", `[ $CNI_COMMAND = DEL ] || echo '{"ips":[{"address":"9.0.1.200/25"},{"address":"9.0.1.201/25"}]}'`,
			cni.ErrCodeDelegate, "one address of each family", []string{"ADD c1 eth0 K=V", "DEL c1 eth0 K=V"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			container := newNamespace(t)
			c := call{netns: container.path, env: []string{"CNI_ARGS=K=V"},
				conf: m.config("dcos", "1.0.0", "ipam", map[string]any{"type": m.script("other", tt.script)})}
			if tt.code == 0 {
				r := m.add(c)
				if r.IPs[0].Gateway.String() != "9.0.1.129" || r.Routes[0].GW.String() != "9.0.1.129" || r.DNS.Nameservers[0] != "9.0.0.53" {
					t.Errorf("result is %v", r)
				}
			} else {
				c.command = "ADD"
				m.refused(c, tt.code, tt.words)
				m.wantNothing(container)
			}
			if diff := cmp.Diff(tt.calls, m.calls("other")); diff != "" {
				t.Errorf("calls (-want +got):\n%s", diff)
			}
			stdin, err := os.ReadFile(filepath.Join(m.path[0], "other.stdin"))
			if err != nil {
				t.Fatal(err)
			}
			want, _ := json.Marshal(c.conf)
			if string(stdin) != string(want) {
				t.Errorf("stdin was %s, want %s", stdin, want)
			}
		})
	}
}

func TestRequests(t *testing.T) {
	m := newMachine(t)
	container := newNamespace(t)
	r := m.add(call{netns: container.path, conf: m.config("both", "1.1.0", "mtu", 1400, "hairpinMode", false,
		"runtimeConfig", map[string]any{"mac": "0A:58:01:02:03:04", "ips": []string{"9.1.1.200/25", "fd01:c::8000:0:77"}})})
	if got := strings.Join([]string{r.IPs[0].Address.String(), r.IPs[1].Address.String(), r.Interfaces[1].Mac}, " "); got != "9.1.1.200/25 fd01:c::8000:0:77/81 0a:58:01:02:03:04" {
		t.Errorf("got %s", got)
	}
	inside, err := container.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if a := inside.Attrs(); a.MTU != 1400 || a.HardwareAddr.String() != "0a:58:01:02:03:04" || r.Interfaces[1].Mtu != 1400 {
		t.Errorf("kernel has MTU %d and MAC %s", a.MTU, a.HardwareAddr)
	}
	host, err := m.host.LinkByName(r.Interfaces[0].Name)
	if err != nil {
		t.Fatal(err)
	}
	wantPort(t, m, host, "d-both", false)
	ping(t, container, addrOf(r.IPs[0].Gateway))
	ping(t, container, addrOf(r.IPs[1].Gateway))

	m.refused(call{command: "ADD", id: "c2", netns: newNamespace(t).path, conf: m.config("both", "1.1.0"), env: []string{"CNI_ARGS=IP=9.1.1.200"}},
		cni.ErrCodeAddress, "9.1.1.200")
}

// TestChain: the results of the plugins before are passed on.
func TestChain(t *testing.T) {
	m := newMachine(t)
	container := newNamespace(t)
	prev := map[string]any{"cniVersion": "1.0.0",
		"interfaces": []map[string]any{{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": container.path}},
		"ips":        []map[string]any{{"address": "127.0.0.1/8", "interface": 0}},
		"dns":        map[string]any{"domain": "example.org"}}
	r := m.add(call{netns: container.path, conf: m.config("dcos", "1.0.0", "prevResult", prev)})
	var names []string
	for _, i := range r.Interfaces {
		names = append(names, i.Name)
	}
	if len(names) != 3 || names[0] != "lo" || names[2] != "eth0" {
		t.Errorf("interfaces are %v", names)
	}
	if len(r.IPs) != 2 || *r.IPs[0].Interface != 0 || *r.IPs[1].Interface != 2 || r.DNS.Domain != "example.org" {
		t.Errorf("result is %v", r)
	}
}

// TestIPv6SwitchedOff: some runtimes make namespaces without IPv6.
func TestIPv6SwitchedOff(t *testing.T) {
	m := newMachine(t)
	for _, overlay := range []string{"dcos", "both"} {
		container := newNamespace(t)
		container.inside(t, func() error {
			return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
		})
		r := m.add(call{id: overlay, netns: container.path, conf: m.config(overlay, "1.0.0")})
		for _, ip := range r.IPs {
			ping(t, container, addrOf(ip.Gateway))
		}
		link, err := container.LinkByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		var want []string
		for _, ip := range r.IPs {
			want = append(want, ip.Address.String())
		}
		wantAddrs(t, container, link, want)
	}
}

// TestMTUBelowIPv6: the kernel has no IPv6 on an interface with an MTU below
// 1280, nor on any where it was started with ipv6.disable=1, and refuses what is
// said about it in the same way.
func TestMTUBelowIPv6(t *testing.T) {
	m := newMachine(t)
	for _, mtu := range []int{1279, 552} {
		container := newNamespace(t)
		c := call{id: strconv.Itoa(mtu), netns: container.path, conf: m.config("dcos", "1.0.0", "mtu", mtu)}
		r := m.add(c)
		ping(t, container, addrOf(r.IPs[0].Gateway))
		link, err := container.LinkByName("eth0")
		if err != nil || link.Attrs().MTU != mtu {
			t.Errorf("eth0 has MTU %d, %v; want %d", link.Attrs().MTU, err, mtu)
		}
		host, err := m.host.LinkByName(r.Interfaces[0].Name)
		if err != nil || host.Attrs().Alias == "" {
			t.Errorf("%s is not marked as ours: alias %q, %v", r.Interfaces[0].Name, host.Attrs().Alias, err)
		}
	}
}

func TestStatus(t *testing.T) {
	ok := func(*machine, *call) {}
	tests := []struct {
		name    string
		arrange func(m *machine, c *call)
		code    uint
		words   string
	}{
		{"ready", ok, 0, ""},
		{"nothing published", func(m *machine, _ *call) { os.Remove(filepath.Join(m.run, "state.json")) }, 50, "has not published"},
		{"lease lost", func(m *machine, _ *call) { m.state.Lease.Lost = "granted to another"; m.publish() }, 51, "granted to another"},
		{"overlay drained", func(m *machine, _ *call) { m.state.Overlays[0].Info.Draining = true; m.publish() }, 50, "is being drained"},
		{"bridge missing", func(m *machine, _ *call) { m.deleteLink("d-dcos") }, 51, "bridge d-dcos is missing"},
		{"VTEP missing", func(m *machine, _ *call) { m.deleteLink("vtep1024") }, 51, "vtep1024 is missing or down"},
		{"the plugin for addresses is not ready", func(m *machine, c *call) {
			c.conf["ipam"] = map[string]any{"type": m.script("other", `echo '{"code":50,"msg":"full"}'; exit 1`)}
		}, 50, "plugin other: STATUS: full"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			c := call{command: "STATUS", conf: m.config("dcos", "1.1.0")}
			tt.arrange(m, &c)
			if tt.code == 0 {
				if out := m.ok(c); out != "" {
					t.Errorf("printed %q", out)
				}
				return
			}
			m.refused(c, tt.code, tt.words)
		})
	}
}

// TestGC: what is not listed goes, of this network and half, and old enough.
func TestGC(t *testing.T) {
	m := newMachine(t)
	keep := newNamespace(t)
	kept := m.add(call{id: "keep", netns: keep.path, conf: m.config("dcos", "1.1.0")})
	m.add(call{id: "young", netns: newNamespace(t).path, conf: m.config("dcos", "1.1.0")})
	for _, id := range []string{"old1", "old2", "old3"} {
		m.add(call{id: id, netns: newNamespace(t).path, conf: m.config("dcos", "1.1.0")})
		m.age("dcos", id)
	}
	m.add(call{id: "other", netns: newNamespace(t).path, conf: m.config("both", "1.1.0")})
	m.age("both", "other")
	m.add(call{plugin: "m-overlay", id: "mesos", netns: newNamespace(t).path, conf: m.config("dcos", "1.1.0")})
	m.age("dcos", "mesos")
	m.age("dcos", "keep")

	gc := call{command: "GC", conf: m.config("dcos", "1.1.0")}
	m.refused(gc, types.ErrInvalidNetworkConfig, "cni.dev/valid-attachments: missing")
	gc.conf["cni.dev/valid-attachments"] = []map[string]string{{"containerID": "keep", "ifname": "eth0"}, {"containerID": "unknown", "ifname": "eth0"}}
	if out := m.ok(gc); out != "" {
		t.Errorf("printed %q", out)
	}
	var ids []string
	f := m.left()
	for _, r := range f.records {
		ids = append(ids, r.ContainerID)
	}
	slices.Sort(ids)
	if want := []string{"keep", "mesos", "other", "young"}; !slices.Equal(ids, want) || len(f.links) != len(want) {
		t.Errorf("left: records of %v, links %v; want %v", ids, f.links, want)
	}
	ping(t, keep, addrOf(kept.IPs[0].Gateway))
}

// TestCheck: each thing that can be wrong is found, and nothing is changed.
func TestCheck(t *testing.T) {
	tests := []struct {
		name    string
		disturb func(m *machine, container namespace, c *call)
		code    uint
		words   string
	}{
		{"nothing", func(*machine, namespace, *call) {}, 0, ""},
		{"more routes and addresses", func(m *machine, container namespace, _ *call) {
			container.ip(m.t, "addr", "add", "10.9.9.9/24", "dev", "eth0")
			container.ip(m.t, "route", "add", "10.1.0.0/16", "via", "9.1.1.129")
		}, 0, ""},
		{"MAC changed and said so", func(m *machine, container namespace, c *call) {
			container.ip(m.t, "link", "set", "eth0", "address", "0a:58:00:00:00:01")
			c.conf["prevResult"].(map[string]any)["interfaces"].([]any)[1].(map[string]any)["mac"] = "0a:58:00:00:00:01"
		}, 0, ""},
		{"MAC changed", func(m *machine, container namespace, _ *call) {
			container.ip(m.t, "link", "set", "eth0", "address", "0a:58:00:00:00:01")
		}, cni.ErrCodeMissing, "interface eth0 has MAC 0a:58:00:00:00:01, and prevResult says"},
		{"interface gone", func(m *machine, container namespace, _ *call) { container.ip(m.t, "link", "del", "eth0") },
			cni.ErrCodeMissing, "of the container is missing on the host"},
		{"interface renamed", func(m *machine, container namespace, _ *call) {
			container.ip(m.t, "link", "set", "eth0", "name", "eth9")
		},
			cni.ErrCodeMissing, "interface eth0 is missing in the container"},
		{"interface down", func(m *machine, container namespace, _ *call) { container.ip(m.t, "link", "set", "eth0", "down") },
			cni.ErrCodeMissing, "interface eth0 is down in the container"},
		{"IPv4 address gone", func(m *machine, container namespace, _ *call) {
			container.ip(m.t, "addr", "del", "9.1.1.130/25", "dev", "eth0")
		}, cni.ErrCodeMissing, "interface eth0 does not have address 9.1.1.130/25"},
		{"IPv6 address gone", func(m *machine, container namespace, _ *call) {
			container.ip(m.t, "addr", "del", "fd01:c::8000:0:2/81", "dev", "eth0")
		}, cni.ErrCodeMissing, "interface eth0 does not have address fd01:c::8000:0:2/81"},
		{"IPv4 route gone", func(m *machine, container namespace, _ *call) { container.ip(m.t, "route", "del", "default") },
			cni.ErrCodeMissing, "the container has no route to 0.0.0.0/0 via 9.1.1.129"},
		{"IPv6 route gone", func(m *machine, container namespace, _ *call) { container.ip(m.t, "-6", "route", "del", "default") },
			cni.ErrCodeMissing, "the container has no route to ::/0 via fd01:c::8000:0:1"},
		{"off the bridge", func(m *machine, _ namespace, _ *call) { m.host.ip(m.t, "link", "set", m.left().links[0], "nomaster") },
			cni.ErrCodeMissing, "is not a port of bridge d-both"},
		{"bridge gone", func(m *machine, _ namespace, _ *call) { m.deleteLink("d-both") },
			types.ErrTryAgainLater, "bridge d-both is missing or down"},
		{"record gone", func(m *machine, _ namespace, _ *call) { m.forget("both", "c1") },
			cni.ErrCodeMissing, "has no address in the docker half of overlay both"},
		{"no prevResult", func(_ *machine, _ namespace, c *call) { delete(c.conf, "prevResult") },
			types.ErrInvalidNetworkConfig, "prevResult"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			container := newNamespace(t)
			c := call{command: "ADD", netns: container.path, conf: m.config("both", "1.1.0")}
			var prev map[string]any
			if err := json.Unmarshal([]byte(m.ok(c)), &prev); err != nil {
				t.Fatal(err)
			}
			c.command = "CHECK"
			c.conf["prevResult"] = prev
			tt.disturb(m, container, &c)
			before := m.left()
			if tt.code == 0 {
				if out := m.ok(c); out != "" {
					t.Errorf("printed %q", out)
				}
			} else {
				m.refused(c, tt.code, tt.words)
			}
			after := m.left()
			if !slices.Equal(before.links, after.links) || len(before.records) != len(after.records) {
				t.Errorf("CHECK changed %v to %v", before, after)
			}
		})
	}
}

// TestAddressInUse: an IPAM plugin of others that gives an address which a living
// container has is refused, and what it gave is given to nobody else.
func TestAddressInUse(t *testing.T) {
	m := newMachine(t)
	giving := func(name, address string) map[string]any {
		return m.config("dcos", "1.0.0", "ipam", map[string]any{"type": m.script(name, `[ $CNI_COMMAND = DEL ] || echo '{"cniVersion":"1.0.0","ips":[{"address":"`+address+`/25"}]}'`)})
	}
	inUse := func(c call, code uint, words string) {
		t.Helper()
		container := newNamespace(t)
		c.command, c.netns = "ADD", container.path
		m.refused(c, code, words)
		if links := container.links(t); len(links) > 0 {
			t.Errorf("left in the container: %v", links)
		}
	}
	// Ours has it: the plugin's is refused, and its own DEL is run.
	own := m.add(call{id: "own", netns: newNamespace(t).path, conf: m.config("dcos", "1.0.0")})
	static := giving("static1", addrsOf(own)[0].String())
	inUse(call{id: "a", conf: static}, cni.ErrCodeDelegate, "gave 9.0.1.130, which is in use by dcos/own/eth0")
	if diff := cmp.Diff([]string{"ADD a eth0", "DEL a eth0"}, m.calls("static1")); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	// One plugin has it: another, its own, and one of Docker's kind do not get it.
	m.ok(call{command: "ADD", id: "b", netns: newNamespace(t).path, conf: giving("static2", "9.0.1.140")})
	inUse(call{id: "c", conf: giving("static3", "9.0.1.140")}, cni.ErrCodeDelegate, "gave 9.0.1.140, which is in use by dcos/b/eth0")
	second := giving("static4", "9.0.1.140")
	second["name"], second["overlay"] = "second", "dcos"
	inUse(call{id: "c", conf: second}, cni.ErrCodeDelegate, "gave 9.0.1.140, which is in use by dcos/b/eth0")
	inUse(call{id: "d", conf: m.config("dcos", "1.0.0"), env: []string{"CNI_ARGS=IP=9.0.1.140"}}, cni.ErrCodeAddress, "9.0.1.140 is in use by dcos/b/eth0")
	for i := range 12 { // the frontier passes it
		r := m.add(call{id: "e" + strconv.Itoa(i), netns: newNamespace(t).path, conf: m.config("dcos", "1.0.0")})
		if addrsOf(r)[0] == netip.MustParseAddr("9.0.1.140") {
			t.Fatal("9.0.1.140 was given out again")
		}
	}
	// Not filed, because the store was lost and a stranger's took its place: the
	// link says so.
	m.forget("dcos", "b")
	inUse(call{id: "c", conf: giving("static5", "9.0.1.140")}, cni.ErrCodeDelegate, "gave 9.0.1.140, which is in use by dcos/b/eth0")
	// Gone: it can be had again.
	m.ok(call{command: "DEL", id: "b", conf: giving("static2", "9.0.1.140")})
	m.ok(call{command: "ADD", id: "c", netns: newNamespace(t).path, conf: giving("static3", "9.0.1.140")})
	// In both families: none is kept when one is refused.
	both := m.config("both", "1.0.0", "ipam", map[string]any{"type": m.script("static6", `[ $CNI_COMMAND = DEL ] || echo '{"cniVersion":"1.0.0","ips":[{"address":"9.1.1.140/25"},{"address":"fd01:c::8000:0:2/81"}]}'`)})
	six := m.add(call{id: "six", netns: newNamespace(t).path, conf: m.config("both", "1.0.0")})
	inUse(call{id: "f", conf: both}, cni.ErrCodeDelegate, "gave "+addrsOf(six)[1].String())
	m.ok(call{command: "DEL", id: "six", conf: m.config("both", "1.0.0")})
	m.ok(call{command: "ADD", id: "f", netns: newNamespace(t).path, conf: both})
}

// TestBridgeFull: a bridge without a port left is no defect: try again later. Its
// other ports count too.
func TestBridgeFull(t *testing.T) {
	m := newMachine(t)
	bridge, err := m.host.LinkByName("d-dcos6")
	if err != nil {
		t.Fatal(err)
	}
	for i := range (conf.BridgePorts - 1) / 2 { // both ends are ports
		name, peer := "x"+strconv.Itoa(i), "y"+strconv.Itoa(i)
		err := m.host.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MasterIndex: bridge.Attrs().Index, TxQLen: -1}, PeerName: peer})
		if err == nil {
			var l netlink.Link
			if l, err = m.host.LinkByName(peer); err == nil {
				err = m.host.LinkSetMaster(l, bridge)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	status := call{command: "STATUS", conf: m.config("dcos6", "1.1.0")}
	m.ok(status)
	m.ok(call{command: "ADD", id: "last", netns: newNamespace(t).path, conf: m.config("dcos6", "1.1.0")})
	m.refused(status, types.ErrPluginNotAvailable, "bridge d-dcos6 has 1023 ports: a Linux bridge has at most 1023 ports")
	m.refused(call{command: "ADD", id: "next", netns: newNamespace(t).path, conf: m.config("dcos6", "1.1.0")},
		types.ErrTryAgainLater, "a Linux bridge has at most 1023 ports; remove containers")
	if recs := m.records("dcos6"); len(recs) != 1 {
		t.Errorf("in the store: %v", recs)
	}
	m.ok(call{command: "DEL", id: "last", conf: m.config("dcos6", "1.1.0")})
	m.ok(status)
}

// Where the store is gone and overlay-ipam is the first to need one, it has what the
// links say in it: the programs after it trust what they find.
func TestStoreMadeByIPAM(t *testing.T) {
	m := newMachine(t)
	attached, other, third := newNamespace(t), newNamespace(t), newNamespace(t)
	r := m.add(call{id: "attached", netns: attached.path, conf: m.config("both", "1.1.0")})
	if err := os.RemoveAll(filepath.Join(m.run, conf.IPAMDir)); err != nil {
		t.Fatal(err)
	}
	of := m.config("both", "1.1.0", "ipam", map[string]any{"type": "overlay-ipam", "half": "docker"})
	m.ok(call{plugin: "overlay-ipam", command: "STATUS", conf: of})
	m.ok(call{plugin: "overlay-ipam", command: "ADD", id: "other", netns: other.path, conf: of})
	m.add(call{id: "third", netns: third.path, conf: m.config("both", "1.1.0")})
	owners := map[netip.Addr]string{}
	for _, rec := range m.records("both") {
		for _, a := range rec.Addrs {
			owners[a] = rec.ContainerID
		}
	}
	if len(owners) != 6 {
		t.Errorf("in use: %v", owners)
	}
	for _, a := range addrsOf(r) {
		if owners[a] != "attached" {
			t.Errorf("%s is of %q", a, owners[a])
		}
	}
}
