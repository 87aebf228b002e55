package agent

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// While the coordinator is away the way to it may be a detour with another
// source address. What the other hosts send to stays as long as it is there.
func TestAgentIPStaysDuringOutage(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.opts.IP, h.renew = netip.Addr{}, 50*time.Millisecond
	h.start()
	h.ready()
	ip := h.document().IP
	refused := func(times int) {
		t.Helper()
		eventually(t, "the lease is not renewed", func() error {
			if n := strings.Count(h.log.String(), "lease not renewed"); n < times {
				return fmt.Errorf("%d times", n)
			}
			return nil
		})
	}

	c.stop()
	refused(1)
	routeFrom(t, "172.17.0.9")
	h.restart()
	refused(2)
	h.published("the document is of this run", func(s conf.State) bool { return s.Lease.Error != "" })
	if now := h.document().IP; now != ip || strings.Contains(h.log.String(), "agent IP changed") {
		t.Errorf("agent IP %s, before the outage it was %s", now, ip)
	}

	c.start()
	h.published("the coordinator has heard of the other address", func(s conf.State) bool { return s.IP == addr("172.17.0.9") })
}

// The agent IP is found, and followed when it changes; the lease stays.
func TestAgentIPChanges(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.opts.IP = netip.Addr{}
	routeFrom(t, "172.17.0.6")
	h.start()
	h.ready()
	before := h.document()
	if before.IP != addr("172.17.0.6") {
		t.Fatalf("agent IP %s, want the source address towards the coordinator", before.IP)
	}
	id := h.id()

	// While the agent is away, the coordinator down too.
	h.stop()
	c.stop()
	routeFrom(t, "172.17.0.7")
	u0, err := netlink.LinkByName("u0")
	must(t, err)
	old, err := netlink.ParseAddr("172.17.0.6/24")
	must(t, err)
	must(t, netlink.AddrDel(u0, old))
	h.start()
	h.ready()
	h.published("the new IP is used at once", func(s conf.State) bool { return s.IP == addr("172.17.0.7") })
	if local := vtepLocal(t); local != "172.17.0.7" {
		t.Errorf("the VTEP sends from %s, want 172.17.0.7", local)
	}
	c.start()
	eventually(t, "the coordinator knows the new IP", func() error { return agentAt(c, id, "172.17.0.7") })

	// While both run. The kernel announces it when an address changes.
	routeFrom(t, "172.17.0.8")
	d, err := netlink.LinkByName("d-dcos")
	must(t, err)
	must(t, netlink.LinkDel(d))
	eventually(t, "the coordinator knows the newest IP", func() error { return agentAt(c, id, "172.17.0.8") })
	after := h.published("the newest IP", func(s conf.State) bool {
		return s.IP == addr("172.17.0.8") && s.Lease.Error == "" && s.Lease.Epoch > before.Lease.Epoch
	})
	if h.id() != id || after.Overlays[0].Subnet != before.Overlays[0].Subnet {
		t.Errorf("id %s and subnet %s, want %s and %s as before", h.id(), after.Overlays[0].Subnet, id, before.Overlays[0].Subnet)
	}
	eventually(t, "VTEP follows", func() error {
		if local := vtepLocal(t); local != "172.17.0.8" {
			return fmt.Errorf("the VTEP sends from %s", local)
		}
		return nil
	})
}

// routeFrom sets the source address towards the coordinator.
func routeFrom(t *testing.T, src string) {
	t.Helper()
	u0, err := netlink.LinkByName("u0")
	must(t, err)
	_, dst, err := net.ParseCIDR("172.17.0.0/24")
	must(t, err)
	must(t, netlink.RouteReplace(&netlink.Route{
		LinkIndex: u0.Attrs().Index, Dst: dst, Src: net.ParseIP(src), Scope: unix.RT_SCOPE_LINK, Protocol: unix.RTPROT_KERNEL,
	}))
}

func vtepLocal(t *testing.T) string {
	t.Helper()
	l, err := netlink.LinkByName(conf.VTEPName)
	must(t, err)
	return l.(*netlink.Vxlan).SrcAddr.String()
}

func agentAt(c *cluster, id, ip string) error {
	agents, err := c.client().Agents(c.t.Context())
	if err != nil {
		return err
	}
	for _, a := range agents {
		if a.AgentID == id && a.AgentIP == addr(ip) {
			return nil
		}
	}
	return fmt.Errorf("agents are %v", agents)
}

