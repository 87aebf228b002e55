package coordinator_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
)

// Each pool in turn is the small one. What runs out is named, nothing leaks,
// and everything else goes on.
func TestExhaustedVTEP(t *testing.T) {
	for _, tt := range []struct{ name, network, words string }{
		{"vtep", `{"vtep_subnet": "44.128.0.0/29", "vtep_subnet6": "fd01:a::/64", "vtep_mac_oui": "70:B3:D5:00:00:00",
			"overlays": [{"name": "dcos", "subnet": "9.0.0.0/8", "prefix": 24, "subnet6": "fd01:b::/64", "prefix6": 80}]}`,
			"all 6 of vtep_subnet 44.128.0.0/29"},
		{"vtep6", `{"vtep_subnet": "44.128.0.0/20", "vtep_subnet6": "fd01:a::/125", "vtep_mac_oui": "70:B3:D5:00:00:00",
			"overlays": [{"name": "dcos", "subnet": "9.0.0.0/8", "prefix": 24, "subnet6": "fd01:b::/64", "prefix6": 80}]}`,
			"all 6 of vtep_subnet6 fd01:a::/125"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore(t)
			n := start(t, s, tt.network)
			for i := range 6 {
				n.register(t, nth(i))
			}
			before := stored(t, s)
			for i := 6; i < 30; i++ {
				_, err := n.client.Register(t.Context(), nth(i))
				refused(t, err, 507, tt.words)
			}
			if diff := cmp.Diff(before, stored(t, s)); diff != "" {
				t.Errorf("refused registrations left something:\n%s", diff)
			}
			checkPools(t, n, 6)
			n.register(t, nth(3)) // the others go on
			if _, err := n.client.Delete(t.Context(), []string{"agent-2"}); err != nil {
				t.Fatal(err)
			}
			// Had a refusal leaked an address of the other family, it would not be
			// the deleted agent's pair that comes next.
			lease := n.register(t, nth(40))
			if got := fmt.Sprint(lease.VTEP.IP.Addr(), lease.VTEP.IP6.Addr()); got != "44.128.0.3 fd01:a::3" {
				t.Errorf("VTEP %s, want 44.128.0.3 fd01:a::3", got)
			}
		})
	}
}

// checkPools checks that every pool has n blocks in use.
func checkPools(t testing.TB, n *node, used uint64) {
	t.Helper()
	for _, o := range n.Overlays() {
		for _, p := range []*api.Pool{o.Pool, o.Pool6} {
			if p != nil && p.Used != used {
				t.Errorf("overlay %s: %d of %d in use, want %d", o.Name, p.Used, p.Total, used)
			}
		}
	}
}

func TestExhaustedOverlay(t *testing.T) {
	for _, tt := range []struct{ name, small, words string }{
		{"v4", `"subnet": "10.9.0.0/22", "prefix": 24, "subnet6": "fd01:b::/64", "prefix6": 80`,
			"overlay small: no free agent subnet: all 4 /24 of 10.9.0.0/22 are leased"},
		{"v6", `"subnet": "10.8.0.0/14", "prefix": 24, "subnet6": "fd01:b::/78", "prefix6": 80`,
			"overlay small: no free agent subnet: all 4 /80 of fd01:b::/78 are leased"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore(t)
			n := start(t, s, `{"vtep_subnet": "44.128.0.0/20", "vtep_subnet6": "fd01:a::/64", "vtep_mac_oui": "70:B3:D5:00:00:00",
				"overlays": [{"name": "small", `+tt.small+`}, {"name": "large", "subnet": "9.0.0.0/8", "prefix": 24}]}`)
			for i := range 4 {
				n.register(t, nth(i))
			}
			for i := 4; i < 10; i++ {
				lease := n.register(t, nth(i))
				small, large := lease.Grants[0], lease.Grants[1]
				if !strings.Contains(small.Error, tt.words) || small.Subnet.IsValid() || small.Subnet6.IsValid() {
					t.Errorf("agent %d: %+v, want an error with %q", i, small, tt.words)
				}
				if want := fmt.Sprintf("9.0.%d.0/24", i); large.Subnet.String() != want || large.Error != "" {
					t.Errorf("agent %d has %s of the other overlay, want %s", i, large.Subnet, want)
				}
			}
			overlays := n.Overlays()
			if small, large := overlays[0], overlays[1]; small.Leases != 4 || small.Pool.Used != 4 || small.Pool6.Used != 4 || large.Pool.Used != 10 {
				t.Errorf("in use: %d leases, %+v %+v, other overlay %+v", small.Leases, small.Pool, small.Pool6, large.Pool)
			}
			state := n.State()
			if got := len(state.Agents[9].Overlays); got != 1 {
				t.Errorf("the state shows %d overlays for an agent that has one", got)
			}
			if got := n.Agents()[9].Grants[0].Error; !strings.Contains(got, tt.words) {
				t.Errorf("the listing says %q", got)
			}
			// What becomes free is given at the next registration.
			before := n.register(t, nth(8))
			if _, err := n.client.Delete(t.Context(), []string{"agent-1"}); err != nil {
				t.Fatal(err)
			}
			after := n.register(t, nth(8))
			g := after.Grants[0]
			if g.Error != "" || !g.Subnet.IsValid() || !g.Subnet6.IsValid() || after.Epoch <= before.Epoch || after.Grants[1].Subnet != before.Grants[1].Subnet {
				t.Errorf("lease %+v after one became free, before %+v", after, before)
			}
		})
	}
}

