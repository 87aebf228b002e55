package firewall_test

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/firewall/iptables"
	"overlayd.internal/overlay/internal/firewall/nftables"
	"overlayd.internal/overlay/internal/mark"
)

// kinds are the implementations and the flavours of iptables.
var kinds = []string{"nftables", "iptables-nft", "iptables-legacy"}

// space is a network namespace with a firewall.
type space struct {
	t  *testing.T
	ns ns.NetNS
	firewall.Firewall
}

var count atomic.Int32

func newSpace(t *testing.T, kind string) *space {
	t.Helper()
	name := fmt.Sprintf("ovf-%d-%d", os.Getpid(), count.Add(1))
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		t.Fatalf("make a network namespace (as root): %v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	n, err := ns.GetNS("/run/netns/" + name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	s := &space{t: t, ns: n}
	if flavour, ok := strings.CutPrefix(kind, "iptables-"); ok {
		useFlavour(t, flavour)
		s.do(func() error {
			f, err := iptables.New()
			if err == nil {
				t.Cleanup(f.Close)
				s.Firewall = f
			}
			return err
		})
	} else {
		s.Firewall = nftables.New()
	}
	return s
}

// useFlavour makes iptables mean one of its flavours.
func useFlavour(t *testing.T, flavour string) {
	dir := t.TempDir()
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, suffix := range []string{"", "-save", "-restore"} {
			path, err := exec.LookPath(name + "-" + flavour + suffix)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(path, filepath.Join(dir, name+suffix)); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func (s *space) do(f func() error) {
	s.t.Helper()
	if err := s.ns.Do(func(ns.NetNS) error { return f() }); err != nil {
		s.t.Fatal(err)
	}
}

func (s *space) sh(script string) (out string) {
	s.t.Helper()
	s.do(func() error {
		b, err := exec.Command("sh", "-ec", script).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w\n%s", script, err, b)
		}
		out = string(b)
		return nil
	})
	return out
}

func (s *space) set(r firewall.Ruleset) (changed int) {
	s.t.Helper()
	s.do(func() (err error) {
		changed, err = s.Set(s.t.Context(), r)
		return err
	})
	return changed
}

func (s *space) mustBeIdle(r firewall.Ruleset) {
	s.t.Helper()
	if n := s.set(r); n != 0 {
		s.t.Fatalf("what was just set is changed in %d places:\n%s", n, s.all())
	}
}

// all is every rule and set of the namespace, without counters.
func (s *space) all() string {
	return s.sh(`{ iptables-save; ip6tables-save; nft -s list ruleset; ipset list -t -o save | sort; ipset list -o save | grep ^add | sort; } 2>/dev/null |
		grep -v '^#' | sed 's/\[[0-9]*:[0-9]*\]//'`)
}

func config(overlays, peers int, isolation conf.Isolation) firewall.Config {
	c := firewall.Config{VTEPPools: []netip.Prefix{netip.MustParsePrefix("44.128.0.0/20"), netip.MustParsePrefix("fd01:a::/64")}}
	for i := range overlays {
		name := fmt.Sprint("o", i)
		c.Overlays = append(c.Overlays, firewall.Overlay{Name: name, Isolation: isolation, Subnets: []netip.Prefix{
			netip.MustParsePrefix(fmt.Sprintf("10.%d.0.0/16", i)), netip.MustParsePrefix(fmt.Sprintf("fd02:%x::/64", i)),
		}})
		for _, h := range conf.Halves {
			c.Bridges = append(c.Bridges, firewall.Bridge{Name: h.Bridge(name), Overlay: name})
		}
	}
	for i := range peers {
		c.Peers = append(c.Peers, netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}))
	}
	return c
}

// direct is a configuration in which peers may send without VXLAN, to eth0.
func direct(c firewall.Config) firewall.Config {
	c.Direct = &firewall.Direct{}
	for i := range c.Peers {
		c.Direct.Sources = append(c.Direct.Sources, source(fmt.Sprintf("10.0.%d.0/26", i)), source(fmt.Sprintf("fd02:0:0:0:%x::/80", i)))
	}
	return c
}

func source(subnet string) firewall.Element {
	return firewall.Element{Prefix: netip.MustParsePrefix(subnet), Device: "eth0"}
}

