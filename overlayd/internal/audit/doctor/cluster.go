package doctor

import (
	"fmt"
	"time"
)

func checkCoordinators(h *host) (out []Finding) {
	silent := 0
	for _, c := range h.coordinators {
		if c.Err != nil {
			silent++
		}
	}
	for _, c := range h.coordinators {
		if c.Err == nil {
			continue
		}
		f := Finding{Severity: Warning, What: "the coordinator " + c.URL + " cannot be used", Evidence: c.Err.Error(),
			Fix: "see that overlayd coordinator runs there, and that its port is reached from here"}
		if silent == len(h.coordinators) {
			f.Severity = Error
			f.What += ", nor can another: no host can join, and leases are not renewed"
		}
		out = append(out, f)
	}
	return out
}

// skew is how far clocks may be apart: certificates are good from their making.
const skew = 30 * time.Second

func checkClock(h *host) (out []Finding) {
	for _, c := range h.coordinators {
		if c.Err == nil && c.Ahead.Abs() > skew {
			out = append(out, Finding{
				Severity: Warning, What: "the clocks of this host and of a coordinator differ: certificates are refused, and logs do not fit together",
				Evidence: fmt.Sprintf("%s is %s ahead of this host", c.URL, c.Ahead.Round(time.Second)), Fix: "timedatectl set-ntp true, on both",
			})
		}
	}
	return out
}

func checkVersions(h *host) (out []Finding) {
	if h.Version != "" && h.state.Version != "" && h.state.Version != h.Version {
		out = append(out, Finding{
			Severity: Warning, What: "the agent that runs is not of the version that is installed",
			Evidence: fmt.Sprintf("the agent is %s, this program is %s", h.state.Version, h.Version), Fix: restart,
		})
	}
	return out
}
