package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
)

// A machine is a host whose agent has done its work, in a network namespace,
// and the program under test.
//
//	dcos   9.0.1.128/25                           on d-dcos
//	both   9.1.1.128/25 and fd01:c::8000:0:0/81   on d-both
type machine struct {
	t    *testing.T
	host string // network namespace
	run  string
	bin  string
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{t: t, run: t.TempDir(), bin: filepath.Join(t.TempDir(), "overlay-netavark")}
	if out, err := exec.Command("go", "build", "-o", m.bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	m.publish()
	return m
}

func (m *machine) publish() {
	m.t.Helper()
	boot, err := conf.BootID()
	if err != nil {
		m.t.Fatal(err)
	}
	lease := conf.Lease{Bridges: conf.Halves[:], Grants: []conf.Grant{
		{Overlay: conf.Overlay{Name: "dcos", Subnet: netip.MustParsePrefix("9.0.0.0/16")}, Subnet: netip.MustParsePrefix("9.0.1.0/24")},
		{
			Overlay: conf.Overlay{Name: "both", Subnet: netip.MustParsePrefix("9.1.0.0/16"), Subnet6: netip.MustParsePrefix("fd01:c::/64")},
			Subnet:  netip.MustParsePrefix("9.1.1.0/24"), Subnet6: netip.MustParsePrefix("fd01:c::/80"),
		},
	}}
	state := conf.State{
		BootID: boot, MTU: 1450, CoolingSeconds: 150, Overlays: lease.AgentOverlays(nil),
		Lease: conf.LeaseState{ExpiresBoottime: int64(conf.Boottime() + time.Hour)},
	}
	if err := conf.WriteJSON(filepath.Join(m.run, conf.StateFile), state, 0o644); err != nil {
		m.t.Fatal(err)
	}
}

// boot makes the host's network.
func (m *machine) boot() {
	m.t.Helper()
	m.host = m.namespace("host")
	m.inside(m.host, `
		ip link set lo up
		ip link add d-dcos type bridge; ip addr add 9.0.1.129/25 dev d-dcos; ip link set d-dcos up
		ip link add d-both type bridge; ip addr add 9.1.1.129/25 dev d-both; ip addr add fd01:c::8000:0:1/81 dev d-both nodad; ip link set d-both up`)
}

func (m *machine) namespace(name string) string {
	m.t.Helper()
	if os.Getuid() != 0 {
		m.t.Skip("needs root: makes network namespaces")
	}
	name = fmt.Sprintf("ovl-%d-nv-%s", os.Getpid(), name)
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		m.t.Fatalf("make namespace %s: %v: %s", name, err, out)
	}
	m.t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	return "/run/netns/" + name
}

func (m *machine) inside(namespace, script string) string {
	m.t.Helper()
	cmd := exec.Command("nsenter", "--net="+namespace, "sh", "-ec", script)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		m.t.Fatalf("%s: %v: %s%s", script, err, out, &stderr)
	}
	return strings.TrimSpace(string(out))
}

