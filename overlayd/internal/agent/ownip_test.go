package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// ipCmd runs ip(8), which the reader knows.
func ipCmd(t *testing.T, args string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		t.Errorf("ip %s: %v: %s", args, err, out)
	}
}

// The underlay's addresses go and the routes stay: the kernel would send from
// the VTEP's or a bridge's address. None of them ever becomes the agent IP.
func TestOwnAddressIsNoAgentIP(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.opts.IP, h.renew = netip.Addr{}, 50*time.Millisecond
	h.start()
	h.ready()
	before := h.document().IP
	u0, err := netlink.LinkByName("u0")
	must(t, err)
	ipCmd(t, "addr flush dev u0 scope global")
	ipCmd(t, "route add 172.17.0.1 dev u0 scope link")
	if src := kernelSource(t, "172.17.0.1"); !strings.HasPrefix(src, "9.0.") && !strings.HasPrefix(src, "44.128.") {
		t.Fatalf("the kernel sends from %s; this test wants it to choose an address of ours", src)
	}
	start := c.registrations.Load()
	h.published("the failure is published", func(s conf.State) bool { return strings.Contains(s.Lease.Error, "agent IP") })
	if n := c.registrations.Load(); n != start && !strings.Contains(h.log.String(), "lease not renewed") {
		t.Errorf("%d registrations while there was no address", n-start)
	}
	d, err := netlink.LinkByName("d-dcos")
	must(t, err)
	must(t, netlink.LinkDel(d)) // everything is looked at once more
	eventually(t, "the bridge is back", func() error { return hasAddr("d-dcos", "9.0.0.129/25") })
	if ip, local := h.document().IP, vtepLocal(t); ip != before || local != before.String() {
		t.Errorf("agent IP %s, VTEP sends from %s; want %s as before", ip, local, before)
	}

	// The same for an agent that has no lease yet and finds devices of an
	// earlier one.
	h.stop()
	must(t, os.RemoveAll(h.opts.StateDir))
	h.opts.Coordinator = c.client() // a new process has no connections from the address that has gone
	h.start()
	h.notReady("which is the overlay's own")
	if local := vtepLocal(t); local != before.String() {
		t.Errorf("the VTEP sends from %s, want %s as before", local, before)
	}

	must(t, netlink.AddrAdd(u0, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(172, 17, 0, 7), Mask: net.CIDRMask(24, 32)}}))
	ipCmd(t, "route del 172.17.0.1 dev u0 scope link")
	h.ready()
	if ip := h.document().IP; ip != addr("172.17.0.7") {
		t.Errorf("agent IP %s, want the new address", ip)
	}
}

func kernelSource(t *testing.T, to string) string {
	t.Helper()
	conn, err := net.Dial("udp", net.JoinHostPort(to, "9"))
	must(t, err)
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().String()
}

// An address of this host that the coordinator refuses is not applied, and the
// host goes on with the one it has.
func TestRefusedAddressIsNotApplied(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	other := c.join("other", "172.17.0.9")
	h := newHost(c)
	h.opts.IP, h.renew = netip.Addr{}, 50*time.Millisecond
	h.tune = func(t *timing) { t.follow = 100 * time.Millisecond }
	// Through a proxy, so that the coordinator does not see where it comes from.
	h.behind(startNginx(t, c.addr, "proxy_bind 172.17.0.3;"))
	ipCmd(t, "route add default via 172.17.0.1 src 172.17.0.6")
	h.start()
	h.ready()
	before := h.document().IP
	follow(t, c, other) // it is alive, so its address is its own
	ipCmd(t, "route replace default via 172.17.0.1 src 172.17.0.9")
	eventually(t, "the other address is refused", func() error {
		if !strings.Contains(h.log.String(), "172.17.0.9 belongs to agent other") {
			return errors.New("not yet")
		}
		return nil
	})
	h.published("the lease is renewed with the old address", func(s conf.State) bool { return s.Lease.Error == "" })
	c.join("peer", "172.17.0.5")
	eventually(t, "peers are followed again", func() error { return hasRoute(prefix("9.0.2.0/24")) })
	if ip, local := h.document().IP, vtepLocal(t); ip != before || local != before.String() {
		t.Errorf("agent IP %s, VTEP sends from %s; want %s as before", ip, local, before)
	}
}

