package datapath

import (
	"context"
	"time"

	"overlayd.internal/overlay/internal/firewall/foreign"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// othersPause is the least time between two looks at the rules of others: they
// take a few programs.
const othersPause = 5 * time.Second

// others is what rules of others were last found to stop.
type others struct {
	found   []string
	at      time.Time
	skipped bool // a look, because the last one was just then
}

// lookAtOthers finds rules of others that stop packets of the overlays. What is
// accepted by one table of rules can be dropped by another, so nothing but them
// can mend it.
func (d *Datapath) lookAtOthers(ctx context.Context, w plan.Wanted) {
	o := &d.others
	if len(w.Overlays) == 0 {
		*o = others{}
		return
	}
	if o.skipped = time.Since(o.at) < othersPause; o.skipped {
		return
	}
	o.at = time.Now()
	host := foreign.Host{Underlay6: w.VTEP.Local.Is6()}
	for _, dev := range w.Devices() {
		host.Devices = append(host.Devices, dev.Name)
	}
	for _, overlay := range w.Overlays {
		host.Subnets = append(host.Subnets, overlay.Subnets...)
	}
	rules := foreign.Read(ctx)
	if ctx.Err() != nil {
		return
	}
	o.found = nil
	if rules.Err != nil {
		o.found = append(o.found, "the rules of others cannot be looked at: "+rules.Err.Error())
	}
	for _, f := range rules.All(host) {
		o.found = append(o.found, f.String())
	}
}
