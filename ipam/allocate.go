package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	bolt "go.etcd.io/bbolt"

	"overlayd.internal/overlay/conf"
)

// Allocate gives an attachment one address of each range, all or none. An
// attachment that has addresses gets the same ones again, unless the ranges
// have changed. It fails with *ExhaustedError, *UnavailableError or ErrUnfiled.
func (s *Store) Allocate(ctx context.Context, r Request) (Allocation, error) {
	r, err := r.checked()
	if err != nil {
		return Allocation{}, fmt.Errorf("allocate an address: %w", err)
	}
	var out Allocation
	err = s.run(ctx, func() error {
		err := s.update(func(tx *bolt.Tx) error {
			h, err := s.half(tx, r.Half)
			if err != nil {
				return err
			}
			if out, err = h.allocate(s.o, r); err != nil {
				return err
			}
			if err := s.db.keepReserve(tx); err != nil {
				return err
			}
			return h.flush()
		})
		var unknown *unknownError
		if errors.As(err, &unknown) && s.db != nil {
			return s.confirmAllocated(r, out, unknown)
		}
		return err
	})
	if err != nil {
		return Allocation{}, err
	}
	if s.rebuilt > 0 && s.o.Now()-s.rebuilt < s.o.Cooling && !out.Existing {
		// What was cooling is not known after a rebuild.
		out.Flush = slices.Clone(out.Addrs)
	}
	return out, nil
}

// confirmAllocated finds out whether an allocation that could not be written is there.
func (s *Store) confirmAllocated(r Request, out Allocation, unknown error) error {
	rec, found, err := s.find(r.Half, r.Key())
	if err != nil {
		return fmt.Errorf("%w; read it back: %w", unknown, err)
	}
	if !found || !slices.Equal(rec.Addrs, out.Addrs) {
		return unknown
	}
	return nil
}

// maxRanges is two families of as many blocks as an agent can have, and Docker's
// bystander.
const maxRanges = 2*conf.MaxBlocksPerAgent + 1

// checked returns the request with masked ranges, or says what is wrong.
func (r Request) checked() (Request, error) {
	if err := checkAttachment(r.Attachment); err != nil {
		return r, err
	}
	if _, err := conf.ParseHalf(string(r.Half)); err != nil {
		return r, err
	}
	r.Origin = conf.Origin{Runtime: conf.CleanName(r.Origin.Runtime), Name: conf.CleanName(r.Origin.Name)}
	if len(r.Ranges) == 0 || len(r.Ranges) > maxRanges {
		return r, fmt.Errorf("%d ranges, want 1 to %d", len(r.Ranges), maxRanges)
	}
	r.Ranges = slices.Clone(r.Ranges)
	for i, p := range r.Ranges {
		if !p.IsValid() || p.Addr().Is4In6() || conf.Containers(p) == 0 {
			return r, fmt.Errorf("range %s has no address for a container", p)
		}
		r.Ranges[i] = p.Masked()
		if j := slices.IndexFunc(r.Ranges[:i], p.Overlaps); j >= 0 {
			return r, fmt.Errorf("ranges %s and %s overlap", r.Ranges[j], p)
		}
	}
	if r.Exact && len(r.Want) == 0 {
		return r, errors.New("no address is wanted")
	}
	for i, a := range r.Want {
		if slices.ContainsFunc(r.Want[:i], func(b netip.Addr) bool { return a.BitLen() == b.BitLen() }) {
			return r, &UnavailableError{a, "is the second one of its family; one interface gets one address of each"}
		}
		if !slices.ContainsFunc(r.Ranges, func(p netip.Prefix) bool { return p.Addr().BitLen() == a.BitLen() }) {
			return r, &UnavailableError{a, fmt.Sprintf("is of a family that overlay does not have here; there is %v", r.Ranges)}
		}
	}
	return r, nil
}

// checkAttachment refuses one that cannot be stored under its names.
func checkAttachment(a conf.Attachment) error {
	for _, s := range [...]string{a.Network, a.ContainerID, a.IfName} {
		if s == "" || len(s) > 4096 {
			return fmt.Errorf("attachment %q: network, container and interface must be named, with at most 4096 bytes each", a)
		}
	}
	return nil
}
