package firewall

import (
	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// forward makes the chains for packets through this host: the administrator's
// is asked about all of them, ours about what comes from a device of ours and
// what goes to one.
//
// Most packets belong to a connection that was let through. New ones are asked
// for isolation before anything accepts them. What containers send, what other
// hosts send to them and what a published port of this host leads to is
// accepted. Any other new connection from outside into an overlay is left to the
// rules of the host.
func (b *builder) forward() {
	b.r.Chains = append(b.r.Chains, Chain{Name: mark.UserChain, Table: Forward, Foreign: true})
	var from []Rule
	if !b.Guarded {
		b.chain(mark.EncapChain, Forward, b.encapsulated()...)
		from = []Rule{{UDPPort: conf.VXLANPort, Action: Jump, Chain: mark.EncapChain}}
	}
	from = append(from, b.leftAlone()...)
	from = append(from,
		Rule{Established: true, Action: Accept},
		Rule{Action: Jump, Chain: mark.ReachChain})
	to := []Rule{{Established: true, Action: Accept}}
	if b.strict {
		from = append(from, b.strictFrom()...)
		to = append(to, strictTo()...)
	}
	from = append(from, b.admission()...)
	from = append(from,
		Rule{In: bridgesSet, Src: overlaysSet, Action: Accept})
	from = append(from, b.fromHosts(Rule{Dst: overlaysSet, Action: Accept})...)
	from = append(from,
		// Bridged frames come here too where br_netfilter asks for it, also those of
		// neighbour discovery, which have other sources.
		Rule{In: bridgesSet, Out: bridgesSet, Action: Accept})
	if b.Direct != nil {
		from = append(from, Rule{SrcIn: DirectSet, Dst: overlaysSet, Action: Accept})
	}
	to = append(to, Rule{Dst: overlaysSet, Redirected: true, Action: Accept})
	if b.Direct != nil { // hosts themselves, which come with the address of their VTEP otherwise
		to = append(to, Rule{Src: PeersSet, Dst: overlaysSet, Action: Accept})
	}
	b.chain(mark.FromChain, Forward, from...)
	b.chain(mark.ToChain, Forward, to...)
	forward := []Rule{
		{Action: Jump, Chain: mark.UserChain},
		{In: devicesSet, Action: Goto, Chain: mark.FromChain},
	}
	if b.Direct != nil {
		forward = append(forward, Rule{SrcIn: DirectSet, Action: Goto, Chain: mark.FromChain})
	}
	b.hook(mark.ForwardChain, Forward, append(forward, Rule{Out: devicesSet, Action: Goto, Chain: mark.ToChain})...)
}

// masquerade gives what leaves the overlays the address of the host. Packets
// from one overlay address to another, or to a VTEP, keep their source; so does
// what never leaves a link.
func (b *builder) masquerade() {
	b.hook(mark.MasqueradeChain, Postrouting, Rule{Src: overlaysSet, NotDst: staySet, Action: Masquerade})
}
