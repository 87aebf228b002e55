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

// fit says what of the leases does not fit a network that is to follow the present
// one, or nil.
func (v *view) fit(next conf.Network) error {
	return explain(v.network.Network, next, v.reserveAll(newPools(next)), v.explainRanges(next))
}

// explainRanges says what forbids ranges that the present network has not got, and
// what forbids that ranges go.
func (v *view) explainRanges(next conf.Network) []error {
	return slices.Concat(v.explainReused(next), v.explainAgentIPs(next), v.explainWithoutVTEPs(next), v.explainWithoutVTEPs6(next))
}

// explainWithoutVTEPs is about vtep_subnet, which stays as long as a holder has an
// address of it: the MAC of its VTEP is made of that.
func (v *view) explainWithoutVTEPs(next conf.Network) []error {
	if !v.network.VTEPSubnet.IsValid() || next.VTEPSubnet.IsValid() {
		return nil
	}
	have := 0
	for _, rec := range v.holders() {
		if rec.VTEP.IsValid() {
			have++
		}
	}
	if have == 0 {
		return nil
	}
	return []error{fmt.Errorf("vtep_subnet %s cannot be taken away: VTEPs have addresses of it, and their MACs are made of them, on %d hosts; "+
		"put it back, it is in nobody's way where overlays have IPv6 alone", v.network.VTEPSubnet, have)}
}

// explainWithoutVTEPs6 is about vtep_subnet6, which stays as long as a holder has an
// address of it alone: it would have none.
func (v *view) explainWithoutVTEPs6(next conf.Network) []error {
	if !v.network.VTEPSubnet6.IsValid() || next.VTEPSubnet6.IsValid() {
		return nil
	}
	var alone []string
	for owner, rec := range v.holders() {
		if !rec.VTEP.IsValid() {
			alone = append(alone, holderName(owner))
		}
	}
	if alone == nil {
		return nil
	}
	slices.Sort(alone)
	return []error{fmt.Errorf("vtep_subnet6 %s cannot be taken away: these have no IPv4 VTEP address and would be left without any: %s; "+
		"put it back, beside a vtep_subnet with room for all of them, and take it away when all have registered since; delete agents that are gone", v.network.VTEPSubnet6, few(alone))}
}

// explain turns what is leased and does not fit the configuration into one
// error, or nil. A block is never granted anew behind an agent's back: its
// containers would go on using the old one.
func explain(stored, next conf.Network, misfits []*misfit, others []error) error {
	errs := misfitErrors(stored, next, misfits, others)
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrMisfit, errors.Join(errs...))
}

