package agent

import (
	"overlayd.internal/overlay/internal/calls"
	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/metrics"
)

// callMetrics say what the CNI programs have done, which run without the agent and
// leave it in the run directory.
func (a *Agent) callMetrics(p *metrics.Page) {
	counts, err := calls.Read(a.opts.RunDir)
	if err != nil {
		a.log.Warn("cannot read the counters of the CNI programs", logkey.Err, err)
	}
	for _, c := range counts {
		upTo, sum := map[float64]uint64{}, uint64(0)
		for i, n := range c.Calls[:len(c.Calls)-1] {
			sum += n
			upTo[calls.Bucket(i).Seconds()] = sum
		}
		p.Histogram("overlay_agent_cni_duration_seconds", "How long calls of the CNI programs took, since the host was booted.",
			c.Total(), c.Sum, upTo, "program", c.Program, "verb", c.Verb, "result", c.Result)
	}
}
