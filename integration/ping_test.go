package integration

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
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
	return pingsAs(t, h, "", args...)
}

// pingsAs is pings by whoever has logged in with a home directory; empty: nobody has.
func pingsAs(t *testing.T, h *lab.Host, home string, args ...string) []pinged {
	t.Helper()
	cmd := overlayctlAs(t, h, home, append([]string{"ping", "-o", "json"}, args...)...)
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
	rows := pings(t, h, "--all", "--here", "--count", "20")
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
	home := operatorHome(t, s, h)
	pingMatrix(t, s, h, home)
	for _, args := range [][]string{{}, {"--here"}, {"--here", "172.17.0.3"}, {"--all", "--count", "101"}, {"--all", "172.17.0.3"}, {"--all", "--count", "0"}, {"--all", "--wait", "1ns"}} {
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
	for _, r := range pings(t, h, "--all", "--here", "--wait", "200ms") {
		want := map[string]int{"172.17.0.3": 1400 + 4 - 50}[r.To.String()]
		if want == 0 {
			want = 1450
		}
		if r.PathMTU != want || r.Received != r.Sent {
			t.Errorf("%+v, want a path MTU of %d", r, want)
		}
	}
	script(t, peer, "ip link set eth0 mtu 1500; iptables -t raw -I PREROUTING -p udp --dport 64000 -j DROP")
	for _, r := range pings(t, h, "--all", "--here", "--wait", "200ms") {
		if cut := r.To.String() == "172.17.0.3"; cut && (r.Received != 0 || r.Loss != 100 || r.PathMTU != 0) || !cut && r.Received != r.Sent {
			t.Errorf("%+v", r)
		}
	}
	said, err := overlayctlAs(t, h, home, "ping", "--all", "--wait", "200ms").CombinedOutput()
	// Nothing comes in at the one host, so no way from or to it carries anything.
	if out := string(said); err == nil || !strings.Contains(out, "no answer; overlayctl doctor on both hosts") ||
		!strings.Contains(out, "4 of 6 ways are not as they should be") || strings.Count(out, "LOST") != 4 {
		t.Errorf("%v\n%s", err, out)
	}
	script(t, peer, "iptables -t raw -D PREROUTING -p udp --dport 64000 -j DROP")
}

// operatorHome is a home directory with the login of an operator.
func operatorHome(t *testing.T, s *lab.Seed, h *lab.Host) (home string) {
	t.Helper()
	home = t.TempDir()
	token, err := s.Overlayctl(t.Context(), "token", "create", "--role", "operator")
	must(t, err)
	if out, err := overlayctlAs(t, h, home, "login", "--coordinator", s.Coordinator.URL, "--token", strings.TrimSpace(token)).CombinedOutput(); err != nil {
		t.Fatalf("log in: %v\n%s", err, out)
	}
	return home
}

// overlayctlAs is overlayctl on a host, by whoever has logged in with a home directory.
func overlayctlAs(t *testing.T, h *lab.Host, home string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := h.Command(t.Context(), append([]string{filepath.Join(h.Lab.Bin, "overlayctl"), "--run-dir", h.RunDir}, args...)...)
	if home != "" {
		cmd.Env = append(os.Environ(), "HOME="+home)
	}
	return cmd
}

// pingMatrix: every host measures the ways to every other one, for an operator alone,
// and one that does not answer is named.
func pingMatrix(t *testing.T, s *lab.Seed, h *lab.Host, home string) {
	t.Helper()
	ways := map[string]bool{}
	for _, r := range pingsAs(t, h, home, "--all") {
		ways[r.From.String()+" to "+r.To.String()] = true
		if r.Sent != 5 || r.Received != 5 || r.Avg <= 0 || r.PathMTU != 1450 {
			t.Errorf("%+v", r)
		}
	}
	hosts := []string{"172.17.0.2", "172.17.0.3", "172.17.0.4"}
	for _, from := range hosts {
		for _, to := range hosts {
			if from != to && !ways[from+" to "+to] {
				t.Errorf("the way from %s to %s is missing: %v", from, to, ways)
			}
		}
	}
	if len(ways) != 6 {
		t.Errorf("%d ways: %v", len(ways), ways)
	}
	out, err := overlayctlAs(t, h, home, "ping", "--all").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "6 ways, nothing lost, full packets") || strings.Count(string(out), "\n") != 6 {
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("\n%s", out)
	out, err = overlayctlAs(t, h, "", "ping", "--all").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "these are the ways from this host alone") || strings.Count(string(out), "172.17.0.4  172.17.0.") != 2 {
		t.Errorf("as nobody: %v\n%s", err, out)
	}

	gone := s.Agents[1]
	must(t, gone.Proc.Stop())
	must(t, lab.Wait(t.Context(), "the coordinator to see that an agent is gone", 30*time.Second, func() error {
		out, err := overlayctlAs(t, h, home, "ping", "--all", "--count", "1").CombinedOutput()
		if err == nil || !strings.Contains(string(out), "host 172.17.0.3 has not answered: it is not connected to a coordinator") || !strings.Contains(string(out), "?") {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return nil
	}))
	must(t, s.StartAgent(gone))
	must(t, gone.WaitReady(t.Context()))
}
