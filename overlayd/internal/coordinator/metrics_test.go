package coordinator_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/metrics/metricstest"
)

// TestMetrics: the numbers are those of the state.
func TestMetrics(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	n.register(t, nth(0))
	n.register(t, nth(1))
	n.register(t, nth(1)) // a renewal
	if _, err := n.client.Register(t.Context(), request("a/b", "172.16.0.9")); err == nil {
		t.Fatal("a bad agent id was granted a lease")
	}
	n.watch(t, nth(1).AgentID, 0).next(t)
	err := n.Report(t.Context(), api.StatusReport{AgentID: nth(0).AgentID, Overlays: map[string]conf.OverlayStatus{
		"dcos": {Status: conf.StatusOK}, "dcos6": {Status: conf.StatusFailed, Error: "no such device"},
	}})
	if err != nil {
		t.Fatal(err)
	}

	resp, err := http.Get(n.url + api.PathMetrics)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.Header.Get("Content-Type"); !strings.HasPrefix(got, "text/plain; version=0.0.4") {
		t.Errorf("Content-Type %q", got)
	}
	metricstest.Lint(t, string(b))
	lines := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		lines[strings.TrimSpace(line)] = true
	}
	for _, want := range []string{
		`overlay_build_info{program="coordinator",version="test"} 1`,
		`# TYPE overlay_coordinator_registrations_total counter`,
		`overlay_coordinator_registrations_total{result="granted"} 3`,
		`overlay_coordinator_registrations_total{result="refused"} 1`,
		`overlay_coordinator_agents 2`,
		`# TYPE overlay_coordinator_store_duration_seconds histogram`,
		`overlay_coordinator_agents_connected 1`,
		`overlay_coordinator_overlay_agents{overlay="dcos",status="STATUS_OK"} 1`,
		`overlay_coordinator_overlay_agents{overlay="dcos",status="STATUS_FAILED"} 0`,
		`overlay_coordinator_overlay_agents{overlay="dcos6",status="STATUS_FAILED"} 1`,
		`overlay_coordinator_ready 1`,
		`overlay_coordinator_pool_size{family="ipv4",overlay="",pool="vtep"} 4094`,
		`overlay_coordinator_pool_used{family="ipv6",overlay="",pool="vtep"} 2`,
		`overlay_coordinator_pool_size{family="ipv4",overlay="dcos",pool="subnet"} 65536`,
		`overlay_coordinator_pool_used{family="ipv6",overlay="dcos6",pool="subnet"} 2`,
	} {
		if !lines[want] {
			t.Errorf("no line %s in\n%s", want, b)
		}
	}
}
