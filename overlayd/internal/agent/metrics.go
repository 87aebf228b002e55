package agent

import (
	"context"
	"net/http"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/audit"
	"overlayd.internal/overlay/overlayd/internal/metrics"
)

// usageTimeout bounds waiting for the address stores: a page without them is
// better than none.
const usageTimeout = 2 * time.Second

func (a *Agent) serveMetrics(w http.ResponseWriter, r *http.Request) error {
	s := a.served.Load()
	var p metrics.Page
	p.Gauge("overlay_build_info", "Always 1; the labels say what runs.", 1, "program", "agent", "version", a.opts.Version)
	p.Bool("overlay_agent_ready", "Whether new containers can be attached.", s.reason() == "")
	p.Gauge("overlay_agent_lease_epoch", "Epoch of the lease, 0 if there is none.", float64(s.state.Lease.Epoch))
	p.Gauge("overlay_agent_lease_remaining_seconds", "How long the lease holds without being renewed.", max(0, s.expires-s.now()).Seconds())
	p.Gauge("overlay_agent_mtu_bytes", "MTU of VTEP, bridges and containers.", float64(s.state.MTU))
	p.Gauge("overlay_agent_peers", "Other hosts that packets are forwarded to.", float64(a.peers.Load()))
	p.Gauge("overlay_agent_configuration_attempts", "Rounds since the lease changed, until all was well.", float64(s.state.ConfigurationAttempts))
	for _, o := range s.state.Overlays {
		p.Bool("overlay_agent_overlay_ok", "Whether the overlay is set up on this host.",
			o.State != nil && o.State.Status == conf.StatusOK, "overlay", o.Info.Name)
	}
	ctx, cancel := context.WithTimeout(r.Context(), usageTimeout)
	defer cancel()
	usage, err := audit.ReadUsage(ctx, a.opts.RunDir, s.state)
	p.Bool("overlay_agent_address_stores_ok", "Whether all address stores could be read.", err == nil)
	usageMetrics(&p, usage)
	p.Serve(w)
	return nil
}

// usageMetrics say how full the halves are: what DC/OS had no way to tell.
func usageMetrics(p *metrics.Page, usage []audit.Usage) {
	labels := func(u audit.Usage, more ...string) []string {
		family := "ipv4"
		if u.Range.Addr().Is6() {
			family = "ipv6"
		}
		return append([]string{"overlay", u.Overlay, "half", string(u.Half), "family", family}, more...)
	}
	for _, u := range usage {
		const name, help = "overlay_agent_addresses", "Addresses of a half, by what they are."
		p.Gauge(name, help, float64(u.Used), labels(u, "state", "used")...)
		p.Gauge(name, help, float64(u.Cooling), labels(u, "state", "cooling")...)
		p.Gauge(name, help, float64(u.Free()), labels(u, "state", "free")...)
	}
	for _, u := range usage {
		p.Counter("overlay_agent_addresses_reused_early_total", "Addresses used again before they had cooled, since the host was booted.", float64(u.Early), labels(u)...)
	}
}
