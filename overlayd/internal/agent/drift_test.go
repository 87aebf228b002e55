package agent

import (
	"bytes"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath"
)

// Every repair counts; the same one over and over is logged three times, then once
// a minute.
func TestDriftLog(t *testing.T) {
	var out bytes.Buffer
	counted := map[string]int{}
	d := driftLog{log: slog.New(slog.NewTextHandler(&out, nil)), count: func(kind string, n int) { counted[kind] += n }}
	now := time.Now()
	link := datapath.Drift{Counts: map[string]int{"link": 1}, What: []string{"link set m-dcos up"}}
	both := datapath.Drift{Counts: map[string]int{"link": 1, "sysctl": 2}, What: []string{"link set m-dcos up", "sysctl x=1"}}
	for _, step := range []struct {
		drift  datapath.Drift
		later  time.Duration
		logged int
	}{
		{datapath.Drift{}, 0, 0},
		{link, time.Second, 1},
		{link, time.Second, 2},
		{link, time.Second, 3},
		{link, time.Second, 3},
		{link, time.Second, 3},
		{both, time.Second, 4},
		{link, time.Second, 5},
		{link, driftQuiet, 6},
		{link, time.Second, 7},
		{link, time.Second, 7},
		{link, driftQuiet, 8},
	} {
		now = now.Add(step.later)
		d.take(step.drift, now)
		if got := strings.Count(out.String(), "kernel state repaired"); got != step.logged {
			t.Errorf("logged %d times, want %d:\n%s", got, step.logged, &out)
		}
	}
	if counted["link"] != 11 || counted["sysctl"] != 2 || !slices.Equal(d.state.Counts, []conf.DriftCount{{Kind: "link", Objects: 11}, {Kind: "sysctl", Objects: 2}}) {
		t.Errorf("counted %v, published %v", counted, d.state)
	}
	if !strings.Contains(out.String(), `objects=3 kinds=link,sysctl what="link set m-dcos up; sysctl x=1"`) {
		t.Errorf("logged\n%s", &out)
	}
}
