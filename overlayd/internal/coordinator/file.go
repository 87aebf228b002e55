package coordinator

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
)

// firstNetwork is what an edited file makes of the stored network when a
// coordinator starts. What it removes while hosts have it set up stays: nobody has
// said yet whether containers are attached there.
func (c *Coordinator) firstNetwork(v *view) (conf.Network, error) {
	if err := v.fit(c.file); err != nil {
		return conf.Network{}, err
	}
	next := c.file
	var kept []string
	for _, was := range v.network.Overlays {
		i := slices.IndexFunc(next.Overlays, func(o conf.Overlay) bool { return o.Name == was.Name })
		gone := i < 0 || was.Subnet.IsValid() && !next.Overlays[i].Subnet.IsValid() ||
			was.Subnet6.IsValid() && !next.Overlays[i].Subnet6.IsValid()
		if !gone || len(v.setUp(was.Name)) == 0 {
			continue
		}
		kept = append(kept, was.Name)
		if i < 0 {
			next.Overlays = append(slices.Clip(next.Overlays), was)
			continue
		}
		next.Overlays = slices.Clone(next.Overlays)
		next.Overlays[i] = was
	}
	if len(kept) == 0 {
		return next, nil
	}
	var errs []error
	for _, p := range next.Validate() {
		errs = append(errs, errors.New(p.String()))
	}
	if err := errors.Join(errs...); err != nil {
		return conf.Network{}, fmt.Errorf("%w: containers may be attached to overlay %s, which can therefore not be removed while the coordinator starts, and with it: %w",
			ErrMisfit, strings.Join(kept, ", "), err)
	}
	c.log.Warn("the file no longer has overlays, or a family of them, that hosts have set up; they stay, for containers may be attached. "+
		"Remove them with overlayctl overlays remove, or have the file applied with SIGHUP", "overlays", strings.Join(kept, ","))
	return next, v.fit(next)
}

// setUp are the agents that have said that they have set up an overlay.
func (v *view) setUp(overlay string) (agents []*agent) {
	for id, a := range v.agents {
		if s, ok := v.statuses[id].decode().Overlays[overlay]; ok && s.Status == conf.StatusOK && a.Superseded == "" {
			agents = append(agents, a)
		}
	}
	return agents
}
