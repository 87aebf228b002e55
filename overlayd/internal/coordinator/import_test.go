package coordinator_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// sample is what the cluster in DC/OS's documentation answers.
func sample(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile("../../../integration/testdata/seed-state.json")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// madeUp is the state of a DC/OS cluster of many agents that came and went, so
// that VTEPs and subnets do not go side by side, as they do in a new one.
func madeUp(t testing.TB, agents int) ([]byte, map[netip.Addr]conf.Lease) {
	t.Helper()
	vteps, blocks, blocks6 := rand.Perm(2*agents), rand.Perm(2*agents), rand.Perm(2*agents)
	leases := map[netip.Addr]conf.Lease{}
	var rows []any
	for i := range agents {
		ip := netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
		vtep := netip.AddrFrom4([4]byte{44, 128, byte((vteps[i] + 1) >> 8), byte(vteps[i] + 1)})
		vtep6 := netip.MustParseAddr(fmt.Sprintf("fd01:a::%x", 2*agents-vteps[i]))
		subnet := netip.PrefixFrom(netip.AddrFrom4([4]byte{9, byte(blocks[i] >> 8), byte(blocks[i]), 0}), 24)
		subnet6 := netip.PrefixFrom(netip.MustParseAddr(fmt.Sprintf("fd01:b:0:0:%x::", blocks6[i])), 80)
		leases[ip] = conf.Lease{
			VTEP:   conf.VTEP{IP: netip.PrefixFrom(vtep, 20), IP6: netip.PrefixFrom(vtep6, 64)},
			Grants: []conf.Grant{{Subnet: subnet}, {Subnet6: subnet6}},
		}
		backend := map[string]any{"vxlan": map[string]any{
			"vni": 1024, "vtep_ip": vtep.String() + "/20", "vtep_ip6": vtep6.String() + "/64",
			"vtep_mac": fmt.Sprintf("70:b3:d5:%02x:%02x:%02x", vtep.As4()[1], vtep.As4()[2], vtep.As4()[3]), "vtep_name": "vtep1024"}}
		rows = append(rows, map[string]any{"ip": ip.String(), "overlays": []any{
			map[string]any{"backend": backend, "info": map[string]any{"name": "dcos", "enabled": true, "subnet": "9.0.0.0/8", "prefix": 24},
				"subnet": subnet.String(), "state": map[string]any{"status": "STATUS_OK"}},
			map[string]any{"backend": backend, "info": map[string]any{"name": "dcos6", "enabled": true, "subnet6": "fd01:b::/64", "prefix6": 80},
				"subnet6": subnet6.String(), "state": map[string]any{"status": "STATUS_OK"}},
		}})
	}
	b, err := json.Marshal(map[string]any{"agents": rows, "network": json.RawMessage(seedNetwork)})
	if err != nil {
		t.Fatal(err)
	}
	return b, leases
}

func (n *node) imported(t testing.TB, document []byte) api.Imported {
	t.Helper()
	result, err := n.client.ImportState(t.Context(), document, false)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// blocksOf are the VTEPs and subnets of a lease.
func blocksOf(l conf.Lease) string {
	var names []string
	for _, g := range l.Grants {
		names = append(names, fmt.Sprint(g.Subnet, " ", g.Subnet6))
	}
	return fmt.Sprint(l.VTEP.IP, " ", l.VTEP.IP6, " ", names)
}

// TestImportSample: the agents of the documentation's cluster move over and
// nothing is renumbered, whoever else came before them; the new coordinator shows
// what the old one did.
func TestImportSample(t *testing.T) {
	s := newStore(t)
	n := start(t, s, seedNetwork)
	if r := n.imported(t, sample(t)); len(r.Reserved) != 3 || len(r.Before)+len(r.Taken) > 0 {
		t.Errorf("imported %+v", r)
	}
	others := []string{}
	for i := range 5 {
		l := n.register(t, nth(i))
		if l.VTEP.IP.Addr().Less(netip.MustParseAddr("44.128.0.4")) || l.Grants[0].Subnet.Addr().Less(netip.MustParseAddr("9.0.3.0")) {
			t.Errorf("a newcomer got %s", blocksOf(l))
		}
		others = append(others, nth(i).AgentID)
	}
	n.stop()
	n = start(t, s, seedNetwork) // reservations are in the store
	if got := n.Reserved(); len(got) != 3 || got[0].AgentIP.String() != "172.17.0.2" || got[0].VTEP.String() != "44.128.0.1" || len(got[0].Subnets) != 2 {
		t.Errorf("reserved: %+v", got)
	}
	if _, err := n.client.Delete(t.Context(), others); err != nil {
		t.Fatal(err)
	}
	n.register(t, request("a-master", "172.17.0.2"))
	n.register(t, request("one", "172.17.0.4", conf.Mesos, conf.Docker))
	n.register(t, request("two", "172.17.0.3", conf.Docker, conf.Mesos))
	for _, id := range []string{"a-master", "one", "two"} {
		if err := n.client.Report(t.Context(), api.StatusReport{AgentID: id, Overlays: allOK}); err != nil {
			t.Fatal(err)
		}
	}
	var want, got any
	if err := json.Unmarshal(sample(t), &want); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(n.State())
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the state (-DC/OS +ours):\n%s", diff)
	}
	if got := n.Reserved(); len(got) != 0 {
		t.Errorf("still reserved: %+v", got)
	}
	n.stop()
	n = start(t, s, seedNetwork) // what was taken is in use after a restart too
	checkPools(t, n, 3)
	if l := n.register(t, nth(9)); l.VTEP.IP.Addr().String() != "44.128.0.4" {
		t.Errorf("a newcomer got %s", blocksOf(l))
	}
}

// TestImportKeepsConfiguration: what is reserved cannot be configured away.
func TestImportKeepsConfiguration(t *testing.T) {
	s := newStore(t)
	n := start(t, s, seedNetwork)
	n.imported(t, sample(t))
	n.stop()
	_, err := coordinator.New(t.Context(), coordinator.Options{
		Network: parseNetwork(t, strings.Replace(seedNetwork, `"prefix": 24`, `"prefix": 25`, 1)), Store: s, Log: slog.New(slog.DiscardHandler),
	})
	if !errors.Is(err, coordinator.ErrMisfit) || !strings.Contains(err.Error(), "9.0.0.0/24 by the reservation for 172.17.0.2") {
		t.Errorf("another prefix: %v", err)
	}
}

// TestImportMany: five hundred agents and as many newcomers register all at once,
// at two coordinators. Each agent gets what it had, nobody else any of it.
func TestImportMany(t *testing.T) {
	const agents = 500
	s := newStore(t)
	nodes := []*node{start(t, s, seedNetwork), start(t, s, seedNetwork)}
	document, want := madeUp(t, agents)
	if r := nodes[0].imported(t, document); len(r.Reserved) != agents {
		t.Fatalf("reserved %d", len(r.Reserved))
	}
	reserved := map[string]bool{}
	for _, l := range want {
		reserved[l.VTEP.IP.String()], reserved[l.VTEP.IP6.String()] = true, true
		reserved[l.Grants[0].Subnet.String()], reserved[l.Grants[1].Subnet6.String()] = true, true
	}
	var all sync.WaitGroup
	turn := make(chan struct{}, 32)
	try := func(n *node, req api.RegisterRequest, check func(conf.Lease)) {
		all.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			l, err := n.client.Register(t.Context(), req)
			if err != nil {
				t.Error(err)
				return
			}
			check(l)
		})
	}
	i := 0
	for ip, w := range want {
		try(nodes[i%2], api.RegisterRequest{AgentID: fmt.Sprintf("back-%d", i), AgentIP: ip, Bridges: conf.Halves[:], Version: "1.0"}, func(l conf.Lease) {
			if got, want := blocksOf(l), blocksOf(w); got != want {
				t.Errorf("%s got %s, want %s", ip, got, want)
			}
		})
		try(nodes[(i+1)%2], nth(i), func(l conf.Lease) {
			for _, block := range []string{l.VTEP.IP.String(), l.VTEP.IP6.String(), l.Grants[0].Subnet.String(), l.Grants[1].Subnet6.String()} {
				if reserved[block] {
					t.Errorf("a newcomer got %s, which was reserved", block)
				}
			}
		})
		i++
	}
	all.Wait()
	for _, n := range nodes {
		eventually(t, "nothing is reserved", func() bool { return len(n.Reserved()) == 0 })
	}
	checkExact(t, nodes[0], 2*agents)
}

