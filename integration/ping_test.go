package integration

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

type pinged struct {
	From, To, Address netip.Addr
	AgentID           string `json:"agent_id"`
	Sent, Received    int
	Loss              float64 `json:"loss_percent"`
	Avg               float64 `json:"rtt_avg_ms"`
	PathMTU           int     `json:"path_mtu"`
	MTU               int
}

// pings runs overlayctl ping and checks that its exit code fits.
func pings(t *testing.T, h *lab.Host, args ...string) []pinged {
	t.Helper()
	cmd := h.Command(t.Context(), append([]string{filepath.Join(h.Lab.Bin, "overlayctl"), "ping", "-o", "json", "--run-dir", h.RunDir}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var rows []pinged
	if jerr := json.Unmarshal(out, &rows); jerr != nil {
		t.Fatalf("overlayctl ping %q: %v, %v\n%s%s", args, err, jerr, out, stderr.String())
	}
	whole := true
	for _, r := range rows {
		whole = whole && r.Received == r.Sent && r.PathMTU >= r.MTU
	}
	if (err == nil) != whole {
		t.Errorf("overlayctl ping %q: %v\n%s", args, err, out)
	}
	return rows
}

// TestPing: healthy ways, one that carries small packets only, and one that is cut.
func TestPing(t *testing.T) {
	t.Parallel()
	s := upSeed(t, seedConfig(t))
	h, peer := s.Agents[0], s.Agents[1]
	far := place(t, s, 1, "far", "dcos", lab.Docker)
	far6 := place(t, s, 1, "far6", "dcos6", lab.Mesos)

	must(t, lab.Wait(t.Context(), "the agent to store its peers", 15*time.Second, func() error {
		out, err := h.Run(t.Context(), filepath.Join(h.Lab.Bin, "overlayctl"), "peers", "--run-dir", h.RunDir)
		if n := strings.Count(string(out), "\n"); err == nil && n != 3 {
			err = fmt.Errorf("%d lines", n)
		}
		return err
	}))
	rows := pings(t, h, "--all", "--count", "20")
	if len(rows) != 2 {
		t.Fatalf("%+v, want the two other hosts", rows)
	}
	for _, r := range rows {
		if r.From.String() != "172.17.0.4" || r.Sent != 20 || r.Received != 20 || r.Loss != 0 || r.Avg <= 0 || r.PathMTU != 1450 || r.MTU != 1450 {
			t.Errorf("%+v", r)
		}
	}
	id := rows[1].AgentID
	for _, name := range []string{"172.17.0.3", "44.128.0.3", id, id[:8]} {
		if rows := pings(t, h, name); len(rows) != 1 || rows[0].To.String() != "172.17.0.3" || rows[0].Address.String() != "44.128.0.3" || rows[0].Received != 5 {
			t.Errorf("%s: %+v", name, rows)
		}
	}
	for _, c := range []*lab.Container{far, far6} {
		if rows := pings(t, h, c.Addr().String()); len(rows) != 1 || rows[0].Address != c.Addr() || rows[0].PathMTU != 1450 {
			t.Errorf("container %s: %+v", c.Addr(), rows)
		}
	}
	for _, args := range [][]string{{}, {"--all", "172.17.0.3"}, {"--all", "--count", "0"}, {"--all", "--wait", "1ns"}} {
		out, status := program(t, append([]string{"overlayctl", "ping"}, args...)...)
		if status != 2 {
			t.Errorf("ping %q: status %d: %s", args, status, out)
		}
	}
	if out, err := h.Run(t.Context(), filepath.Join(h.Lab.Bin, "overlayctl"), "ping", "9.200.0.1", "--run-dir", h.RunDir); err == nil {
		t.Errorf("an address that nobody has: %s", out)
	}

	// The other host takes in no larger packets than these, and the four bytes that a
	// veth leaves for a VLAN tag, less the encapsulation.
	script(t, peer, "ip link set eth0 mtu 1400")
	for _, r := range pings(t, h, "--all", "--wait", "200ms") {
		want := map[string]int{"172.17.0.3": 1400 + 4 - 50}[r.To.String()]
		if want == 0 {
			want = 1450
		}
		if r.PathMTU != want || r.Received != r.Sent {
			t.Errorf("%+v, want a path MTU of %d", r, want)
		}
	}
	script(t, peer, "ip link set eth0 mtu 1500; iptables -t raw -I PREROUTING -p udp --dport 64000 -j DROP")
	for _, r := range pings(t, h, "--all", "--wait", "200ms") {
		if cut := r.To.String() == "172.17.0.3"; cut && (r.Received != 0 || r.Loss != 100 || r.PathMTU != 0) || !cut && r.Received != r.Sent {
			t.Errorf("%+v", r)
		}
	}
	out, err := h.Run(t.Context(), filepath.Join(h.Lab.Bin, "overlayctl"), "ping", "--all", "--wait", "200ms", "--run-dir", h.RunDir)
	if err == nil || !strings.Contains(err.Error()+string(out), "no answer; overlayctl doctor on both hosts") {
		t.Errorf("%v\n%s", err, out)
	}
	script(t, peer, "iptables -t raw -D PREROUTING -p udp --dport 64000 -j DROP")
}
