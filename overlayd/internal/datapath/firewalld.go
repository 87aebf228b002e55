package datapath

import (
	"context"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall/firewalld"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// UseFirewalld has firewalld let our traffic through, where it runs; address is
// that of its D-Bus. It is called before the first Apply.
func (d *Datapath) UseFirewalld(address string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.firewalld = firewalld.Client{Address: address}
}

// passFirewalld puts our devices into a zone of firewalld, and what comes from
// containers without VXLAN.
func (d *Datapath) passFirewalld(ctx context.Context, w plan.Wanted, have *plan.State) (changed int, err error) {
	if len(w.Overlays) == 0 {
		return d.firewalld.Remove(ctx, have.Underlay)
	}
	t := firewalld.Traffic{Devices: []string{conf.VTEPName}, Underlay: have.Underlay}
	for _, b := range w.Bridges {
		t.Devices = append(t.Devices, b.Name)
	}
	if w.Direct.Take {
		whole, _, pools := w.Ranges()
		for _, s := range slices.Concat(whole, pools) {
			if s.Addr().Is6() == w.VTEP.Local.Is6() {
				t.Sources = append(t.Sources, s)
			}
		}
	}
	return d.firewalld.Ensure(ctx, t)
}
