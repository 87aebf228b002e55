package coordinator

import (
	"context"
	"net/http"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/allocate"
	"overlayd.internal/overlay/overlayd/internal/metrics"
)

// counts are what is counted as it happens; all else is read when somebody asks.
type counts struct {
	*metrics.Registry
	registrations metrics.Counter
	store         metrics.Durations
}

func newCounts(version string) *counts {
	r := metrics.New("coordinator", version)
	c := &counts{
		Registry:      r,
		registrations: r.Counter("overlay_coordinator_registrations_total", "Registrations and renewals answered since the start.", "result"),
		store:         r.Durations("overlay_coordinator_store_duration_seconds", "How long the store took, failures included.", "operation"),
	}
	c.registrations.Add(0, "granted") // so that a rate can be told from the first one on
	c.registrations.Add(0, "refused")
	return c
}

func (c *counts) registration(err error) {
	if err != nil {
		c.registrations.Add(1, "refused")
		return
	}
	c.registrations.Add(1, "granted")
}

func (c *counts) storeTook(operation string, took time.Duration) { c.store.Observe(took, operation) }

func (c *Coordinator) serveMetrics(w http.ResponseWriter, r *http.Request) error {
	c.counts.Serve(w, r, func(_ context.Context, p *metrics.Page) {
		c.agentMetrics(p)
		c.storeMetrics(p)
		c.addressMetrics(p)
	})
	return nil
}

// agentMetrics are about agents, those that are not superseded where nothing else is
// said.
func (c *Coordinator) agentMetrics(p *metrics.Page) {
	agents, connected, superseded, gone := 0, 0, 0, 0
	type key struct {
		overlay string
		status  conf.Status
	}
	reported := map[key]int{}
	for _, k := range c.knownAgents(false) {
		if k.Superseded != "" {
			superseded++
			continue
		}
		if k.gone {
			gone++
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
	p.Gauge("overlay_coordinator_agents_superseded", "Agents whose address another one has; overlayctl agents prune gives their leases back.", float64(superseded))
	p.Gauge("overlay_coordinator_agents_gone", "Agents that nobody has seen for three terms.", float64(gone))
	for _, o := range c.network().Overlays {
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
	p.Gauge("overlay_coordinator_adopting_seconds", "How long only leases that agents show are granted, because the store lacks some; 0: all are.", c.adoptingLocked().Seconds())
	p.Gauge("overlay_coordinator_store_revision", "Revision of the store.", float64(c.view.rev))
	each := func(name, help string, value func(*allocate.Pool) uint64) {
		add := func(pool *allocate.Pool, family string, labels ...string) {
			if pool != nil {
				p.Gauge(name, help, float64(value(pool)), append(labels, "family", family)...)
			}
		}
		pools := c.view.pools
		add(pools.vtep, "ipv4", "pool", "vtep", "overlay", "")
		add(pools.vtep6, "ipv6", "pool", "vtep", "overlay", "")
		for _, o := range c.network().Overlays {
			add(pools.overlays[o.Name].v4, "ipv4", "pool", "subnet", "overlay", o.Name)
			add(pools.overlays[o.Name].v6, "ipv6", "pool", "subnet", "overlay", o.Name)
		}
	}
	each("overlay_coordinator_pool_size", "VTEP addresses, or agent subnets of an overlay, that there are.", (*allocate.Pool).Total)
	each("overlay_coordinator_pool_used", "How many of them are leased.", (*allocate.Pool).Used)
}
