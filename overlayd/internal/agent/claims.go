package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
)

// claims are the peers and what each of them claims: an agent IP, VTEP
// addresses, a MAC and subnets. Nearly always every peer claims something of
// its own. Those that do not, because they claim what another or we have, are
// contested; resolve decides between them, and only between them: it can come to
// no other decision about the rest than to believe them, nor can the rest
// change what it decides. So one more peer costs what that peer claims, however
// many there are.
type claims struct {
	own  conf.Lease
	ours []netip.Prefix // agent subnets of own
	ip   netip.Addr     // agent IP

	peers     map[string]conf.Peer
	claimants map[claim]uint16        // how often something is claimed
	contested map[string]bool         // by agent id
	stale     bool                    // contested has to be found anew
	touched   map[string]bool         // agents that changed since changes or all was called
	lost      string                  // why our lease no longer holds
	elsewhere map[netip.Prefix]string // of ours, those that peers have since, and who
}

// claim is what only one agent can have. Addresses of both families are in one
// form, and zones are left out; that makes a claim contested at worst.
type claim struct {
	kind claimKind
	bits uint8 // of a subnet
	what [16]byte
}

type claimKind uint8

const (
	claimAddr claimKind = iota // agent IP or VTEP address
	claimMAC
	claimSubnet
)

func newClaims() *claims {
	return &claims{
		peers: map[string]conf.Peer{}, claimants: map[claim]uint16{},
		contested: map[string]bool{}, touched: map[string]bool{},
	}
}

// claimsOf calls fn for everything a peer claims.
func claimsOf(p *conf.Peer, fn func(claim)) {
	for _, a := range [...]netip.Addr{p.AgentIP, p.SecondIP, p.VTEPIP, p.VTEPIP6} {
		if a.IsValid() {
			fn(claim{kind: claimAddr, what: a.As16()})
		}
	}
	mac := claim{kind: claimMAC}
	copy(mac.what[:], p.VTEPMAC[:])
	fn(mac)
	for _, s := range p.Subnets {
		fn(claim{kind: claimSubnet, bits: uint8(s.Bits()), what: s.Addr().As16()})
	}
}

// setOwn says what we have ourselves.
func (c *claims) setOwn(own conf.Lease, ip netip.Addr) {
	ours := own.Peer().Subnets
	if c.own.Epoch != own.Epoch || c.own.VTEP != own.VTEP || c.own.SecondIP != own.SecondIP || c.ip != ip || !slices.Equal(c.ours, ours) {
		c.stale = true
	}
	c.own, c.ours, c.ip = own, ours, ip
}

// put takes in a peer that is new or has changed.
func (c *claims) put(p conf.Peer) {
	c.remove(p.AgentID)
	c.peers[p.AgentID] = p
	shared := false
	claimsOf(&p, func(k claim) {
		n := c.claimants[k] + 1
		c.claimants[k] = n
		shared = shared || n > 1
	})
	c.touched[p.AgentID] = true
	c.stale = c.stale || shared || c.claimsOurs(&p)
}

// expect makes room for n peers at once, where there were none: a map that grows to
// thousands copies all that is in it again and again.
func (c *claims) expect(n int) {
	if len(c.peers)+len(c.touched) > 0 {
		return
	}
	const each = 4 // agent IP, VTEP, MAC and a subnet
	c.peers, c.touched = make(map[string]conf.Peer, n), make(map[string]bool, n)
	c.claimants = make(map[claim]uint16, each*n)
}

// remove forgets a peer.
func (c *claims) remove(id string) {
	p, ok := c.peers[id]
	if !ok {
		return
	}
	delete(c.peers, id)
	claimsOf(&p, func(k claim) {
		if c.claimants[k]--; c.claimants[k] == 0 {
			delete(c.claimants, k)
		}
	})
	c.touched[id] = true
	c.stale = c.stale || c.contested[id]
}

// isContested reports whether another peer claims something that p claims, or
// we have it. What p itself claims twice counts as well: resolve decides rightly.
func (c *claims) isContested(p *conf.Peer) bool {
	contested := c.claimsOurs(p)
	claimsOf(p, func(k claim) { contested = contested || c.claimants[k] > 1 })
	return contested
}

// claimsOurs reports whether a peer claims something that we have.
func (c *claims) claimsOurs(p *conf.Peer) bool {
	for _, a := range [...]netip.Addr{p.AgentIP, p.SecondIP, p.VTEPIP, p.VTEPIP6} {
		if a.IsValid() && (a == c.ip || a == c.own.SecondIP || a == c.own.VTEP.IP.Addr() || a == c.own.VTEP.IP6.Addr()) {
			return true
		}
	}
	if p.VTEPMAC == c.own.VTEP.MAC {
		return true
	}
	for _, s := range p.Subnets {
		if slices.ContainsFunc(c.ours, s.Overlaps) {
			return true
		}
	}
	return false
}

// find brings contested up to date. It looks at all peers, which is worth it:
// it happens when somebody contested comes, changes or goes, and never else.
func (c *claims) find() {
	before := c.contested
	c.contested, c.stale = map[string]bool{}, false
	for id, p := range c.peers {
		if c.isContested(&p) {
			c.contested[id] = true
			c.touched[id] = true
		}
	}
	for id := range before {
		c.touched[id] = true
	}
}

