package ipam

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
)

// Which address an attachment gets.

func (h *half) allocate(o Options, r Request) (Allocation, error) {
	spans, err := h.useRanges(r.Ranges)
	if err != nil {
		return Allocation{}, err
	}
	rec, found, err := h.attachment(r.Key())
	if err != nil {
		return Allocation{}, err
	}
	if found && r.fits(rec.Addrs, spans) {
		a, err := h.existing(rec, r)
		if err != nil {
			return a, err
		}
		// Whoever decided to release an abandoned record must see that it is in use
		// again.
		rec.Since, rec.NetNS, rec.Origin, rec.Half = h.now, r.NetNS, r.Origin, r.by()
		return a, h.file(rec)
	}
	if found { // of another lease: the addresses no longer lead here
		if err := h.release(rec); err != nil {
			return Allocation{}, err
		}
	}
	if h.isUnfiled() {
		return Allocation{}, ErrUnfiled
	}
	if r.NetNS.Path == "" { // it gets a host end, which is a port
		if err := h.hasPort(o, spans); err != nil {
			return Allocation{}, err
		}
	}
	a := Allocation{}
	for _, f := range byFamily(spans) {
		var addr netip.Addr
		var early bool
		switch want := wanted(r.Want, f); {
		case want.IsValid():
			addr, early, err = h.takeNamed(f, want)
		case r.Exact:
			continue
		default:
			addr, early, err = h.takeNext(o, f)
		}
		if err != nil {
			return Allocation{}, err
		}
		a.Addrs = append(a.Addrs, addr)
		if early {
			f.countEarly(addr)
			a.Flush = append(a.Flush, addr)
		}
	}
	return a, h.bind(Record{Attachment: r.Attachment, Half: r.by(), Addrs: a.Addrs, BootID: o.BootID, Since: h.now, NetNS: r.NetNS, Origin: r.Origin})
}

// existing answers an attachment that has its addresses already.
func (h *half) existing(rec Record, r Request) (Allocation, error) {
	for _, want := range r.Want {
		if !slices.Contains(rec.Addrs, want) {
			return Allocation{}, &UnavailableError{want, fmt.Sprintf("cannot be given to %s, which has %v; delete it first", rec.Attachment, rec.Addrs)}
		}
	}
	for _, a := range rec.Addrs {
		if owner, ok, err := h.owner(a); err != nil {
			return Allocation{}, err
		} else if !ok || owner != rec.Key() {
			return Allocation{}, damagef("address %s of %s is not filed as its own", a, rec.Attachment)
		}
	}
	return Allocation{Addrs: rec.Addrs, Existing: true}, nil
}

// by is the half whose program asks.
func (r Request) by() conf.Half { return cmp.Or(r.By, r.Half) }

// fits reports whether an attachment that has these addresses may keep them.
func (r Request) fits(addrs []netip.Addr, spans []*span) bool {
	if !r.Exact {
		return inSpans(addrs, spans)
	}
	return len(addrs) == len(r.Want) && !slices.ContainsFunc(r.Want, func(a netip.Addr) bool { return !slices.Contains(addrs, a) })
}

// inSpans reports whether there is exactly one address for each family, in order.
func inSpans(addrs []netip.Addr, spans []*span) bool {
	families := byFamily(spans)
	if len(addrs) != len(families) {
		return false
	}
	for i, f := range families {
		if f.of(addrs[i]) == nil {
			return false
		}
	}
	return true
}

func wanted(want []netip.Addr, f spans) netip.Addr {
	for _, a := range want {
		if a.BitLen() == f[0].first.BitLen() {
			return a
		}
	}
	return netip.Addr{}
}

func (h *half) takeNamed(f spans, a netip.Addr) (_ netip.Addr, early bool, err error) {
	if f.of(a) == nil {
		return a, false, &UnavailableError{a, f.whyNot(a)}
	}
	owner, ok, err := h.owner(a)
	if err != nil {
		return a, false, err
	}
	if ok {
		rec, found, err := h.attachment(owner)
		if err == nil && !found {
			err = damagef("address %s belongs to %s, which is not stored", a, owner)
		}
		if err != nil {
			return a, false, err
		}
		return a, false, &UnavailableError{a, "is in use by " + rec.Attachment.String()}
	}
	if h.elsewhere(a) {
		return a, false, &UnavailableError{a, "is in use by a container that has it of the " + string(other(h.name)) + " half"}
	}
	t, ok, err := h.ticketOf(a)
	if err != nil {
		return a, false, err
	}
	if !ok {
		return a, false, h.proveAbsence()
	}
	return a, !t.cooled(h.now, h.cool), h.dequeue(t)
}

