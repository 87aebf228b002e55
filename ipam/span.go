package ipam

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
)

// Ranges.

func (h *half) loadSpans() error {
	if h.spans != nil {
		return nil
	}
	return h.each([]byte{kindRange}, func(k, payload []byte) (bool, error) {
		s, err := decodeSpan(k, payload)
		h.spans = append(h.spans, s)
		return true, err
	})
}

// useRanges makes the stored ranges those of the request. A range that is new
// starts at its first address and counts what is in use in it already.
func (h *half) useRanges(want []netip.Prefix) (spans, error) {
	if err := h.loadSpans(); err != nil {
		return nil, err
	}
	stored := h.spans
	h.spans = make([]*span, 0, len(want))
	for _, p := range want {
		if h.isRetired(p) {
			continue
		}
		i := slices.IndexFunc(stored, func(s *span) bool { return s.prefix == p })
		if i >= 0 {
			h.spans = append(h.spans, stored[i])
			stored = slices.Delete(stored, i, i+1)
			continue
		}
		s, err := h.freshSpan(p)
		if err != nil {
			return nil, err
		}
		s.changed = true
		h.spans = append(h.spans, s)
	}
	for _, s := range stored {
		if err := h.remove(rangeKey(s.prefix)); err != nil {
			return nil, err
		}
	}
	return h.spans, nil
}

func (h *half) freshSpan(p netip.Prefix) (*span, error) {
	s := newSpan(p)
	err := h.between(kindInUse, s.first, s.last, func(netip.Addr) { s.used++ })
	return s, err
}

// spans are ranges of a half; where it matters, of one family.
type spans []*span

// byFamily sorts ranges into those of each family, in order.
func byFamily(all spans) (out []spans) {
	for _, s := range all {
		i := slices.IndexFunc(out, func(f spans) bool { return f[0].first.BitLen() == s.first.BitLen() })
		if i < 0 {
			out = append(out, spans{s})
			continue
		}
		out[i] = append(out[i], s)
	}
	return out
}

// of is the range that the address is in; nil: none.
func (f spans) of(a netip.Addr) *span {
	for _, s := range f {
		if s.contains(a) {
			return s
		}
	}
	return nil
}

// countEarly counts that an address was taken before it had cooled.
func (f spans) countEarly(a netip.Addr) {
	if s := f.of(a); s != nil {
		s.early++
		s.changed = true
	}
}

// whyNot says why an address is none that a container can get.
func (f spans) whyNot(a netip.Addr) string {
	var all []netip.Prefix
	for _, s := range f {
		all = append(all, s.prefix)
	}
	return whyNot(all, a)
}

func whyNot(ranges []netip.Prefix, a netip.Addr) string {
	var all []string
	for _, p := range ranges {
		all = append(all, p.String())
		switch {
		case !p.Contains(a):
		case a == p.Addr():
			return "is the network address of " + p.String()
		case a == conf.Gateway(p):
			return "is the gateway of " + p.String()
		default:
			return "is the broadcast address of " + p.String()
		}
	}
	return "is outside " + strings.Join(all, ", ")
}

// A span is what the store keeps about one prefix of the half.
type span struct {
	prefix      netip.Prefix
	first, last netip.Addr // what containers can get, inclusive
	frontier    netip.Addr // where the search for a never-used address goes on
	full        bool       // the frontier has passed last
	used        uint64
	early       uint64
	changed     bool
}

func newSpan(p netip.Prefix) *span {
	s := &span{prefix: p, first: conf.FirstContainer(p), last: conf.LastContainer(p)}
	s.frontier = s.first
	return s
}

func (s *span) contains(a netip.Addr) bool {
	return a.BitLen() == s.first.BitLen() && s.first.Compare(a) <= 0 && a.Compare(s.last) <= 0
}

// pass moves the frontier behind a.
func (s *span) pass(a netip.Addr) {
	s.changed = true
	if a == s.last {
		s.full = true
		return
	}
	s.frontier = a.Next()
}

// behind counts the addresses of the range before a, up to 2^64.
func (s *span) behind(a netip.Addr) uint64 {
	x, y := s.first.As16(), a.As16()
	return binary.BigEndian.Uint64(y[8:]) - binary.BigEndian.Uint64(x[8:])
}

// sparse ranges have so many addresses that not every one that was ever used
// can be remembered in the queue, as an IPv6 half has.
func (s *span) sparse() bool { return conf.Containers(s.prefix) > 1<<16 }

// restart begins another lap through the range.
func (s *span) restart() {
	s.frontier, s.full, s.changed = s.first, false, true
}

func (s *span) stats(cooling uint64) Stats {
	return Stats{Range: s.prefix, Total: conf.Capacity(s.prefix), Used: s.used, Cooling: cooling, Early: s.early}
}

func encodeSpan(s *span) []byte {
	full := byte(0)
	if s.full {
		full = 1
	}
	b := append(appendAddr(nil, s.frontier), full)
	b = binary.BigEndian.AppendUint64(b, s.used)
	return binary.BigEndian.AppendUint64(b, s.early)
}

func decodeSpan(key, payload []byte) (*span, error) {
	if len(key) != 19 {
		return nil, damagef("range key %x has %d bytes", key, len(key))
	}
	addr := netip.AddrFrom16([16]byte(key[1:17]))
	if key[18] == 4 {
		addr = addr.Unmap()
	}
	p, err := addr.Prefix(int(key[17]))
	if err != nil || p.Addr() != addr || conf.Containers(p) == 0 {
		return nil, damagef("range key %x is not a range", key)
	}
	r := reader{b: payload}
	s := newSpan(p)
	s.frontier, s.full = r.addr(), r.byte() != 0
	s.used, s.early = r.u64(), r.u64()
	if err := r.end("range " + p.String()); err != nil {
		return nil, err
	}
	if !s.contains(s.frontier) || s.used > conf.Containers(p) {
		return nil, damagef("range %s: frontier %s, %d in use", p, s.frontier, s.used)
	}
	return s, nil
}
