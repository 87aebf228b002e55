package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// TestImportState: the hosts of the seed's cluster move over in another order than
// they once joined in, and another host before them. Each gets what it had, and
// containers talk.
func TestImportState(t *testing.T) {
	o := options()
	o.Secure = true
	s := makeSeed(t, seedConfig(t), o)
	ctx := t.Context()
	must(t, s.StartCoordinator(ctx))
	state := filepath.Join(top, "conf/examples/dcos-state.json")
	out, err := s.Overlayctl(ctx, "import-state", state)
	must(t, err)
	if !strings.HasPrefix(out, "3 leases reserved, 0 were before, 0 hosts have registered") {
		t.Error(out)
	}
	newcomer, err := s.Host(ctx, "newcomer", 9)
	must(t, err)
	for _, h := range []*lab.Host{newcomer, s.Agents[1], s.Agents[0], s.Master} {
		must(t, s.StartAgent(h))
		must(t, h.WaitRegistered(ctx, s.Coordinator))
	}
	must(t, s.WaitMesh(ctx))
	must(t, s.PlaceAll(ctx))
	checkTraffic(t, s)

	byIP := func(document []byte) map[string]any {
		var doc struct{ Agents []map[string]any }
		must(t, json.Unmarshal(document, &doc))
		agents := map[string]any{}
		for _, a := range doc.Agents {
			if ip := a["ip"].(string); ip != newcomer.Underlay().String() {
				agents[ip] = a
			}
		}
		return agents
	}
	want, err := os.ReadFile(state)
	must(t, err)
	if seed, err := os.ReadFile("testdata/seed-state.json"); err != nil || string(seed) != string(want) {
		t.Errorf("conf/examples/dcos-state.json is not the state of the seed's cluster (%v)", err)
	}
	wanted, err := json.Marshal(byIP(want))
	must(t, err)
	var diff string
	if err := lab.Wait(ctx, "the state of the DC/OS cluster", 10*time.Second, func() error {
		got, err := s.Coordinator.Get(ctx, "/overlay-master/state")
		if err != nil {
			return err
		}
		is, err := json.Marshal(byIP(got))
		if err != nil {
			return err
		}
		if diff = lab.DiffState(is, wanted); diff != "" {
			return os.ErrInvalid
		}
		return nil
	}); err != nil {
		t.Errorf("%v (-DC/OS +ours):\n%s", err, diff)
	}
	if out, err = s.Overlayctl(ctx, "import-state", state); err != nil || !strings.HasPrefix(out, "0 leases reserved, 0 were before, 3 hosts have registered") {
		t.Errorf("again: %v\n%s", err, out)
	}
	if out, err := s.Overlayctl(ctx, "import-state", "--list", "-o", "json"); err != nil || strings.TrimSpace(out) != "[]" {
		t.Errorf("list: %v\n%s", err, out)
	}
}

// TestImportStateByDaemon: overlayd knows the command too, and what is no state is
// a mistake of usage.
func TestImportStateByDaemon(t *testing.T) {
	out, status := program(t, "overlayd", "import-state", "--help")
	if status != 0 || !strings.Contains(out, "overlayctl import-state") {
		t.Errorf("status %d:\n%s", status, out)
	}
	bad := filepath.Join(t.TempDir(), "state.json")
	must(t, os.WriteFile(bad, []byte("agents:"), 0o600))
	if out, status := program(t, "overlayd", "import-state", bad); status != 2 || !strings.Contains(out, "is not JSON") {
		t.Errorf("status %d:\n%s", status, out)
	}
}