// misfitErrors makes one error of what does not fit in one place, and adds others.
func misfitErrors(stored, next conf.Network, misfits []*misfit, errs []error) []error {
	type group struct {
		overlay string
		ipv6    bool
	}
	groups := map[group][]*misfit{}
	for _, m := range misfits {
		g := group{m.overlay, m.block.Addr().Is6()}
		groups[g] = append(groups[g], m)
	}
	for g, ms := range groups {
		errs = append(errs, explainGroup(stored, next, g.overlay, g.ipv6, ms))
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errs
}

func explainGroup(stored, next conf.Network, overlay string, ipv6 bool, ms []*misfit) error {
	var was, is string
	if overlay == "" {
		was, is = describeVTEP(stored, ipv6), describeVTEP(next, ipv6)
		return fmt.Errorf("%s is configured, but leased is %s; put back %s, or delete these agents under the old configuration first",
			is, examples(ms), was)
	}
	old, _ := stored.Overlay(overlay)
	now, _ := next.Overlay(overlay)
	was, is = describeOverlay(old, ipv6), describeOverlay(now, ipv6)
	return fmt.Errorf("overlay %s: %s is configured, but leased is %s; put back %s, or delete these agents under the old configuration first, or give the new overlay another name and range, and drain this one (overlayctl overlays drain %s)",
		overlay, is, examples(ms), was, overlay)
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
		names = append(names, fmt.Sprintf("%s by %s", block, holderName(m.owner)))
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
	bits    int // of an agent subnet
}

func (r configuredRange) name() string {
	if r.of == "" {
		return r.key
	}
	return fmt.Sprintf("overlay %s: %s", r.of, r.key)
}

// ranges are all those of a network.
func ranges(n conf.Network) (out []configuredRange) {
	add := func(overlay, key string, p netip.Prefix, bits int) {
		if p.IsValid() {
			out = append(out, configuredRange{overlay, key, p, bits})
		}
	}
	add("", "vtep_subnet", n.VTEPSubnet, 0)
	add("", "vtep_subnet6", n.VTEPSubnet6, 0)
	for _, o := range n.Overlays {
		add(o.Name, "subnet", o.Subnet, o.Prefix)
		add(o.Name, "subnet6", o.Subnet6, o.Prefix6)
	}
	return out
}

// newRanges are those that the stored configuration has not got.
func newRanges(stored, next conf.Network) []configuredRange {
	was := ranges(stored)
	return slices.DeleteFunc(ranges(next), func(r configuredRange) bool {
		return slices.ContainsFunc(was, func(w configuredRange) bool { return w.of == r.of && w.key == r.key && w.prefix == r.prefix })
	})
}

// explainAgentIPs is about new ranges in which hosts of the cluster have their own
// addresses: no packet would find such a host any more.
func (v *view) explainAgentIPs(next conf.Network) (errs []error) {
	for _, r := range newRanges(v.network.Network, next) {
		var in []string
		for ip, key := range v.byIP {
			if a := v.agents[key.id]; a != nil && r.prefix.Contains(ip) {
				in = append(in, fmt.Sprintf("%s (agent %s)", ip, key.id))
			}
		}
		if in != nil {
			slices.Sort(in)
			errs = append(errs, fmt.Errorf("%s %s holds the addresses of hosts themselves: %s; choose another range", r.name(), r.prefix, few(in)))
		}
	}
	return errs
}

// explainReused is about new ranges of which a part is still leased under a name,
// or in a family, that is no longer configured, as after an overlay was renamed.
// On the host that has the lease the bridge and its subnet stay as long as there
// are containers; given to another host, the subnet would be on both.
func (v *view) explainReused(next conf.Network) (errs []error) {
	type group struct {
		configuredRange
		was string // overlay
	}
	groups := map[group][]*misfit{}
	ranges := newRanges(v.network.Network, next)
	for owner, rec := range v.holders() {
		for _, m := range unconfigured(next, owner, rec) {
			for _, r := range ranges {
				if r.prefix.Overlaps(m.block) {
					g := group{r, m.overlay}
					groups[g] = append(groups[g], m)
				}
			}
		}
	}
	for g, ms := range groups {
		slices.SortFunc(ms, func(a, b *misfit) int { return a.block.Addr().Compare(b.block.Addr()) })
		errs = append(errs, fmt.Errorf("%s %s is configured, but of it overlay %s, which no longer has it, leased %s; "+
			"put back overlay %s as it was, or choose a range that was not leased before, or stop these agents and delete them under the old configuration first",
			g.name(), g.prefix, g.was, examples(ms), g.was))
	}
	return errs
}

// unconfigured are the subnets a holder keeps of overlays, or families of them,
// that a network has not got.
func unconfigured(n conf.Network, owner string, rec record) (kept []*misfit) {
	for _, h := range rec.Subnets {
		o, _ := n.Overlay(h.Overlay)
		for _, b := range h.all() {
			if b.Subnet.IsValid() && !o.Subnet.IsValid() {
				kept = append(kept, &misfit{resource: resource{overlay: h.Overlay, block: b.Subnet}, owner: owner})
			}
			if b.Subnet6.IsValid() && !o.Subnet6.IsValid() {
				kept = append(kept, &misfit{resource: resource{overlay: h.Overlay, block: b.Subnet6}, owner: owner})
			}
		}
	}
	return kept
}

// logUnconfigured says which leases are kept and not served because their
// overlay, or its family, is no longer configured.
func (c *Coordinator) logUnconfigured() {
	n, kept := c.view.network, map[string]int{}
	for _, a := range c.view.agents {
		for _, h := range a.Subnets {
			o, ok := n.Overlay(h.Overlay)
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