// An overlay that comes later is given at the next registration and touches
// nothing else; one that goes is kept, reported and not served.
func TestOverlayAddedAndRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	network := func(overlays string) string {
		return `{"vtep_subnet": "44.128.0.0/20", "vtep_mac_oui": "70:B3:D5:00:00:00", "overlays": [` + overlays + `]}`
	}
	const (
		one      = `{"name": "one", "subnet": "9.0.0.0/8", "prefix": 24}`
		oneDual  = `{"name": "one", "subnet": "9.0.0.0/8", "prefix": 24, "subnet6": "fd01:b::/64", "prefix6": 80}`
		two      = `{"name": "two", "subnet": "10.0.0.0/16", "prefix": 24}`
		disabled = `{"name": "two", "subnet": "10.0.0.0/16", "prefix": 24, "enabled": false}`
	)
	with := func(overlays string, f func(n *node)) {
		t.Helper()
		s := openStore(t, path)
		n := start(t, s, network(overlays))
		f(n)
		n.stop()
		s.Close()
	}
	names := func(l conf.Lease) string {
		var out []string
		for _, g := range l.Grants {
			out = append(out, fmt.Sprintf("%s %s %s", g.Overlay.Name, g.Subnet, g.Subnet6))
		}
		return strings.Join(out, ", ")
	}
	want := func(n *node, what, a string) {
		t.Helper()
		if got := names(n.register(t, request("a", "172.16.0.1"))); got != a {
			t.Errorf("%s: agent has %q, want %q", what, got, a)
		}
	}
	const none = "invalid Prefix"
	with(one, func(n *node) {
		n.register(t, request("first", "172.16.0.9"))
		want(n, "at first", "one 9.0.1.0/24 "+none)
	})
	with(one+","+two, func(n *node) {
		if got := n.Agents()[1]; len(got.Grants) != 2 || got.Grants[1].Error == "" {
			t.Errorf("before it registers again the agent has %+v", got.Grants)
		}
		want(n, "added", "one 9.0.1.0/24 "+none+", two 10.0.0.0/24 "+none)
	})
	with(two, func(n *node) {
		want(n, "other removed", "two 10.0.0.0/24 "+none)
		if got := len(n.State().Agents[0].Overlays); got != 0 {
			t.Errorf("the state shows %d overlays for an agent that only has the removed one", got)
		}
		w := n.watch(t, "a", 0)
		for _, p := range w.next(t).Put {
			if strings.Contains(fmt.Sprint(p.Subnets), "9.0.") {
				t.Errorf("a peer has a subnet of the removed overlay: %v", p)
			}
		}
		w.stop()
		gone := n.Overlays()[1]
		if gone.Name != "one" || gone.Configured || gone.Leases != 2 {
			t.Errorf("removed overlay is listed as %+v", gone)
		}
		n.register(t, request("new", "172.16.0.2"))
	})
	with(oneDual+","+disabled, func(n *node) {
		want(n, "back and dual", "one 9.0.1.0/24 fd01:b::/80, two 10.0.0.0/24 "+none)
		if got := names(n.register(t, request("later", "172.16.0.3"))); got != "one 9.0.2.0/24 fd01:b:0:0:1::/80" {
			t.Errorf("with the other disabled a new agent has %q", got)
		}
		if got := names(n.register(t, request("first", "172.16.0.9"))); got != "one 9.0.0.0/24 fd01:b:0:0:2::/80" {
			t.Errorf("with the other disabled an agent that lacked it has %q", got)
		}
	})
}

