package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/audit"
	"overlayd.internal/overlay/overlayd/internal/datapath"
)

// namedElsewhere are the checks that say more plainly what the datapath would
// repair.
var namedElsewhere = [...]string{"vtep", "mac-policy", "vxlan-conflict", "vxlan-port", "bridge", "bridge-port", "rp-filter", "forwarding", "route", "neighbour"}

// checkDrift lets the datapath plan what it would do, without doing it: whatever
// no other check has a name for.
func checkDrift(h *host) []Finding {
	lease, ok, err := audit.StoredLease(h.dirs.State)
	switch {
	case errors.Is(h.peersErr, fs.ErrPermission):
		return []Finding{{Severity: Warning, What: "the stored peers cannot be read: what leads to other hosts was not looked at", Evidence: h.peersErr.Error(), Fix: "run this as root"}}
	case h.peersErr != nil:
		return []Finding{{Severity: Warning, What: "the stored peers cannot be read: after a restart the agent would not know them until a coordinator answers", Evidence: h.peersErr.Error(), Fix: restart}}
	case err != nil:
		return []Finding{{Severity: Warning, What: "the stored lease cannot be read: after a restart the agent would not know it", Evidence: err.Error(), Fix: restart}}
	}
	named := slices.ContainsFunc(h.found, func(f Finding) bool { return slices.Contains(namedElsewhere[:], f.Check) })
	if !ok || named || len(h.healthy()) == 0 {
		return nil
	}
	for i, g := range lease.Grants { // the agent holds some back while containers have addresses of before
		if o, _ := h.state.Overlay(g.Overlay.Name); !o.Subnet.IsValid() && !o.Subnet6.IsValid() {
			lease.Grants[i] = conf.Grant{Overlay: g.Overlay}
		}
	}
	want := datapath.HostOf(lease, h.state.IP)
	want.Peers, want.Partial = h.peers, true
	direct := h.state.Datapath.Routing == conf.RoutingDirect
	want.Direct = datapath.Direct{Take: direct, Send: direct}
	p, err := datapath.Inspect(want)
	if err != nil {
		return unread("objects", err)
	}
	if len(p.Ops) == 0 {
		return nil
	}
	var ops []string
	for _, o := range p.Ops[:min(most, len(p.Ops))] {
		ops = append(ops, o.String())
	}
	return []Finding{{
		Severity: Error, What: "the kernel is not as the agent would make it",
		Evidence: fmt.Sprintf("%d changes, among them: %s", len(p.Ops), strings.Join(ops, "; ")), Fix: restart,
	}}
}
