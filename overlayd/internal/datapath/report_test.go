package datapath

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// What could not be sent because the context ended is sent by the next Set.
func TestCancelled(t *testing.T) {
	_, hosts := onlyIPv4.plugHosts(t, 1)
	h, cfg := hosts[0], onlyIPv4.Host(0, 4)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, resync := range []bool{false, true} {
		var r Report
		h.do(func() { r = h.dp.Apply(ctx, Wanted{Host: cfg, Resync: resync}) })
		if !errors.Is(r.Err, context.Canceled) {
			t.Errorf("resync %t: %v", resync, r.Err)
		}
	}
	if r := h.mustSet(cfg, false); r.Changed != 3*4 {
		t.Errorf("%d objects changed, want 12", r.Changed)
	}
	h.mustBeIdle(cfg)
}

// Thousands of failures for one reason are not told one by one.
func TestReportIsShort(t *testing.T) {
	var all []plan.Problem
	for i := range 5000 {
		all = append(all, plan.Problem{Overlay: "dcos", Err: fmt.Errorf("route %d", i)}, plan.Problem{Overlay: "", Err: fmt.Errorf("neighbour %d", i)})
	}
	r := newReport(all, 1450, 0, errors.New("and stopped"))
	if got := r.Overlays["dcos"].Error(); strings.Count(got, "\n") != maxReported || !strings.HasSuffix(got, "and 4992 more") {
		t.Errorf("overlay: %s", got)
	}
	if got := r.Err.Error(); !strings.HasPrefix(got, "neighbour 0\n") || !strings.HasSuffix(got, "and 4992 more\nand stopped") {
		t.Errorf("host: %s", got)
	}
}
