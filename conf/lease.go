package conf

import (
	"fmt"
	"net/netip"
	"time"
)

// Lease is the coordinator's grant to one agent: its VTEP and one agent subnet
// per overlay and family. The same agent id gets the same lease for ever.
type Lease struct {
	ClusterID string     `json:"cluster_id"`
	AgentID   string     `json:"agent_id"`
	AgentIP   netip.Addr `json:"agent_ip"` // underlay address; may change
	// Epoch grows, across the whole cluster, whenever a lease is granted anew
	// or changed. Of two claims to one subnet the higher epoch is right.
	Epoch uint64 `json:"epoch"`
	// TermSeconds is how long the lease holds without being renewed.
	TermSeconds int     `json:"term_seconds"`
	Bridges     []Half  `json:"bridges"` // the halves for which the host has bridges
	VTEP        VTEP    `json:"vtep"`
	Grants      []Grant `json:"overlays"` // in configuration order
	Underlay
	// TakenDown are overlays that were removed by force: their bridges go although
	// containers are attached.
	TakenDown []string `json:"taken_down,omitempty"`
	// SecondError says why the second agent IP that the agent has was not taken.
	SecondError string `json:"second_error,omitempty"`
	// Signed is this lease as the agent is to show it, should the store be lost.
	Signed *SignedLease `json:"signed,omitempty"`
}

// SignedLease is a lease in the bytes that were signed when it was granted, so
// that fields which only one side knows are covered, too. Only coordinators of the
// cluster can sign and check; for everybody else it is opaque.
type SignedLease struct {
	Lease string `json:"lease"` // JSON
	// Signatures are by the keys of the cluster of then; one of them will do. There
	// is none in a cluster without identities.
	Signatures [][]byte `json:"signatures,omitempty"`
}

// Underlay is what a host says about itself that others have to know before they
// send to it. A host of an earlier release says nothing.
type Underlay struct {
	// Direct: it takes packets of peers on its links without VXLAN.
	Direct bool `json:"direct,omitempty"`
	// MTU is that of an overlay packet that its underlay interface takes; 0: not
	// known.
	MTU int `json:"mtu,omitempty"`
	// SecondIP is an agent IP of the other family, for hosts that have none of the
	// first one's; invalid: there is none. SecondMTU is MTU for what goes there.
	SecondIP  netip.Addr `json:"second_ip,omitzero"`
	SecondMTU int        `json:"second_mtu,omitempty"`
	// TwoFamilies: it knows that hosts may have two agent IPs.
	TwoFamilies bool `json:"two_families,omitempty"`
}

// OneFamily is what is left without the second agent IP.
func (u Underlay) OneFamily() Underlay {
	u.SecondIP, u.SecondMTU = netip.Addr{}, 0
	return u
}

// CheckUnderlay says what is wrong with it, or nil.
func CheckUnderlay(u Underlay) error {
	for _, mtu := range [...]int{u.MTU, u.SecondMTU} {
		if mtu != 0 && (mtu < MinMTU || mtu > MaxMTU) {
			return fmt.Errorf("mtu %d: want %d to %d, or 0 where it is not known", mtu, MinMTU, MaxMTU)
		}
	}
	return nil
}

// Between chooses the agent IPs by which two hosts, each with a first and perhaps a
// second one, send to each other: the first ones where they are of one family, else
// those of IPv4, else those of IPv6. Both hosts come to the same. ok is false where
// they have no family in common.
func Between(first, second, peerFirst, peerSecond netip.Addr) (own, peer netip.Addr, ok bool) {
	if first.Is4() == peerFirst.Is4() {
		return first, peerFirst, true
	}
	for _, is4 := range [...]bool{true, false} {
		own, peer = ofFamily(is4, first, second), ofFamily(is4, peerFirst, peerSecond)
		if own.IsValid() && peer.IsValid() {
			return own, peer, true
		}
	}
	return netip.Addr{}, netip.Addr{}, false
}

// ofFamily is the first valid address of a family.
func ofFamily(is4 bool, addrs ...netip.Addr) netip.Addr {
	for _, a := range addrs {
		if a.IsValid() && a.Is4() == is4 {
			return a
		}
	}
	return netip.Addr{}
}

// Routing is how a host sends to its peers.
type Routing string

// The ways.
const (
	RoutingVXLAN  Routing = "vxlan"  // to all of them in VXLAN
	RoutingDirect Routing = "direct" // to those on its link by a plain route, where both hosts are for it
)

// ParseRouting turns "vxlan" or "direct" into a Routing.
func ParseRouting(s string) (Routing, error) {
	if r := Routing(s); r == RoutingVXLAN || r == RoutingDirect {
		return r, nil
	}
	return "", fmt.Errorf("%q: want %s or %s", s, RoutingVXLAN, RoutingDirect)
}

// Term is TermSeconds as a duration.
func (l Lease) Term() time.Duration { return time.Duration(l.TermSeconds) * time.Second }

// VTEP is the address of a host inside the overlay. IP and IP6 carry the
// length of the pool they were taken from.
type VTEP struct {
	IP  netip.Prefix `json:"ip"` // invalid, and printed as "", in a cluster without vtep_subnet
	IP6 netip.Prefix `json:"ip6,omitzero"`
	MAC MAC          `json:"mac"`
	MTU int          `json:"mtu,omitzero"` // only where the configuration says it
}

