package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// What doctor finds on a host is at the coordinator, and gone from there when it is
// cured.
func TestExaminer(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.tune = func(timing *timing) {
		timing.examineFirst, timing.examine, timing.examineAgain = 100*time.Millisecond, 100*time.Millisecond, 100*time.Millisecond
	}
	h.start()
	h.ready()
	other := filepath.Join(h.opts.CNIConfDir, "10-other.conf")
	const want = "doctor: warning: runtimes that are not told a network take another one before an overlay"
	told := func(is bool) {
		t.Helper()
		eventually(t, fmt.Sprintf("told: %v", is), func() error {
			agents, err := c.client().Agents(t.Context())
			if err != nil {
				return err
			}
			if len(agents) != 1 || slices.Contains(agents[0].Problems, want) != is {
				return fmt.Errorf("%+v", agents)
			}
			n := 0
			for _, p := range agents[0].Problems {
				if strings.HasPrefix(p, "doctor: ") {
					n++
				}
			}
			if n > maxFindings {
				t.Fatalf("%d findings are told", n)
			}
			return nil
		})
	}
	must(t, os.WriteFile(other, []byte(`{"cniVersion": "1.0.0", "name": "other", "type": "bridge"}`), 0o644))
	told(true)
	must(t, os.Remove(other))
	told(false)
}