// TestImportAgain: an import can be repeated at any time, and says what became of
// each agent; what is dropped is free.
func TestImportAgain(t *testing.T) {
	s := newStore(t)
	n := start(t, s, seedNetwork)
	checked, err := n.client.ImportState(t.Context(), sample(t), true)
	if err != nil || !checked.DryRun || len(checked.Reserved) != 3 || len(n.Reserved()) != 0 {
		t.Errorf("dry run: %+v, %v, reserved %v", checked, err, n.Reserved())
	}
	n.imported(t, sample(t))
	before := stored(t, s)
	if r := n.imported(t, sample(t)); len(r.Reserved) != 0 || len(r.Before) != 3 {
		t.Errorf("the second time: %+v", r)
	}
	if diff := cmp.Diff(before, stored(t, s)); diff != "" {
		t.Errorf("the second time wrote something:\n%s", diff)
	}
	n.register(t, request("one", "172.17.0.4", conf.Mesos))
	r := n.imported(t, sample(t))
	if len(r.Reserved) != 0 || len(r.Before) != 2 || fmt.Sprint(r.Taken) != "[172.17.0.4]" {
		t.Errorf("when one has moved over: %+v", r)
	}
	// Its lease was given back, and it has to have the same again.
	if _, err := n.client.Delete(t.Context(), []string{"one"}); err != nil {
		t.Fatal(err)
	}
	if r := n.imported(t, sample(t)); len(r.Reserved) != 1 || r.Reserved[0].VTEP.String() != "44.128.0.2" {
		t.Errorf("after the lease was given back: %+v", r)
	}
	dropped, err := n.client.ReservedDrop(t.Context(), api.ReservedDrop{Agents: []netip.Addr{netip.MustParseAddr("172.17.0.2"), netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("172.17.0.2")}})
	if err != nil || len(dropped) != 1 || dropped[0].VTEP.String() != "44.128.0.1" {
		t.Errorf("dropped %+v, %v", dropped, err)
	}
	if l := n.register(t, nth(1)); l.VTEP.IP.Addr().String() != "44.128.0.1" || l.Grants[0].Subnet.String() != "9.0.0.0/24" {
		t.Errorf("after the drop a newcomer got %s", blocksOf(l))
	}
	if dropped, err = n.client.ReservedDrop(t.Context(), api.ReservedDrop{All: true}); err != nil || len(dropped) != 2 {
		t.Errorf("dropped %+v, %v", dropped, err)
	}
	checkPools(t, n, 1)
}

