package attach

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/mark"
)

// TestAddIsWhatTheKernelHas: each line of a result, read back from the kernel.
func TestAddIsWhatTheKernelHas(t *testing.T) {
	m := newMachine(t)
	tests := []struct {
		plugin, overlay string
		half            conf.Half
		addrs, gateways []string
		mac             string // empty: hashed from the IPv6 address
	}{
		{"m-overlay", "dcos", conf.Mesos, []string{"9.0.1.2/25"}, []string{"9.0.1.1"}, "0a:58:09:00:01:02"},
		{"d-overlay", "dcos", conf.Docker, []string{"9.0.1.130/25"}, []string{"9.0.1.129"}, "0a:58:09:00:01:82"},
		{"m-overlay", "dcos6", conf.Mesos, []string{"fd01:b::2/81"}, []string{"fd01:b::1"}, ""},
		{"d-overlay", "dcos6", conf.Docker, []string{"fd01:b::8000:0:2/81"}, []string{"fd01:b::8000:0:1"}, ""},
		{"m-overlay", "both", conf.Mesos, []string{"9.1.1.2/25", "fd01:c::2/81"}, []string{"9.1.1.1", "fd01:c::1"}, "0a:58:09:01:01:02"},
		{"d-overlay", "both", conf.Docker, []string{"9.1.1.130/25", "fd01:c::8000:0:2/81"}, []string{"9.1.1.129", "fd01:c::8000:0:1"}, "0a:58:09:01:01:82"},
	}
	for _, tt := range tests {
		t.Run(tt.plugin+" "+tt.overlay, func(t *testing.T) {
			container := newNamespace(t)
			c := call{plugin: tt.plugin, netns: container.path, conf: m.config(tt.overlay, "1.1.0")}
			r := m.add(c)

			att := conf.Attachment{Network: tt.overlay, ContainerID: "c1", IfName: "eth0"}
			hostName := mark.HostEnd(tt.half, att.Key())
			host, err := m.host.LinkByName(hostName)
			if err != nil {
				t.Fatal(err)
			}
			inside, err := container.LinkByName("eth0")
			if err != nil {
				t.Fatal(err)
			}
			want := []*types100.Interface{
				{Name: hostName, Mac: host.Attrs().HardwareAddr.String(), Mtu: testMTU},
				{Name: "eth0", Mac: inside.Attrs().HardwareAddr.String(), Mtu: testMTU, Sandbox: container.path},
			}
			if diff := cmp.Diff(want, r.Interfaces); diff != "" {
				t.Errorf("interfaces (-kernel +result):\n%s", diff)
			}
			if host.Attrs().MTU != testMTU || inside.Attrs().MTU != testMTU {
				t.Errorf("MTU is %d on the host and %d in the container, want %d", host.Attrs().MTU, inside.Attrs().MTU, testMTU)
			}
			for _, l := range []netlink.Link{host, inside} {
				if a := l.Attrs(); a.NumTxQueues != 1 || a.NumRxQueues != 1 {
					t.Errorf("%s has %d queues out and %d in, want one each", a.Name, a.NumTxQueues, a.NumRxQueues)
				}
			}
			if got := inside.Attrs().HardwareAddr.String(); tt.mac != "" && got != tt.mac {
				t.Errorf("MAC is %s, want %s", got, tt.mac)
			}
			var gotAddrs, gotGateways []string
			for _, ip := range r.IPs {
				if ip.Interface == nil || *ip.Interface != 1 {
					t.Errorf("address %s belongs to interface %v, want 1", &ip.Address, ip.Interface)
				}
				gotAddrs = append(gotAddrs, ip.Address.String())
				gotGateways = append(gotGateways, ip.Gateway.String())
			}
			if !slices.Equal(gotAddrs, tt.addrs) || !slices.Equal(gotGateways, tt.gateways) {
				t.Errorf("result has addresses %v via %v, want %v via %v", gotAddrs, gotGateways, tt.addrs, tt.gateways)
			}
			wantAddrs(t, container, inside, tt.addrs)
			for i, gateway := range tt.gateways {
				wantDefault(t, container, inside, r.Routes[i], gateway)
			}
			if len(r.Routes) != len(tt.gateways) {
				t.Errorf("result has routes %v", r.Routes)
			}
			wantPort(t, m, host, tt.half.Bridge(tt.overlay), true)
			alias, ok := mark.ParseAlias(host.Attrs().Alias)
			if !ok || alias.Attachment != att || alias.Overlay != tt.overlay || alias.Half != tt.half || !slices.Equal(alias.Addrs, addrsOf(r)) {
				t.Errorf("alias is %q", host.Attrs().Alias)
			}

			c.conf["prevResult"] = r
			c.command = "CHECK"
			m.ok(c)
			c.command, c.netns = "DEL", ""
			if out := m.ok(c); out != "" {
				t.Errorf("DEL printed %q", out)
			}
			m.wantNothing(container)
		})
	}
}