// A VTEP subnet of IPv6 that comes later is served at the next contact.
func TestVTEP6Added(t *testing.T) {
	s := newStore(t)
	const v4 = `{"vtep_subnet": "44.128.0.0/20", "vtep_mac_oui": "70:B3:D5:00:00:00", "overlays": [{"name": "dcos", "subnet": "9.0.0.0/8", "prefix": 24}]}`
	n := start(t, s, v4)
	before := n.register(t, request("a", "172.16.0.1"))
	n.stop()
	n = start(t, s, strings.Replace(v4, `"overlays"`, `"vtep_subnet6": "fd01:a::/125", "overlays"`, 1))
	if ip6 := n.Agents()[0].VTEP.IP6; ip6.IsValid() {
		t.Errorf("VTEP %s before the next contact", ip6)
	}
	after := n.register(t, request("a", "172.16.0.1"))
	if after.VTEP.IP6.String() != "fd01:a::1/125" || after.VTEP.IP != before.VTEP.IP || after.Epoch <= before.Epoch {
		t.Errorf("lease %+v, before %+v", after, before)
	}
}

// Leases that do not fit the configuration stop the start. The message says
// which, and what to do.
func TestMisfit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	n := start(t, s, seedNetwork)
	for i := range 5 {
		n.register(t, nth(i))
	}
	n.stop()
	before := stored(t, s)
	for name, tt := range map[string]struct {
		old, new string
		words    []string // none: it fits
	}{
		"other subnet":    {"9.0.0.0/8", "10.0.0.0/8", []string{"overlay dcos", "subnet 10.0.0.0/8 with prefix 24", "9.0.0.0/24 by agent agent-0", "2 more", "put back subnet 9.0.0.0/8 with prefix 24"}},
		"smaller subnet":  {"9.0.0.0/8", "9.0.0.0/22", []string{"overlay dcos", "9.0.4.0/24 by agent agent-4"}},
		"other prefix":    {`"prefix": 24`, `"prefix": 25`, []string{"prefix 25", "prefix 24"}},
		"other subnet6":   {"fd01:b::/64", "fd01:c::/64", []string{"overlay dcos6", "subnet6 fd01:c::/64 with prefix6 80", "fd01:b:0:0:1::/80"}},
		"other VTEP":      {"44.128.0.0/20", "44.129.0.0/20", []string{"vtep_subnet 44.129.0.0/20", "44.128.0.1 by agent agent-0", "put back vtep_subnet 44.128.0.0/20"}},
		"other VTEP6":     {"fd01:a::/64", "fd01:d::/64", []string{"vtep_subnet6 fd01:d::/64", "fd01:a::1"}},
		"larger subnet":   {"9.0.0.0/8", "8.0.0.0/7", nil},
		"smaller fits":    {"9.0.0.0/8", "9.0.0.0/20", nil},
		"name is removed": {`"dcos", "subnet": "9.0.0.0/8"`, `"other", "subnet": "10.0.0.0/8"`, nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := coordinator.New(t.Context(), coordinator.Options{
				Network: parseNetwork(t, strings.ReplaceAll(seedNetwork, tt.old, tt.new)), Store: s, Log: slog.New(slog.DiscardHandler),
			})
			if (err == nil) != (tt.words == nil) {
				t.Fatalf("error %v, want one: %v", err, tt.words != nil)
			}
			for _, w := range tt.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("message %q does not say %q", err, w)
				}
			}
			// The next case starts from the first configuration again.
			start(t, s, seedNetwork).stop()
		})
	}
	if diff := cmp.Diff(before, stored(t, s)); diff != "" {
		t.Errorf("the attempts changed what is stored:\n%s", diff)
	}
	n = start(t, s, seedNetwork)
	if _, err := n.client.Delete(t.Context(), []string{"agent-0", "agent-1", "agent-2", "agent-3", "agent-4"}); err != nil {
		t.Fatal(err)
	}
	n.stop()
	lease := start(t, s, strings.ReplaceAll(seedNetwork, "9.0.0.0/8", "10.0.0.0/8")).register(t, nth(0))
	if got := lease.Grants[0].Subnet.String(); got != "10.0.0.0/24" {
		t.Errorf("with nobody left the new subnet gives %s", got)
	}
}