// An agent that has a lease keeps it when it moves to an address for which
// something is reserved; that goes to a new agent there.
func TestImportIsForNewAgents(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	n.imported(t, sample(t))
	was := n.register(t, request("old", "10.0.0.1"))
	if is := n.register(t, request("old", "172.17.0.4")); blocksOf(is) != blocksOf(was) {
		t.Errorf("moved: %s, was %s", blocksOf(is), blocksOf(was))
	}
	if got := n.Reserved(); len(got) != 3 {
		t.Errorf("reserved: %+v", got)
	}
}

// The store is lost after hosts have moved over, and the state is imported again.
// Who shows the lease that it has keeps it, whether it is what is reserved or not.
func TestImportAfterLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		other := b.register("other", "172.17.0.2") // before the import
		if _, err := b.Import(t.Context(), []byte(strings.Replace(string(sample(t)), "172.17.0.2", "172.17.0.9", 1)), false); err == nil {
			t.Error("the first block is leased, and was reserved for another host")
		}
		if _, err := b.Delete(t.Context(), []string{"other"}); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Import(t.Context(), sample(t), false); err != nil {
			t.Fatal(err)
		}
		moved := b.register("moved", "172.17.0.4")
		stray := b.register("stray", "10.0.0.1")
		stray.AgentIP = netip.MustParseAddr("172.17.0.3") // it has changed its address meanwhile
		if blocksOf(other) == blocksOf(stray) {
			t.Fatalf("stray got what is reserved: %s", blocksOf(stray))
		}
		b.stop()
		b = bubbleWith(t, coordinator.Options{Store: newStore(t), Adopt: coordinator.Adopt{Cluster: b.ClusterID()}})
		if _, err := b.Import(t.Context(), sample(t), false); err != nil {
			t.Fatal(err)
		}
		kept(t, moved, b.show(moved))
		kept(t, stray, b.show(stray))
		if got := b.Reserved(); len(got) != 2 {
			t.Errorf("reserved: %+v, want what is for the two that did not come back", got)
		}
	})
}

