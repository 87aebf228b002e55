// Package rebuild reads from the kernel what an address store should hold: the
// alias of each host end of ours names its attachment and addresses. It stands
// beside ipam because overlay-ipam, which makes no links, does not link netlink.
package rebuild

import (
	"overlayd.internal/overlay/internal/veth"
	"overlayd.internal/overlay/ipam"
)

// Record is the address record behind a host end.
func Record(l veth.Link) ipam.Record {
	return ipam.Record{Attachment: l.Attachment, Half: l.Half, Addrs: l.Addrs, Since: l.Since}
}

// Records returns the records behind all host ends of an overlay.
func Records(overlay string) ([]ipam.Record, error) {
	links, err := veth.List()
	if err != nil {
		return nil, err
	}
	var out []ipam.Record
	for _, l := range links {
		if l.Overlay == overlay {
			out = append(out, Record(l))
		}
	}
	return out, nil
}
