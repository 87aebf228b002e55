package datapath

import (
	"fmt"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// firewalld is told of sources where packets are taken without VXLAN, and is never
// asked to forget some that nobody told it of: they may be an administrator's.
func TestTrafficOf(t *testing.T) {
	for _, tc := range []struct {
		n    network
		take bool
		want string
	}{
		{bothIP, false, "[]"},
		{bothIP, true, "[9.0.0.0/8 44.128.0.0/14]"},
		{onlyIPv6, false, "[]"},
	} {
		w := tc.n.Host(0, 2)
		w.Direct.Take = tc.take
		got := trafficOf(w, &plan.State{Underlay: "eth0"})
		if fmt.Sprint(got.Sources) != tc.want || len(got.Former) > 0 {
			t.Errorf("take %v: sources %v, former %v, want %s and none", tc.take, got.Sources, got.Former, tc.want)
		}
	}
}