func TestContract(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			t.Run("Set", func(t *testing.T) { testSet(t, kind) })
			t.Run("Repair", func(t *testing.T) { testRepair(t, kind) })
			t.Run("Elements", func(t *testing.T) { testElements(t, kind) })
			t.Run("ManyElements", func(t *testing.T) { testManyElements(t, kind) })
			t.Run("Remove", func(t *testing.T) { testRemove(t, kind) })
			t.Run("UserChain", func(t *testing.T) { testUserChain(t, kind) })
			t.Run("Size", func(t *testing.T) { testSize(t, kind) })
		})
	}
}

// Every ruleset can follow every other, and setting it again changes nothing,
// also for a firewall that was opened later.
func testSet(t *testing.T, kind string) {
	s := newSpace(t, kind)
	six := config(1, 0, conf.IsolationOverlay)
	six.Overlays[0].Subnets, six.Underlay6 = six.Overlays[0].Subnets[1:], true
	six.Peers = []netip.Addr{netip.MustParseAddr("fd00::1")}
	allow := config(3, 2, conf.IsolationStrict)
	allow.Overlays[0].Allow = []string{"o1", "o2"}
	for i, c := range []firewall.Config{
		config(2, 3, conf.IsolationOverlay), config(3, 1, conf.IsolationNone), config(1, 0, conf.IsolationStrict),
		six, allow, direct(allow), direct(config(2, 3, conf.IsolationOverlay)), {}, config(2, 3, conf.IsolationOverlay), direct(config(2, 3, conf.IsolationOverlay)),
	} {
		r := firewall.Build(c)
		if n := s.set(r); n == 0 {
			t.Errorf("ruleset %d changed nothing", i)
		}
		s.mustBeIdle(r)
		want := s.all()
		later := newSpaceIn(s, kind)
		later.set(r)
		if got := later.all(); got != want {
			t.Errorf("another firewall made something else of ruleset %d:\n%s\nwas:\n%s", i, got, want)
		}
	}
}

// newSpaceIn opens another firewall in the same namespace.
func newSpaceIn(s *space, kind string) *space {
	n := &space{t: s.t, ns: s.ns, Firewall: nftables.New()}
	if kind != "nftables" {
		s.do(func() error {
			f, err := iptables.New()
			if err == nil {
				s.t.Cleanup(f.Close)
				n.Firewall = f
			}
			return err
		})
	}
	return n
}

// Whatever somebody does to our rules is undone.
func testRepair(t *testing.T, kind string) {
	s := newSpace(t, kind)
	r := firewall.Build(direct(config(2, 3, conf.IsolationStrict)))
	s.set(r)
	want := s.all()
	damages := []string{
		"iptables -F; ip6tables -F; iptables -t nat -F; ip6tables -t raw -F",
		"iptables -I OVERLAY-FORWARD 1 -j DROP", "iptables -A OVERLAY-FROM -j ACCEPT", "iptables -D OVERLAY-REACH 1",
		"iptables -t raw -D PREROUTING -j OVERLAY-RAW", "iptables -I FORWARD -j OVERLAY-FORWARD",
		"ipset del overlay-peers4 172.16.0.1", "ipset add overlay-peers4 1.2.3.4", "ipset flush overlay-reach4",
		"ipset del overlay-direct4 10.0.1.0/26,eth0", "ipset add overlay-direct6 fd02::/64,eth0",
		"iptables -I INPUT -j ACCEPT",
	}
	if kind == "nftables" {
		damages = []string{
			"nft flush ruleset", "nft delete table inet overlay", "nft flush table inet overlay", "nft flush chain inet overlay OVERLAY-RAW",
			"nft insert rule inet overlay OVERLAY-FORWARD drop", "nft add rule inet overlay OVERLAY-FROM accept",
			"nft delete element inet overlay peers4 { 172.16.0.1 }", "nft add element inet overlay peers4 { 1.2.3.4 }",
			"nft add element inet overlay open6 { fd02::/64 }", "nft flush set inet overlay reach4",
			`nft delete element inet overlay direct4 { 10.0.1.0/26 . "eth0" }`, `nft add element inet overlay direct4 { 10.1.0.0/16 . "eth1" }`,
			`nft "delete element inet overlay direct4 { 10.0.1.0/26 . \"eth0\" }; add element inet overlay direct4 { 10.0.1.0/25 . \"eth0\" }"`,
			"nft flush chain inet overlay OVERLAY-FORWARD && nft add chain inet overlay OVERLAY-FORWARD '{ policy drop; }'",
		}
	}
	for _, d := range damages {
		s.sh(d)
		if n := s.set(r); n == 0 {
			t.Errorf("%s: nothing was repaired", d)
		}
		s.sh("iptables -D INPUT -j ACCEPT 2>/dev/null || true") // theirs, it stayed
		if got := s.all(); got != want {
			t.Errorf("%s: was repaired to\n%s\nwas\n%s", d, got, want)
		}
		s.mustBeIdle(r)
	}
}

