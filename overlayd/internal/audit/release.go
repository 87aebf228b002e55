package audit

import (
	"context"
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
// would go on with addresses that are given to others.
func Release(ctx context.Context, runDir, containerID string, force bool) (released []netip.Addr, _ error) {
	h, err := Read(ctx, runDir)
	if err != nil {
		return nil, err
	}
	found := map[string][]ipam.Record{}
	for overlay, s := range h.Stores {
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
		return nil, fmt.Errorf("no address store of this host has the container %s; overlayctl containers lists them", containerID)
	}
	for overlay, records := range found {
		s, err := ipam.Open(ctx, ipam.Options{
			Dir: filepath.Join(runDir, conf.IPAMDir), Overlay: overlay, Cooling: time.Duration(h.State.CoolingSeconds) * time.Second,
		})
		if err != nil {
			return released, err
		}
		for _, r := range records {
			addrs, err := s.Release(ctx, r.Attachment)
			released = append(released, addrs...)
			if err != nil {
				s.Close()
				return released, err
			}
		}
		if err := s.Close(); err != nil {
			return released, err
		}
	}
	return released, nil
}
