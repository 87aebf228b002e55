package ipam

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	bolt "go.etcd.io/bbolt"

	"overlayd.internal/overlay/conf"
)

// Stats is how full one range of a half is, or all its ranges of one family.
type Stats struct {
	Range   netip.Prefix `json:"range"`
	Total   uint64       `json:"total"` // containers that fit: conf.Capacity
	Used    uint64       `json:"used"`
	Cooling uint64       `json:"cooling"`
	Early   uint64       `json:"early"` // times a cooling address was used before its time

	// Ranges that are counted together with Range: their names, and addresses.
	Further          string `json:"-"`
	FurtherAddresses uint64 `json:"-"`
}

// Addresses is how many there are for containers.
func (s Stats) Addresses() uint64 {
	return min(conf.Containers(s.Range)+s.FurtherAddresses, 1<<62)
}

// Free is how many containers fit without taking an address that is cooling.
func (s Stats) Free() uint64 {
	less := func(a, b uint64) uint64 { return a - min(a, b) }
	return min(less(s.Addresses(), s.Used+s.Cooling), less(s.Total, s.Used))
}

// PortLimited reports whether it is not addresses that run out first, but the ports
// of the half's bridge.
func (s Stats) PortLimited() bool { return s.Total < s.Addresses() }

// Ranges names all ranges that are counted.
func (s Stats) Ranges() string {
	return s.Range.String() + s.Further
}

// Sum adds up the ranges of each family: they are one pool, on one bridge.
func Sum(all []Stats) (out []Stats) {
	for _, s := range all {
		i := slices.IndexFunc(out, func(o Stats) bool { return o.Range.Addr().BitLen() == s.Range.Addr().BitLen() })
		if i < 0 {
			out = append(out, s)
			continue
		}
		o := &out[i]
		o.Further += ", " + s.Range.String()
		o.FurtherAddresses = min(o.FurtherAddresses+conf.Containers(s.Range), 1<<62)
		o.Used, o.Cooling, o.Early = o.Used+s.Used, o.Cooling+s.Cooling, o.Early+s.Early
		o.Total = min(o.Addresses(), conf.BridgePorts)
	}
	return out
}

// Stats says how full the ranges of a half are, in their order. It looks at
// every address that is cooling and, for a range that nothing was ever
// allocated from, at those in use; otherwise its cost is constant.
func (s *Store) Stats(ctx context.Context, name conf.Half, ranges []netip.Prefix) ([]Stats, error) {
	var out []Stats
	err := s.run(ctx, func() error {
		out = nil
		return s.db.view(func(tx *bolt.Tx) error {
			h, err := s.half(tx, name)
			if err != nil {
				return err
			}
			if err := h.loadSpans(); err != nil {
				return err
			}
			for _, p := range ranges {
				st, err := h.stats(p.Masked())
				if err != nil {
					return err
				}
				out = append(out, st)
			}
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("statistics of the %s half: %w", name, err)
	}
	return out, nil
}

func (h *half) stats(p netip.Prefix) (Stats, error) {
	i := slices.IndexFunc(h.spans, func(s *span) bool { return s.prefix == p })
	var s *span
	var err error
	if i >= 0 {
		s = h.spans[i]
	} else if s, err = h.freshSpan(p); err != nil {
		return Stats{}, err
	}
	cooling, err := h.cooling(s)
	return s.stats(cooling), err
}

// ExhaustedError says that a half has no address left, neither free nor cooling, or
// that its bridge has no port left.
type ExhaustedError struct {
	Overlay string
	Half    conf.Half // or conf.SharedPool
	Stats   Stats     // of one family
}

func (e *ExhaustedError) Error() string {
	text := fmt.Sprintf("overlay %s: no %%s left in the %s %s: %d used, %d cooling, %d in all%%s; remove containers or %%s",
		e.Overlay, e.Half.PoolText(), e.Stats.Ranges(), e.Stats.Used, e.Stats.Cooling, e.Stats.Total)
	if e.Stats.PortLimited() {
		return fmt.Sprintf(text, "place", fmt.Sprintf(" because a Linux bridge has at most %d ports", conf.BridgePorts), "start them on another host")
	}
	return fmt.Sprintf(text, "address", "", "give the overlay a shorter prefix")
}