// The same with hosts that hold more than what is reserved, or not at the address
// that it is reserved for: they keep all of it.
func TestImportAfterLossOfMore(t *testing.T) {
	for name, changed := range map[string]func(*api.RegisterRequest){
		"a further block": func(r *api.RegisterRequest) { r.Want = map[string]int{"dcos": 2} },
		"another address": func(r *api.RegisterRequest) { r.AgentIP = netip.MustParseAddr("10.0.0.7") },
		"both": func(r *api.RegisterRequest) {
			r.AgentIP, r.Want = netip.MustParseAddr("10.0.0.7"), map[string]int{"dcos": 2}
		},
		"the address of another": func(r *api.RegisterRequest) { r.AgentIP = netip.MustParseAddr("172.17.0.3") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := inBubble(t, newStore(t))
				if _, err := b.Import(t.Context(), sample(t), false); err != nil {
					t.Fatal(err)
				}
				moved := b.register("moved", "172.17.0.4")
				req := shows(moved)
				changed(&req)
				moved, err := b.Register(t.Context(), req)
				if err != nil {
					t.Fatal(err)
				}
				b.stop()
				b = bubbleWith(t, coordinator.Options{Store: newStore(t), Adopt: coordinator.Adopt{Cluster: b.ClusterID()}})
				if _, err := b.Import(t.Context(), sample(t), false); err != nil {
					t.Fatal(err)
				}
				kept(t, moved, b.show(moved))
				if got := b.Reserved(); len(got) != 2 || got[0].VTEP == moved.VTEP.IP.Addr() || got[1].VTEP == moved.VTEP.IP.Addr() {
					t.Errorf("reserved: %+v, want what is for the two that did not come back", got)
				}
			})
		})
	}
}

// edit is the sample with other words in it.
func edit(t *testing.T, pairs ...string) []byte {
	t.Helper()
	text := string(sample(t))
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(text, pairs[i]) {
			t.Fatalf("the sample has no %q", pairs[i])
		}
	}
	return []byte(strings.NewReplacer(pairs...).Replace(text))
}

