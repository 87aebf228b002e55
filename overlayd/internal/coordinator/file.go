package coordinator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// firstNetwork is what an edited file makes of the stored network when a
// coordinator starts. What it removes while hosts have it set up stays: nobody has
// said yet whether containers are attached there. finishFile removes it when they have.
func (c *Coordinator) firstNetwork(v *view) (conf.Network, error) {
	c.kept = nil
	if err := v.fit(c.file); err != nil {
		return conf.Network{}, err
	}
	next := withDrains(c.file, v.network.Network)
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
	c.kept = kept
	c.log.Info("the file no longer has overlays, or a family of them, that hosts have set up; they stay until these hosts have told that no containers are attached",
		"overlays", strings.Join(kept, ","))
	return next, v.fit(next)
}

// How finishFile waits for hosts: most are back within seconds.
const (
	fileLook = 250 * time.Millisecond
	fileWait = 2 * time.Minute
)

// finishFile applies the rest of an edited file, see firstNetwork, when all hosts
// have told what is attached; not if they do not, containers are attached, or
// somebody has changed the configuration meanwhile.
func (c *Coordinator) finishFile(ctx context.Context) {
	c.mu.Lock()
	kept, mod := c.kept, c.view.network.mod
	c.mu.Unlock()
	if len(kept) == 0 {
		return
	}
	look, end := time.NewTicker(fileLook), time.NewTimer(fileWait)
	defer look.Stop()
	defer end.Stop()
	const stay = "the file no longer has overlays, or a family of them, that stay: remove them with overlayctl overlays remove, or have the file applied with SIGHUP"
	for {
		select {
		case <-look.C:
		case <-end.C:
			c.log.Warn(stay, "overlays", strings.Join(kept, ","), "err", "hosts that have set them up have not told whether containers are attached")
			return
		case <-ctx.Done():
			return
		}
		c.mu.Lock()
		file, same, told := c.file, c.view.network.mod == mod, !slices.ContainsFunc(kept, c.untoldLocked)
		c.mu.Unlock()
		switch {
		case !same:
			return
		case told:
			if _, err := c.ApplyNetwork(ctx, file, mod); err != nil && ctx.Err() == nil {
				c.log.Warn(stay, "overlays", strings.Join(kept, ","), "err", err)
			}
			return
		}
	}
}

// untoldLocked reports whether a host has set up an overlay and not told whether
// containers are attached.
func (c *Coordinator) untoldLocked(overlay string) bool {
	return slices.ContainsFunc(c.hostsOfLocked(overlay, nil), func(h api.OverlayHost) bool { return h.Unknown })
}

// sameAsFile reports whether a network is what the file says.
func (c *Coordinator) sameAsFile(n conf.Network) bool { return sameNetwork(n, withDrains(c.file, n)) }

// ApplyFile makes the configuration file, which was read again, that of the
// cluster.
func (c *Coordinator) ApplyFile(ctx context.Context, n conf.Network) (api.NetworkPlan, error) {
	c.mu.Lock()
	c.file = n
	c.mu.Unlock()
	return c.ApplyNetwork(ctx, n, 0)
}

// logFileDiffersLocked says that what is served is not what the file says.
func (c *Coordinator) logFileDiffersLocked() {
	if !c.sameAsFile(c.view.network.Network) {
		c.log.Warn("the configuration file differs from the cluster's configuration, which is served; " +
			"overlayctl overlays plan FILE shows how, overlayctl overlays apply FILE or SIGHUP applies it")
	}
}

// fileDiffersLocked says in a few words how the file differs about an overlay; ""
// where it does not.
func (c *Coordinator) fileDiffersLocked(o conf.Overlay) string {
	in, ok := c.file.Overlay(o.Name)
	in.Draining = o.Draining
	switch n := c.view.network; {
	case !ok:
		return "the file does not have it"
	case !bytes.Equal(encode(in), encode(o)):
		return "the file differs"
	case c.sameAsFile(conf.Network{Overlays: n.Overlays, Reclaim: c.file.Reclaim, VTEPMACOUI: c.file.VTEPMACOUI,
		VTEPMTU: c.file.VTEPMTU, VTEPSubnet: c.file.VTEPSubnet, VTEPSubnet6: c.file.VTEPSubnet6}) && !c.sameAsFile(n.Network):
		return "the file differs in settings beside the overlays"
	}
	return ""
}

// hostsOfLocked is what is attached to an overlay, by host: those that have
// containers, which the book counts, and those that have set it up and have not told
// whether they have.
func (c *Coordinator) hostsOfLocked(overlay string, byAgent map[string]int) (hosts []api.OverlayHost) {
	for id, n := range byAgent {
		if a := c.view.agents[id]; a != nil && n > 0 {
			hosts = append(hosts, api.OverlayHost{AgentID: id, AgentIP: a.IP, Containers: n})
		}
	}
	for _, a := range c.view.setUp(overlay) {
		if !c.book.Has(a.id) {
			hosts = append(hosts, api.OverlayHost{AgentID: a.id, AgentIP: a.IP, Unknown: true})
		}
	}
	slices.SortFunc(hosts, func(a, b api.OverlayHost) int { return a.AgentIP.Compare(b.AgentIP) })
	return hosts
}

// setUp are the agents that may have set up an overlay: they have said what became
// of it. One that has failed, in one family or because of the host, may still have
// containers from before.
func (v *view) setUp(overlay string) (agents []*agent) {
	for id, a := range v.agents {
		if _, ok := v.statuses[id].decode().Overlays[overlay]; ok && a.Superseded == "" {
			agents = append(agents, a)
		}
	}
	return agents
}