// A set is changed in place, and the next Set agrees.
func testElements(t *testing.T, kind string) {
	s := newSpace(t, kind)
	c := config(2, 3, conf.IsolationOverlay)
	s.set(firewall.Build(c))
	more, gone := netip.MustParseAddr("172.17.0.9"), c.Peers[1]
	s.do(func() error {
		return s.Elements(t.Context(), firewall.PeersSet,
			[]firewall.Element{firewall.Address(more), firewall.Address(c.Peers[0])},
			[]firewall.Element{firewall.Address(gone), firewall.Address(netip.MustParseAddr("172.17.0.77"))})
	})
	c.Peers = []netip.Addr{more, c.Peers[0], c.Peers[2]}
	s.mustBeIdle(firewall.Build(c))
	c = direct(c)
	r := firewall.Build(c)
	s.set(r)
	added := []firewall.Element{source("10.1.4.0/26"), source("fd02:0:0:0:9::/80"), c.Direct.Sources[0]}
	s.do(func() error {
		return s.Elements(t.Context(), firewall.DirectSet, added, []firewall.Element{c.Direct.Sources[2], source("10.1.77.0/26")})
	})
	c.Direct.Sources = append(slices.Delete(slices.Clone(c.Direct.Sources), 2, 3), added[:2]...)
	s.mustBeIdle(firewall.Build(c))
	all := s.all()
	if !strings.Contains(all, "10.1.4.0/26") || strings.Contains(all, "10.0.1.0/26") {
		t.Errorf("the set of subnets was not changed:\n%s", all)
	}
	if !strings.Contains(all, "172.17.0.9") || strings.Contains(all, gone.String()+"\n") {
		t.Errorf("the set was not changed:\n%s", all)
	}
}

// A set takes the hosts of a large cluster, of both families, and gives most of
// them back. What is there, or gone, already is no error among the others.
func testManyElements(t *testing.T, kind string) {
	s := newSpace(t, kind)
	c := config(2, 3, conf.IsolationOverlay)
	s.set(firewall.Build(c))
	var all []netip.Addr
	for i := range 4500 {
		all = append(all, netip.AddrFrom4([4]byte{172, 20, byte(i >> 8), byte(i)}),
			netip.AddrFrom16([16]byte{0xfd, 9, 14: byte(i >> 8), 15: byte(i)}))
	}
	elements := func(addrs []netip.Addr) (out []firewall.Element) {
		for _, a := range addrs {
			out = append(out, firewall.Address(a))
		}
		return out
	}
	change := func(add, remove []netip.Addr) {
		s.do(func() error { return s.Elements(t.Context(), firewall.PeersSet, elements(add), elements(remove)) })
	}
	change(all, nil)
	few := config(2, 3, conf.IsolationOverlay).Peers
	c.Peers = append(few, all...)
	s.mustBeIdle(firewall.Build(c))
	change(all[:10], all[4000:])
	change(nil, all[3990:5000])
	c.Peers = append(few, all[:3990]...)
	s.mustBeIdle(firewall.Build(c))
	c.Peers = few
	s.set(firewall.Build(c))
	s.mustBeIdle(firewall.Build(c))
}

// After Remove the namespace is as it was, with what others have in it.
func testRemove(t *testing.T, kind string) {
	s := newSpace(t, kind)
	s.sh(`iptables -A FORWARD -s 1.2.3.4 -j DROP; ip6tables -t nat -A POSTROUTING -j MASQUERADE; iptables -t nat -S; ip6tables -S
		for t in iptables ip6tables; do for x in raw filter nat; do $t -t $x -N other; done; done
		for t in iptables ip6tables; do $t -t raw -P PREROUTING ACCEPT; $t -t nat -P POSTROUTING ACCEPT; for h in INPUT FORWARD OUTPUT; do $t -P $h ACCEPT; done; done
		nft 'add table inet other; add chain inet other c { type filter hook forward priority 0; }'; ipset create other hash:ip`)
	want := s.all()
	s.set(firewall.Build(config(3, 5, conf.IsolationStrict)))
	if s.all() == want {
		t.Fatal("nothing was set")
	}
	for _, first := range []bool{true, false} {
		s.do(func() error {
			n, err := s.Remove(t.Context())
			if (n > 0) != first {
				t.Errorf("removed %d", n)
			}
			return err
		})
	}
	if got := s.all(); got != want {
		t.Errorf("left behind:\n%s\nwas:\n%s", got, want)
	}
}

