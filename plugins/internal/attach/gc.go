package attach

import (
	"context"
	"errors"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/antispoof"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/internal/veth"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/ipam/rebuild"
)

// gc releases what the runtime no longer knows: the host ends of this network
// and half first, then the addresses.
func (p program) gc(ctx context.Context, c *cni.Call) error {
	rebuildFromLinks(c)
	withShortIDs(c)
	keep, err := cni.GCKeep(c)
	if err != nil {
		return err
	}
	links, err := veth.List()
	if err != nil {
		return kernelError(err)
	}
	links = slices.DeleteFunc(links, func(l veth.Link) bool {
		return l.Half != p.half || !l.InNetwork(c.Conf.Name) || keep(rebuild.Record(l))
	})
	if err := removeLinks(links); err != nil {
		return kernelError(err) // their addresses stay taken
	}
	if err := unprotectAll(links); err != nil {
		return kernelError(err)
	}
	released, err := cni.GC(ctx, c, p.half)
	err = errors.Join(err, kernelError(p.removeReleased(released)))
	if delegates(c.Conf) && checkDelegate(c) == nil {
		err = errors.Join(err, delegateVerb(ctx, c))
	}
	return err
}

// withShortIDs adds to the list of valid attachments what stands for them where
// their names did not fit into an alias.
func withShortIDs(c *cni.Call) {
	for _, list := range [...]*[]conf.ValidAttachment{c.Conf.ValidAttachments, c.Conf.LegacyValidAttachments} {
		if list == nil {
			continue
		}
		for _, v := range slices.Clone(*list) {
			key := conf.Attachment{Network: c.Conf.Name, ContainerID: v.ContainerID, IfName: v.IfName}.Key()
			*list = append(*list, conf.ValidAttachment{ContainerID: mark.ShortID(key), IfName: v.IfName})
		}
	}
}

// unprotectAll is unprotect for links that were removed together.
func unprotectAll(links []veth.Link) error {
	for batch := range slices.Chunk(links, 100) {
		var ports []antispoof.Port
		for _, l := range batch {
			if p, checked := portOf(l.Name, l.Alias); checked {
				ports = append(ports, p)
			}
		}
		if err := supported(antispoof.Release(ports...)); err != nil {
			return err
		}
	}
	return nil
}

// removeReleased removes what an ADD that was killed may have left of attachments that
// were released: a host end without an alias, and what may be sent from where there is
// none.
func (p program) removeReleased(released []ipam.Record) error {
	if len(released) == 0 {
		return nil
	}
	conn, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer conn.Close()
	all, err := conn.Links()
	if err != nil {
		return err
	}
	var devices []string
	for _, r := range released {
		devices = append(devices, mark.HostEnd(p.half, mark.KeyOf(r.Attachment)))
	}
	slices.Sort(devices)
	var left []veth.Link
	for _, l := range all {
		_, ours := slices.BinarySearch(devices, l.Name)
		if ours && l.Kind == "veth" && l.Alias == "" && !l.Carrier() {
			left = append(left, veth.Link{Index: l.Index, Name: l.Name})
		}
	}
	if err := removeLinks(left); err != nil {
		return err
	}
	return supported(antispoof.ReleaseDevice(devices...))
}

// removeLinks removes links together: the kernel waits 20 ms for each one that
// is removed alone, and no longer for a group of them.
func removeLinks(links []veth.Link) error {
	if len(links) == 0 {
		return nil
	}
	conn, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer conn.Close()
	for batch := range slices.Chunk(links, 100) {
		var b rtnl.Batch
		for _, l := range batch {
			setGroup(&b, l.Name, l.Index, goingGroup)
		}
		for _, err := range conn.Each(&b) {
			if removed(err) != nil {
				return err
			}
		}
	}
	var b rtnl.Batch
	deleteGroup(&b, goingGroup)
	return removed(conn.Each(&b)[0])
}
