package agent

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/calls"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/metrics/metricstest"
)

// The numbers are there before there is a lease, and tell how full a half is
// after a container got an address of it.
func TestMetrics(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.join("other", "172.17.0.2")
	h := newHost(c)
	// A look at the whole kernel, as the agent's own routes bring about, would
	// count the peers too.
	h.tune = func(t *timing) { t.kernel, t.kernelPause, t.resync = time.Hour, time.Hour, time.Hour }
	c.stop()
	h.start()
	h.notReady("no lease yet")
	h.metrics(`overlay_agent_ready 0`, `overlay_agent_lease_remaining_seconds 0`, `overlay_agent_address_stores_ok 1`)

	c.start()
	h.ready()
	eventually(t, "the other host is a peer", func() error { return h.lines("overlay_agent_peers 1") })
	s, err := ipam.Open(t.Context(), ipam.Options{Dir: h.path(conf.IPAMDir), Overlay: "dcos"})
	must(t, err)
	_, err = s.Allocate(t.Context(), ipam.Request{
		Attachment: conf.Attachment{Network: "dcos", ContainerID: "c", IfName: "eth0"},
		Half:       conf.Mesos, Ranges: []netip.Prefix{prefix("9.0.1.0/25")},
	})
	must(t, err)
	must(t, s.Close())
	calls.Record(h.path(""), calls.Call{Program: "m-overlay", Verb: "ADD", Took: 3 * time.Millisecond})
	calls.Record(h.path(""), calls.Call{Program: "m-overlay", Verb: "ADD", Took: time.Minute, Code: 11})
	h.metrics(
		`# TYPE overlay_agent_cni_duration_seconds histogram`,
		`overlay_agent_cni_duration_seconds_bucket{program="m-overlay",result="ok",verb="ADD",le="0.002"} 0`,
		`overlay_agent_cni_duration_seconds_bucket{program="m-overlay",result="ok",verb="ADD",le="0.004"} 1`,
		`overlay_agent_cni_duration_seconds_sum{program="m-overlay",result="again",verb="ADD"} 60`,
		`overlay_agent_cni_duration_seconds_count{program="m-overlay",result="again",verb="ADD"} 1`,
		`overlay_build_info{program="agent",version="1.2.3"} 1`,
		`overlay_agent_ready 1`,
		`overlay_agent_mtu_bytes 1450`,
		`overlay_agent_peers 1`,
		`overlay_agent_overlay_ok{overlay="dcos6"} 1`,
		`overlay_agent_address_stores_ok 1`,
		`overlay_agent_addresses{family="ipv4",half="mesos",overlay="dcos",state="used"} 1`,
		`overlay_agent_addresses{family="ipv4",half="mesos",overlay="dcos",state="free"} 124`,
		`overlay_agent_addresses{family="ipv4",half="docker",overlay="dcos",state="used"} 0`,
		`overlay_agent_addresses{family="ipv6",half="docker",overlay="dcos6",state="cooling"} 0`,
		`overlay_agent_registrations_total{result="granted"} 1`,
		`# TYPE overlay_agent_reconcile_duration_seconds histogram`,
		`# TYPE overlay_agent_kernel_changes_total counter`,
		`# TYPE overlay_agent_addresses_reused_early_total counter`,
		`overlay_agent_addresses_reused_early_total{family="ipv4",half="mesos",overlay="dcos"} 0`,
	)

	_, body, err := h.get(api.PathMetrics)
	must(t, err)
	metricstest.Lint(t, body)

	// A later peer changes nothing else.
	c.join("late", "172.17.0.5")
	eventually(t, "the late host is a peer", func() error { return h.lines("overlay_agent_peers 2") })
}

// metrics checks that the page has these lines.
func (h *testHost) metrics(want ...string) {
	h.t.Helper()
	if err := h.lines(want...); err != nil {
		h.t.Error(err)
	}
}

func (h *testHost) lines(want ...string) error {
	code, body, err := h.get(api.PathMetrics)
	if err != nil || code != http.StatusOK {
		return fmt.Errorf("GET %s: %d %v %s", api.PathMetrics, code, err, body)
	}
	for _, line := range want {
		if !strings.Contains("\n"+body, "\n"+line+"\n") {
			return fmt.Errorf("no line %s in\n%s", line, body)
		}
	}
	return nil
}