// The administrator's chain is there, asked first, and never touched.
func testUserChain(t *testing.T, kind string) {
	s := newSpace(t, kind)
	list, add := "iptables -S OVERLAY-USER", "iptables -A OVERLAY-USER -s 1.2.3.4/32 -j DROP"
	first := "iptables -S OVERLAY-FORWARD | sed -n 2p"
	if kind == "nftables" {
		list, add = "nft list chain inet overlay OVERLAY-USER", "nft add rule inet overlay OVERLAY-USER ip saddr 1.2.3.4 drop"
		first = "nft list chain inet overlay OVERLAY-FORWARD | sed -n 4p"
	}
	r := firewall.Build(config(2, 3, conf.IsolationOverlay))
	s.set(r)
	if got := s.sh(first); !strings.Contains(got, mark.UserChain) {
		t.Errorf("the first rule of %s is %q", mark.ForwardChain, got)
	}
	s.sh(add)
	s.mustBeIdle(r)
	s.set(firewall.Build(config(1, 0, conf.IsolationStrict)))
	newSpaceIn(s, kind).set(r)
	if !strings.Contains(s.sh(list), "1.2.3.4") {
		t.Error("the administrator's rule is gone")
	}
	s.do(func() error {
		_, err := s.Remove(t.Context())
		return err
	})
	if got := s.sh(list); !strings.Contains(got, "1.2.3.4") {
		t.Error("Remove took the administrator's rule away")
	}
	if all := s.all(); strings.Contains(all, mark.FromChain) || strings.Contains(all, "overlay-peers") {
		t.Errorf("Remove left something of ours:\n%s", all)
	}
	s.set(r)
	s.mustBeIdle(r)
}

// The number of rules does not grow with that of overlays and peers.
func testSize(t *testing.T, kind string) {
	s := newSpace(t, kind)
	rules := func() int {
		if kind == "nftables" {
			return strings.Count(s.sh("nft -a list table inet overlay"), "# handle")
		}
		return strings.Count(s.all(), "-A ")
	}
	s.set(firewall.Build(direct(config(2, 2, conf.IsolationOverlay))))
	few := rules()
	many := config(200, 1000, conf.IsolationOverlay)
	many.Direct = &firewall.Direct{}
	for i := range 4000 {
		many.Direct.Sources = append(many.Direct.Sources, source(fmt.Sprintf("10.%d.%d.%d/26", i>>10, i>>2&255, i<<6&255)))
	}
	r := firewall.Build(many)
	s.set(r)
	s.mustBeIdle(r)
	if n := rules(); n != few {
		t.Errorf("%d rules for 2 overlays and 2 peers, %d for 200 and 1000", few, n)
	}
}

// What the guard does is not done twice, and nothing of it is left out: where peers
// send without VXLAN, which the guard does not know, the rules do everything.
func TestGuarded(t *testing.T) {
	chain := func(r firewall.Ruleset, name string) []firewall.Rule {
		for _, c := range r.Chains {
			if c.Name == name {
				return c.Rules
			}
		}
		return nil
	}
	c := config(2, 3, conf.IsolationOverlay)
	raw := chain(firewall.Build(c), mark.RawChain)
	if got := chain(firewall.BuildGuard(c, true), mark.RawChain); len(raw) == 0 || !slices.Equal(got, raw) {
		t.Errorf("the guard asks\n%v, the rules\n%v", got, raw)
	}
	c.Guarded = true
	for _, name := range []string{mark.RawChain, mark.EncapChain} {
		if rules := chain(firewall.Build(c), name); rules != nil {
			t.Errorf("beside the guard there is %s: %v", name, rules)
		}
		if rules := chain(firewall.BuildGuard(c, true), name); rules == nil {
			t.Errorf("the guard has no %s", name)
		}
	}
	unguarded := direct(config(2, 3, conf.IsolationOverlay))
	both := direct(c)
	if !firewall.Build(both).Equal(firewall.Build(unguarded)) {
		t.Error("with peers that send without VXLAN the rules leave something to the guard")
	}
}
