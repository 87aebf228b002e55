package datapath

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan/plantest"
)

// netNS is a network namespace made for one test.
type netNS struct {
	t    testing.TB
	name string
	ns   ns.NetNS
}

var nsCount atomic.Int32

// firewallVariable is where a test says which firewall its hosts have.
const firewallVariable = "OVERLAY_TEST_FIREWALL"

func newNS(t testing.TB, role string) *netNS {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to make network namespaces")
	}
	name := fmt.Sprintf("ovl-%d-%d-%s", os.Getpid(), nsCount.Add(1), role)
	sh(t, "ip netns add "+name)
	t.Cleanup(func() { sh(t, "ip netns del "+name) })
	n, err := ns.GetNS("/run/netns/" + name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	h := &netNS{t, name, n}
	h.sh("ip link set lo up")
	return h
}

func sh(t testing.TB, script string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// do runs f on a thread in the namespace. f must not end the test.
func (h *netNS) do(f func()) {
	h.t.Helper()
	if err := h.ns.Do(func(ns.NetNS) error { f(); return nil }); err != nil {
		h.t.Fatal(err)
	}
}

// try runs a script in the namespace. It returns what it printed, and with an
// error what it complained of: ip(8) does so of namespaces that go meanwhile.
func (h *netNS) try(script string) (string, error) {
	h.t.Helper()
	cmd := exec.Command("sh", "-ec", script)
	var out, complaints strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &complaints
	var err error
	h.do(func() { err = cmd.Run() })
	if err != nil {
		return out.String() + complaints.String(), err
	}
	return out.String(), nil
}

// sh runs a script in the namespace and returns what it printed.
func (h *netNS) sh(script string) string {
	h.t.Helper()
	out, err := h.try(script)
	if err != nil {
		h.t.Fatalf("in %s: %s: %v\n%s", h.name, script, err, out)
	}
	return out
}

// pings says whether dst answers, with src as the source unless it is empty.
func (h *netNS) pings(src, dst string) bool {
	h.t.Helper()
	if src != "" {
		src = "-I " + src
	}
	_, err := h.try("ping -n -q -c 1 -W 0.5 " + src + " " + dst)
	return err == nil
}

func (h *netNS) mustPing(src, dst string) {
	h.t.Helper()
	// The first packet may meet a bridge that is just coming up.
	h.eventually(func() bool { return h.pings(src, dst) }, "%s does not answer %s", dst, src)
}

func (h *netNS) mustNotPing(src, dst string) {
	h.t.Helper()
	if h.pings(src, dst) {
		h.t.Errorf("in %s: %s answers %s and should not", h.name, dst, src)
	}
}

func (h *netNS) eventually(cond func() bool, format string, args ...any) {
	h.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			h.t.Fatalf("in %s: "+format, append([]any{h.name}, args...)...)
		}
	}
}

// lan is an Ethernet that hosts are plugged into.
type lan struct {
	*netNS
	plugs int
}

func newLAN(t testing.TB) *lan {
	l := &lan{netNS: newNS(t, "lan")}
	l.sh("ip link add br0 type bridge; ip link set br0 up")
	return l
}

// plug gives h an eth0 with these addresses.
func (l *lan) plug(h *netNS, addrs ...string) {
	l.t.Helper()
	l.plugs++
	port := fmt.Sprintf("p%d", l.plugs)
	l.sh(fmt.Sprintf("ip link add %s type veth peer name eth0 netns %s; ip link set %s master br0 up", port, h.name, port))
	h.sh("ip link set eth0 up")
	for _, a := range addrs {
		h.sh("ip addr add " + a + " dev eth0 nodad")
	}
}

// host is a namespace with a datapath.
type host struct {
	*netNS
	dp *Datapath
}

func newHost(t testing.TB, role string) *host {
	t.Helper()
	h := &host{netNS: newNS(t, role)}
	h.dp = h.newDatapath()
	return h
}

// in is the same host in a subtest.
func (h *host) in(t testing.TB) *host {
	n := *h.netNS
	n.t = t
	return &host{&n, h.dp}
}

