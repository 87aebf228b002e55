package coordinator_test

import (
	"net/netip"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// TestSharedHalves: an overlay whose halves share a pool is leased to agents that know
// of such, whole, and nothing of it to those that would make two bridges of it. Before
// anybody has a subnet the halves may be changed.
func TestSharedHalves(t *testing.T) {
	n := start(t, newStore(t), networkOf(overlayOne, overlayTwo))
	shared := networkOf(strings.Replace(overlayOne, "}", `, "halves": "shared"}`, 1), overlayTwo)
	if plan, err := n.apply(t, shared); err != nil || !plan.Applied {
		t.Fatalf("halves of an overlay that nobody has: %v, %v", plan.Refused, err)
	}
	old := nth(1)
	l := n.register(t, old)
	if got := granted(l); !strings.Contains(got, "two 10.0.0.0/24") || strings.Contains(got, "9.0.") {
		t.Errorf("an agent that does not know of shared pools has %s", got)
	}
	if why := l.Grants[len(l.Grants)-1].Error; !strings.Contains(why, "overlay one: Mesos and Docker share one pool") || !strings.Contains(why, "upgrade the agent") {
		t.Errorf("it is told %q", why)
	}
	shown := func(whether bool) {
		t.Helper()
		var why string
		for _, g := range n.Agents()[0].Grants {
			if g.Overlay.Name == "one" {
				why = g.Error
			}
		}
		if whether != strings.Contains(why, "share one pool") || whether != strings.Contains(why, "(1.0)") {
			t.Errorf("people are told %q of overlay one", why)
		}
	}
	shown(true)
	if err := n.client.Report(t.Context(), api.StatusReport{AgentID: old.AgentID, Overlays: map[string]conf.OverlayStatus{"two": {Status: conf.StatusOK}}}); err != nil {
		t.Fatal(err)
	}
	shown(true)
	checkHeld(t, n, map[string]uint64{"one": 0, "two": 1})

	// It is upgraded, goes back, and is upgraded again.
	known := old
	known.SharedHalves = true
	for range 2 {
		l = n.register(t, known)
		shown(false)
		o := l.AgentOverlays(nil)[0]
		whole := netip.MustParsePrefix("9.0.0.0/24")
		for _, h := range conf.Halves {
			if b := o.Bridge(h); b == nil || b.Name != "m-one" || b.IP != whole {
				t.Errorf("the bridge of %s is %+v, want m-one with %s", h, b, whole)
			}
		}
		if got := granted(n.register(t, old)); strings.Contains(got, "9.0.") {
			t.Errorf("after it went back it has %s", got)
		}
		shown(true)
	}
	checkHeld(t, n, map[string]uint64{"one": 1, "two": 1})
}
