package datapath

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// afar are the subnets that peers have of overlays which this host has nothing of.
// It routes to them, so nobody on the underlay may send with an address of theirs.
// What overlaps a network of the host is left out: the host would cut itself off.
type afar struct {
	tally[netip.Prefix]
	here      ranges                    // overlays that this host has
	others    []netip.Prefix            // networks of the host, and overlays that it cannot have for one
	elsewhere map[netip.Prefix]struct{} // to which routes of others lead
	nested    bool                      // one holds another, which is left out
}

// ranges finds out which of many prefixes hold another.
type ranges struct {
	in      map[netip.Prefix]bool
	lengths map[int]bool
}

func newRanges() ranges { return ranges{map[netip.Prefix]bool{}, map[int]bool{}} }

func (r ranges) add(p netip.Prefix) { r.in[p.Masked()], r.lengths[p.Bits()] = true, true }

// holding are those that p is or lies in.
func (r ranges) holding(p netip.Prefix) (out []netip.Prefix) {
	for bits := range r.lengths {
		if up, err := p.Addr().Prefix(bits); err == nil && bits <= p.Bits() && r.in[up] {
			out = append(out, up)
		}
	}
	return out
}

// manyAfar is how many new ones are put into the rules by themselves.
const manyAfar = 100

// of are those of some peers.
func (a *afar) of(peers ...conf.Peer) (out []netip.Prefix) {
	for i := range peers {
		for _, s := range peers[i].Subnets {
			if s.IsValid() && len(a.here.holding(s)) == 0 && !slices.ContainsFunc(a.others, s.Overlaps) {
				out = append(out, s.Masked())
			}
		}
	}
	return out
}

// afarOf counts those of peers, and those that the kernel routes to where there may be
// more peers than are known.
func afarOf(peers map[string]conf.Peer, cfg Host, have *plan.State) *afar {
	a := &afar{tally: tally[netip.Prefix]{}, here: newRanges(), others: slices.Clone(cfg.Refused), elsewhere: have.Elsewhere}
	for _, o := range cfg.Overlays {
		for _, s := range o.Subnets {
			a.here.add(s)
		}
	}
	for _, k := range have.Others {
		a.others = append(a.others, k.Prefix.Masked())
	}
	for _, p := range peers {
		a.change(nil, a.of(p))
	}
	if peers == nil {
		a.change(nil, a.of(cfg.Peers...))
	}
	for dst, r := range have.Routes {
		if cfg.Partial && (r.Kind == plan.ToPeer || r.Kind == plan.Plain) && a.tally[dst] == 0 {
			a.change(nil, a.of(conf.Peer{Subnets: []netip.Prefix{dst}}))
		}
	}
	return a
}

// elements are those that hold no network that routes of others lead to, and that are
// in no larger one.
func (a *afar) elements() (out []firewall.Element) {
	all := newRanges()
	for s := range a.tally {
		all.add(s)
	}
	left := maps.Clone(all.in)
	a.nested = false
	for s := range a.tally {
		if len(all.holding(s)) > 1 {
			a.nested = true
			delete(left, s)
		}
	}
	for p := range a.elsewhere {
		for _, s := range all.holding(p) {
			delete(left, s)
		}
	}
	return asElements(slices.Collect(maps.Keys(left)))
}

func asElements(in []netip.Prefix) (out []firewall.Element) {
	for _, s := range in {
		out = append(out, firewall.Element{Prefix: s})
	}
	return out
}

// knowsAfar reports whether the set of them can follow peers that change by itself.
func (r *rules) knowsAfar(old, now []conf.Peer) bool {
	if r.senders == nil || r.policy == nil {
		return true
	}
	a := r.senders.afar
	was, is := a.of(old...), a.of(now...)
	if len(was)+len(is) == 0 {
		return true
	}
	is = slices.DeleteFunc(is, func(s netip.Prefix) bool { return a.tally[s] > 0 })
	if a.nested || len(is) > manyAfar {
		return false
	}
	for _, s := range is {
		family := func(e firewall.Element) bool { return is6(e.Prefix) == is6(s) }
		if !slices.ContainsFunc(r.policy.Afar, family) || a.meets(s) || slices.ContainsFunc(is, func(o netip.Prefix) bool { return o != s && o.Overlaps(s) }) {
			return false
		}
	}
	return len(r.policy.Afar) > 0
}

func is6(p netip.Prefix) bool { return p.Addr().Is6() }

// meets reports whether a subnet cannot stand beside the others.
func (a *afar) meets(s netip.Prefix) bool {
	for o := range a.tally {
		if o.Overlaps(s) {
			return true
		}
	}
	for p := range a.elsewhere {
		if s.Bits() <= p.Bits() && s.Contains(p.Addr()) {
			return true
		}
	}
	return false
}

// changeAfar takes the subnets of old peers out of the rules and those of new ones in.
func (r *rules) changeAfar(ctx context.Context, cfg Host, old, now []conf.Peer) error {
	a := r.senders.afar
	add, remove := a.change(a.of(old...), a.of(now...))
	if len(add)+len(remove) == 0 {
		return nil
	}
	more, less := asElements(add), asElements(remove)
	var err error
	if !cfg.Direct.Take { // else the guard does not ask for sources
		err = r.guard.elements(ctx, firewall.AfarSet, more, less)
	}
	return errors.Join(err, r.active.Elements(ctx, firewall.AfarSet, more, less))
}
