package datapath

import (
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/antispoof"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// unchecked are the devices of which a notification of nftables says that what
// they send is no longer checked.
func unchecked(m rtnl.Message) (devices []string) {
	const header = 4 // struct nfgenmsg
	if m.Type != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_DELSETELEM || len(m.Data) < header || m.Data[0] != unix.NFPROTO_BRIDGE {
		return nil
	}
	attrs := map[uint16][]byte{}
	rtnl.EachAttr(m.Data[header:], func(typ uint16, v []byte) { attrs[typ] = v })
	if unix.ByteSliceToString(attrs[unix.NFTA_SET_ELEM_LIST_TABLE]) != mark.NFTable {
		return nil
	}
	rtnl.Elements([]map[uint16][]byte{attrs}, func(key, _ []byte) { // every key begins with the device
		devices = append(devices, unix.ByteSliceToString(key[:min(len(key), unix.IFNAMSIZ)]))
	})
	return devices
}

// checkSources has the kernel check what containers send: those whose host ends
// say so in their alias, which is where a CNI program leaves it, also on bridges
// that are left. A kernel that cannot check it is named once in the log.
func (d *Datapath) checkSources(p *plan.Plan, have *plan.State) (changed int, err error) {
	w := p.Wanted
	if len(w.Overlays) == 0 && len(p.LeftBridges) == 0 {
		changed, err = d.sources.Remove()
		if antispoof.Unsupported(err) {
			return 0, nil
		}
		return changed, err
	}
	any := map[string]bool{}
	for _, o := range w.Overlays {
		any[o.Name] = o.AnySource
	}
	var ports []antispoof.Port
	var unchecked []string
	for name, l := range have.Links {
		a, ours := mark.IsHostEnd(name, l.Alias)
		switch {
		case !ours || l.Kind != "veth":
		case a.MAC == conf.MAC{}:
			unchecked = append(unchecked, name)
		case !any[a.Overlay]:
			ports = append(ports, antispoof.Port{Device: name, MAC: a.MAC, Addrs: a.Addrs})
		}
	}
	changed, err = d.sources.Set(ports, unchecked...)
	d.drift.add(driftSourceCheck, changed-d.sources.Forgotten, "table bridge "+mark.NFTable)
	unsupported := antispoof.Unsupported(err)
	if unsupported && !d.unchecked {
		d.log.Warn("the kernel cannot check what containers send; they may use any address", "err", err)
	}
	d.unchecked = unsupported
	if unsupported {
		return 0, nil
	}
	return changed, err
}
