package coordinator_test

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/store/transfer"
)

// roomy has an overlay of both families with 32 blocks.
const roomy = `{
	"vtep_subnet": "44.128.0.0/20", "vtep_subnet6": "fd01:a::/64", "vtep_mac_oui": "70:B3:D5:00:00:00",
	"overlays": [
		{"name": "a", "subnet": "9.0.0.0/22", "prefix": 27, "subnet6": "fd01:b::/75", "prefix6": 80%s},
		{"name": "b", "subnet": "10.0.0.0/22", "prefix": 27, "blocks_per_agent": 1}
	]}`

func network(more string) string { return fmt.Sprintf(roomy, more) }

func block(v4, v6 string) conf.Block {
	return conf.Block{Subnet: netip.MustParsePrefix(v4), Subnet6: netip.MustParsePrefix(v6)}
}

func wanting(i int, overlay string, n int) api.RegisterRequest {
	r := nth(i)
	r.Want = map[string]int{overlay: n}
	return r
}

// An agent gets as many blocks as it wants and the configuration allows, whole ones
// of both families, and its peers get to know.
func TestFurtherBlocks(t *testing.T) {
	s := newStore(t)
	n := start(t, s, network(`, "blocks_per_agent": 3`))
	first := n.register(t, nth(0))
	n.register(t, nth(1))
	w := n.watch(t, "agent-1", 0)
	w.next(t)

	two := n.register(t, wanting(0, "a", 2))
	want := []conf.Block{block("9.0.0.64/27", "fd01:b:0:0:2::/80")}
	if diff := cmp.Diff(want, two.Grants[0].Blocks, cmp.Comparer(func(a, b conf.Block) bool { return a == b })); diff != "" {
		t.Errorf("further blocks (-want +got):\n%s", diff)
	}
	if two.Grants[0].Subnet != first.Grants[0].Subnet || two.Epoch <= first.Epoch {
		t.Errorf("the first block is %s, before %s; epoch %d, before %d", two.Grants[0].Subnet, first.Grants[0].Subnet, two.Epoch, first.Epoch)
	}
	eventually(t, "told", func() bool {
		for _, p := range w.next(t).Put {
			if p.AgentID == "agent-0" {
				return len(p.Subnets) == 5
			}
		}
		return false
	})
	if again := n.register(t, wanting(0, "a", 2)); again.Epoch != two.Epoch {
		t.Error("what is held already was granted again")
	}
	if again := n.register(t, nth(0)); len(again.Grants[0].Blocks) != 1 || again.Epoch != two.Epoch {
		t.Error("who wants nothing loses what it has")
	}
	if most := n.register(t, wanting(0, "a", 64)); len(most.Grants[0].Blocks) != 2 {
		t.Errorf("%d further blocks where 2 are allowed", len(most.Grants[0].Blocks))
	}
	if one := n.register(t, wanting(0, "b", 2)); len(one.Grants[1].Blocks) != 0 {
		t.Errorf("a further block where blocks_per_agent is 1: %v", one.Grants[1].Blocks)
	}
	checkHeld(t, n, map[string]uint64{"a": 4, "b": 2})

	n.stop()
	n = start(t, s, network(`, "blocks_per_agent": 3`))
	if l := n.register(t, nth(0)); len(l.Grants[0].Blocks) != 2 {
		t.Errorf("%d further blocks after a restart, want 2", len(l.Grants[0].Blocks))
	}
	state := n.State()
	if len(state.Agents[0].Overlays[0].Blocks) != 2 {
		t.Errorf("the state shows %v", state.Agents[0].Overlays[0])
	}
	if _, err := n.client.Delete(t.Context(), []string{"agent-0"}); err != nil {
		t.Fatal(err)
	}
	checkHeld(t, n, map[string]uint64{"a": 1, "b": 1})
	for _, key := range stored(t, s) {
		if strings.HasPrefix(key, "subnet/a/9.0.0.0/") || strings.HasPrefix(key, "subnet/a/9.0.0.64/") {
			t.Errorf("key %s is left", key)
		}
	}
}