// wantAddrs: these addresses and a link-local one in IPv6, all usable now.
func wantAddrs(t *testing.T, container namespace, link netlink.Link, want []string) {
	t.Helper()
	list, err := container.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	linkLocal := false
	for _, a := range list {
		if a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_OPTIMISTIC|unix.IFA_F_DADFAILED) != 0 {
			t.Errorf("address %s has flags %#x: it is tentative, or its detection has failed", a.IPNet, a.Flags)
		}
		if a.IP.IsLinkLocalUnicast() {
			linkLocal = true
			continue
		}
		got = append(got, a.IPNet.String())
	}
	if !slices.Equal(got, want) {
		t.Errorf("the container has %v, want %v", got, want)
	}
	if slices.ContainsFunc(want, func(a string) bool { return strings.Contains(a, ":") }) && !linkLocal {
		t.Errorf("the container has IPv6 and no link-local address: %v", list)
	}
}

func wantDefault(t *testing.T, container namespace, link netlink.Link, r *types.Route, gateway string) {
	t.Helper()
	if bits, _ := r.Dst.Mask.Size(); bits != 0 || r.GW.String() != gateway {
		t.Errorf("result has route %s, want the default via %s", r, gateway)
	}
	routes, err := container.RouteList(link, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(routes, func(have netlink.Route) bool {
		return have.Gw.Equal(r.GW) && (have.Dst == nil || have.Dst.String() == r.Dst.String()) && have.Protocol == mark.RouteProtocol
	}) {
		t.Errorf("the container has no default route via %s: %v", gateway, routes)
	}
}

// wantPort: the link is up and forwards on the bridge.
func wantPort(t *testing.T, m *machine, host netlink.Link, bridge string, hairpin bool) {
	t.Helper()
	br, err := m.host.LinkByName(bridge)
	if err != nil {
		t.Fatal(err)
	}
	port, err := m.host.LinkGetProtinfo(host)
	if err != nil {
		t.Fatal(err)
	}
	if host.Attrs().MasterIndex != br.Attrs().Index || host.Attrs().OperState != netlink.OperUp || port.Hairpin != hairpin {
		t.Errorf("%s: master %d (want %d), %s, hairpin %v (want %v)", host.Attrs().Name,
			host.Attrs().MasterIndex, br.Attrs().Index, host.Attrs().OperState, port.Hairpin, hairpin)
	}
}

// TestFirstPacketArrives: two containers and the gateway, at once after ADD.
func TestFirstPacketArrives(t *testing.T) {
	m := newMachine(t)
	for _, overlay := range []string{"dcos", "dcos6", "both"} {
		t.Run(overlay, func(t *testing.T) {
			a, b := newNamespace(t), newNamespace(t)
			ra := m.add(call{id: "a", netns: a.path, conf: m.config(overlay, "1.0.0")})
			rb := m.add(call{id: "b", netns: b.path, conf: m.config(overlay, "1.0.0")})
			for i, ip := range rb.IPs {
				ping(t, a, addrOf(ip.Address.IP))
				ping(t, b, addrOf(ra.IPs[i].Address.IP))
				ping(t, a, addrOf(ip.Gateway))
			}
		})
	}
}

// TestOldestFormat: a configuration without a version gets what Mesos parses,
// under an environment with nothing in it.
func TestOldestFormat(t *testing.T) {
	m := newMachine(t)
	container := newNamespace(t)
	got := m.ok(call{plugin: "m-overlay", command: "ADD", netns: container.path, conf: m.config("both", "")})
	want := `{
    "cniVersion": "0.1.0",
    "ip4": {
        "ip": "9.1.1.2/25",
        "gateway": "9.1.1.1",
        "routes": [
            {
                "dst": "0.0.0.0/0",
                "gw": "9.1.1.1"
            }
        ]
    },
    "ip6": {
        "ip": "fd01:c::2/81",
        "gateway": "fd01:c::1",
        "routes": [
            {
                "dst": "::/0",
                "gw": "fd01:c::1"
            }
        ]
    },
    "dns": {}
}
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("result (-want +got):\n%s", diff)
	}
}

func TestSecondAddHarmsNothing(t *testing.T) {
	m := newMachine(t)
	container, elsewhere := newNamespace(t), newNamespace(t)
	c := call{netns: container.path, conf: m.config("dcos", "1.0.0")}
	r := m.add(c)
	before := m.left()

	again := c
	again.command = "ADD"
	m.refused(again, cni.ErrCodeExists, "interface eth0 exists already in the container")
	again.netns = elsewhere.path
	m.refused(again, cni.ErrCodeExists, "in another network namespace")
	again.netns, again.id = container.path, "c2"
	m.refused(again, cni.ErrCodeExists, "interface eth0 exists already in the container")

	if diff := cmp.Diff(before.links, m.left().links); diff != "" {
		t.Errorf("links changed:\n%s", diff)
	}
	if n := len(m.left().records); n != 1 {
		t.Errorf("%d records, want the first one's", n)
	}
	ping(t, container, addrOf(r.IPs[0].Gateway))
}

// TestSecondInterface: one container in several networks.
func TestSecondInterface(t *testing.T) {
	m := newMachine(t)
	container := newNamespace(t)
	first := m.add(call{ifName: "eth0", netns: container.path, conf: m.config("both", "1.0.0")})
	same := m.add(call{ifName: "eth1", netns: container.path, conf: m.config("both", "1.0.0")})
	other := m.add(call{ifName: "eth2", netns: container.path, conf: m.config("dcos", "1.0.0")})

	if slices.Equal(addrsOf(first), addrsOf(same)) {
		t.Errorf("both interfaces got %v", addrsOf(first))
	}
	// The default route is the first interface's; the third leads to its overlay, and
	// to everything else when the others are gone.
	if len(first.Routes) != 2 || first.Routes[0].Dst.String() != "0.0.0.0/0" {
		t.Errorf("routes of the first: %v", first.Routes)
	}
	if len(other.Routes) != 2 || other.Routes[0].Dst.String() != "9.0.0.0/16" || other.Routes[0].GW.String() != "9.0.1.129" ||
		other.Routes[1].Dst.String() != "0.0.0.0/0" || defaultOf(t, container, netlink.FAMILY_V4) != "eth0" {
		t.Errorf("routes of another network: %v", other.Routes)
	}
	m.ok(call{command: "DEL", ifName: "eth1", netns: container.path, conf: m.config("both", "1.0.0")})
	if links := container.links(t); !slices.Equal(links, []string{"eth0", "eth2"}) {
		t.Errorf("after DEL of eth1 the container has %v", links)
	}
	ping(t, container, addrOf(first.IPs[0].Gateway))
	for _, c := range []call{{ifName: "eth0", conf: m.config("both", "1.0.0")}, {ifName: "eth2", conf: m.config("dcos", "1.0.0")}} {
		c.command = "DEL"
		m.ok(c)
	}
	m.wantNothing(container)
}

func TestFiftyAtOnce(t *testing.T) {
	m := newMachine(t)
	const n = 50
	var containers [n]namespace
	for i := range containers {
		containers[i] = newNamespace(t)
	}
	each := func(f func(i int)) {
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() { f(i) })
		}
		wg.Wait()
	}
	var results [n]*types100.Result
	each(func(i int) {
		out := m.exec(call{command: "ADD", id: fmt.Sprintf("c%d", i), netns: containers[i].path, conf: m.config("both", "1.0.0")})
		var r types100.Result
		if err := json.Unmarshal([]byte(out.stdout), &r); err != nil || out.status != 0 {
			t.Errorf("ADD %d: exit %d: %s%s", i, out.status, out.stdout, out.stderr)
			return
		}
		results[i] = &r
	})
	if t.Failed() {
		return
	}
	seen := map[netip.Addr]bool{}
	for _, r := range results {
		for _, a := range addrsOf(r) {
			seen[a] = true
		}
	}
	if len(seen) != 2*n {
		t.Errorf("%d distinct addresses, want %d", len(seen), 2*n)
	}
	if f := m.left(); len(f.links) != n || len(f.records) != n {
		t.Errorf("%d links and %d records, want %d of each", len(f.links), len(f.records), n)
	}
	each(func(i int) {
		out := m.exec(call{command: "DEL", id: fmt.Sprintf("c%d", i), netns: containers[i].path, conf: m.config("both", "1.0.0")})
		if out.status != 0 {
			t.Errorf("DEL %d: exit %d: %s%s", i, out.status, out.stdout, out.stderr)
		}
	})
	m.wantNothing(containers[:]...)
}

// TestFailedAddLeavesNothing: one row for each thing that can go wrong.
func TestFailedAddLeavesNothing(t *testing.T) {
	tests := []struct {
		name    string
		arrange func(m *machine, container namespace, c *call)
		code    uint
		words   string
	}{
		{"nothing published", func(m *machine, _ namespace, _ *call) { os.Remove(filepath.Join(m.run, conf.StateFile)) },
			types.ErrTryAgainLater, "has not published yet"},
		{"another overlay", func(m *machine, _ namespace, c *call) { c.conf = m.config("none-such", "1.0.0") },
			cni.ErrCodeNoOverlay, "overlay none-such is not known on this host"},
		{"no bridge of the half", func(m *machine, _ namespace, _ *call) {
			m.state.Overlays[0].DockerBridge = nil
			m.publish()
		}, cni.ErrCodeNoOverlay, "has no bridge for the docker half"},
		{"overlay drained", func(m *machine, _ namespace, _ *call) {
			m.state.Overlays[0].Info.Draining = true
			m.publish()
		}, cni.ErrCodeDraining, "overlay dcos is being drained: no new container is attached to it on any host"},
		{"overlay failed", func(m *machine, _ namespace, _ *call) {
			m.state.Overlays[0].State = &conf.OverlayStatus{Status: conf.StatusFailed, Error: "no VXLAN in this kernel"}
			m.publish()
		}, types.ErrTryAgainLater, "overlay dcos is not ready on this host: no VXLAN in this kernel"},
		{"lease ended", func(m *machine, _ namespace, _ *call) {
			m.state.Lease.ExpiresBoottime = int64(conf.Boottime()) - 1
			m.publish()
		}, types.ErrTryAgainLater, "the lease of this host has run out"},
		{"bridge missing", func(m *machine, _ namespace, _ *call) { m.deleteLink("d-dcos") },
			types.ErrTryAgainLater, "bridge d-dcos is missing on this host"},
		{"bridge down", func(m *machine, _ namespace, _ *call) { m.down("d-dcos") },
			types.ErrTryAgainLater, "bridge d-dcos is down on this host"},
		{"bridge's name is an altname of another link", func(m *machine, _ namespace, _ *call) {
			m.deleteLink("d-dcos")
			m.altname("vtep1024", "d-dcos")
		}, types.ErrTryAgainLater, "bridge d-dcos is missing on this host"},
		{"bridge is no bridge", func(m *machine, _ namespace, _ *call) {
			m.deleteLink("d-dcos")
			m.stranger("d-dcos")
		}, cni.ErrCodeKernel, "create interface vd"},
		{"MTU too large", func(_ *machine, _ namespace, c *call) { c.conf["mtu"] = 1500 },
			types.ErrInvalidNetworkConfig, "mtu 1500: must be from 68 to 1450"},
		{"MAC is multicast", func(_ *machine, _ namespace, c *call) { c.env = []string{"CNI_ARGS=MAC=01:00:5e:00:00:01"} },
			types.ErrInvalidNetworkConfig, "is not a unicast address"},
		{"address of the gateway", func(_ *machine, _ namespace, c *call) { c.env = []string{"CNI_ARGS=IP=9.0.1.129"} },
			cni.ErrCodeAddress, "9.0.1.129"},
		{"MAC the kernel refuses to route", func(_ *machine, _ namespace, c *call) {
			c.conf["runtimeConfig"] = map[string]any{"mac": "0a:58:00:00:00:zz"}
		}, types.ErrInvalidNetworkConfig, "is not a hex byte"},
		{"host link of another", func(m *machine, _ namespace, _ *call) {
			m.stranger(mark.HostEnd(conf.Docker, conf.Attachment{Network: "dcos", ContainerID: "c1", IfName: "eth0"}.Key()))
		}, cni.ErrCodeExists, "is not ours"},
		{"the plugin for addresses is absent", func(_ *machine, _ namespace, c *call) {
			c.conf["ipam"] = map[string]any{"type": "no-such-ipam"}
		}, cni.ErrCodeDelegate, "plugin no-such-ipam is in none of the directories of CNI_PATH"},
		{"route conflict", func(m *machine, container namespace, c *call) {
			// The connected route of our subnet is there, on another link.
			container.up(m.t, "lo")
			l, err := container.LinkByName("lo")
			if err == nil {
				err = container.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(netip.MustParsePrefix("9.7.0.0/16"))})
			}
			if err != nil {
				m.t.Fatal(err)
			}
			c.conf["ipam"] = map[string]any{"type": m.script("conflict", `echo '{"cniVersion":"1.0.0","ips":[{"address":"9.0.1.200/25"}],"routes":[{"dst":"9.7.0.0/16"}]}'`)}
		}, cni.ErrCodeKernel, "add route 9.7.0.0/16 via 9.0.1.129: file exists"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			container := newNamespace(t)
			c := call{command: "ADD", netns: container.path, conf: m.config("dcos", "1.0.0")}
			tt.arrange(m, container, &c)
			before := m.host.links(t)
			m.refused(c, tt.code, tt.words)
			if diff := cmp.Diff(before, m.host.links(t)); diff != "" {
				t.Errorf("links of the host changed:\n%s", diff)
			}
			if recs := m.records("dcos"); len(recs) != 0 {
				t.Errorf("records left: %v", recs)
			}
			if links := container.links(t); len(links) != 0 {
				t.Errorf("links left in the container: %v", links)
			}
		})
	}
}

func (m *machine) deleteLink(name string) {
	m.t.Helper()
	l, err := m.host.LinkByName(name)
	if err == nil {
		err = m.host.LinkDel(l)
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

// altname gives a link another name.
func (m *machine) altname(link, name string) {
	m.t.Helper()
	l, err := m.host.LinkByName(link)
	if err == nil {
		err = m.host.LinkAddAltName(l, name)
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) down(name string) {
	m.t.Helper()
	l, err := m.host.LinkByName(name)
	if err == nil {
		err = m.host.LinkSetDown(l)
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

// stranger makes a link that is nobody's.
func (m *machine) stranger(name string) {
	m.t.Helper()
	if err := m.host.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, TxQLen: -1, Alias: "uplink"}, PeerName: "stranger"}); err != nil {
		m.t.Fatal(err)
	}
	m.host.up(m.t, name, "stranger")
	l, err := m.host.LinkByName(name)
	if err == nil {
		err = m.host.LinkSetAlias(l, "uplink to rack 7")
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

// script makes a CNI plugin of a shell script and returns its name. It records
// each call in <name>.calls beside it.
func (m *machine) script(name, body string) string {
	m.t.Helper()
	dir := m.t.TempDir()
	text := "#!/bin/sh\ncat > " + dir + "/" + name + ".stdin\necho $CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_ARGS >> " + dir + "/" + name + ".calls\n" + body + "\n"
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
		m.t.Fatal(err)
	}
	m.path = append(m.path, dir)
	return name
}

// calls are the calls of a script.
func (m *machine) calls(name string) []string {
	m.t.Helper()
	b, err := os.ReadFile(filepath.Join(m.path[len(m.path)-1], name+".calls"))
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

func TestExhausted(t *testing.T) {
	m := newMachine(t)
	a, b := newNamespace(t), newNamespace(t)
	m.add(call{id: "a", netns: a.path, conf: m.config("tiny", "1.1.0")})
	m.refused(call{command: "ADD", id: "b", netns: b.path, conf: m.config("tiny", "1.1.0")}, types.ErrTryAgainLater,
		"overlay tiny: no address left in the docker half 9.2.0.4/30: 1 used, 0 cooling, 1 in all")
	m.refused(call{command: "STATUS", conf: m.config("tiny", "1.1.0")}, types.ErrPluginNotAvailable, "no address left")
	if links := b.links(t); len(links) != 0 {
		t.Errorf("left in the container: %v", links)
	}
	// The only address is used again before it has cooled.
	m.ok(call{command: "DEL", id: "a", conf: m.config("tiny", "1.1.0")})
	r := m.add(call{id: "b", netns: b.path, conf: m.config("tiny", "1.1.0")})
	if got := addrsOf(r); got[0] != netip.MustParseAddr("9.2.0.6") {
		t.Errorf("got %v", got)
	}
}