// TestImportProblems: everything that is wrong is reported at once with its place,
// and nothing is written.
func TestImportProblems(t *testing.T) {
	for _, tt := range []struct {
		name     string
		document func(*testing.T) []byte
		want     []string
	}{
		{"outside the overlay", func(t *testing.T) []byte { return edit(t, `"subnet": "9.0.1.0/24"`, `"subnet": "8.0.1.0/24"`) },
			[]string{"agents[1].overlays[0].subnet: 8.0.1.0/24 is no block of the configured subnet of overlay dcos: not inside"}},
		{"another prefix", func(t *testing.T) []byte { return edit(t, `"subnet": "9.0.1.0/24"`, `"subnet": "9.0.1.0/25"`) },
			[]string{"agents[1].overlays[0].subnet: 9.0.1.0/25 is no block of the configured subnet of overlay dcos: the pool 9.0.0.0/8 hands out /24"}},
		{"overlap", func(t *testing.T) []byte {
			return edit(t, `"subnet": "9.0.1.0/24"`, `"subnet": "9.0.0.0/24"`, `"subnet6": "fd01:b:0:0:2::/80"`, `"subnet6": "fd01:b::/80"`)
		}, []string{"agents[1].overlays[0].subnet: 9.0.0.0/24 stands at agents[0].overlays[0].subnet too",
			"agents[2].overlays[1].subnet6: fd01:b::/80 stands at agents[0].overlays[1].subnet6 too"}},
		{"VTEP outside", func(t *testing.T) []byte {
			return edit(t, "44.128.0.2/20", "44.129.0.2/20", "fd01:a::3/64", "fd01:c::3/64")
		},
			[]string{"agents[1].overlays[0].backend.vxlan.vtep_ip: 44.129.0.2 is no block of the configured vtep_subnet",
				"agents[1].overlays[0].backend.vxlan.vtep_mac: 70:b3:d5:80:00:02, but vtep_mac_oui",
				"agents[2].overlays[0].backend.vxlan.vtep_ip6: fd01:c::3 is no block of the configured vtep_subnet6"}},
		{"VTEP twice", func(t *testing.T) []byte {
			return edit(t, "44.128.0.2/20", "44.128.0.1/20", "70:b3:d5:80:00:02", "70:b3:d5:80:00:01")
		},
			[]string{"agents[1].overlays[0].backend.vxlan.vtep_ip: 44.128.0.1 stands at agents[0].overlays[0].backend.vxlan.vtep_ip too"}},
		{"another OUI", func(t *testing.T) []byte { return edit(t, "70:b3:d5:80:00:0", "02:00:00:80:00:0") },
			[]string{"agents[0].overlays[0].backend.vxlan.vtep_mac: 02:00:00:80:00:01, but vtep_mac_oui 70:B3:D5:00:00:00 makes 70:b3:d5:80:00:01 of 44.128.0.1",
				"agents[1].", "agents[2]."}},
		{"agents twice", func(t *testing.T) []byte { return edit(t, "172.17.0.4", "172.17.0.2") },
			[]string{"agents[1].ip: 172.17.0.2 stands at agents[0].ip too"}},
		{"no host's address", func(t *testing.T) []byte { return edit(t, "172.17.0.4", "9.1.1.1", "172.17.0.3", "127.0.0.1") },
			[]string{"agents[1].ip: 9.1.1.1 lies in overlay dcos", "agents[2].ip: "}},
		{"an overlay that is not configured", func(t *testing.T) []byte { return edit(t, `"name": "dcos6"`, `"name": "six"`) },
			[]string{`agents[0].overlays[1].info.name: overlay "six" is not configured here`, "agents[1].", "agents[2]."}},
		{"registered otherwise, and unreadable", func(t *testing.T) []byte { return edit(t, "172.17.0.4", "172.16.0.4", "9.0.2.0/24", "nine") },
			[]string{`agents[2].overlays[0].subnet: "nine" is no subnet`,
				"agents[1].ip: agent agent-3 has registered with 172.16.0.4 and holds another lease (VTEP 44.128.0.4, 9.0.3.0/24 of dcos, fd01:b:0:0:3::/80 of dcos6); delete it first (overlayctl agents remove agent-3)"}},
		{"leased to others", func(t *testing.T) []byte {
			return edit(t, "44.128.0.2/20", "44.128.0.4/20", "70:b3:d5:80:00:02", "70:b3:d5:80:00:04", "9.0.1.0/24", "9.0.3.0/24")
		}, []string{"agents[1].overlays[0].backend.vxlan.vtep_ip: 44.128.0.4 is leased to agent agent-3",
			"agents[1].overlays[0].subnet: 9.0.3.0/24 is leased to agent agent-3"}},
		{"reserved otherwise", func(t *testing.T) []byte { return edit(t, "172.17.0.4", "10.5.0.1") },
			[]string{"agents[1].ip: for 10.5.0.1 another lease is reserved (VTEP 44.128.4.0, 9.9.0.0/24 of dcos); drop it first (overlayctl import-state --drop 10.5.0.1)"}},
		{"reserved for others", func(t *testing.T) []byte { return edit(t, "9.0.2.0/24", "9.9.0.0/24") },
			[]string{"agents[2].overlays[0].subnet: 9.9.0.0/24 is leased to the reservation for 10.5.0.1"}},
		{"no state", func(t *testing.T) []byte { return []byte(`{"network": {}}`) }, []string{"agents: missing or empty"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore(t)
			n := start(t, s, seedNetwork)
			for i := range 4 {
				n.register(t, nth(i))
			}
			if _, err := n.client.Delete(t.Context(), []string{"agent-0", "agent-1", "agent-2"}); err != nil {
				t.Fatal(err)
			}
			n.imported(t, []byte(`{"agents": [{"ip": "10.5.0.1", "overlays": [{"backend": {"vxlan": {"vtep_ip": "44.128.4.0/20"}}, "info": {"name": "dcos"}, "subnet": "9.9.0.0/24"}]}]}`))
			before := stored(t, s)
			_, err := n.client.ImportState(t.Context(), tt.document(t), false)
			refused(t, err, http.StatusUnprocessableEntity, "nothing was")
			var refusal *api.Error
			errors.As(err, &refusal)
			for i, p := range refusal.Problems {
				if i >= len(tt.want) || !strings.HasPrefix(p, tt.want[i]) {
					t.Errorf("problem %d: %s", i, p)
				}
			}
			if len(refusal.Problems) != len(tt.want) {
				t.Errorf("%d problems, want %d", len(refusal.Problems), len(tt.want))
			}
			if diff := cmp.Diff(before, stored(t, s)); diff != "" {
				t.Errorf("something was written:\n%s", diff)
			}
		})
	}
}

