package coordinator

import (
	"net/http"
	"sync/atomic"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/allocate"
	"overlayd.internal/overlay/overlayd/internal/metrics"
)

// counts are what only counting tells; all else is read when somebody asks.
type counts struct{ granted, refused atomic.Uint64 }

func (c *counts) registration(err error) {
	if err != nil {
		c.refused.Add(1)
		return
	}
	c.granted.Add(1)
}

func (c *Coordinator) serveMetrics(w http.ResponseWriter, _ *http.Request) error {
	var p metrics.Page
	p.Gauge("overlay_build_info", "Always 1; the labels say what runs.", 1, "program", "coordinator", "version", c.version)
	registrations := func(result string, n uint64) {
		p.Counter("overlay_coordinator_registrations_total", "Registrations and renewals answered since the start.", float64(n), "result", result)
	}
	registrations("granted", c.counts.granted.Load())
	registrations("refused", c.counts.refused.Load())
	c.agentMetrics(&p)
	c.storeMetrics(&p)
	p.Serve(w)
	return nil
}

// agentMetrics are about all agents that are not superseded.
func (c *Coordinator) agentMetrics(p *metrics.Page) {
	agents, connected := 0, 0
	type key struct {
		overlay string
		status  conf.Status
	}
	reported := map[key]int{}
	for _, k := range c.knownAgents(false) {
		if k.Superseded != "" {
			continue
		}
		agents++
		if k.connected {
			connected++
		}
		for overlay, s := range k.status.decode().Overlays {
			reported[key{overlay, s.Status}]++
		}
	}
	p.Gauge("overlay_coordinator_agents", "Agents that have a lease.", float64(agents))
	p.Gauge("overlay_coordinator_agents_connected", "Agents that follow their peers right now.", float64(connected))
	for _, o := range c.network.Overlays {
		for _, s := range []conf.Status{conf.StatusOK, conf.StatusFailed, conf.StatusConfiguring} {
			p.Gauge("overlay_coordinator_overlay_agents", "Agents by what they have made of an overlay.",
				float64(reported[key{o.Name, s}]), "overlay", o.Name, "status", string(s))
		}
	}
}

// storeMetrics are about the store and how full the pools are.
func (c *Coordinator) storeMetrics(p *metrics.Page) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p.Bool("overlay_coordinator_ready", "Whether leases can be granted.", c.readyLocked() == nil)
	p.Gauge("overlay_coordinator_store_revision", "Revision of the store.", float64(c.view.rev))
	each := func(name, help string, value func(*allocate.Pool) uint64) {
		add := func(pool *allocate.Pool, family string, labels ...string) {
			if pool != nil {
				p.Gauge(name, help, float64(value(pool)), append(labels, "family", family)...)
			}
		}
		pools := c.view.pools
		add(pools.vtep, "ipv4", "pool", "vtep")
		add(pools.vtep6, "ipv6", "pool", "vtep")
		for _, o := range c.network.Overlays {
			add(pools.overlays[o.Name].v4, "ipv4", "pool", "subnet", "overlay", o.Name)
			add(pools.overlays[o.Name].v6, "ipv6", "pool", "subnet", "overlay", o.Name)
		}
	}
	each("overlay_coordinator_pool_size", "VTEP addresses, or agent subnets of an overlay, that there are.", (*allocate.Pool).Total)
	each("overlay_coordinator_pool_used", "How many of them are leased.", (*allocate.Pool).Used)
}
