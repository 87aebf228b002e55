package agent

import (
	"context"
	"maps"
	"net/http"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/fastpath"
	"overlayd.internal/overlay/overlayd/internal/audit"
	"overlayd.internal/overlay/overlayd/internal/datapath"
	"overlayd.internal/overlay/overlayd/internal/fast"
	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/metrics"
)

// usageTimeout bounds waiting for the address stores: a page without them is
// better than none.
const usageTimeout = 2 * time.Second

// counts are what is counted as it happens; all else is read when somebody asks.
type counts struct {
	*metrics.Registry
	registrations metrics.Counter
	reconcile     metrics.Durations
	changed       metrics.Counter
	reads         metrics.Counter
	reports       metrics.Counter
	drift         metrics.Counter
}

func newCounts(version string) *counts {
	r := metrics.New("agent", version)
	c := &counts{
		Registry:      r,
		registrations: r.Counter("overlay_agent_registrations_total", "Registrations and renewals asked for since the start.", "result"),
		reconcile:     r.Durations("overlay_agent_reconcile_duration_seconds", "How long it took to make the host what it should be.", "result"),
		changed:       r.Counter("overlay_agent_kernel_changes_total", "Kernel objects added, changed or removed since the start."),
	}
	c.drift = r.Counter("overlay_agent_drift_total", "Kernel objects of ours that others had changed or removed and that were put back, since the start.", "kind")
	for _, kind := range datapath.DriftKinds() {
		c.drift.Add(0, kind)
	}
	c.reads, c.reports = newInventoryCounts(r)
	c.registrations.Add(0, "granted") // so that a rate can be told from the first one on
	c.registrations.Add(0, "failed")
	c.changed.Add(0)
	return c
}

// newInventoryCounts count what is done to tell the coordinator of the containers.
func newInventoryCounts(r *metrics.Registry) (reads, reports metrics.Counter) {
	reads = r.Counter("overlay_agent_inventory_reads_total", "Readings of the address stores for the coordinator since the start.")
	reports = r.Counter("overlay_agent_inventory_reports_total", "Reports of attached containers to the coordinator since the start.", "result")
	reads.Add(0)
	reports.Add(0, "accepted")
	reports.Add(0, "failed")
	return reads, reports
}

func (c *counts) reported(err error) {
	if err != nil {
		c.reports.Add(1, "failed")
		return
	}
	c.reports.Add(1, "accepted")
}

func (c *counts) registration(err error) {
	if err != nil {
		c.registrations.Add(1, "failed")
		return
	}
	c.registrations.Add(1, "granted")
}

func (c *counts) drifted(kind string, n int) { c.drift.Add(n, kind) }

func (c *counts) reconciled(began time.Time, r datapath.Report) {
	result := "ok"
	if r.Err != nil || len(r.Overlays) > 0 {
		result = "failed"
	}
	c.reconcile.Observe(time.Since(began), result)
	c.changed.Add(r.Changed)
}

func (a *Agent) serveMetrics(w http.ResponseWriter, r *http.Request) error {
	a.counts.Serve(w, r, a.readMetrics)
	return nil
}

func (a *Agent) readMetrics(ctx context.Context, p *metrics.Page) {
	s := a.served.Load()
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
	a.trafficMetrics(p, s.state)
	a.callMetrics(p)
	ctx, cancel := context.WithTimeout(ctx, usageTimeout)
	defer cancel()
	usage, err := audit.ReadUsage(ctx, a.opts.RunDir, s.state)
	p.Bool("overlay_agent_address_stores_ok", "Whether all address stores could be read.", err == nil)
	usageMetrics(p, audit.Sum(usage))
}

// trafficMetrics say what crossed hosts by the fast path, and what it left to the
// kernel. The counters begin anew with the agent.
func (a *Agent) trafficMetrics(p *metrics.Page, state conf.State) {
	p.Bool("overlay_agent_fast_path", "Whether traffic between hosts takes the fast path (BPF programs).", state.Datapath.Taken == string(fast.EBPF))
	traffic, err := a.fast.Traffic()
	if err != nil {
		a.log.Warn("cannot read the counters of the fast path", logkey.Err, err)
	}
	names := slices.Sorted(maps.Keys(traffic))
	for _, unit := range []struct {
		name, help string
		of         func(fastpath.Count) uint64
	}{
		{"overlay_agent_traffic_packets_total", "Packets between containers of two hosts, on the wire, by the path they took.", func(c fastpath.Count) uint64 { return c.Packets }},
		{"overlay_agent_traffic_bytes_total", "Bytes of the frames between containers of two hosts, by the path they took.", func(c fastpath.Count) uint64 { return c.Bytes }},
	} {
		for _, name := range names {
			t := traffic[name]
			p.Counter(unit.name, unit.help, float64(unit.of(t.Out)), "overlay", name, "direction", "out", "path", "fast")
			p.Counter(unit.name, unit.help, float64(unit.of(t.In)), "overlay", name, "direction", "in", "path", "fast")
			p.Counter(unit.name, unit.help, float64(unit.of(t.PassedOut)), "overlay", name, "direction", "out", "path", "kernel")
			p.Counter(unit.name, unit.help, float64(unit.of(t.PassedIn)), "overlay", name, "direction", "in", "path", "kernel")
			p.Counter(unit.name, unit.help, float64(unit.of(t.Near)), "overlay", name, "direction", "local", "path", "fast")
		}
	}
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