// TestImportAllProblems: a thousand problems come whole.
func TestImportAllProblems(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	document, _ := madeUp(t, 500)
	text := strings.NewReplacer(`"subnet":"9.`, `"subnet":"19.`, `"subnet6":"fd01:b:`, `"subnet6":"fd01:c:`).Replace(string(document))
	_, err := n.client.ImportState(t.Context(), []byte(text), false)
	var refusal *api.Error
	if !errors.As(err, &refusal) || len(refusal.Problems) != 1000 {
		t.Fatalf("%.300v", err)
	}
}

// TestImportRace: newcomers take what the state names while it is imported. Then
// either all of it is reserved or nothing, and no block has two owners.
func TestImportRace(t *testing.T) {
	outcomes := map[bool]int{}
	for round := range 12 {
		n := start(t, newStore(t), seedNetwork)
		document, want := madeUp(t, 60)
		var all sync.WaitGroup
		for i := range round % 3 * 4 {
			all.Go(func() { n.register(t, nth(i)) })
		}
		result, err := n.client.ImportState(t.Context(), document, false)
		all.Wait()
		reserved := n.Reserved()
		switch {
		case err == nil && (len(result.Reserved) != 60 || len(reserved) != 60):
			t.Errorf("reserved %d and there are %d, want 60", len(result.Reserved), len(reserved))
		case err != nil && len(reserved) != 0:
			t.Errorf("refused (%v), and %d are reserved", err, len(reserved))
		}
		outcomes[err == nil]++
		owners := map[string]string{}
		own := func(owner string, blocks ...string) {
			for _, b := range blocks {
				if other := owners[b]; other != "" && !strings.HasPrefix(b, "invalid") {
					t.Errorf("%s is of %s and of %s", b, other, owner)
				}
				owners[b] = owner
			}
		}
		for _, r := range reserved {
			own(r.AgentIP.String(), r.VTEP.String(), r.VTEP6.String())
			for _, s := range r.Subnets {
				own(r.AgentIP.String(), s.Subnet.String(), s.Subnet6.String())
			}
			if w := want[r.AgentIP]; w.VTEP.IP.Addr() != r.VTEP {
				t.Errorf("%s: reserved %s, want %s", r.AgentIP, r.VTEP, w.VTEP.IP)
			}
		}
		for _, a := range n.Agents() {
			own(a.AgentID, a.VTEP.IP.Addr().String(), a.VTEP.IP6.Addr().String(), a.Grants[0].Subnet.String(), a.Grants[1].Subnet6.String())
		}
		n.stop()
	}
	if outcomes[true] == 0 || outcomes[false] == 0 {
		t.Errorf("imported: %d, refused: %d", outcomes[true], outcomes[false])
	}
}

