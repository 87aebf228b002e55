package firewall

import (
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// Permits reports whether containers of one overlay may open connections to
// those of another. The answers to such a connection are let through as well. An
// isolated overlay neither reaches others nor is reached, but for one that
// allows it.
func Permits(from, to Overlay) bool {
	return from.Name == to.Name ||
		from.Isolation.Mode() == conf.IsolationNone && to.Isolation.Mode() == conf.IsolationNone ||
		slices.Contains(to.Allow, from.Name)
}

// pairs makes the sets that say which destinations the containers of each
// bridge reach. What overlays without isolation have in common is not among
// them, so that the pairs grow with the number of overlays and of exceptions,
// not with its square.
func (b *builder) pairs() {
	byName := map[string]Overlay{}
	allows := map[string][]Overlay{} // by the name of who is allowed
	for _, o := range b.Overlays {
		byName[o.Name] = o
		for _, name := range o.Allow {
			if name != o.Name {
				allows[name] = append(allows[name], o)
			}
		}
	}
	var own, reach, openOwn, strictOwn, guests []Element
	for _, br := range b.Bridges {
		o, ok := byName[br.Overlay]
		if !ok {
			continue
		}
		on := func(o Overlay) (out []Element) {
			for _, s := range o.Subnets {
				out = append(out, Element{Prefix: s.Masked(), Device: br.Name})
			}
			return out
		}
		if br.Only != nil {
			left := on(Overlay{Subnets: br.Only})
			own, reach = append(own, left...), append(reach, left...)
			continue
		}
		own = append(own, on(o)...)
		reach = append(reach, on(o)...)
		for _, to := range allows[o.Name] {
			reach = append(reach, on(to)...)
		}
		switch o.Isolation.Mode() {
		case conf.IsolationNone:
			openOwn = append(openOwn, on(o)...)
		case conf.IsolationStrict:
			strictOwn = append(strictOwn, on(o)...)
		}
	}
	for _, o := range b.Overlays {
		if len(allows[o.Name]) > 0 {
			guests = append(guests, prefixes(o.Subnets...)...)
		}
	}
	b.set(ownSet, PrefixesOnDevice, own)
	b.set(reachSet, PrefixesOnDevice, reach)
	b.set(openOwnSet, PrefixesOnDevice, openOwn)
	b.set(guestsSet, Prefixes, guests)
	if b.strict {
		b.set(strictOwnSet, PrefixesOnDevice, strictOwn)
	}
}

// reach asks whether a container may send to an overlay address. The bridge
// that a packet came in by says whose it is; its source address may be a lie.
func reach() []Rule {
	return []Rule{
		{DstIn: reachSet, Action: Return},
		{SrcIn: openOwnSet, Dst: openSet, Action: Return},
		{In: bridgesSet, Dst: overlaysSet, Action: Drop},
	}
}

// leftAlone keeps what is on bridges whose overlay is not here any more and all
// overlays apart, also what was let through before. Nothing says which addresses those
// containers have, so it goes by the bridge.
func (b *builder) leftAlone() []Rule {
	if !b.leftUnknown() || len(b.Overlays) == 0 {
		return nil
	}
	return []Rule{
		{Src: overlaysSet, Out: leftSet, Action: Drop},
		{In: leftSet, Dst: overlaysSet, Action: Drop},
	}
}

// admission asks whether a packet may be delivered to a bridge. Its own host
// asked its reach chain before; this still holds where that is of an older
// release. Overlays that any other allows are taken on trust.
func (b *builder) admission() []Rule {
	rules := []Rule{
		{SrcOut: ownSet, Action: Accept},
		{Src: openSet, Dst: openSet, Action: Accept},
		{Src: guestsSet, Dst: overlaysSet, Action: Accept},
	}
	rules = append(rules, b.fromHosts(Rule{Src: overlaysSet, Dst: overlaysSet, Action: Drop})...)
	if b.Direct != nil {
		rules = append(rules, Rule{SrcIn: DirectSet, Src: overlaysSet, Dst: overlaysSet, Action: Drop})
	}
	return rules
}

// strictFrom are the rules for what containers of strictly isolated overlays
// send to hosts of the cluster, and hosts to them. Who lies about his source
// might be one of them.
func (b *builder) strictFrom() []Rule {
	rules := []Rule{
		{SrcIn: strictOwnSet, Dst: poolsSet, Action: Drop},
		{SrcIn: strictOwnSet, Dst: PeersSet, Action: Drop},
		{In: bridgesSet, NotSrcIn: ownSet, Dst: poolsSet, Action: Drop},
		{In: bridgesSet, NotSrcIn: ownSet, Dst: PeersSet, Action: Drop},
	}
	rules = append(rules, b.fromHosts(Rule{Src: poolsSet, Dst: strictSet, Action: Drop})...)
	if b.Direct != nil {
		rules = append(rules, Rule{SrcIn: DirectSet, Src: poolsSet, Dst: strictSet, Action: Drop})
	}
	return rules
}

// strictTo are the rules for what comes to strictly isolated overlays from
// outside: published ports.
func strictTo() []Rule {
	return []Rule{
		{Dst: strictSet, Redirected: true, Action: Accept},
		{Dst: strictSet, Action: Drop},
	}
}

// strictInput are the rules for packets to this host: a container of a
// strictly isolated overlay may ping its gateway and look for its MAC.
func (b *builder) strictInput() []Rule {
	rules := []Rule{
		{DstIn: reachSet, ICMP: true, Action: Return},
		{Dst: linkSet, ICMP: true, Action: Return},
		{SrcIn: strictOwnSet, Action: Drop},
		{In: bridgesSet, NotSrcIn: ownSet, Action: Drop},
	}
	rules = append(rules, b.fromHosts(Rule{Src: strictSet, Action: Drop})...)
	if b.Direct != nil {
		rules = append(rules, Rule{Src: strictSet, SrcIn: DirectSet, Action: Drop})
	}
	return rules
}

// output is asked about what this host sends itself, where an overlay is
// strictly isolated: it gets ICMP of its gateway.
func (b *builder) output() {
	b.chain(mark.HostOutChain, Output,
		Rule{Established: true, Action: Return},
		Rule{Out: bridgesSet, Dst: strictSet, ICMP: true, Action: Return},
		Rule{Dst: strictSet, Action: Drop})
	b.hook(mark.OutputChain, Output, Rule{Out: devicesSet, Action: Goto, Chain: mark.HostOutChain})
}
