package datapath

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"overlayd.internal/overlay/conf"
)

// Whoever says what changed gets what whoever says everything gets.
func TestUpdate(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 1)
	h := hosts[0]
	all := bothIP.Host(0, 60)
	now := all
	now.Peers = nil
	update := func(set []conf.Peer, gone []string) (r Report, ok bool) {
		h.do(func() { r, ok = h.dp.update(t.Context(), now, set, gone, false) })
		return r, ok
	}
	h.mustSet(now, true)
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		var set []conf.Peer
		var gone []string
		next := map[string]conf.Peer{}
		for _, p := range now.Peers {
			next[p.AgentID] = p
		}
		for _, p := range all.Peers {
			switch rnd.IntN(4) {
			case 0:
				delete(next, p.AgentID)
				gone = append(gone, p.AgentID) // in the kernel or not
			case 1:
				if rnd.IntN(2) == 0 {
					p.Subnets = p.Subnets[1:]
				}
				next[p.AgentID] = p
				set = append(set, p) // another or the same
			}
		}
		now.Peers = nil
		for _, p := range next {
			now.Peers = append(now.Peers, p)
		}
		r, ok := update(set, gone)
		if !ok || r.Err != nil || len(r.Overlays) > 0 {
			t.Fatalf("seed %d: ok %t, %+v", seed, ok, r)
		}
		h.mustBeIdle(now)
	}

	if r, ok := update(nil, []string{"agent-never"}); !ok || r.Changed != 0 {
		t.Errorf("nothing to do: ok %t, %+v", ok, r)
	}
	was := now
	now.VTEP.MTU = 1400
	if _, ok := update(nil, nil); ok {
		t.Error("a change of the host was taken for one of peers")
	}
	now = was
	// Something that a peer which stays has: the two have to be decided between.
	twin := now.Peers[0]
	twin.AgentID = "twin"
	twin.AgentIP = bothIP.AgentIP(99)
	if _, ok := update([]conf.Peer{twin}, nil); ok {
		t.Error("a peer was given what another has")
	}
	h.mustBeIdle(now)
	h.dp = h.newDatapath()
	if _, ok := update(now.Peers, nil); ok {
		t.Error("updated what it did not know")
	}
}

// While peers may be missing, those that the kernel has are kept only by a
// look at it; once none are, peers come and go as ever, and who is said to be
// gone is gone.
func TestUpdatePartial(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 1)
	h, cfg := hosts[0], bothIP.Host(0, 4)
	h.mustSet(cfg, true)
	h.dp = h.newDatapath()
	less := cfg
	less.Partial, less.Peers = true, slices.Clone(cfg.Peers[:2])
	h.mustSet(less, false)
	update := func(set []conf.Peer, gone ...string) (ok bool) {
		h.do(func() { _, ok = h.dp.update(t.Context(), less, set, gone, false) })
		return ok
	}
	if update(cfg.Peers[2:3]) {
		t.Error("updated although the kernel has more than was asked for")
	}
	less.Peers = cfg.Peers
	h.mustSet(less, false)
	if !update(nil, cfg.Peers[0].AgentID) {
		t.Error("the kernel was to be read although nothing was kept")
	}
	less.Partial, less.Peers = false, cfg.Peers[1:]
	if !update(nil) {
		t.Error("the kernel was to be read to learn that no peer is missing")
	}
	h.mustBeIdle(less)
}

// What was wrong with a peer is over when the peer has gone, or is another.
func TestUpdateEndsProblem(t *testing.T) {
	_, hosts := onlyIPv4.plugHosts(t, 1)
	h, cfg := hosts[0], onlyIPv4.Host(0, 3)
	strange := cfg.Peers[0]
	strange.AgentIP = netip.MustParseAddr("fd00::1")
	update := func(set []conf.Peer, gone ...string) (r Report) {
		h.do(func() {
			var ok bool
			if r, ok = h.dp.update(t.Context(), cfg, set, gone, false); !ok {
				r = h.dp.Apply(t.Context(), Wanted{Host: cfg})
			}
		})
		return r
	}
	alone := func() {
		t.Helper()
		cfg.Peers = []conf.Peer{strange}
		if r := h.set(cfg, true); len(r.Overlays) != 1 {
			t.Fatalf("with a peer of the other family only: %+v", r)
		}
	}

	alone()
	cfg.Peers = nil
	if r := update(nil, strange.AgentID); len(r.Overlays) > 0 {
		t.Errorf("the strange peer has gone: %v", r.Overlays)
	}
	alone()
	cfg = onlyIPv4.Host(0, 3)
	if r := update(cfg.Peers[:1]); len(r.Overlays) > 0 {
		t.Errorf("the strange peer is one of ours now: %v", r.Overlays)
	}
	alone()
	other := onlyIPv4.Host(0, 3).Peers[1]
	cfg.Peers = []conf.Peer{strange, other}
	if r := update([]conf.Peer{other}); len(r.Overlays) > 0 {
		t.Errorf("there is another peer: %v", r.Overlays)
	}
}
