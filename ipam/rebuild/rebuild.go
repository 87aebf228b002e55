// Package rebuild reads from the kernel what an address store should hold: the
// alias of each host end of ours names its attachment and addresses. Those of Docker
// tell nothing, so where there is one it says that. It stands
// beside ipam because an address store needs no kernel.
package rebuild

import (
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/published"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/internal/veth"
	"overlayd.internal/overlay/ipam"
)

// Record is the address record behind a host end.
func Record(l veth.Link) ipam.Record {
	return ipam.Record{Attachment: l.Attachment, Half: l.Half, Addrs: l.Addrs, Since: l.Since}
}

// Known returns the records behind all host ends of an overlay, each for the pool
// that the published state has its half draw from, and the pool that containers of
// Docker have addresses of.
func Known(runDir, overlay string) (out ipam.Known, _ error) {
	c, err := rtnl.Open()
	if err != nil {
		return out, err
	}
	defer c.Close()
	links, err := c.Links()
	if err != nil {
		return out, err
	}
	state, _ := published.Load(runDir) // as far as it can be read
	o, there := state.Overlay(overlay)
	if !there {
		o.Info.Halves = halvesOf(overlay, links)
	}
	for _, l := range veth.Of(links) {
		if l.Overlay != overlay {
			continue
		}
		rec := Record(l)
		if pool := o.Info.Pool(rec.Half); pool != rec.Half {
			rec.Pool = pool
		}
		out.Records = append(out.Records, rec)
	}
	pool := o.Info.Pool(conf.Docker)
	if HasDocker(links, pool.Bridge(overlay)) {
		out.Unfiled = []conf.Half{pool}
	}
	return out, nil
}

// HasDocker reports whether a container of Docker is on a bridge.
func HasDocker(links []rtnl.Link, bridge string) bool {
	i := slices.IndexFunc(links, func(l rtnl.Link) bool { return l.Name == bridge })
	return i >= 0 && slices.ContainsFunc(links, func(l rtnl.Link) bool {
		return l.Master == links[i].Index && l.Kind == "veth" && isDockers(l.Name)
	})
}

// isDockers reports whether dockerd names host ends so. Names of ours, and of the CNI
// plugins, are of another length.
func isDockers(name string) bool {
	digits, ok := strings.CutPrefix(name, "veth")
	return ok && len(digits) == 7 && strings.Trim(digits, "0123456789abcdef") == ""
}

// halvesOf tells by the bridges how the halves of an overlay give out addresses,
// where nothing is published: those that share a pool have that of Mesos alone.
func halvesOf(overlay string, links []rtnl.Link) string {
	has := func(half conf.Half) bool {
		return slices.ContainsFunc(links, func(l rtnl.Link) bool { return l.Name == half.Bridge(overlay) })
	}
	if has(conf.Mesos) && !has(conf.Docker) {
		return conf.HalvesShared
	}
	return conf.HalvesSplit
}
