package ipam

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	bolt "go.etcd.io/bbolt"

	"overlayd.internal/overlay/conf"
)

// Docker asks an IPAM driver for one address at a time, says nothing about who
// it is for, and gives it back by the address alone. So its addresses are filed
// under themselves.

// SingleRequest asks for one address of one family.
type SingleRequest struct {
	Half   conf.Half // as in Request
	By     conf.Half
	Ranges []netip.Prefix // the half's prefixes, one per family, as in Request
	// From is one of the Ranges, and then the address is taken from all of its
	// family in their order; or a part of one, and then it is taken from that.
	From netip.Prefix
	// Want is an address asked for by name, from anywhere in the Ranges; zero:
	// any of From.
	Want netip.Addr
	// Name says what the chosen address is filed under. That must not be filed
	// yet.
	Name func(netip.Addr) conf.Attachment
}

// AllocateSingle gives out one address. It fails with *ExhaustedError,
// *UnavailableError or ErrUnfiled. Allocation.Existing is never set.
func (s *Store) AllocateSingle(ctx context.Context, r SingleRequest) (Allocation, error) {
	r, err := r.checked()
	if err != nil {
		return Allocation{}, err
	}
	var out Allocation
	err = s.run(ctx, func() error {
		var req Request
		err := s.update(func(tx *bolt.Tx) error {
			h, err := s.half(tx, r.Half)
			if err != nil {
				return err
			}
			addr, early, err := h.single(s.o, r)
			if err != nil {
				return err
			}
			out = Allocation{Addrs: []netip.Addr{addr}}
			if early {
				out.Flush = out.Addrs
			}
			req = Request{Attachment: r.Name(addr), Half: r.Half}
			if err := s.db.keepReserve(tx); err != nil {
				return err
			}
			return h.flush()
		})
		var unknown *unknownError
		if errors.As(err, &unknown) && s.db != nil {
			return s.confirmAllocated(req, out, unknown)
		}
		return err
	})
	if err != nil {
		return Allocation{}, err
	}
	if s.rebuilt > 0 && s.o.Now()-s.rebuilt < s.o.Cooling {
		out.Flush = out.Addrs // what was cooling is not known after a rebuild
	}
	return out, nil
}

func (r SingleRequest) checked() (SingleRequest, error) {
	all := Request{Attachment: conf.Attachment{Network: "n", ContainerID: "c", IfName: "i"}, Half: r.Half, Ranges: r.Ranges}
	all, err := all.checked()
	if err != nil {
		return r, fmt.Errorf("allocate an address: %w", err)
	}
	r.Ranges, r.From = all.Ranges, r.From.Masked()
	i := r.rangeOf(r.From.Addr())
	if i < 0 || r.From.Bits() < r.Ranges[i].Bits() {
		return r, fmt.Errorf("allocate an address: range %s is in none of %v", r.From, r.Ranges)
	}
	if r.Want.IsValid() && (r.rangeOf(r.Want) < 0 || r.Want.BitLen() != r.From.Addr().BitLen()) {
		return r, &UnavailableError{r.Want, whyNot(slices.DeleteFunc(slices.Clone(r.Ranges), func(p netip.Prefix) bool {
			return p.Addr().BitLen() != r.From.Addr().BitLen()
		}), r.Want)}
	}
	return r, nil
}

// rangeOf is the index of the range that has the address, or -1.
func (r SingleRequest) rangeOf(a netip.Addr) int {
	return slices.IndexFunc(r.Ranges, func(p netip.Prefix) bool { return p.Contains(a) })
}

// single takes one address and binds it to the name it gets.
func (h *half) single(o Options, r SingleRequest) (a netip.Addr, early bool, err error) {
	all, err := h.useRanges(r.Ranges)
	if err != nil {
		return a, false, err
	}
	var f spans
	var s *span
	for _, x := range all {
		if x.first.BitLen() == r.From.Addr().BitLen() {
			f = append(f, x)
		}
		if x.prefix.Contains(r.From.Addr()) {
			s = x
		}
	}
	if s == nil {
		return a, false, fmt.Errorf("allocate an address: %s is being given back", r.From)
	}
	if err := h.hasPort(o, f); err != nil {
		return a, false, err
	}
	switch {
	case h.isUnfiled() && !r.Want.IsValid(): // by name Docker asks for what it has
		return a, false, ErrUnfiled
	case r.Want.IsValid():
		a, early, err = h.takeNamed(f, r.Want)
	case r.From == s.prefix:
		a, early, err = h.takeNext(o, f)
	default:
		a, early, err = h.takeFrom(o, s, r.From)
	}
	if err != nil {
		return a, false, err
	}
	if early {
		f.countEarly(a)
	}
	att := r.Name(a)
	if err := checkAttachment(att); err != nil {
		return a, false, err
	}
	rec, found, err := h.attachment(att.Key())
	if err == nil && found {
		err = fmt.Errorf("allocate an address: %s has %v already", att, rec.Addrs)
	}
	if err != nil {
		return a, false, err
	}
	return a, early, h.bind(Record{Attachment: att, Half: cmp.Or(r.By, r.Half), Addrs: []netip.Addr{a}, BootID: o.BootID, Since: h.now})
}

// takeFrom is takeNext for a part of the range. It looks at one address after
// the other, which is right for what is rare.
func (h *half) takeFrom(o Options, s *span, from netip.Prefix) (a netip.Addr, early bool, err error) {
	first, last := s.first, s.last
	if from.Addr().Compare(first) > 0 {
		first = from.Addr()
	}
	if end := conf.LastAddr(from); end.Compare(last) < 0 {
		last = end
	}
	var total, used uint64
	for a := first; a.IsValid() && a.Compare(last) <= 0; a = a.Next() {
		total++
		inUse := h.b.Get(addrKey(kindInUse, a)) != nil || h.elsewhere(a)
		if !inUse && h.b.Get(addrKey(kindReleased, a)) == nil {
			return a, false, h.proveAbsence()
		}
		if inUse {
			used++
		}
	}
	var t ticket
	found := false
	if err := h.each([]byte{kindQueue, family(s.first)}, func(k, payload []byte) (bool, error) {
		q, err := decodeTicket(k, payload)
		if err == nil && from.Contains(q.addr) && s.contains(q.addr) && !h.elsewhere(q.addr) {
			t, found = q, true
		}
		return !found, err
	}); err != nil {
		return a, false, err
	}
	if !found {
		return a, false, &ExhaustedError{Overlay: o.Overlay, Half: h.name, Stats: Stats{Range: from, Total: total, Used: used}}
	}
	return t.addr, !t.cooled(h.now, h.cool), h.dequeue(t)
}