// claims checks that no two agents have anything in common.
func claims(t testing.TB, leases []conf.Lease) {
	t.Helper()
	owner := map[string]string{}
	claim := func(what fmt.Stringer, id string) {
		if other, taken := owner[what.String()]; taken && other != id {
			t.Errorf("%s is leased to %s and to %s", what, other, id)
		}
		owner[what.String()] = id
	}
	for _, l := range leases {
		for _, p := range []netip.Prefix{l.VTEP.IP, l.VTEP.IP6} {
			if p.IsValid() {
				claim(p, l.AgentID)
			}
		}
		claim(l.VTEP.MAC, l.AgentID)
		for _, g := range l.Grants {
			switch {
			case g.Subnet.IsValid():
				claim(g.Subnet, l.AgentID)
			case g.Subnet6.IsValid():
				claim(g.Subnet6, l.AgentID)
			default:
				t.Errorf("agent %s has nothing of %s: %s", l.AgentID, g.Overlay.Name, g.Error)
			}
		}
	}
}

// registerAll registers agents [0, n) from 50 goroutines, agent i at
// nodes[i % len(nodes)], each of them twice at the same time.
func registerAll(t testing.TB, n int, nodes ...*node) []conf.Lease {
	t.Helper()
	var mu sync.Mutex
	var leases []conf.Lease
	work := make(chan int)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			for i := range work {
				lease, err := nodes[i%len(nodes)].client.Register(t.Context(), nth(i/2))
				if err != nil {
					t.Errorf("agent %d: %v", i/2, err)
					continue
				}
				mu.Lock()
				leases = append(leases, lease)
				mu.Unlock()
			}
		})
	}
	for i := range 2 * n {
		work <- i
	}
	close(work)
	wg.Wait()
	return leases
}

// checkExact checks that n agents hold exactly the lowest n of everything.
func checkExact(t testing.TB, n *node, want int) {
	t.Helper()
	agents := n.Agents()
	if len(agents) != want {
		t.Fatalf("%d agents, want %d", len(agents), want)
	}
	var leases []conf.Lease
	for _, a := range agents {
		leases = append(leases, a.Lease)
	}
	claims(t, leases)
	checkPools(t, n, uint64(want))
	if got, want := len(stored(t, n.store)), 3+want*7; got != want { // cluster network deleted; agents status ip vtep vtep6 and two subnets
		t.Errorf("%d keys are stored, want %d", got, want)
	}
}

func TestConcurrentRegistration(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	const agents = 1000
	claims(t, registerAll(t, agents, n))
	checkExact(t, n, agents)
	claims(t, registerAll(t, agents, n)) // and again
	checkExact(t, n, agents)
	// While an agent registered twice at the same time, one of the two had taken something
	// higher for a moment. What lies below the highest is free all the same: who comes
	// next, one after the other, fills it.
	const more = 50 // as many as registered at the same time
	for i := range more {
		n.register(t, nth(agents+i))
	}
	checkExact(t, n, agents+more)
	for _, a := range n.Agents() {
		if ip := a.VTEP.IP.Addr().As4(); int(ip[2])<<8+int(ip[3]) > agents+more {
			t.Errorf("agent %s has VTEP %s: something leaked below", a.AgentID, a.VTEP.IP)
		}
	}
}