// proveAbsence makes sure that an address which is not filed is free. Damage can
// hide an entry: a page that has lost an element is sound in itself.
func (h *half) proveAbsence() error {
	if h.walk == nil {
		return nil
	}
	return h.walk()
}

// takeNext takes a never-used or a cooled address of the first range that has one,
// else the one of all that was released first.
func (h *half) takeNext(o Options, f spans) (a netip.Addr, early bool, err error) {
	for _, s := range f {
		if s.sparse() {
			if err := h.dropCooled(s); err != nil {
				return netip.Addr{}, false, err
			}
		}
		if a, ok, err := h.advance(s); ok || err != nil {
			return a, false, err
		}
		t, ok, err := h.oldest(spans{s}, len(f) > 1)
		if err != nil {
			return netip.Addr{}, false, err
		}
		if ok {
			return h.takeReleased(t)
		}
		if s.sparse() && s.used < conf.Containers(s.prefix) {
			s.restart()
			if a, ok, err := h.advance(s); ok || err != nil {
				return a, false, err
			}
		}
	}
	t, ok, err := h.oldest(f, false)
	if err != nil {
		return netip.Addr{}, false, err
	}
	if !ok {
		return netip.Addr{}, false, h.exhausted(o, f)
	}
	return h.takeReleased(t)
}

// takeReleased takes an address out of the queue.
func (h *half) takeReleased(t ticket) (a netip.Addr, early bool, err error) {
	if _, taken, err := h.owner(t.addr); err != nil {
		return netip.Addr{}, false, err
	} else if taken {
		return netip.Addr{}, false, damagef("address %s is both in use and released", t.addr)
	}
	return t.addr, !t.cooled(h.now, h.cool), h.dequeue(t)
}

// hasPort fails where the half's bridge has no port left. Addresses of other main
// plugins' interfaces take none; they are told apart only when it matters.
func (h *half) hasPort(o Options, all spans) error {
	for _, f := range byFamily(all) {
		used := uint64(0)
		for _, s := range f {
			used += s.used
		}
		if used < conf.BridgePorts {
			continue
		}
		recs, err := h.attachments()
		if err != nil {
			return err
		}
		ports := 0
		for _, rec := range recs {
			if rec.NetNS.Path == "" && slices.ContainsFunc(rec.Addrs, func(a netip.Addr) bool { return f.of(a) != nil }) {
				ports++
			}
		}
		if ports >= conf.BridgePorts {
			return h.exhausted(o, f)
		}
	}
	return nil
}

// exhausted is the error of a family that has nothing left.
func (h *half) exhausted(o Options, f spans) error {
	var all []Stats
	for _, s := range f {
		cooling, err := h.cooling(s)
		if err != nil {
			return err
		}
		all = append(all, s.stats(cooling))
	}
	return &ExhaustedError{Overlay: o.Overlay, Half: h.name, Stats: Sum(all)[0]}
}

// advance moves the frontier to behind the next address that is neither in use
// (somebody asked for it by name) nor released.
func (h *half) advance(s *span) (netip.Addr, bool, error) {
	for !s.full {
		a := s.frontier
		s.pass(a)
		if h.b.Get(addrKey(kindInUse, a)) != nil || h.b.Get(addrKey(kindReleased, a)) != nil {
			continue
		}
		if h.elsewhere(a) { // its turn comes again
			if err := h.enqueue(a, h.now); err != nil {
				return a, false, err
			}
			continue
		}
		// What the frontier has not reached was never given out, but by name, or
		// before the file was made anew: then more is in use than lies behind it.
		if s.used > s.behind(a) {
			if err := h.proveAbsence(); err != nil {
				return a, false, err
			}
		}
		return a, true, nil
	}
	return netip.Addr{}, false, nil
}