// follow holds the stream of another agent open.
func follow(t *testing.T, c *cluster, lease conf.Lease) {
	t.Helper()
	began, ended := make(chan struct{}, 100), make(chan struct{})
	client := c.client()
	go func() {
		defer close(ended)
		client.Watch(t.Context(), lease.AgentID, api.Known{}, func(api.PeerEvent) error {
			began <- struct{}{}
			return nil
		})
	}()
	t.Cleanup(func() { <-ended })
	select {
	case <-began:
	case <-time.After(10 * time.Second):
		t.Fatal("the other agent does not get its stream")
	}
}

// What the kernel would send from is taken only if it lasts.
func TestLastingAddresses(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	newRemote(t)
	must(t, os.WriteFile("/proc/sys/net/ipv6/conf/u0/use_tempaddr", []byte("2"), 0o644))
	ask := func(current string) string {
		t.Helper()
		was := netip.Addr{}
		if current != "" {
			was = addr(current)
		}
		ip, err := agentIP(t.Context(), []string{"http://[fd77::1]:6440"}, was)
		if err != nil {
			return err.Error()
		}
		return ip.String()
	}
	expect := func(what, got, want string) {
		t.Helper()
		if !strings.Contains(got, want) {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	ipCmd(t, "-6 route add fd77::/64 dev u0")
	expect("no address", ask(""), "no usable source address")

	// A temporary address beside the stable one.
	ipCmd(t, "addr add fd77::2/64 dev u0 mngtmpaddr nodad valid_lft 9000 preferred_lft 5000")
	eventually(t, "the kernel prefers a temporary address", func() error {
		if src := kernelSource(t, "fd77::1"); src == "fd77::2" {
			return errors.New("it sends from the stable one")
		}
		return nil
	})
	temporary := kernelSource(t, "fd77::1")
	expect("a temporary and a stable address", ask(""), "fd77::2")
	expect("the one that was there before", ask(temporary), temporary)

	// Deprecated, as when the router withdraws the prefix, beside another
	// interface's and our own devices' addresses.
	ipCmd(t, "addr flush dev u0 scope global")
	ipCmd(t, "addr add fd77::2/64 dev u0 nodad preferred_lft 0")
	ipCmd(t, "link add d-dcos type bridge")
	ipCmd(t, "addr add fd01:b::1/81 dev d-dcos nodad")
	ipCmd(t, "link set d-dcos up")
	ipCmd(t, "link add docker0 type bridge")
	ipCmd(t, "addr add fd99::1/64 dev docker0 nodad")
	ipCmd(t, "link set docker0 up")
	if src := kernelSource(t, "fd77::1"); src == "fd77::2" {
		t.Fatal("the kernel takes the deprecated address; this test wants it to choose another interface's")
	}
	expect("deprecated", ask("fd77::2"), "fd77::2")
	expect("deprecated, at the first start", ask(""), "no usable source address")
	expect("deprecated, the old one gone", ask("fd77::3"), "no usable source address")
	ipCmd(t, "addr add fd77::4/64 dev u0 nodad")
	expect("a new one beside the deprecated", ask("fd77::2"), "fd77::4")

	// IPv4 knows deprecated, too, though the kernel does not mind.
	ipCmd(t, "addr flush dev u0 scope global")
	ipCmd(t, "addr add 172.17.0.2/24 dev u0 preferred_lft 0")
	v4 := func(current netip.Addr) string {
		ip, err := agentIP(t.Context(), []string{"http://172.17.0.1:6440"}, current)
		return fmt.Sprint(ip, err)
	}
	expect("deprecated IPv4", v4(addr("172.17.0.2")), "172.17.0.2")
	expect("deprecated IPv4 at the first start", v4(netip.Addr{}), "deprecated")
	ipCmd(t, "addr add 172.17.0.3/24 dev u0")
	expect("another IPv4", v4(netip.Addr{}), "172.17.0.3")

	// Addresses on the loopback interface that any way leads to.
	ipCmd(t, "addr flush dev u0 scope global")
	ipCmd(t, "addr add 10.1.1.1/32 dev lo")
	ipCmd(t, "route add 172.17.0.1 dev u0 src 10.1.1.1")
	expect("on lo", v4(netip.Addr{}), "10.1.1.1")
}

// TestSecondAddress: the second agent IP is a lasting address of the other family at
// the first one's interface, else the one that the default route leaves from, and none
// of a container network. It stays while the host has it.
func TestSecondAddress(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	newRemote(t)
	expect := func(what string, given, current, want netip.Addr) {
		t.Helper()
		u, err := readUnderlay()
		must(t, err)
		defer u.close()
		if got := u.second(addr("172.17.0.2"), given, current); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	none := netip.Addr{}
	ipCmd(t, "addr flush dev u0 scope global")
	ipCmd(t, "addr add 172.17.0.2/24 dev u0")
	expect("none", none, none, none)
	ipCmd(t, "link add docker0 type bridge")
	ipCmd(t, "addr add fd99::1/64 dev docker0 nodad")
	ipCmd(t, "link set docker0 up")
	ipCmd(t, "addr add fd98::1/128 dev lo nodad")
	expect("a bridge and the loopback", none, none, none)

	ipCmd(t, "link add other type veth peer name other1")
	ipCmd(t, "link set other1 up")
	ipCmd(t, "link set other up")
	ipCmd(t, "addr add fd97::1/64 dev other nodad")
	expect("an interface that no route leads to", none, none, none)
	ipCmd(t, "-6 route add default dev other")
	expect("the default route", none, none, addr("fd97::1"))
	ipCmd(t, "addr add fd77::3/64 dev u0 nodad preferred_lft 0")
	expect("a deprecated one at the interface", none, none, addr("fd97::1"))
	ipCmd(t, "addr add fd77::2/64 dev u0 nodad")
	expect("the interface", none, none, addr("fd77::2"))
	expect("the one so far", none, addr("fd97::1"), addr("fd97::1"))
	expect("one of the same family", none, addr("172.17.0.2"), addr("fd77::2"))
	expect("one that has gone", none, addr("fd97::9"), addr("fd77::2"))
	expect("the one given", addr("fd97::1"), addr("fd77::2"), addr("fd97::1"))
	expect("given, and not there", addr("fd97::9"), addr("fd77::2"), none)
}

// A coordinator at a link-local address tells the interface.
func TestAgentIPTowardsLinkLocal(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	newRemote(t)
	ipCmd(t, "addr add fe80::99/64 dev u0 nodad")
	ip, err := agentIP(t.Context(), []string{"http://[fe80::1%25u0]:6440"}, netip.Addr{})
	if err == nil {
		t.Errorf("without an IPv6 address: %s", ip)
	}
	ipCmd(t, "addr add fd77::2/64 dev u0 nodad")
	if ip, err := agentIP(t.Context(), []string{"http://[fe80::1%25u0]:6440"}, netip.Addr{}); err != nil || ip != addr("fd77::2") {
		t.Errorf("agent IP %s, %v; want the interface's address", ip, err)
	}
}

// Where the kernel cannot be read, the second agent IP so far stays, unless there is to
// be none any more.
func TestSecondAddressUnread(t *testing.T) {
	four, six := addr("172.17.0.2"), addr("fd00::2")
	held := conf.Lease{}
	held.SecondIP, held.SecondMTU = six, 1380
	for _, tt := range []struct {
		name string
		o    Options
		want conf.Underlay
	}{
		{"both are looked for", Options{}, conf.Underlay{Direct: true, SecondIP: six, SecondMTU: 1380}},
		{"both are given", Options{IP: four, Second: six}, conf.Underlay{Direct: true, SecondIP: six, SecondMTU: 1380}},
		{"--one-family", Options{OneFamily: true}, conf.Underlay{Direct: true}},
		{"one is given", Options{IP: four}, conf.Underlay{Direct: true}},
	} {
		if got := tt.o.underlayUnread(held); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}
