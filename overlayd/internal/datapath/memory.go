package datapath

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// trust is how much the next Apply may take for granted of what the last one
// left behind.
//
//	        everything obeyed, nothing to say of it
//	nothing --------------------------------------> exact
//	nothing --------------------------------------> remarked   problems or notices that are not about peers, or
//	                                                           something refused at the second VXLAN device
//	nothing --------------------------------------> entangled  peers at odds, or of peers that may be missing
//	                                                           something was kept
//	any     --------------------------------------> nothing    refused, cut short, answers lost, peers that
//	                                                           claim the same, two with one agent id
//
// From exact the next Apply sends differences, and a look compares. From remarked
// it sends differences; a look plans everything, because only that finds the
// problems again. From entangled and nothing everything is planned: any change
// may be about what was kept, or end a problem.
type trust uint8

const (
	nothing trust = iota
	entangled
	remarked
	exact
)

// memory is what the last Apply left behind.
type memory struct {
	trust    trust
	asked    plan.Wanted          // as it was asked for, without the peers
	possible plan.Wanted          // what this host can have of it
	peers    map[string]conf.Peer // by agent id
	index    map[string]int       // of the links by name
	foreign  map[netip.Prefix]plan.ForeignRoute
	problems []plan.Problem // that remain until asked or the kernel changes
	mtu      int
	refused  []string // overlays that are not set up
	notices  []string
	// noSecond: the kernel refused something at the second VXLAN device, so that
	// what is known of peers behind it is not so.
	noSecond bool
	// noVTEP: nothing may be done for peers.
	noVTEP bool
}

// remember takes in a plan that was carried out as a whole, but for what second
// says. peers is nil when two have one id: there is no telling them apart.
func (m *memory) remember(w plan.Wanted, p *plan.Plan, have *plan.State, peers map[string]conf.Peer, index map[string]int, second []string) {
	switch {
	case p.Disputed || peers == nil:
		m.trust = nothing
		return
	case p.Kept || p.AtOdds:
		m.trust = entangled
	case len(p.Notices) > 0 || len(p.Problems) > 0 || len(second) > 0:
		m.trust = remarked
	default:
		m.trust = exact
	}
	m.asked, m.possible, m.peers, m.index = w, p.Wanted, peers, index
	m.foreign, m.problems, m.mtu, m.refused, m.notices = have.Foreign, p.Problems, p.MTU, p.Refused, slices.Concat(p.Notices, second)
	m.noSecond, m.noVTEP = len(second) > 0, !p.HasVTEP()
	m.asked.Peers, m.possible.Peers = nil, nil
	m.possible.Partial = false // whoever is said to be gone later is gone for certain
}

// refusesSecond reports whether some of these peers are behind a second VXLAN device
// at which the kernel refused something.
func (m *memory) refusesSecond(peers []conf.Peer) bool {
	return m.noSecond && slices.ContainsFunc(peers, func(p conf.Peer) bool {
		own, _, ok := m.possible.Reach(&p)
		return ok && own == m.possible.VTEP.Second
	})
}

// byID is nil when two have one id.
func byID(peers []conf.Peer) map[string]conf.Peer {
	m := make(map[string]conf.Peer, len(peers))
	for _, p := range peers {
		m[p.AgentID] = p
	}
	if len(m) < len(peers) {
		return nil
	}
	return m
}

// difference lists the peers that changed as they were and as they are wanted.
func (m *memory) difference(peers []conf.Peer) (old, now []conf.Peer) {
	stayed := 0
	for i := range peers {
		was, ok := m.peers[peers[i].AgentID]
		if ok {
			stayed++
		}
		if ok && plan.SamePeer(&was, &peers[i]) {
			continue
		}
		if ok {
			old = append(old, was)
		}
		now = append(now, peers[i])
	}
	if stayed == len(m.peers) {
		return old, now
	}
	wanted := make(map[string]struct{}, len(peers))
	for i := range peers {
		wanted[peers[i].AgentID] = struct{}{}
	}
	for id, was := range m.peers {
		if _, ok := wanted[id]; !ok {
			old = append(old, was)
		}
	}
	return old, now
}

// changes is difference for somebody who knows where to look.
func (m *memory) changes(set []conf.Peer, gone []string) (old, now []conf.Peer) {
	now = make([]conf.Peer, 0, len(set))
	for i := range set {
		was, ok := m.peers[set[i].AgentID]
		if ok && plan.SamePeer(&was, &set[i]) {
			continue
		}
		if ok {
			old = append(old, was)
		}
		now = append(now, set[i])
	}
	for _, id := range gone {
		if was, ok := m.peers[id]; ok {
			old = append(old, was)
		}
	}
	return old, now
}

// replace puts peers into the place of what they were.
func (m *memory) replace(old, now []conf.Peer) {
	for _, p := range old {
		delete(m.peers, p.AgentID)
	}
	for _, p := range now {
		m.peers[p.AgentID] = p
	}
}

// warned is what was logged of what works, but not as it was meant.
type warned struct {
	mtu       int // configured one that does not fit
	disputed  bool
	notices   []string
	second    []string // what the kernel refused at the second VXLAN device
	guard     bool     // that the kernel has no tables that belong to a process
	unbounded bool     // that the kernel cannot bound what containers make the host resolve
	altered   bool     // that rules which are not announced cannot be looked at
}

// warn logs what works, but not as it was meant; once, until it changes.
func (w *warned) warn(log *slog.Logger, p *plan.Plan, mtu int) {
	if !p.Lowered {
		mtu = 0
	}
	if mtu != w.mtu && mtu != 0 {
		log.Warn("the configured MTU does not fit into the underlay", "configured", mtu, "used", p.MTU)
	}
	if p.Disputed && !w.disputed {
		log.Warn("two peers claim the same subnet or VTEP; the newer lease is obeyed")
	}
	w.mtu, w.disputed = mtu, p.Disputed

	notices := p.Notices
	if n := len(notices) - maxReported; n > 0 {
		notices = append(notices[:maxReported:maxReported], fmt.Sprintf("and %d more", n))
	}
	w.notices = sayNew(log, w.notices, notices)
}

// sayNew logs which notices are new and which no longer hold, and returns those
// that do.
func sayNew(log *slog.Logger, before, notices []string) []string {
	for _, n := range notices {
		if !slices.Contains(before, n) {
			log.Warn("degraded; overlays work", "what", n)
		}
	}
	for _, n := range before {
		if !slices.Contains(notices, n) {
			log.Info("recovered", "what", n)
		}
	}
	return notices
}