// Two coordinators on one store, both at work, never grant anything twice.
func TestTwoCoordinators(t *testing.T) {
	s := newStore(t)
	a, b := start(t, s, seedNetwork), start(t, s, seedNetwork)
	const agents = 400
	claims(t, registerAll(t, agents, a, b))
	for _, n := range []*node{a, b} {
		eventually(t, "both know all agents", func() bool { return len(n.Agents()) == agents })
		checkExact(t, n, agents)
	}
	if a.State().Network.VTEPMACOUI == "" || a.Agents()[0].ClusterID != b.Agents()[0].ClusterID {
		t.Error("two cluster ids in one store")
	}
	// What one frees the other one can give.
	if _, err := a.client.Delete(t.Context(), []string{"agent-7"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other one sees the delete", func() bool { return len(b.Agents()) == agents-1 })
	b.register(t, nth(2000))
	checkExact(t, b, agents)
}

// What is leased of an overlay that is no longer configured is not given out
// under another name: the host that has it keeps the subnet as long as there are
// containers in it.
func TestRangeReused(t *testing.T) {
	s := newStore(t)
	n := start(t, s, seedNetwork)
	n.register(t, request("a", "10.0.0.1"))
	n.register(t, request("b", "10.0.0.2"))
	n.stop()
	const without4, without6 = `{"name": "more", "subnet": "10.128.0.0/16", "prefix": 24}`, `{"name": "more6", "subnet6": "fd01:e::/64", "prefix6": 80}`
	const was4, was6 = `{"name": "dcos", "subnet": "9.0.0.0/8", "prefix": 24}`, `{"name": "dcos6", "subnet6": "fd01:b::/64", "prefix6": 80}`
	fits := func(network string) error {
		_, err := coordinator.New(t.Context(), coordinator.Options{Network: parseNetwork(t, network), Store: s, Log: slog.New(slog.DiscardHandler)})
		return err
	}
	replaced := func(old, by string) string { return strings.Replace(seedNetwork, old, by, 1) }
	for _, tt := range []struct {
		name, network string
		words         []string // none: it fits
	}{
		{"renamed", replaced(`"dcos"`, `"other"`), []string{"overlay other: subnet 9.0.0.0/8", "overlay dcos", "9.0.0.0/24 by agent a", "9.0.1.0/24 by agent b", "put back overlay dcos"}},
		{"renamed, IPv6", replaced(`"dcos6"`, `"other"`), []string{"overlay other: subnet6 fd01:b::/64", "fd01:b:0:0:1::/80 by agent b"}},
		{"removed", replaced(was4, without4), nil},
		{"removed, then renamed", replaced(`"dcos"`, `"other"`), []string{"overlay other"}},
		{"a part of it", replaced(was4, `{"name": "other", "subnet": "9.0.1.0/24", "prefix": 26}`), []string{"9.0.1.0/24 by agent b"}},
		{"a part that was not leased", replaced(was4, `{"name": "other", "subnet": "9.1.0.0/16", "prefix": 24}`), nil},
		{"that part, made larger", replaced(was4, `{"name": "other", "subnet": "9.0.0.0/15", "prefix": 24}`), []string{"overlay other: subnet 9.0.0.0/15"}},
		{"back", seedNetwork, nil},
		{"removed, IPv6", replaced(was6, without6), nil},
		{"for VTEPs", strings.Replace(replaced(was6, without4), `"fd01:a::/64"`, `"fd01:b::/64"`, 1), []string{"vtep_subnet6 fd01:b::/64", "overlay dcos6"}},
	} {
		err := fits(tt.network)
		if (err == nil) != (tt.words == nil) || err != nil && !errors.Is(err, coordinator.ErrMisfit) {
			t.Fatalf("%s: error %v, want one: %v", tt.name, err, tt.words != nil)
		}
		for _, w := range tt.words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: message %q does not say %q", tt.name, err, w)
			}
		}
	}

	n = start(t, s, seedNetwork)
	if _, err := n.client.Delete(t.Context(), []string{"a", "b"}); err != nil {
		t.Fatal(err)
	}
	n.stop()
	if err := fits(replaced(`"dcos"`, `"other"`)); err != nil {
		t.Errorf("with the leases given back: %v", err)
	}
}

// An agent of more overlays than fit into one transaction gets all of them, and
// gives all of them back.
func TestVeryManyOverlays(t *testing.T) {
	const overlays = 150
	var text []string
	for i := range overlays {
		text = append(text, fmt.Sprintf(`{"name": "o%d", "subnet": "10.%d.0.0/16", "prefix": 24, "subnet6": "fd01:%x::/64", "prefix6": 80}`, i, i, i))
	}
	network := `{"vtep_subnet": "44.128.0.0/20", "vtep_subnet6": "fd02::/64", "vtep_mac_oui": "70:B3:D5:00:00:00", "overlays": [` + strings.Join(text, ",") + "]}"
	n := start(t, newStore(t), network)
	empty := len(stored(t, n.store))
	lease := n.register(t, request("a", "172.16.0.1"))
	if len(lease.Grants) != overlays {
		t.Fatalf("%d grants, want %d", len(lease.Grants), overlays)
	}
	for _, g := range lease.Grants {
		if !g.Subnet.IsValid() || !g.Subnet6.IsValid() || g.Error != "" {
			t.Errorf("grant %+v", g)
		}
	}
	if _, err := n.client.Delete(t.Context(), []string{"a"}); err != nil {
		t.Fatal(err)
	}
	if left := stored(t, n.store); len(left) != empty {
		t.Errorf("%d keys are left, before there were %d", len(left), empty)
	}
	if again := n.register(t, request("a", "172.16.0.1")); again.Grants[0].Subnet != lease.Grants[0].Subnet {
		t.Errorf("subnet %s after the delete, before %s", again.Grants[0].Subnet, lease.Grants[0].Subnet)
	}
}
