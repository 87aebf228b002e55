package datapath

import (
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall/firewalld"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// UseFirewalld has firewalld let our traffic through, where it runs; address is
// that of its D-Bus. It is called before the first Apply. The keeper has to be
// run by the caller.
func (d *Datapath) UseFirewalld(address string) *firewalld.Keeper {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.firewalld = firewalld.NewKeeper(address, d.news)
	return d.firewalld
}

// Formerly names sources that an earlier process may have told firewalld of. It is
// called after UseFirewalld and before the first Apply.
func (d *Datapath) Formerly(sources []netip.Prefix) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.firewalld != nil {
		d.firewalld.Formerly(sources)
	}
}

// passFirewalld asks for our devices in a zone of firewalld, and what comes from
// containers without VXLAN. set is when our own rules were set, which have to
// stand before the latter. It returns what came of earlier requests.
func (d *Datapath) passFirewalld(w plan.Wanted, have *plan.State, set firewalld.Round) (changed int, err error) {
	if d.firewalld == nil {
		return 0, nil
	}
	return d.firewalld.Want(trafficOf(w, have), set)
}

// trafficOf is what firewalld is to let through. What this process or an earlier one
// asked for and no longer wants is known to the keeper; of the other ranges an
// administrator may have made sources.
func trafficOf(w plan.Wanted, have *plan.State) firewalld.Traffic {
	if len(w.Overlays) == 0 {
		return firewalld.Traffic{Underlay: have.Underlay}
	}
	t := firewalld.Traffic{Devices: []string{conf.VTEPName}, Underlay: have.Underlay}
	if w.VTEP.Second.IsValid() {
		t.Devices, t.Second = append(t.Devices, mark.SecondVTEP), have.Second
	}
	for _, b := range w.Bridges {
		t.Devices = append(t.Devices, b.Name)
	}
	whole, _, pools := w.Ranges()
	for _, s := range slices.Concat(whole, pools) {
		if w.Direct.Take && s.Addr().Is6() == w.VTEP.Local.Is6() {
			t.Sources = append(t.Sources, s)
		}
	}
	return t
}

// firewalldRound is to be asked for before rules are set.
func (d *Datapath) firewalldRound() firewalld.Round {
	if d.firewalld == nil {
		return 0
	}
	return d.firewalld.Round()
}
