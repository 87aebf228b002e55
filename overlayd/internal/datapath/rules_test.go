package datapath

import (
	"sync/atomic"
	"testing"

	"overlayd.internal/overlay/conf"
)

// It is told of rules that others have for forwarded packets, and of the
// administrator's. What the agent does to its own is not among them.
func TestOnRules(t *testing.T) { eachFirewall(t, testOnRules) }

func testOnRules(t *testing.T) {
	n := onlyIPv4
	_, hosts := n.plugHosts(t, 1)
	h := hosts[0]
	var told atomic.Int32
	h.dp.OnRules(func() { told.Add(1) })
	h.do(func() { h.dp.Changes(t.Context()) })
	changes := []string{
		"nft 'add table inet a; add chain inet a g { type filter hook forward priority 0; }'",
		"nft add rule inet a g tcp dport 22 drop",
		"nft flush chain inet a g",
		"nft 'add table bridge b; add chain bridge b g; add rule bridge b g drop'",
		"nft delete table inet a",
		"iptables-nft -N DOCKER-USER; iptables-nft -A DOCKER-USER -d 9.9.9.9 -j DROP",
	}
	switch r := &h.dp.rules; {
	case r.active != r.iptables:
		changes = append(changes, "nft add rule inet overlay OVERLAY-USER ip daddr 9.9.9.9 drop")
	case !r.iptables.Legacy(): // which announces nothing
		changes = append(changes, "iptables -A OVERLAY-USER -d 9.9.9.9 -j DROP")
	}
	for _, change := range changes {
		told.Store(0)
		h.sh(change)
		h.eventually(func() bool { return told.Load() > 0 }, "nobody is told of: %s", change)
	}
	if r := &h.dp.rules; r.active == r.iptables {
		return // which makes jumps in chains of others
	}
	told.Store(0)
	w := n.Host(0, 1)
	w.Overlays = append([]Overlay{}, w.Overlays...)
	w.Overlays[0].Isolation = conf.IsolationStrict
	h.mustSet(w, true)
	h.sh("nft 'add table inet last; add chain inet last g'")
	h.eventually(func() bool { return told.Load() > 0 }, "nobody is told of the last chain")
	if n := told.Load(); n != 1 {
		t.Errorf("of what the agent did it was told %d times", n-1)
	}
}