// checkHeld checks how many blocks of every overlay are in use.
func checkHeld(t *testing.T, n *node, want map[string]uint64) {
	t.Helper()
	for _, o := range n.Overlays() {
		for family, pool := range map[string]*api.Pool{"IPv4": o.Pool, "IPv6": o.Pool6} {
			if pool != nil && pool.Used != want[o.Name] {
				t.Errorf("overlay %s: %d blocks of %s in use, want %d", o.Name, pool.Used, family, want[o.Name])
			}
		}
	}
}

// What an agent returns is free at once, unless its lease has changed since it
// decided that; then the request is of a time before.
func TestReturnBlocks(t *testing.T) {
	n := start(t, newStore(t), network(""))
	n.register(t, nth(0))
	lease := n.register(t, wanting(0, "a", 4))
	blocks := lease.Grants[0].Blocks
	if len(blocks) != 3 {
		t.Fatalf("%d further blocks, want 3", len(blocks))
	}
	back := func(epoch uint64, b ...conf.Block) conf.Lease {
		t.Helper()
		r := nth(0)
		r.Return = &api.Return{Epoch: epoch, Blocks: map[string][]conf.Block{"a": b}}
		return n.register(t, r)
	}
	less := back(lease.Epoch, blocks[1])
	if got := less.Grants[0].Blocks; len(got) != 2 || got[0] != blocks[0] || got[1] != blocks[2] || less.Epoch <= lease.Epoch {
		t.Errorf("left are %v of %v, epoch %d", got, blocks, less.Epoch)
	}
	checkHeld(t, n, map[string]uint64{"a": 3, "b": 1})
	if other := n.register(t, nth(7)); other.Grants[0].Subnet != blocks[1].Subnet {
		t.Errorf("the next agent gets %s, want the free %s", other.Grants[0].Subnet, blocks[1].Subnet)
	}
	// Late, of another agent's block, and of the first one.
	for name, l := range map[string]conf.Lease{
		"late":         back(lease.Epoch, blocks[0]),
		"another's":    back(less.Epoch, blocks[1]),
		"the first":    back(less.Epoch, conf.Block{Subnet: less.Grants[0].Subnet, Subnet6: less.Grants[0].Subnet6}),
		"half a block": back(less.Epoch, conf.Block{Subnet: blocks[0].Subnet}),
	} {
		if l.Epoch != less.Epoch || len(l.Grants[0].Blocks) != 2 || l.Grants[0].Subnet != lease.Grants[0].Subnet {
			t.Errorf("%s: %+v", name, l.Grants[0])
		}
	}
	both := back(less.Epoch, blocks[0], blocks[2])
	if len(both.Grants[0].Blocks) != 0 {
		t.Errorf("left are %v", both.Grants[0].Blocks)
	}
	checkHeld(t, n, map[string]uint64{"a": 2, "b": 2})
}

// A block comes back too after the store was moved, which gives every lease another
// epoch without a record being written.
func TestReturnAfterMove(t *testing.T) {
	from, to := newStore(t), newStore(t)
	n := start(t, from, network(""))
	n.register(t, nth(0))
	blocks := n.register(t, wanting(0, "a", 4)).Grants[0].Blocks
	n.stop()
	content, err := transfer.Read(t.Context(), from)
	if err != nil {
		t.Fatal(err)
	}
	if err := content.Copy(t.Context(), to, time.Now()); err != nil {
		t.Fatal(err)
	}
	n = start(t, to, network(""))
	lease := n.register(t, nth(0))
	r := nth(0)
	r.Return = &api.Return{Epoch: lease.Epoch, Blocks: map[string][]conf.Block{"a": blocks[:1], "nothing": {}}}
	if got := n.register(t, r).Grants[0].Blocks; len(got) != len(blocks)-1 {
		t.Errorf("left are %d of %d blocks, want one less", len(got), len(blocks))
	}
}

