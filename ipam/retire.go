package ipam

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	bolt "go.etcd.io/bbolt"

	"overlayd.internal/overlay/conf"
)

// A block that an agent gives back must not be given out from any more, also by a
// program that read what the agent published before. Both look here, under the lock
// of the store.

// Retire keeps addresses of the ranges from being given out, if none of them is in
// use or cooling, and reports whether that is so. It is all of them or none. Nothing of
// the ranges in empty may be in use or cooling either, in any half.
func (s *Store) Retire(ctx context.Context, ranges map[conf.Half][]netip.Prefix, empty ...netip.Prefix) (bool, error) {
	used := false
	err := s.run(ctx, func() error {
		return s.updateHalves(func(h *half) (changed bool, _ error) {
			for _, p := range slices.Concat(ranges[h.name], empty) {
				if empty, err := h.isEmpty(p.Masked()); err != nil {
					return false, err
				} else if !empty {
					used = true
					return false, errUnchanged
				}
			}
			for _, p := range ranges[h.name] {
				if err := h.put(prefixKey(kindRetired, p.Masked()), nil); err != nil {
					return false, err
				}
			}
			return len(ranges[h.name]) > 0, nil
		})
	})
	if err != nil {
		return false, fmt.Errorf("retire %v: %w", ranges, err)
	}
	return !used, nil
}

// Reinstate takes back what Retire did.
func (s *Store) Reinstate(ctx context.Context, ranges map[conf.Half][]netip.Prefix) error {
	err := s.run(ctx, func() error {
		return s.updateHalves(func(h *half) (changed bool, _ error) {
			for _, p := range ranges[h.name] {
				if !h.isRetired(p.Masked()) {
					continue
				}
				changed = true
				if err := h.remove(prefixKey(kindRetired, p.Masked())); err != nil {
					return false, err
				}
			}
			return changed, nil
		})
	})
	if err != nil {
		return fmt.Errorf("reinstate %v: %w", ranges, err)
	}
	return nil
}

// Retired are those of the ranges that are retired.
func (s *Store) Retired(ctx context.Context, name conf.Half, ranges []netip.Prefix) (out []netip.Prefix, _ error) {
	err := s.run(ctx, func() error {
		out = nil
		return s.db.view(func(tx *bolt.Tx) error {
			h, err := s.half(tx, name)
			if err != nil {
				return err
			}
			for _, p := range ranges {
				if h.isRetired(p.Masked()) {
					out = append(out, p)
				}
			}
			return nil
		})
	})
	return out, err
}

// isEmpty reports whether no address of a range is in use or cooling. That nothing
// is filed proves it only in a file that is whole.
func (h *half) isEmpty(p netip.Prefix) (bool, error) {
	if h.isUnfiled() {
		return false, nil
	}
	used := false
	if err := h.between(kindInUse, p.Addr(), conf.LastAddr(p), func(netip.Addr) { used = true }); err != nil || used {
		return false, err
	}
	cooling, err := h.cooling(newSpan(p))
	if err != nil || cooling > 0 {
		return false, err
	}
	return true, h.proveAbsence()
}

func (h *half) isRetired(p netip.Prefix) bool { return h.b.Get(prefixKey(kindRetired, p)) != nil }
