package datapath

import (
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

func (h *host) set(cfg Config, resync bool) (r Report) {
	h.t.Helper()
	h.do(func() { r = h.dp.Set(h.t.Context(), cfg, resync) })
	return r
}

// mustSet is set without any failure.
func (h *host) mustSet(cfg Config, resync bool) Report {
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
func (h *host) mustBeIdle(cfg Config) {
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

// network says which overlays a test cluster has.
type network struct {
	overlays []Overlay
	length   int // of IPv4 agent subnets
	length6  int // of IPv6 agent subnets
	under6   bool
}

func overlay4(name string, subnet string) Overlay {
	return Overlay{Name: name, Subnets: []netip.Prefix{netip.MustParsePrefix(subnet)}, Isolation: conf.IsolationNone}
}

var (
	onlyIPv4 = network{overlays: []Overlay{overlay4("dcos", "9.0.0.0/8")}, length: 24, length6: 80}
	onlyIPv6 = network{overlays: []Overlay{overlay4("dcos6", "fd01:b::/64")}, length: 24, length6: 80}
	bothIP   = network{overlays: []Overlay{overlay4("dcos", "9.0.0.0/8"), overlay4("dcos6", "fd01:b::/64")}, length: 24, length6: 80}
)

var testOUI = conf.MAC{0x70, 0xb3, 0xd5}

// nth is subnet number i of that length in pool.
func nth(pool netip.Prefix, length, i int) netip.Prefix {
	b := pool.Masked().Addr().AsSlice()
	for bit := length - 1; i > 0; bit, i = bit-1, i>>1 {
		if i&1 == 1 {
			b[bit/8] |= 0x80 >> (bit % 8)
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(a, length)
}

func (n network) agentIP(i int) netip.Addr {
	if n.under6 {
		return nth(netip.MustParsePrefix("fd00:1::/64"), 128, i+2).Addr()
	}
	return nth(netip.MustParsePrefix("172.16.0.0/12"), 32, i+2).Addr()
}

// vtepPool is that of a test cluster: wide enough for the largest benchmark.
var (
	vtepPool  = netip.MustParsePrefix("44.128.0.0/14")
	vtepPool6 = netip.MustParsePrefix("fd01:a::/64")
)

// peer is host i as others see it.
func (n network) peer(i int) conf.Peer {
	p := conf.Peer{
		AgentID: fmt.Sprint("agent-", i), AgentIP: n.agentIP(i), Epoch: uint64(i + 1),
		VTEPIP:  nth(vtepPool, 32, i+1).Addr(),
		VTEPIP6: nth(vtepPool6, 128, i+1).Addr(),
	}
	p.VTEPMAC = conf.VTEPMAC(testOUI, p.VTEPIP)
	for _, o := range n.overlays {
		p.Subnets = append(p.Subnets, n.agentSubnet(o, i))
	}
	return p
}

func (n network) agentSubnet(o Overlay, i int) netip.Prefix {
	if o.Subnets[0].Addr().Is6() {
		return nth(o.Subnets[0], n.length6, i)
	}
	return nth(o.Subnets[0], n.length, i)
}

// config is what host i of size hosts is given.
func (n network) config(i, size int) Config {
	self := n.peer(i)
	c := Config{VTEP: VTEP{
		Local: self.AgentIP, MAC: self.VTEPMAC,
		IP:  netip.PrefixFrom(self.VTEPIP, vtepPool.Bits()),
		IP6: netip.PrefixFrom(self.VTEPIP6, vtepPool6.Bits()),
	}}
	for _, o := range n.overlays {
		own := n.agentSubnet(o, i)
		for _, h := range conf.Halves {
			c.Bridges = append(c.Bridges, Bridge{h.Bridge(o.Name), o.Name, []netip.Prefix{conf.GatewayPrefix(h.Of(own))}})
		}
		o.Agent = []netip.Prefix{own}
		c.Overlays = append(c.Overlays, o)
	}
	for j := range size {
		if j != i {
			c.Peers = append(c.Peers, n.peer(j))
		}
	}
	return c
}

// plugHosts makes size hosts on one LAN, each with its configuration applied.
func (n network) plugHosts(t testing.TB, size int) (*lan, []*host) {
	t.Helper()
	l := newLAN(t)
	var hosts []*host
	for i := range size {
		h := newHost(t, fmt.Sprint("h", i))
		length := "/12"
		if n.under6 {
			length = "/64"
		}
		l.plug(h.netNS, n.agentIP(i).String()+length)
		h.mustSet(n.config(i, size), true)
		hosts = append(hosts, h)
	}
	return l, hosts
}

// gateway is the gateway of host i in one half of overlay number o.
func (n network) gateway(o, i int, h conf.Half) string {
	return conf.Gateway(h.Of(n.agentSubnet(n.overlays[o], i))).String()
}

// container plugs a namespace into a bridge of h, as a CNI program would, and
// gives it the address number k of the bridge's subnet.
func (h *host) container(bridge string, gateway netip.Prefix, k int) (*netNS, string) {
	h.t.Helper()
	c := newNS(h.t, "c")
	addr := netip.PrefixFrom(nth(gateway.Masked(), gateway.Addr().BitLen(), k).Addr(), gateway.Bits())
	port := fmt.Sprintf("v%d", nsCount.Load())
	h.sh(fmt.Sprintf("ip link add %s type veth peer name eth0 netns %s; ip link set %s master %s up", port, c.name, port, bridge))
	c.sh(fmt.Sprintf("ip link set eth0 up; ip addr add %s dev eth0 nodad; ip route add default via %s", addr, gateway.Addr()))
	return c, addr.Addr().String()
}