// An eighth of an overlay is for hosts that join, however much those that are there
// want; and who asks for what cannot be is refused.
func TestReserveOfBlocks(t *testing.T) {
	n := start(t, newStore(t), network(`, "blocks_per_agent": 64`))
	lease := n.register(t, wanting(0, "a", 64))
	if got := len(lease.Grants[0].Blocks); got != 27 { // 32 - 4 - 1
		t.Errorf("%d further blocks, want 27", got)
	}
	if lease.Grants[0].Error != "" {
		t.Errorf("an error: %s", lease.Grants[0].Error)
	}
	for i := 1; i <= 4; i++ {
		if l := n.register(t, wanting(i, "a", 2)); !l.Grants[0].Subnet.IsValid() || len(l.Grants[0].Blocks) != 0 {
			t.Errorf("agent %d has %+v", i, l.Grants[0])
		}
	}
	for name, r := range map[string]api.RegisterRequest{
		"many":     wanting(0, "a", 65),
		"negative": wanting(0, "a", -1),
		"name":     wanting(0, "../x", 1),
	} {
		if _, err := n.client.Register(t.Context(), r); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	// More keys than one transaction deletes.
	if _, err := n.client.Delete(t.Context(), []string{"agent-0"}); err != nil {
		t.Fatal(err)
	}
	checkHeld(t, n, map[string]uint64{"a": 4, "b": 4})
}

// Agents that want blocks, and return them, at the same time never have one
// together.
func TestBlocksAtOnce(t *testing.T) {
	n := start(t, newStore(t), network(`, "blocks_per_agent": 8`))
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			for round := range 20 {
				r := wanting(i, "a", 1+(round+i)%8)
				l, err := n.client.Register(t.Context(), r)
				if err != nil {
					t.Error(err)
					return
				}
				r = nth(i)
				r.Return = &api.Return{Epoch: l.Epoch, Blocks: map[string][]conf.Block{"a": l.Grants[0].Blocks}}
				if round < 19 {
					if _, err := n.client.Register(t.Context(), r); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	owner := map[netip.Prefix]string{}
	held := uint64(0)
	for _, a := range n.Agents() {
		held += 1 + uint64(len(a.Grants[0].Blocks))
		for _, p := range a.Peer().Subnets {
			if other := owner[p]; other != "" {
				t.Errorf("%s belongs to %s and %s", p, other, a.AgentID)
			}
			owner[p] = a.AgentID
		}
	}
	checkHeld(t, n, map[string]uint64{"a": held, "b": 6})
}

// TestReturnAfterFamilyRemoved: the agent knows its blocks without the family that the
// overlay no longer has. What it returns goes back whole.
func TestReturnAfterFamilyRemoved(t *testing.T) {
	n := start(t, newStore(t), network(""))
	n.register(t, nth(0))
	blocks := n.register(t, wanting(0, "a", 3)).Grants[0].Blocks
	n.mustApply(t, strings.Replace(network(""), `, "subnet6": "fd01:b::/75", "prefix6": 80`, "", 1))
	lease := n.register(t, nth(0))
	if got := lease.Grants[0].Blocks; len(got) != 2 || got[0] != (conf.Block{Subnet: blocks[0].Subnet}) {
		t.Fatalf("it has %v, want those of IPv4 of %v", got, blocks)
	}
	r := nth(0)
	// One as the lease of now has it, one as it was known before.
	r.Return = &api.Return{Epoch: lease.Epoch, Blocks: map[string][]conf.Block{"a": {lease.Grants[0].Blocks[0], blocks[1]}}}
	if got := n.register(t, r).Grants[0].Blocks; len(got) != 0 {
		t.Errorf("left are %v", got)
	}
	n.mustApply(t, network(""))
	if got := n.register(t, wanting(1, "a", 3)).Grants[0].Blocks; len(got) != 2 || got[0] != blocks[1] {
		t.Errorf("another agent gets %v, want what was given back, %v, again", got, blocks)
	}
}