// exec runs the program on the host as netavark does, and returns what it
// printed and its exit status.
func (m *machine) exec(stdin any, env []string, args ...string) (string, int) {
	m.t.Helper()
	in, err := json.Marshal(stdin)
	if err != nil {
		m.t.Fatal(err)
	}
	argv := append([]string{m.bin}, args...)
	if m.host != "" {
		argv = append([]string{"nsenter", "--net=" + m.host}, argv...)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(append(os.Environ(), "CNI_PATH="), env...)
	cmd.Stdin = strings.NewReader(string(in))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	var failed *exec.ExitError
	if err != nil && !errors.As(err, &failed) {
		m.t.Fatal(err)
	}
	return strings.TrimSpace(string(out)), cmd.ProcessState.ExitCode()
}

// expect runs the program and compares the document it prints.
func (m *machine) expect(what string, stdin any, want string, args ...string) {
	m.t.Helper()
	out, status := m.exec(stdin, nil, args...)
	same(m.t, what, out, want)
	if failed := strings.HasPrefix(want, `{"error"`); failed != (status != 0) {
		m.t.Errorf("%s: exit %d", what, status)
	}
}

// same compares two JSON documents, or two empty texts.
func same(t *testing.T, what, got, want string) {
	t.Helper()
	var g, w any
	if got != "" && json.Unmarshal([]byte(got), &g) != nil {
		t.Fatalf("%s: printed %q", what, got)
	}
	if want != "" && json.Unmarshal([]byte(want), &w) != nil {
		t.Fatalf("%s: wanted %q", what, want)
	}
	if d := cmp.Diff(w, g); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

type object = map[string]any

// network is a definition as Podman passes it to create and, completed, to
// setup.
func (m *machine) network(name string, more ...any) object {
	n := object{
		"name": name, "id": "2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9", "driver": "overlay-netavark",
		"created": "2026-11-22T14:00:00Z", "ipv6_enabled": false, "internal": false, "dns_enabled": true,
		"ipam_options": object{}, "options": object{"runDir": m.run},
	}
	for i := 0; i < len(more); i += 2 {
		if more[i+1] == nil {
			delete(n, more[i].(string))
			continue
		}
		n[more[i].(string)] = more[i+1]
	}
	return n
}

func container(network object, more ...any) object {
	c := object{
		"container_id": "752947ff91f961eb3cb47ffe9315016979f3ffbec09e4d96a4fae3fb03391697", "container_name": "web",
		"port_mappings": nil, "network": network,
		"network_options": object{"interface_name": "eth0", "aliases": []string{"752947ff91f9"}, "static_ips": nil, "static_mac": nil},
	}
	for i := 0; i < len(more); i += 2 {
		if o, ok := more[i+1].(object); ok {
			for k, v := range o {
				c[more[i].(string)].(object)[k] = v
			}
			continue
		}
		c[more[i].(string)] = more[i+1]
	}
	return c
}

func TestInfo(t *testing.T) {
	m := newMachine(t)
	for _, args := range [][]string{nil, {"info"}} {
		out, status := m.exec(nil, nil, args...)
		var info struct {
			Version    string
			APIVersion string `json:"api_version"`
		}
		if err := json.Unmarshal([]byte(out), &info); err != nil || status != 0 || info.APIVersion != "1.0.0" || !strings.HasPrefix(info.Version, "v") {
			t.Errorf("%q: %s, exit %d, %v", args, out, status, err)
		}
	}
	m.expect("unknown command", nil, `{"error":"command \"remove\" is not one of info, create, setup, teardown"}`, "remove")
	m.expect("setup without a namespace", nil, `{"error":"setup takes 1 arguments, got 0; setup and teardown take the path of a network namespace"}`, "setup")
}

func TestCreate(t *testing.T) {
	m := newMachine(t)
	completed := func(name, bridge string, v6 bool, more ...any) string {
		b, err := json.Marshal(m.network(name, append([]any{
			"network_interface", bridge, "ipv6_enabled", v6, "dns_enabled", false, "ipam_options", object{"driver": "none"},
		}, more...)...))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	m.expect("IPv4", m.network("dcos"), completed("dcos", "d-dcos", false), "create")
	m.expect("both", m.network("both", "future", 1), completed("both", "d-both", true, "future", 1), "create")
	m.expect("other name, all options", m.network("web", "options", object{"overlay": "both", "runDir": m.run, "mtu": "1400", "hairpinMode": "false"}, "ipam_options", nil, "subnets", nil),
		completed("web", "d-both", true, "options", object{"overlay": "both", "runDir": m.run, "mtu": "1400", "hairpinMode": "false"}), "create")
	m.expect("again", m.network("dcos", "network_interface", "d-dcos", "ipam_options", object{"driver": "none"}), completed("dcos", "d-dcos", false), "create")

	for _, tt := range []struct {
		name    string
		network object
		want    string
	}{
		{"subnet", m.network("both", "subnets", []object{{"subnet": "10.0.0.0/24"}}), "the subnet of a network is that of its overlay on this host, 9.1.1.128/25 and fd01:c::8000:0:0/81; leave --subnet, --gateway and --ip-range out"},
		{"route", m.network("dcos", "routes", []object{{"destination": "10.0.0.0/24"}}), "routes are those of the overlay; leave --route out"},
		{"internal", m.network("dcos", "internal", true), "an overlay leads to other hosts; leave --internal out"},
		{"IPAM", m.network("dcos", "ipam_options", object{"driver": "dhcp"}), "addresses come from the overlay and not from IPAM driver dhcp; leave --ipam-driver out"},
		{"interface", m.network("dcos", "network_interface", "eth0"), "the overlay's bridge is d-dcos; leave --interface-name out"},
		{"option", m.network("dcos", "options", object{"vlan": "3"}), "option vlan is unknown; the options are overlay, runDir, mtu, hairpinMode"},
		{"MTU", m.network("dcos", "options", object{"mtu": "big"}), "option mtu=big: want a number"},
		{"hairpin", m.network("dcos", "options", object{"hairpinMode": "yes"}), "option hairpinMode=yes: want true or false"},
		{"no such overlay", m.network("web"), "overlay web is not known on this host; check the name, and that the coordinator's configuration has it enabled"},
		{"no such agent", m.network("dcos", "options", object{"runDir": "/nonexistent"}), `/nonexistent/state.json is not there: the agent of this host has not published yet; see that "overlayd agent" runs, with --run-dir /nonexistent`},
		{"no overlay's name", m.network("a_very_long_name"), `overlay name: "a_very_long_name" has 16 bytes, at most 13 fit (the bridge is called m-a_very_long_name and a device name holds 15); name another one with -o overlay=NAME`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text, _ := json.Marshal(object{"error": tt.want})
			m.expect(tt.name, tt.network, string(text), "create")
		})
	}
}

func TestSetupTeardown(t *testing.T) {
	m := newMachine(t)
	m.boot()
	box := m.namespace("box")
	dcos := m.network("dcos")

	m.expect("setup", container(dcos), `{"dns_search_domains":[],"dns_server_ips":[],"interfaces":{"eth0":{
		"mac_address":"0a:58:09:00:01:82","subnets":[{"ipnet":"9.0.1.130/25","gateway":"9.0.1.129"}]}}}`, "setup", box)
	m.inside(box, `ping -c1 -W2 9.0.1.129 || busybox ping -c1 -W2 9.0.1.129`)
	// A second network on the same container, with everything by name.
	second := container(m.network("both"), "network_options", object{
		"interface_name": "eth1", "static_ips": []string{"9.1.1.200", "fd01:c::8000:0:77"}, "static_mac": "aa:bb:cc:dd:aa:00",
	})
	m.expect("second", second, `{"dns_search_domains":[],"dns_server_ips":[],"interfaces":{"eth1":{"mac_address":"aa:bb:cc:dd:aa:00","subnets":[
		{"ipnet":"9.1.1.200/25","gateway":"9.1.1.129"},{"ipnet":"fd01:c::8000:0:77/81","gateway":"fd01:c::8000:0:1"}]}}}`, "setup", box)
	same(t, "addresses", m.inside(box, `ip -j addr show eth1 | grep -o '"local":"[^f"][^"]*"' | sed 's/^/{/; s/$/}/' | head -1`), `{"local":"9.1.1.200"}`)

	out, status := m.exec(container(dcos), nil, "setup", box)
	if status != 1 || !strings.Contains(out, "error") || !strings.Contains(out, "eth0") {
		t.Errorf("a second setup: %s, exit %d", out, status)
	}
	m.expect("teardown", second, "", "teardown", box)
	m.expect("teardown", container(dcos), "", "teardown", box)
	m.expect("teardown again, without the namespace", container(dcos), "", "teardown", "/nonexistent")
	same(t, "links left in the container", m.inside(box, `ip -o link | wc -l`), "1")
	same(t, "ports left on the bridges", m.inside(m.host, `ip -o link show type veth | wc -l`), "0")

	// An address that another container was given by name is refused.
	third := container(dcos, "network_options", object{"static_ips": []string{"9.0.1.129"}})
	m.expect("gateway's address", third, `{"error":"requested address 9.0.1.129 is the gateway of 9.0.1.128/25"}`, "setup", box)
	m.expect("no namespace", container(dcos), `{"error":"CNI_NETNS: open /nonexistent: no such file or directory"}`, "setup", "/nonexistent")
}

// TestTeardownOfChangedNetwork: what is wrong with the definition by now does
// not keep a container from being detached.
func TestTeardownOfChangedNetwork(t *testing.T) {
	m := newMachine(t)
	m.boot()
	box := m.namespace("box")
	if out, status := m.exec(container(m.network("dcos")), nil, "setup", box); status != 0 {
		t.Fatalf("setup: %s", out)
	}
	changed := container(m.network("dcos", "options", object{"hairpinMode": "maybe", "mtu": "big", "runDir": m.run, "vlan": "3"}),
		"port_mappings", []object{{"host_port": 0, "container_port": 80}})
	m.expect("setup", changed, `{"error":"option hairpinMode=maybe: want true or false\noption mtu=big: want a number\noption vlan is unknown; the options are overlay, runDir, mtu, hairpinMode\nport mapping 0:80, 1 ports: ports are from 1 to 65535"}`, "setup", box)
	m.expect("teardown", changed, "", "teardown", box)
	same(t, "links left in the container", m.inside(box, `ip -o link | wc -l`), "1")
	if out, status := m.exec(container(m.network("dcos"), "network_options", object{"static_ips": []string{"9.0.1.130"}}), nil, "setup", box); status != 0 {
		t.Errorf("setup with the address that was released: %s", out)
	}
}

// TestPorts: through portmap, which notes how it was called.
func TestPorts(t *testing.T) {
	m := newMachine(t)
	m.boot()
	box := m.namespace("box")
	web := container(m.network("both"), "port_mappings", []object{
		{"host_ip": "127.0.0.1", "host_port": 8080, "container_port": 80, "protocol": "tcp,udp", "range": 2},
		{"host_ip": "", "host_port": 9090, "container_port": 90, "protocol": "tcp", "range": 1},
	})
	out, status := m.exec(web, nil, "setup", box)
	if status != 1 || !strings.Contains(out, "plugin portmap is in none of the directories of CNI_PATH") {
		t.Fatalf("without portmap: %s, exit %d", out, status)
	}
	same(t, "links left in the container", m.inside(box, `ip -o link | wc -l`), "1")

	dir := t.TempDir()
	script := "#!/bin/sh\necho $CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_PATH >> $0.calls\n" +
		"[ $CNI_COMMAND = ADD ] || exec cat > $0.del\ntee $0.add\n"
	if err := os.WriteFile(filepath.Join(dir, "portmap"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	path := []string{"CNI_PATH=" + dir}
	if out, status = m.exec(web, path, "setup", box); status != 0 {
		t.Fatalf("setup: %s", out)
	}
	if out, status = m.exec(web, path, "teardown", box); status != 0 || out != "" {
		t.Fatalf("teardown: %s", out)
	}
	calls, err := os.ReadFile(filepath.Join(dir, "portmap.calls"))
	if err != nil {
		t.Fatal(err)
	}
	called := fmt.Sprintf(" %s %s eth0 %s\n", web["container_id"], box, dir)
	if d := cmp.Diff("ADD"+called+"DEL"+called, string(calls)); d != "" {
		t.Errorf("environment of portmap (-want +got):\n%s", d)
	}
	for _, verb := range []string{"add", "del"} {
		b, err := os.ReadFile(filepath.Join(dir, "portmap."+verb))
		if err != nil {
			t.Fatal(err)
		}
		var got struct{ RuntimeConfig json.RawMessage }
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		same(t, "port mappings on "+verb, string(got.RuntimeConfig), `{"portMappings":[
			{"hostPort":8080,"containerPort":80,"protocol":"tcp","hostIP":"127.0.0.1"},{"hostPort":8081,"containerPort":81,"protocol":"tcp","hostIP":"127.0.0.1"},
			{"hostPort":8080,"containerPort":80,"protocol":"udp","hostIP":"127.0.0.1"},{"hostPort":8081,"containerPort":81,"protocol":"udp","hostIP":"127.0.0.1"},
			{"hostPort":9090,"containerPort":90,"protocol":"tcp"}]}`)
	}
	m.expect("no port", container(m.network("both"), "port_mappings", []object{{"host_port": 65535, "container_port": 1, "protocol": "tcp", "range": 2}}),
		`{"error":"port mapping 65535:1, 2 ports: ports are from 1 to 65535"}`, "setup", box)
}

// TestResultThatNobodyReads: the container is detached again.
func TestResultThatNobodyReads(t *testing.T) {
	m := newMachine(t)
	m.boot()
	box := m.namespace("box")
	in, err := json.Marshal(container(m.network("dcos")))
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer w.Close()
	cmd := exec.Command("nsenter", "--net="+m.host, m.bin, "setup", box)
	cmd.Stdin, cmd.Stdout = strings.NewReader(string(in)), w
	if err := cmd.Run(); err == nil || cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("exit: %v", err)
	}
	same(t, "links left in the container", m.inside(box, `ip -o link | wc -l`), "1")
}

// TestPortsForReal: the reference plugin gets all it needs to know.
func TestPortsForReal(t *testing.T) {
	const dir = "/usr/lib/cni"
	if _, err := os.Stat(dir + "/portmap"); err != nil {
		t.Skipf("needs portmap, which scripts/engines installs: %v", err)
	}
	m := newMachine(t)
	m.boot()
	box := m.namespace("box")
	path := []string{"CNI_PATH=" + dir}
	web := container(m.network("dcos"), "port_mappings", []object{{"host_ip": "", "host_port": 8080, "container_port": 80, "protocol": "tcp", "range": 1}})
	leads := func() string {
		return m.inside(m.host, `iptables -t nat -S | grep -c -- '--to-destination 9.0.1.130:80' || true`)
	}
	if out, status := m.exec(web, path, "setup", box); status != 0 {
		t.Fatalf("setup: %s", out)
	}
	if n := leads(); n != "1" {
		t.Errorf("%s rules lead to the container after setup", n)
	}
	if out, status := m.exec(web, path, "teardown", box); status != 0 || out != "" {
		t.Errorf("teardown: %s", out)
	}
	if n := leads(); n != "0" {
		t.Errorf("%s rules lead to the container after teardown", n)
	}
}
