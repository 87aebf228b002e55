package agent

import (
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// The same repair over and over, because somebody undoes it every second, is
// logged a few times and then once in a while.
const (
	driftAlike = 3
	driftQuiet = time.Minute
)

// driftLog counts what others changed of ours and was put back, and logs it.
type driftLog struct {
	log    *slog.Logger
	count  func(kind string, n int)
	state  *conf.DriftState // nil: nothing yet
	counts map[string]int   // of state
	alike  int              // how often in a row it was state.Last
	logged time.Time        // when it was last logged
}

// take takes in what one round put back.
func (d *driftLog) take(drift datapath.Drift, now time.Time) {
	if len(drift.Counts) == 0 {
		return
	}
	s := &conf.DriftState{Last: strings.Join(drift.What, "; "), LastAt: now.UTC().Format(time.RFC3339)}
	if d.state != nil && d.state.Last != s.Last {
		d.alike = 0
	}
	d.alike++
	if d.counts == nil {
		d.counts = map[string]int{}
	}
	total := 0
	for kind, n := range drift.Counts {
		d.counts[kind] += n
		total += n
		d.count(kind, n)
	}
	for _, kind := range slices.Sorted(maps.Keys(d.counts)) {
		s.Counts = append(s.Counts, conf.DriftCount{Kind: kind, Objects: d.counts[kind]})
	}
	d.state = s // replaced, not changed: the last one is being served
	if d.alike > driftAlike && now.Sub(d.logged) < driftQuiet {
		return
	}
	d.logged = now
	d.log.Info("kernel state repaired", logkey.Objects, total,
		logkey.Kinds, strings.Join(slices.Sorted(maps.Keys(drift.Counts)), ","), logkey.What, s.Last)
}
