package coordinator_test

import (
	"net/netip"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// TestDrafts: what is known of an agent that registered here is what its record says,
// whatever has changed, and nothing is remembered of writes that have ended.
func TestDrafts(t *testing.T) {
	s := newStore(t)
	n := start(t, s, network(""))
	second := nth(1)
	second.Underlay = conf.Underlay{Direct: true, MTU: 1450, SecondIP: netip.MustParseAddr("fd00::1"), SecondMTU: 1430, TwoFamilies: true}
	moved := nth(0)
	moved.AgentIP, moved.Bridges = netip.MustParseAddr("10.99.0.1"), []conf.Half{conf.Docker}
	for i, req := range []api.RegisterRequest{nth(0), second, moved, wanting(1, "a", 3), nth(1), {AgentID: "none", AgentIP: netip.MustParseAddr("10.99.0.2")}} {
		lease := n.register(t, req)
		if wrong := n.Misread(t, s); wrong != nil {
			t.Errorf("after registration %d: %v", i, wrong)
		}
		if i != 3 {
			continue
		}
		back := wanting(1, "a", 1)
		back.Return = &api.Return{Epoch: lease.Epoch, Blocks: map[string][]conf.Block{"a": lease.Grants[0].Blocks}}
		if l := n.register(t, back); len(l.Grants[0].Blocks) != 0 {
			t.Fatal("nothing was given back")
		}
		if wrong := n.Misread(t, s); wrong != nil {
			t.Errorf("after giving back: %v", wrong)
		}
	}
	for _, status := range []conf.Status{conf.StatusOK, conf.StatusFailed, conf.StatusFailed} {
		err := n.client.Report(t.Context(), api.StatusReport{AgentID: "agent-0", Overlays: map[string]conf.OverlayStatus{"a": {Status: status}}})
		if wrong := n.Misread(t, s); err != nil || wrong != nil {
			t.Errorf("after a report: %v, %v", err, wrong)
		}
	}
}
