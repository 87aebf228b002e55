package agent

import (
	"cmp"
	"fmt"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// keepHalves keeps how the halves of an overlay give out addresses for as long as this
// host has the same subnet of it: containers have the gateway and the bridge of then.
// Coordinators refuse to change it; one of an earlier release does not know of it, and
// its answers leave it out.
func (l *loop) keepHalves(before *heldLease, now *conf.Lease) {
	l.lease.kept = nil
	if before == nil || before.ClusterID != now.ClusterID {
		return
	}
	now.Grants = slices.Clone(now.Grants)
	for i := range now.Grants {
		g := &now.Grants[i]
		j := slices.IndexFunc(before.Grants, func(b conf.Grant) bool {
			return b.Overlay.Name == g.Overlay.Name && b.Subnet == g.Subnet && b.Subnet6 == g.Subnet6 && len(b.All()) > 0
		})
		if j < 0 || before.Grants[j].Overlay.Shared() == g.Overlay.Shared() {
			continue
		}
		was, is := before.Grants[j].Overlay.Halves, g.Overlay.Halves
		g.Overlay.Halves = was
		remedy := "see that all coordinators are of this release"
		if is == conf.HalvesShared {
			remedy = "a coordinator of an earlier release leased it; when the host's containers may go, run overlayd agent teardown here, and start the agent again"
		}
		l.lease.kept = append(l.lease.kept, fmt.Sprintf("overlay %s: its halves stay %s on this host, as when its subnet was leased, and the coordinator says %s; %s",
			g.Overlay.Name, cmp.Or(was, conf.HalvesSplit), cmp.Or(is, conf.HalvesSplit), remedy))
		l.log.Debug("halves kept as they were leased", logkey.Overlay, g.Overlay.Name)
	}
}
