package audit

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// Release takes back the addresses of a container of this host whose runtime has
// not called DEL. One that is attached still is refused unless force says so: it
// would go on with addresses that are given to others. So is one that is attached
// again meanwhile: what was seen without the lock is compared under it.
func Release(ctx context.Context, runDir, containerID string, force bool) (released []netip.Addr, _ error) {
	h, err := Read(ctx, runDir)
	if err != nil {
		return nil, err
	}
	found, err := h.releasable(containerID, force)
	if err == nil && !force {
		// An ADD that is under way has its address before its interface.
		if err = settle(ctx); err != nil {
			return nil, err
		}
		if h, err = Read(ctx, runDir); err == nil {
			_, err = h.releasable(containerID, false)
		}
	}
	if err != nil {
		return nil, err
	}
	for overlay, records := range found {
		addrs, err := h.release(ctx, runDir, overlay, records, force)
		if released = append(released, addrs...); err != nil {
			return released, err
		}
	}
	return released, nil
}

// releasable are the records of a container by overlay, all of which may be released.
func (h Host) releasable(containerID string, force bool) (map[string][]ipam.Record, error) {
	found := map[string][]ipam.Record{}
	var unread []error
	for overlay, s := range h.Stores {
		if err := s.unread(); err != nil {
			unread = append(unread, fmt.Errorf("the address store of overlay %s cannot be read: %w", overlay, err))
		}
		gone := h.Abandoned(overlay)
		for _, r := range s.Records {
			if r.ContainerID != containerID {
				continue
			}
			abandoned := slices.ContainsFunc(gone, func(g ipam.Record) bool { return g.Key() == r.Key() && g.Half == r.Half })
			if !abandoned && !force {
				return nil, fmt.Errorf("container %s is attached to overlay %s with %v; delete it, or use --force", containerID, overlay, r.Addrs)
			}
			found[overlay] = append(found[overlay], r)
		}
	}
	if len(found) == 0 {
		return nil, errors.Join(append([]error{fmt.Errorf("%s has the container %s; overlayctl containers lists them", whichStores(unread), containerID)}, unread...)...)
	}
	return found, nil
}

// whichStores are those that were looked into.
func whichStores(unread []error) string {
	if len(unread) > 0 {
		return "no address store of this host that can be read"
	}
	return "no address store of this host"
}

// unread says why nothing is known of what is in a store.
func (s Store) unread() error {
	if s.Err == nil && len(s.Problems) > 0 {
		return fmt.Errorf("%v", s.Problems)
	}
	return s.Err
}

// release takes back the addresses of records as they were seen.
func (h Host) release(ctx context.Context, runDir, overlay string, records []ipam.Record, force bool) (released []netip.Addr, _ error) {
	s, err := ipam.Open(ctx, ipam.Options{
		Dir: filepath.Join(runDir, conf.IPAMDir), Overlay: overlay, Cooling: time.Duration(h.State.CoolingSeconds) * time.Second,
		Existing: true,
	})
	if err != nil {
		return nil, err
	}
	defer s.Close()
	for _, r := range records {
		gone, err := s.GC(ctx, r.Network, r.Half, func(now ipam.Record) bool {
			return now.Key() != r.Key() || !force && now.Since != r.Since
		})
		for _, g := range gone {
			released = append(released, g.Addrs...)
		}
		if err != nil {
			return released, err
		}
		if now, there, err := s.Get(ctx, r.Attachment); err != nil {
			return released, err
		} else if there && now.Since != r.Since {
			return released, fmt.Errorf("container %s was attached again to overlay %s with %v meanwhile; delete it, or use --force", r.ContainerID, overlay, now.Addrs)
		}
	}
	return released, nil
}
