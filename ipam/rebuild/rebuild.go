// Package rebuild reads from the kernel what an address store should hold: the
// alias of each host end of ours names its attachment and addresses. It stands
// beside ipam because overlay-ipam, which makes no links, does not link netlink.
package rebuild

import (
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

// Records returns the records behind all host ends of an overlay, each for the pool
// that the published state has its half draw from.
func Records(runDir, overlay string) ([]ipam.Record, error) {
	links, err := veth.List()
	if err != nil {
		return nil, err
	}
	state, _ := published.Load(runDir) // as far as it can be read
	o, there := state.Overlay(overlay)
	if !there {
		o.Info.Halves, err = halvesOf(overlay)
		if err != nil {
			return nil, err
		}
	}
	var out []ipam.Record
	for _, l := range links {
		if l.Overlay != overlay {
			continue
		}
		rec := Record(l)
		if pool := o.Info.Pool(rec.Half); pool != rec.Half {
			rec.Pool = pool
		}
		out = append(out, rec)
	}
	return out, nil
}

// halvesOf tells by the bridges how the halves of an overlay give out addresses,
// where nothing is published: those that share a pool have that of Mesos alone.
func halvesOf(overlay string) (string, error) {
	c, err := rtnl.Open()
	if err != nil {
		return "", err
	}
	defer c.Close()
	for half, shared := range map[conf.Half]bool{conf.Mesos: true, conf.Docker: false} {
		there, err := c.Has(half.Bridge(overlay))
		if err != nil {
			return "", err
		}
		if there != shared {
			return conf.HalvesSplit, nil
		}
	}
	return conf.HalvesShared, nil
}
