package agent

import (
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath"
)

// Docker makes no network, and with it no bridge, of an overlay whose range
// holds a network of the host.
func TestRefusedOverlaysAreNotOffered(t *testing.T) {
	overlays := testLease().AgentOverlays(nil)
	l := &loop{}
	if got := l.allowed(overlays); len(got) != len(overlays) {
		t.Errorf("%d overlays are offered, want all %d", len(got), len(overlays))
	}
	l.outcome.report = datapath.Report{Refused: []string{"dcos"}}
	got := l.allowed(overlays)
	if len(got) != len(overlays)-1 || got[0].Info.Name == "dcos" {
		t.Errorf("offered are %+v", got)
	}
	if state := (conf.State{Overlays: overlays}); state.Overlays[0].Info.Name != "dcos" {
		t.Error("the document lost the overlay")
	}
}