// decide resolves those that are contested and returns what is left of
// them.
func (c *claims) decide() (resolved []conf.Peer) {
	if c.stale {
		c.find()
	}
	contested := make(map[string]conf.Peer, len(c.contested))
	for id := range c.contested {
		contested[id] = c.peers[id]
	}
	resolved, c.elsewhere, c.lost = resolve(c.own, c.ours, c.ip, contested)
	return resolved
}

// changes returns what became of the peers that changed, or about which another
// decision was made, since the last call of changes or all: those to forward to
// from now on, and the ids of those that are none. Some may be as they were.
func (c *claims) changes() (set []conf.Peer, gone []string) {
	resolved := c.decide()
	set = make([]conf.Peer, 0, len(c.touched))
	for _, p := range resolved {
		if c.touched[p.AgentID] {
			set = append(set, p)
			delete(c.touched, p.AgentID)
		}
	}
	for id := range c.touched {
		if p, ok := c.peers[id]; ok && !c.contested[id] {
			set = append(set, p)
		} else {
			gone = append(gone, id)
		}
	}
	clear(c.touched)
	slices.Sort(gone)
	return sorted(set), gone
}

// all returns every peer to forward to.
func (c *claims) all() []conf.Peer {
	resolved := c.decide()
	clear(c.touched)
	resolved = slices.Grow(resolved, len(c.peers))
	for id, p := range c.peers {
		if !c.contested[id] {
			resolved = append(resolved, p)
		}
	}
	return sorted(resolved)
}

// sorted returns peers in the order they are programmed in. Neighbouring addresses
// are neighbours in the kernel's tables, too. Sorting moves each some ten times, and
// a peer is large.
func sorted(peers []conf.Peer) []conf.Peer {
	order := make([]*conf.Peer, len(peers))
	for i := range peers {
		order[i] = &peers[i]
	}
	slices.SortFunc(order, func(a, b *conf.Peer) int { return a.VTEP().Compare(b.VTEP()) })
	out := make([]conf.Peer, len(peers))
	for i, p := range order {
		out[i] = *p
	}
	return out
}

// resolve decides between peers that claim the same thing, and between them and
// our own lease: the highest epoch is right. An agent whose VTEP or agent IP
// somebody newer has is no peer at all; one whose subnet somebody newer has
// loses that subnet. lost says why our lease no longer holds, if a peer has
// part of it, and elsewhere the same of each subnet of ours. The result is in the
// order of the ids.
func resolve(own conf.Lease, ours []netip.Prefix, ip netip.Addr, peers map[string]conf.Peer) (resolved []conf.Peer, elsewhere map[netip.Prefix]string, lost string) {
	elsewhere = map[netip.Prefix]string{}
	n := len(peers)
	taken := make(map[netip.Addr]bool, 3*n+3)
	taken[ip] = true
	if own.SecondIP.IsValid() {
		taken[own.SecondIP] = true
	}
	for _, p := range valid(own.VTEP.IP, own.VTEP.IP6) {
		taken[p.Addr()] = true
	}
	macs := make(map[conf.MAC]bool, n+1)
	macs[own.VTEP.MAC] = true
	subnets := make(map[netip.Prefix]bool, n)
	ours = slices.Clone(ours)

	byEpoch := make([]*conf.Peer, 0, n)
	for _, p := range peers {
		byEpoch = append(byEpoch, &p)
	}
	slices.SortFunc(byEpoch, func(a, b *conf.Peer) int {
		if a.Epoch != b.Epoch {
			return cmp.Compare(b.Epoch, a.Epoch)
		}
		return cmp.Compare(a.AgentID, b.AgentID)
	})
	kept := byEpoch[:0]
	for _, p := range byEpoch {
		for _, s := range p.Subnets {
			if p.Epoch > own.Epoch && slices.ContainsFunc(ours, s.Overlaps) {
				lost = fmt.Sprintf("subnet %s is leased to agent %s (%s) since; its epoch is %d, ours %d", s, p.AgentID, p.AgentIP, p.Epoch, own.Epoch)
				ours = slices.DeleteFunc(ours, func(o netip.Prefix) bool {
					if o.Overlaps(s) {
						elsewhere[o] = lost
					}
					return o.Overlaps(s)
				})
			}
		}
		if taken[p.SecondIP] { // the host goes on without it
			p.Underlay = p.OneFamily()
		}
		if taken[p.AgentIP] || taken[p.VTEPIP] || taken[p.VTEPIP6] || macs[p.VTEPMAC] {
			continue
		}
		taken[p.AgentIP], macs[p.VTEPMAC] = true, true
		for _, a := range []netip.Addr{p.VTEPIP, p.VTEPIP6, p.SecondIP} {
			if a.IsValid() {
				taken[a] = true
			}
		}
		left := make([]netip.Prefix, 0, len(p.Subnets))
		for _, s := range p.Subnets {
			if !subnets[s] && !slices.ContainsFunc(ours, s.Overlaps) {
				subnets[s] = true
				left = append(left, s)
			}
		}
		p.Subnets = left
		kept = append(kept, p)
	}
	slices.SortFunc(kept, func(a, b *conf.Peer) int { return cmp.Compare(a.AgentID, b.AgentID) })
	resolved = make([]conf.Peer, 0, len(kept))
	for _, p := range kept {
		resolved = append(resolved, *p)
	}
	return resolved, elsewhere, lost
}
