package attach

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/internal/cni"
)

// keysOf are the keys of the objects in one list of a result.
func keysOf(t *testing.T, result, list string) (keys []string) {
	t.Helper()
	var doc map[string]any
	if err := json.Unmarshal([]byte(result), &doc); err != nil {
		t.Fatal(err)
	}
	all, _ := doc[list].([]any)
	for _, o := range all {
		for k := range o.(map[string]any) {
			if !slices.Contains(keys, k) {
				keys = append(keys, k)
			}
		}
	}
	slices.Sort(keys)
	return keys
}

// TestResultHasKeysOfItsVersion: MTU and the like came with 1.1.0, whoever they are
// from. eth1 has a route with a metric.
func TestResultHasKeysOfItsVersion(t *testing.T) {
	m := newMachine(t)
	prev := `{"cniVersion":"%s","interfaces":[{"name":"x","mtu":9000,"socketPath":"/s","pciID":"0000:00:00.0","sandbox":"/n"}],
		"ips":[{"version":"4","address":"10.0.0.2/24","interface":0}],"routes":[{"dst":"10.9.0.0/16","gw":"10.0.0.1","mtu":1400,"priority":7}]}`
	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for _, inChain := range []bool{false, true} {
			container := newNamespace(t)
			c := call{command: "ADD", netns: container.path, ifName: "eth1", conf: m.config("dcos", version)}
			if inChain {
				c.conf["prevResult"] = json.RawMessage(fmt.Sprintf(prev, version))
			}
			out := m.ok(c)
			interfaces, routes := []string{"mac", "name", "sandbox"}, []string{"dst", "gw"}
			if version == "1.1.0" {
				interfaces, routes = []string{"mac", "mtu", "name", "sandbox"}, []string{"dst", "gw", "priority"}
				if inChain {
					interfaces = []string{"mac", "mtu", "name", "pciID", "sandbox", "socketPath"}
					routes = []string{"dst", "gw", "mtu", "priority"}
				}
			}
			if diff := cmp.Diff(interfaces, keysOf(t, out, "interfaces")); diff != "" {
				t.Errorf("%s, in a chain %v: keys of interfaces (-want +got):\n%s", version, inChain, diff)
			}
			if diff := cmp.Diff(routes, keysOf(t, out, "routes")); diff != "" {
				t.Errorf("%s, in a chain %v: keys of routes (-want +got):\n%s", version, inChain, diff)
			}
			m.ok(call{command: "DEL", ifName: "eth1", conf: m.config("dcos", version)})
		}
	}
}

// TestDNS: what the configuration says about DNS is in the result, in all versions.
func TestDNS(t *testing.T) {
	m := newMachine(t)
	file := filepath.Join(t.TempDir(), "resolv.conf")
	text := "# comment\nnameserver 9.9.9.9\nnameserver fd01::53\ndomain old\n\nsearch a.example b.example\noptions ndots:2 rotate\n; end\nsortlist 1.2.3.4\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	conf := map[string]any{"nameservers": []string{"9.0.0.53"}, "domain": "example", "search": []string{"s.example"}, "options": []string{"ndots:1"}}
	configured := types.DNS{Nameservers: []string{"9.0.0.53"}, Domain: "example", Search: []string{"s.example"}, Options: []string{"ndots:1"}}
	fromFile := types.DNS{Nameservers: []string{"9.9.9.9", "fd01::53"}, Domain: "old", Search: []string{"a.example", "b.example"}, Options: []string{"ndots:2", "rotate"}}
	plugin := m.script("other", `[ $CNI_COMMAND = DEL ] || echo '{"cniVersion":"1.0.0","ips":[{"address":"9.0.1.200/25"}],"dns":{"nameservers":["7.7.7.7"]}}'`)
	fromPlugin := types.DNS{Nameservers: []string{"7.7.7.7"}}
	for _, tt := range []struct {
		name string
		conf []any
		want types.DNS
	}{
		{"none", nil, types.DNS{}},
		{"dns", []any{"dns", conf}, configured},
		{"ipam.resolvConf", []any{"ipam", map[string]any{"type": "overlay-ipam", "resolvConf": file}}, fromFile},
		{"dns before ipam.resolvConf", []any{"dns", conf, "ipam", map[string]any{"resolvConf": file}}, configured},
		{"IPAM plugin", []any{"ipam", map[string]any{"type": plugin, "resolvConf": "/its/own"}}, fromPlugin},
		{"dns before IPAM plugin", []any{"dns", conf, "ipam", map[string]any{"type": plugin}}, configured},
	} {
		versions := []string{"1.0.0"}
		if len(tt.conf) <= 2 {
			versions = []string{"", "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}
		}
		for _, version := range versions {
			t.Run(tt.name+" "+version, func(t *testing.T) {
				container := newNamespace(t)
				c := call{command: "ADD", netns: container.path, conf: m.config("dcos", version, tt.conf...)}
				var r struct{ DNS types.DNS }
				if err := json.Unmarshal([]byte(m.ok(c)), &r); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tt.want, r.DNS); diff != "" {
					t.Errorf("dns (-want +got):\n%s", diff)
				}
				m.ok(call{command: "DEL", conf: c.conf})
			})
		}
	}
	for _, path := range []string{"/nonexistent", "/dev/zero", t.TempDir()} {
		m.refused(call{command: "ADD", netns: newNamespace(t).path, conf: m.config("dcos", "1.0.0", "ipam", map[string]any{"resolvConf": path})},
			types.ErrInvalidNetworkConfig, "ipam.resolvConf")
	}
	m.wantNothing()
}

