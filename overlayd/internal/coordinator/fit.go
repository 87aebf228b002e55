package coordinator

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
)

// explain turns what is leased and does not fit the configuration into one
// error, or nil. A block is never granted anew behind an agent's back: its
// containers would go on using the old one.
func (c *Coordinator) explain(v *view, misfits []*misfit) error {
	stored := v.network
	type group struct {
		overlay string
		ipv6    bool
	}
	groups := map[group][]*misfit{}
	for _, m := range misfits {
		g := group{m.overlay, m.block.Addr().Is6()}
		groups[g] = append(groups[g], m)
	}
	errs := c.explainReused(v)
	for g, ms := range groups {
		errs = append(errs, c.explainGroup(stored, g.overlay, g.ipv6, ms))
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrMisfit, errors.Join(errs...))
}

func (c *Coordinator) explainGroup(stored conf.Network, overlay string, ipv6 bool, ms []*misfit) error {
	var was, is string
	if overlay == "" {
		was, is = describeVTEP(stored, ipv6), describeVTEP(c.network, ipv6)
		return fmt.Errorf("%s is configured, but leased is %s; put back %s, or delete these agents under the old configuration first",
			is, examples(ms), was)
	}
	old, _ := stored.Overlay(overlay)
	now, _ := c.network.Overlay(overlay)
	was, is = describeOverlay(old, ipv6), describeOverlay(now, ipv6)
	return fmt.Errorf("overlay %s: %s is configured, but leased is %s; put back %s, or delete these agents under the old configuration first, or give the new overlay another name and range",
		overlay, is, examples(ms), was)
}

func describeVTEP(n conf.Network, ipv6 bool) string {
	key, subnet := "vtep_subnet", n.VTEPSubnet
	if ipv6 {
		key, subnet = "vtep_subnet6", n.VTEPSubnet6
	}
	return describe(key, subnet, "", 0)
}

func describeOverlay(o conf.Overlay, ipv6 bool) string {
	if ipv6 {
		return describe("subnet6", o.Subnet6, "prefix6", o.Prefix6)
	}
	return describe("subnet", o.Subnet, "prefix", o.Prefix)
}

func describe(key string, subnet netip.Prefix, key2 string, prefix int) string {
	switch {
	case !subnet.IsValid():
		return "the former " + key
	case key2 == "":
		return fmt.Sprintf("%s %s", key, subnet)
	}
	return fmt.Sprintf("%s %s with %s %d", key, subnet, key2, prefix)
}

// examples names a few of the misfits.
func examples(ms []*misfit) string {
	const few = 3
	var names []string
	for _, m := range ms[:min(few, len(ms))] {
		block := m.block.String()
		if m.overlay == "" {
			block = m.block.Addr().String()
		}
		names = append(names, fmt.Sprintf("%s by agent %s", block, m.owner))
	}
	s := strings.Join(names, ", ")
	if more := len(ms) - few; more > 0 {
		s += fmt.Sprintf(" and %d more", more)
	}
	return s
}

// configuredRange is a range of the configuration.
type configuredRange struct {
	of, key string // of is empty for the VTEPs
	prefix  netip.Prefix
}

// newRanges are those that the stored configuration has not got.
func (c *Coordinator) newRanges(stored conf.Network) (ranges []configuredRange) {
	add := func(overlay, key string, now, was netip.Prefix) {
		if now.IsValid() && now != was {
			ranges = append(ranges, configuredRange{overlay, key, now})
		}
	}
	add("", "vtep_subnet", c.network.VTEPSubnet, stored.VTEPSubnet)
	add("", "vtep_subnet6", c.network.VTEPSubnet6, stored.VTEPSubnet6)
	for _, o := range c.network.Overlays {
		old, _ := stored.Overlay(o.Name)
		add(o.Name, "subnet", o.Subnet, old.Subnet)
		add(o.Name, "subnet6", o.Subnet6, old.Subnet6)
	}
	return ranges
}

// explainReused is about new ranges of which a part is still leased under a name,
// or in a family, that is no longer configured, as after an overlay was renamed.
// On the host that has the lease the bridge and its subnet stay as long as there
// are containers; given to another host, the subnet would be on both.
func (c *Coordinator) explainReused(v *view) (errs []error) {
	type group struct {
		configuredRange
		was string // overlay
	}
	groups := map[group][]*misfit{}
	ranges := c.newRanges(v.network)
	for _, a := range v.agents {
		for _, m := range c.unconfigured(a) {
			for _, r := range ranges {
				if r.prefix.Overlaps(m.block) {
					g := group{r, m.overlay}
					groups[g] = append(groups[g], m)
				}
			}
		}
	}
	for g, ms := range groups {
		what := g.key
		if g.of != "" {
			what = fmt.Sprintf("overlay %s: %s", g.of, g.key)
		}
		slices.SortFunc(ms, func(a, b *misfit) int { return a.block.Addr().Compare(b.block.Addr()) })
		errs = append(errs, fmt.Errorf("%s %s is configured, but of it overlay %s, which no longer has it, leased %s; "+
			"put back overlay %s as it was, or choose a range that was not leased before, or stop these agents and delete them under the old configuration first",
			what, g.prefix, g.was, examples(ms), g.was))
	}
	return errs
}

// unconfigured are the subnets an agent keeps of overlays, or families of them,
// that are no longer configured.
func (c *Coordinator) unconfigured(a *agent) (kept []*misfit) {
	for _, h := range a.Subnets {
		o, _ := c.network.Overlay(h.Overlay)
		if h.Subnet.IsValid() && !o.Subnet.IsValid() {
			kept = append(kept, &misfit{resource: resource{overlay: h.Overlay, block: h.Subnet}, owner: a.id})
		}
		if h.Subnet6.IsValid() && !o.Subnet6.IsValid() {
			kept = append(kept, &misfit{resource: resource{overlay: h.Overlay, block: h.Subnet6}, owner: a.id})
		}
	}
	return kept
}

// logUnconfigured says once which leases are kept and not served because their
// overlay, or its family, is no longer configured.
func (c *Coordinator) logUnconfigured() {
	kept := map[string]int{}
	for _, a := range c.view.agents {
		for _, h := range a.Subnets {
			o, ok := c.network.Overlay(h.Overlay)
			switch {
			case !ok:
				kept[h.Overlay]++
			case h.Subnet.IsValid() && !o.Subnet.IsValid(), h.Subnet6.IsValid() && !o.Subnet6.IsValid():
				kept[h.Overlay+" (one address family)"]++
			}
		}
	}
	for _, overlay := range slices.Sorted(maps.Keys(kept)) {
		c.log.Warn("overlay is no longer configured; its leases are kept and not served",
			"overlay", overlay, "leases", kept[overlay])
	}
}