func TestAgentIP(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	newRemote(t)
	refuseNames(t)
	for _, tc := range []struct {
		name string
		urls []string
		want string // part of the error if it is not an address
	}{
		{"towards the coordinator", []string{"http://172.17.0.1:6440"}, "172.17.0.2"},
		{"the second coordinator", []string{"http://no-such-host.invalid:6440", "http://172.17.0.1:6440"}, "172.17.0.2"},
		{"no route", []string{"http://10.99.0.1:6440"}, "no usable source address"},
		{"coordinator here, at an address that others know", []string{"http://172.17.0.2:6440"}, "172.17.0.2"},
		{"coordinator here, no default route", []string{"http://127.0.0.1:6440"}, "--agent-ip"},
	} {
		ip, err := agentIP(t.Context(), tc.urls, netip.Addr{})
		if err != nil && !strings.Contains(err.Error(), tc.want) || err == nil && ip.String() != tc.want {
			t.Errorf("%s: %s, %v; want %s", tc.name, ip, err, tc.want)
		}
	}

	must(t, netlink.RouteAdd(&netlink.Route{Gw: net.IPv4(172, 17, 0, 1), Src: net.IPv4(172, 17, 0, 9)}))
	if ip, err := agentIP(t.Context(), []string{"http://localhost:6440"}, netip.Addr{}); err != nil || ip != addr("172.17.0.9") {
		t.Errorf("coordinator here: %s, %v; want the default route's source", ip, err)
	}
	// Not while a name cannot be resolved: on a host with two networks the
	// default route would name the wrong one.
	if ip, err := agentIP(t.Context(), []string{"http://no-such-host.invalid:6440"}, netip.Addr{}); err == nil {
		t.Errorf("name that cannot be resolved: %s, want an error", ip)
	}
}

// refuseNames makes every name server answer at once that it is none: its
// address is this host's.
func refuseNames(t *testing.T) {
	t.Helper()
	b, err := os.ReadFile("/etc/resolv.conf")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		words := strings.Fields(line)
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		ip, err := netip.ParseAddr(words[1])
		must(t, err)
		if !ip.IsLoopback() {
			addAddr(t, "lo", netip.PrefixFrom(ip, ip.BitLen()).String())
		}
	}
}

// A host whose agent IP is on the loopback says that it takes VXLAN only.
func TestUnderlayAt(t *testing.T) {
	u := &underlay{
		links: map[int]hostLink{1: {name: "lo", loopback: true, mtu: 65536}, 2: {name: "eth0", mtu: 1500}},
		addrs: []hostAddr{{ip: addr("192.0.2.1"), bits: 32, link: 1}, {ip: addr("172.17.0.4"), bits: 16, link: 2}},
	}
	for ip, want := range map[string]conf.Underlay{
		"192.0.2.1":  {},
		"172.17.0.4": {MTU: 1450, Direct: true},
		"172.17.0.5": {Direct: true}, // not there yet
	} {
		if got := u.at(addr(ip)); got != want {
			t.Errorf("%s: %+v, want %+v", ip, got, want)
		}
	}
}

// An address that is that of a network of this host, or its broadcast address, is no
// host's: the agent does not start with it, and does not choose it.
func TestAgentIPOfNoHost(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	out, err := exec.Command("ip", "link", "add", "under0", "type", "veth", "peer", "name", "under1").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, a := range []string{"192.0.2.9/28", "192.0.2.128/25", "198.51.100.4/31"} { // the second is that of the network itself
		if out, err := exec.Command("ip", "addr", "add", a, "dev", "under0").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	c := newCluster(t, seedNetwork())
	for ip, problem := range map[string]string{
		"192.0.2.0":   "192.0.2.0 is the address of the network 192.0.2.0/28 and of no host in it; pass the host's own as --agent-ip (interface under0)",
		"192.0.2.15":  "192.0.2.15 is the broadcast address of the network 192.0.2.0/28",
		"192.0.2.128": "192.0.2.128 is the address of the network 192.0.2.128/25",
		"192.0.2.9":   "", "192.0.2.16": "", "198.51.100.4": "", "198.51.100.5": "",
	} {
		h := newHost(c)
		h.opts.IP = addr(ip)
		_, err := New(h.opts)
		if problem == "" && err != nil || problem != "" && (err == nil || !strings.Contains(err.Error(), problem)) {
			t.Errorf("%s: %v, want %q", ip, err, problem)
		}
	}
	u, err := readUnderlay()
	must(t, err)
	defer u.close()
	for ip, good := range map[string]bool{"192.0.2.9": true, "192.0.2.128": false, "198.51.100.4": true} {
		if a, found := u.find(addr(ip)); !found || u.usable(a) != good {
			t.Errorf("%s is found %t and usable %t, want %t", ip, found, !good, good)
		}
	}
}