// Grant is the part of a lease that concerns one overlay.
type Grant struct {
	Overlay Overlay      `json:"overlay"` // as configured when the lease was last renewed
	Subnet  netip.Prefix `json:"subnet,omitzero"`
	Subnet6 netip.Prefix `json:"subnet6,omitzero"`
	// Blocks are further agent subnets, granted because the first one was full, in
	// the order they were granted.
	Blocks []Block `json:"blocks,omitempty"`
	// Error says why there is no subnet (a pool is exhausted); it names the pool.
	Error string `json:"error,omitempty"`
}

// Block is one agent subnet, in each family that it has.
type Block struct {
	Subnet  netip.Prefix `json:"subnet,omitzero"`
	Subnet6 netip.Prefix `json:"subnet6,omitzero"`
}

// Prefixes are the subnets of the block, IPv4 first.
func (b Block) Prefixes() (out []netip.Prefix) {
	for _, p := range [...]netip.Prefix{b.Subnet, b.Subnet6} {
		if p.IsValid() {
			out = append(out, p)
		}
	}
	return out
}

// All are the agent subnets of the grant, the first block before the further ones.
func (g Grant) All() []Block { return allBlocks(g.Subnet, g.Subnet6, g.Blocks) }

// allBlocks puts a first block before further ones; none where there is no first.
func allBlocks(subnet, subnet6 netip.Prefix, further []Block) (out []Block) {
	if !subnet.IsValid() && !subnet6.IsValid() {
		return nil
	}
	return append([]Block{{Subnet: subnet, Subnet6: subnet6}}, further...)
}

// Peer is another agent's lease as a forwarding target.
type Peer struct {
	AgentID string         `json:"id"`
	AgentIP netip.Addr     `json:"ip"`
	Epoch   uint64         `json:"epoch"`
	VTEPIP  netip.Addr     `json:"vtep_ip"`
	VTEPIP6 netip.Addr     `json:"vtep_ip6,omitzero"`
	VTEPMAC MAC            `json:"vtep_mac"`
	Subnets []netip.Prefix `json:"subnets,omitempty"` // agent subnets of every overlay and family
	Underlay
}

// VTEP is the peer's VTEP address: that of IPv4 where it has one, else that of IPv6.
func (p Peer) VTEP() netip.Addr {
	if p.VTEPIP.IsValid() {
		return p.VTEPIP
	}
	return p.VTEPIP6
}

// VTEPs are the VTEP addresses that the peer has, IPv4 first.
func (p Peer) VTEPs() (out []netip.Addr) {
	for _, a := range [...]netip.Addr{p.VTEPIP, p.VTEPIP6} {
		if a.IsValid() {
			out = append(out, a)
		}
	}
	return out
}

// Meet are the VTEP addresses of the peer, of each family that a host with these VTEP
// addresses has one of as well: through the VXLAN nothing goes to others. Invalid: none.
func (p *Peer) Meet(own, own6 netip.Prefix) (vtep, vtep6 netip.Addr) {
	if own.IsValid() {
		vtep = p.VTEPIP
	}
	if own6.IsValid() {
		vtep6 = p.VTEPIP6
	}
	return vtep, vtep6
}

// VTEPOf is the peer's VTEP address of the family of a, as a prefix; invalid where
// it has none.
func (p Peer) VTEPOf(a netip.Addr) netip.Prefix {
	vtep := p.VTEPIP
	if a.Is6() {
		vtep = p.VTEPIP6
	}
	if !vtep.IsValid() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(vtep, vtep.BitLen())
}

// SecondBeside is the second agent IP of a host whose agent IP is ip, which may be
// newer than the lease; invalid: there is none.
func (l Lease) SecondBeside(ip netip.Addr) netip.Addr {
	if !l.SecondIP.IsValid() || l.SecondIP.Is4() == ip.Is4() {
		return netip.Addr{}
	}
	return l.SecondIP
}

// Reach is the agent IPs by which a host with these sends to the peer; see Between. A
// peer of an earlier release knows nothing of second ones, and would not take what
// comes from there.
func (p *Peer) Reach(first, second netip.Addr) (own, peer netip.Addr, ok bool) {
	if !p.TwoFamilies {
		second = netip.Addr{}
	}
	return Between(first, second, p.AgentIP, p.SecondIP)
}

// MTUAt is what the peer's host takes at one of its agent IPs; 0: not known.
func (p *Peer) MTUAt(ip netip.Addr) int {
	if ip.IsValid() && ip == p.SecondIP {
		return p.SecondMTU
	}
	return p.MTU
}

// Peer returns the lease as others see it.
func (l Lease) Peer() Peer {
	p := Peer{
		AgentID: l.AgentID, AgentIP: l.AgentIP, Epoch: l.Epoch,
		VTEPIP: l.VTEP.IP.Addr(), VTEPMAC: l.VTEP.MAC, Underlay: l.Underlay,
	}
	if l.VTEP.IP6.IsValid() {
		p.VTEPIP6 = l.VTEP.IP6.Addr()
	}
	for _, g := range l.Grants {
		for _, b := range g.All() {
			p.Subnets = append(p.Subnets, b.Prefixes()...)
		}
	}
	return p
}

// Status is what an agent says about one overlay, in DC/OS's words.
type Status string

// The states of an overlay on a host.
const (
	StatusOK          Status = "STATUS_OK"
	StatusFailed      Status = "STATUS_FAILED"
	StatusConfiguring Status = "STATUS_CONFIGURING"
)

// OverlayStatus is a Status and, where it failed, the reason.
type OverlayStatus struct {
	Error  string `json:"error,omitempty"`
	Status Status `json:"status"`
}
