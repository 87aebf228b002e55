package datapath

import (
	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/antispoof"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// checkSources has the kernel check what containers send: those whose host ends
// say so in their alias, which is where a CNI program leaves it. A kernel that
// cannot check it is named once in the log.
func (d *Datapath) checkSources(w plan.Wanted, have *plan.State) (changed int, err error) {
	if len(w.Overlays) == 0 {
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
	for name, l := range have.Links {
		a, ours := mark.IsHostEnd(name, l.Alias)
		if ours && l.Kind == "veth" && a.MAC != (conf.MAC{}) && !any[a.Overlay] {
			ports = append(ports, antispoof.Port{Device: name, MAC: a.MAC, Addrs: a.Addrs})
		}
	}
	changed, err = d.sources.Set(ports)
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