// TestIPAMRoutes: ipam.routes stand for the default route of their family.
func TestIPAMRoutes(t *testing.T) {
	m := newMachine(t)
	routes := []map[string]any{{"dst": "9.0.0.0/8"}, {"dst": "10.1.2.3/16", "gw": "9.1.1.200"}}
	c := call{netns: newNamespace(t).path, conf: m.config("both", "1.1.0", "ipam", map[string]any{"routes": routes})}
	r := m.add(c)
	var got []string
	for _, route := range r.Routes {
		got = append(got, route.Dst.String()+" "+route.GW.String())
	}
	if diff := cmp.Diff([]string{"9.0.0.0/8 9.1.1.129", "10.1.0.0/16 9.1.1.200", "::/0 fd01:c::8000:0:1"}, got); diff != "" {
		t.Errorf("routes (-want +got):\n%s", diff)
	}
	c.command, c.conf["prevResult"] = "CHECK", r
	m.ok(c)
	m.ok(call{command: "DEL", conf: c.conf})
	for words, routes := range map[string]any{
		"want a list of":               "9.0.0.0/8",
		"ipam.routes[0]":               []map[string]any{{"dst": "9.0.0.0"}},
		"are of two families":          []map[string]any{{"dst": "9.0.0.0/8", "gw": "fd01::1"}},
		"no address of the family of ": []map[string]any{{"dst": "fd00::/8"}},
	} {
		m.refused(call{command: "ADD", netns: newNamespace(t).path, conf: m.config("dcos", "1.0.0", "ipam", map[string]any{"routes": routes})},
			types.ErrInvalidNetworkConfig, words)
	}
	m.wantNothing()
}

// TestIPAMThatLeadsBack: an IPAM plugin that is none, or runs us again, fails at
// once, and DEL of it is fine.
func TestIPAMThatLeadsBack(t *testing.T) {
	m := newMachine(t)
	again := m.script("again", `exec `+m.bin+`/d-overlay <"$0.stdin"`)
	for _, plugin := range []string{"d-overlay", "m-overlay", "bridge", again} {
		conf := m.config("dcos", "1.1.0", "ipam", map[string]any{"type": plugin})
		start := time.Now()
		m.refused(call{command: "ADD", netns: newNamespace(t).path, conf: conf}, types.ErrInvalidNetworkConfig, plugin)
		m.ok(call{command: "DEL", conf: conf})
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("%s: took %s", plugin, took)
		}
	}
	m.wantNothing()
}

// TestCheckOfAnothersResult: CHECK does not believe a prevResult that is about
// another namespace or gives our address to another interface.
func TestCheckOfAnothersResult(t *testing.T) {
	m := newMachine(t)
	container, other := newNamespace(t), newNamespace(t)
	r := m.add(call{netns: container.path, conf: m.config("both", "1.1.0")})
	for _, tt := range []struct {
		name   string
		change func(*types100.Result)
		words  string // empty: fine
	}{
		{"as it was", func(*types100.Result) {}, ""},
		{"same namespace by another path", func(r *types100.Result) {
			link := filepath.Join(t.TempDir(), "ns")
			if err := os.Symlink(container.path, link); err != nil {
				t.Fatal(err)
			}
			r.Interfaces[1].Sandbox = link
		}, ""},
		{"no indexes", func(r *types100.Result) { r.IPs[0].Interface, r.IPs[1].Interface = nil, nil }, ""},
		{"other sandbox", func(r *types100.Result) { r.Interfaces[1].Sandbox = other.path }, "no interface eth0 in the network namespace"},
		{"sandbox that is none", func(r *types100.Result) { r.Interfaces[1].Sandbox = "/nowhere" }, "no interface eth0 in the network namespace"},
		{"index of the host end", func(r *types100.Result) { r.IPs[0].Interface = types100.Int(0) }, "does not give interface eth0 its address 9.1.1.130"},
		{"index of the host end, IPv6", func(r *types100.Result) { r.IPs[1].Interface = types100.Int(0) }, "does not give interface eth0 its address fd01:c::8000:0:2"},
		{"index of nothing", func(r *types100.Result) { r.IPs[0].Interface = types100.Int(2) }, "lists 2 interfaces"},
		{"index below nothing", func(r *types100.Result) { r.IPs[0].Interface = types100.Int(-1) }, "lists 2 interfaces"},
		{"address of another", func(r *types100.Result) { r.IPs[0].Address = *ipNet(netip.MustParsePrefix("9.1.1.131/25")) }, "9.1.1.13"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			var changed types100.Result
			if err := json.Unmarshal(b, &changed); err != nil {
				t.Fatal(err)
			}
			tt.change(&changed)
			c := call{command: "CHECK", netns: container.path, conf: m.config("both", "1.1.0", "prevResult", changed)}
			if tt.words == "" {
				m.ok(c)
				return
			}
			m.refused(c, cni.ErrCodeMissing, tt.words)
		})
	}
	m.ok(call{command: "DEL", conf: m.config("both", "1.1.0")})
}