func (h *host) newDatapath() *Datapath {
	h.t.Helper()
	var dp *Datapath
	var err error
	h.do(func() { dp, err = New(slog.New(slog.DiscardHandler)) })
	if err != nil {
		h.t.Fatal(err)
	}
	dp.SelectFirewall(os.Getenv(firewallVariable))
	h.t.Cleanup(func() { dp.Close() })
	return dp
}

// update is the first part of Apply, and whether that was enough.
func (d *Datapath) update(ctx context.Context, cfg Host, set []conf.Peer, gone []string, resync bool) (Report, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.byDifference(ctx, Wanted{Host: cfg, Resync: resync, Changes: &Changes{Set: set, Gone: gone}})
}

func (h *host) set(cfg Host, resync bool) (r Report) {
	h.t.Helper()
	h.do(func() { r = h.dp.Apply(h.t.Context(), Wanted{Host: cfg, Resync: resync}) })
	return r
}

// mustSet is set without any failure.
func (h *host) mustSet(cfg Host, resync bool) Report {
	h.t.Helper()
	r := h.set(cfg, resync)
	if r.Err != nil {
		h.t.Fatalf("in %s: %v", h.name, r.Err)
	}
	for name, err := range r.Overlays {
		h.t.Fatalf("in %s: overlay %s: %v", h.name, name, err)
	}
	return r
}

// mustBeIdle checks that the kernel has what cfg wants.
func (h *host) mustBeIdle(cfg Host) {
	h.t.Helper()
	if r := h.mustSet(cfg, true); r.Changed != 0 {
		h.t.Fatalf("in %s: a second Set changed %d objects", h.name, r.Changed)
	}
}

// lines of a command's output that contain all of want.
func (h *netNS) lines(script string, want ...string) (out []string) {
	h.t.Helper()
	for line := range strings.Lines(h.sh(script)) {
		all := true
		for _, w := range want {
			all = all && strings.Contains(line, w)
		}
		if all {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return out
}

func (h *netNS) mustHave(script string, want ...string) {
	h.t.Helper()
	if len(h.lines(script, want...)) == 0 {
		h.t.Errorf("in %s: %s has no line with %q:\n%s", h.name, script, want, h.sh(script))
	}
}

func (h *netNS) mustNotHave(script string, want ...string) {
	h.t.Helper()
	if l := h.lines(script, want...); len(l) > 0 {
		h.t.Errorf("in %s: %s has %q", h.name, script, l)
	}
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// network is a test cluster.
type network struct{ plantest.Network }

var (
	onlyIPv4 = network{plantest.OnlyIPv4}
	onlyIPv6 = network{plantest.OnlyIPv6}
	bothIP   = network{plantest.BothIP}
)

// plugHosts makes size hosts on one LAN, each with its configuration applied.
func (n network) plugHosts(t testing.TB, size int) (*lan, []*host) {
	t.Helper()
	l := newLAN(t)
	var hosts []*host
	for i := range size {
		h := newHost(t, fmt.Sprint("h", i))
		length := "/12"
		if n.Under6 {
			length = "/64"
		}
		l.plug(h.netNS, n.AgentIP(i).String()+length)
		h.mustSet(n.Host(i, size), true)
		hosts = append(hosts, h)
	}
	return l, hosts
}

// gateway is the gateway of host i in one half of overlay number o.
func (n network) gateway(o, i int, h conf.Half) string {
	return conf.Gateway(h.Of(n.AgentSubnet(n.Overlays[o], i))).String()
}

// container plugs a namespace into a bridge of h, as a CNI program would, and
// gives it the address number k of the bridge's subnet.
func (h *host) container(bridge string, gateway netip.Prefix, k int) (*netNS, string) {
	h.t.Helper()
	c := newNS(h.t, "c")
	addr := netip.PrefixFrom(plantest.Nth(gateway.Masked(), gateway.Addr().BitLen(), k).Addr(), gateway.Bits())
	port := fmt.Sprintf("v%d", nsCount.Load())
	h.sh(fmt.Sprintf("ip link add %s type veth peer name eth0 netns %s; ip link set %s master %s up", port, c.name, port, bridge))
	c.sh(fmt.Sprintf("ip link set eth0 up; ip addr add %s dev eth0 nodad; ip route add default via %s", addr, gateway.Addr()))
	return c, addr.Addr().String()
}
