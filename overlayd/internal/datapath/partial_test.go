package datapath

import "testing"

// An agent that was killed may come back with fewer peers than the kernel has:
// until it knows them all, what others talk through stays.
func TestPartialKeepsPeers(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 3)
	h, cfg := hosts[0], bothIP.Host(0, 3)
	h.mustSet(cfg, true)

	h.dp.Close()
	h.dp = h.newDatapath()
	less := cfg
	less.Peers, less.Partial = cfg.Peers[:1], true
	for _, resync := range []bool{false, true} {
		if r := h.mustSet(less, resync); r.Changed != 0 {
			t.Errorf("partial peers, resync %v: %d objects changed, want none", resync, r.Changed)
		}
	}
	less.Partial = false
	if r := h.mustSet(less, false); r.Changed == 0 {
		t.Error("the peer that is gone for certain is still in the kernel")
	}
	h.mustBeIdle(less)
}