// meddler is a real store that calls a function before the third transaction
// that reserves something.
type meddler struct {
	store.Store
	n    atomic.Int64
	call func()
}

func (m *meddler) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	if len(txn.Then) > 0 && strings.HasPrefix(txn.Then[0].Key, "reserved/") && m.n.Add(1) == 3 {
		m.call()
	}
	return m.Store.Commit(ctx, txn)
}

// TestImportTakenBack: a part is reserved when somebody gets what is still to
// come. The import is refused, and what it has reserved is free again.
func TestImportTakenBack(t *testing.T) {
	s := &meddler{Store: newStore(t)}
	n := start(t, s, seedNetwork)
	s.call = func() { n.register(t, nth(0)) }
	var rows []string
	const agents = 200
	for i := range agents {
		rows = append(rows, fmt.Sprintf(`{"ip": "10.1.0.%d", "overlays": [{"backend": {"vxlan": {"vtep_ip": "44.128.0.%d/20"}}, "info": {"name": "dcos"}, "subnet": "9.0.%d.0/24"}]}`, i+1, agents-i, i+1))
	}
	_, err := n.client.ImportState(t.Context(), []byte(`{"agents": [`+strings.Join(rows, ",")+`]}`), false)
	refused(t, err, http.StatusUnprocessableEntity, "1 of what", "agents[199].overlays[0].backend.vxlan.vtep_ip: 44.128.0.1 is leased to agent agent-0")
	if s.n.Load() < 3 || len(n.Reserved()) != 0 {
		t.Errorf("%d transactions, still reserved: %v", s.n.Load(), n.Reserved())
	}
	checkPools(t, n, 1)
}

// TestImportUnsure: the answers of the store get lost, and everything is reserved,
// and dropped, all the same.
func TestImportUnsure(t *testing.T) {
	n := start(t, &unsure{Store: newStore(t)}, seedNetwork)
	document, want := madeUp(t, 300)
	result := n.imported(t, document)
	if got := len(result.Reserved) + len(result.Before); got != len(want) || len(n.Reserved()) != len(want) {
		t.Errorf("reserved %d, and there are %d, want %d", got, len(n.Reserved()), len(want))
	}
	if _, err := n.client.ReservedDrop(t.Context(), api.ReservedDrop{All: true}); err != nil {
		t.Fatal(err)
	}
	if got := stored(t, n.store); len(got) != 3 {
		t.Errorf("left after the drop: %v", got)
	}
	checkPools(t, n, 0)
}

// Who may import: operators alone. Readers may look.
func TestImportAccess(t *testing.T) {
	n := secure(t)
	agent, reader := n.agent(t, "a"), n.join(t, "r", n.token(t, api.TokenRequest{Role: "reader"}))
	operator := n.join(t, "o", n.token(t, api.TokenRequest{Role: "operator"}))
	for who, p := range map[string]*person{"agent": agent, "reader": reader} {
		_, err := p.ImportState(t.Context(), sample(t), false)
		refused(t, err, http.StatusForbidden)
		_, err = p.ReservedDrop(t.Context(), api.ReservedDrop{All: true})
		refused(t, err, http.StatusForbidden)
		if _, err = p.Reserved(t.Context()); (err == nil) != (who == "reader") {
			t.Errorf("%s lists: %v", who, err)
		}
	}
	if r, err := operator.ImportState(t.Context(), sample(t), false); err != nil || len(r.Reserved) != 3 {
		t.Errorf("operator: %+v, %v", r, err)
	}
	if _, err := operator.ReservedDrop(t.Context(), api.ReservedDrop{All: true}); err != nil {
		t.Error(err)
	}
	big, want := madeUp(t, 1900)
	if r, err := operator.ImportState(t.Context(), big, false); err != nil || len(r.Reserved) != len(want) || len(big) <= serve.MaxBody {
		t.Errorf("a state of %d bytes: %d reserved, %v", len(big), len(r.Reserved), err)
	}
}
