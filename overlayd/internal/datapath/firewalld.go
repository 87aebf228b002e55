package datapath

import (
	"context"

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

// passFirewalld puts our devices into a zone of firewalld.
func (d *Datapath) passFirewalld(ctx context.Context, w plan.Wanted, have *plan.State) (changed int, err error) {
	if len(w.Overlays) == 0 {
		return d.firewalld.Remove(ctx, have.Underlay)
	}
	devices := []string{conf.VTEPName}
	for _, b := range w.Bridges {
		devices = append(devices, b.Name)
	}
	return d.firewalld.Ensure(ctx, devices, have.Underlay)
}
