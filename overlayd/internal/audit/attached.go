package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// ReadAttached reads the address stores of the host, and neither verifies them nor
// looks at the kernel: it is for those who look at every change. What could be read
// comes with the error for the rest.
func ReadAttached(ctx context.Context, runDir string, state conf.State) (map[string]Store, error) {
	dir := filepath.Join(runDir, conf.IPAMDir)
	files, err := filepath.Glob(filepath.Join(dir, "*.db"))
	if err != nil {
		return nil, fmt.Errorf("look for address stores in %s: %w", dir, err)
	}
	names := map[string]bool{}
	for _, o := range state.Overlays {
		names[o.Info.Name] = true
	}
	for _, file := range files {
		if name := strings.TrimSuffix(filepath.Base(file), ".db"); conf.CheckName(name) == nil {
			names[name] = true
		}
	}
	out := map[string]Store{}
	var errs []error
	for name := range names {
		s := readAttached(ctx, dir, name, state)
		if s.Err != nil {
			errs = append(errs, fmt.Errorf("overlay %s: %w", name, s.Err))
			continue
		}
		out[name] = s
	}
	return out, errors.Join(errs...)
}

func readAttached(ctx context.Context, dir, overlay string, state conf.State) (out Store) {
	o, _ := state.Overlay(overlay)
	s, err := ipam.TakeSnapshot(ctx, ipam.Options{Dir: dir, Overlay: overlay, Cooling: time.Duration(state.CoolingSeconds) * time.Second})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		out.Usage, out.Err = usage(ctx, o, neverUsed)
		return out
	case err != nil:
		return Store{Err: err}
	}
	defer s.Close()
	if out.Records, out.Err = s.List(ctx); out.Err == nil {
		out.Usage, out.Err = usage(ctx, o, s.Stats)
	}
	return out
}

// HalfUsages is how full the halves are, a row for each: that of the family which
// runs out first. It is what coordinator, status and metrics tell.
func HalfUsages(list []Usage) (out []api.HalfUsage) {
	for list = Sum(list); len(list) > 0; {
		h := api.HalfUsage{Overlay: list[0].Overlay, Half: list[0].Half}
		var v4, v6 *api.Count
		for ; len(list) > 0 && list[0].Overlay == h.Overlay && list[0].Half == h.Half; list = list[1:] {
			c := list[0].Count()
			if r := list[0].Range; r.Addr().Is6() {
				v6, h.Subnet6 = &c, r
			} else {
				v4, h.Subnet = &c, r
			}
		}
		switch {
		case v6 == nil || v4 != nil && left(*v4) <= left(*v6):
			h.Count = *v4
		default:
			h.Count = *v6
		}
		out = append(out, h)
	}
	return out
}

// Count is the usage as it is told.
func (u Usage) Count() api.Count {
	return api.Count{Total: u.Total, Used: u.Used, Cooling: u.Cooling, Free: u.Free()}
}

// left is how many containers fit yet.
func left(c api.Count) uint64 { return c.Total - min(c.Total, c.Used) }
