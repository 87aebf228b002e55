package audit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// Usage is how full one range of a half is.
type Usage struct {
	Overlay string    `json:"overlay"`
	Half    conf.Half `json:"half"` // or conf.SharedPool
	ipam.Stats
}

// ReadUsage says how full the halves of the published overlays are, in the order
// of their names, and looks at nothing else. What could be read comes with the
// error for the rest.
func ReadUsage(ctx context.Context, runDir string, state conf.State) (out []Usage, _ error) {
	var errs []error
	dir := filepath.Join(runDir, conf.IPAMDir)
	for _, o := range byName(state.Overlays) {
		u, err := readUsage(ctx, dir, o, time.Duration(state.CoolingSeconds)*time.Second)
		if err != nil {
			errs = append(errs, fmt.Errorf("overlay %s: %w", o.Info.Name, err))
		}
		out = append(out, u...)
	}
	return out, errors.Join(errs...)
}

func readUsage(ctx context.Context, dir string, o conf.AgentOverlay, cooling time.Duration) ([]Usage, error) {
	s, err := ipam.TakeSnapshot(ctx, ipam.Options{Dir: dir, Overlay: o.Info.Name, Cooling: cooling})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return usage(ctx, o, neverUsed)
	case err != nil:
		return nil, err
	}
	defer s.Close()
	return usage(ctx, o, s.Stats)
}

// Usage is what ReadUsage says, of the stores that could be read.
func (h Host) Usage() (out []Usage) {
	for _, o := range byName(h.State.Overlays) {
		s, there := h.Stores[o.Info.Name]
		if !there {
			s.Usage, _ = usage(context.Background(), o, neverUsed)
		}
		out = append(out, s.Usage...)
	}
	return out
}

func usage(ctx context.Context, o conf.AgentOverlay, stats func(context.Context, conf.Half, []netip.Prefix) ([]ipam.Stats, error)) (out []Usage, _ error) {
	for _, pool := range o.Pools() {
		list, err := stats(ctx, pool.Half, pool.Ranges)
		if err != nil {
			return nil, err
		}
		for _, st := range list {
			out = append(out, Usage{o.Info.Name, pool.Name, st})
		}
	}
	return out, nil
}

// Sum adds up the ranges of one family of a half: they are one pool.
func Sum(all []Usage) (out []Usage) {
	for len(all) > 0 {
		first, n := all[0], 1
		stats := []ipam.Stats{first.Stats}
		for ; n < len(all) && all[n].Overlay == first.Overlay && all[n].Half == first.Half; n++ {
			stats = append(stats, all[n].Stats)
		}
		for _, st := range ipam.Sum(stats) {
			out = append(out, Usage{first.Overlay, first.Half, st})
		}
		all = all[n:]
	}
	return out
}

// neverUsed is ipam.Store.Stats of a store that nobody has made yet. To make one
// is for those who attach.
func neverUsed(_ context.Context, _ conf.Half, ranges []netip.Prefix) (out []ipam.Stats, _ error) {
	for _, r := range ranges {
		out = append(out, ipam.Stats{Range: r, Total: conf.Capacity(r)})
	}
	return out, nil
}

func byName(overlays []conf.AgentOverlay) []conf.AgentOverlay {
	return slices.SortedFunc(slices.Values(overlays), func(a, b conf.AgentOverlay) int { return cmp.Compare(a.Info.Name, b.Info.Name) })
}
