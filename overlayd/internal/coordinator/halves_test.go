package coordinator_test

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// TestIsolationInFlags: an agent that knows isolation by true and false alone, as that
// of 2026-11-23, can read its lease whatever the configuration says.
func TestIsolationInFlags(t *testing.T) {
	with := func(overlay, isolation string) string {
		return strings.Replace(overlay, "}", `, "isolation": `+isolation+"}", 1)
	}
	n := start(t, newStore(t), networkOf(with(overlayOne, `"strict"`), with(overlayTwo, `"none"`),
		with(`{"name": "three", "subnet": "11.0.0.0/16", "prefix": 24}`, `"overlay"`), `{"name": "four", "subnet": "12.0.0.0/16", "prefix": 24}`,
		with(`{"name": "five", "subnet": "13.0.0.0/16", "prefix": 24, "halves": "shared"}`, `"strict"`)))
	isolation := func(req api.RegisterRequest) (said []string) {
		t.Helper()
		for _, g := range n.register(t, req).Grants {
			b, err := json.Marshal(g.Overlay.Isolation)
			if err != nil {
				t.Fatal(err)
			}
			said = append(said, g.Overlay.Name+" "+string(b))
		}
		return said
	}
	req := nth(1)
	if got, want := isolation(req), []string{"one true", "two false", "three true", `four ""`, "five true"}; !slices.Equal(got, want) {
		t.Errorf("an agent of before is told %q, want %q", got, want)
	}
	req.SharedHalves = true
	if got, want := isolation(req), []string{`one "strict"`, `two "none"`, `three "overlay"`, `four ""`, `five "strict"`}; !slices.Equal(got, want) {
		t.Errorf("one of today is told %q, want %q", got, want)
	}
}

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
