package coordinator

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/allocate"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// planNetworkLocked says what another network would change, whom that concerns,
// and what forbids it. The overlay takeDown may go although containers are attached.
func (c *Coordinator) planNetworkLocked(next conf.Network, takeDown string) api.NetworkPlan {
	v := c.view
	d := differ{
		c: c, was: v.network.Network, next: next, takeDown: takeDown, holders: map[string]int{}, hosts: map[string][]api.OverlayHost{},
		plan: api.NetworkPlan{Revision: v.network.mod, Changes: []api.NetworkChange{}, Capacity: []api.PoolChange{}},
	}
	for _, a := range v.agents {
		if a.Superseded == "" {
			d.agents++
		}
		for _, h := range a.Subnets {
			d.holders[h.Overlay]++
		}
	}
	d.settings()
	d.overlays()
	d.capacity()
	d.overlaps()
	for _, err := range misfitErrors(d.was, next, v.reserveAll(newPools(next)), v.explainRanges(next)) {
		d.plan.Refused = append(d.plan.Refused, err.Error())
	}
	return d.plan
}

// differ puts a plan together.
type differ struct {
	c         *Coordinator
	was, next conf.Network
	takeDown  string
	agents    int            // that are not superseded
	holders   map[string]int // agents that hold something of an overlay
	hosts     map[string][]api.OverlayHost
	plan      api.NetworkPlan
}

func (d *differ) change(overlay string, hosts int, what, effect string) {
	ch := api.NetworkChange{Overlay: overlay, What: what, Effect: effect, Hosts: hosts}
	for _, h := range d.hostsOf(overlay) {
		ch.Containers += h.Containers
	}
	d.plan.Changes = append(d.plan.Changes, ch)
}

// hostsOf is hostsOfLocked, found out once.
func (d *differ) hostsOf(overlay string) []api.OverlayHost {
	hosts, ok := d.hosts[overlay]
	if !ok && overlay != "" {
		hosts = d.c.hostsOfLocked(overlay, d.c.book.AttachedTo(overlay))
		d.hosts[overlay] = hosts
	}
	return hosts
}

func (d *differ) refuse(format string, args ...any) {
	d.plan.Refused = append(d.plan.Refused, fmt.Sprintf(format, args...))
}

// setting records a setting that is another, in words.
func (d *differ) setting(overlay, key, was, next string, hosts int, effect string) {
	if was != next {
		d.change(overlay, hosts, fmt.Sprintf("%s %s -> %s", key, cmp.Or(was, "(none)"), cmp.Or(next, "(none)")), effect)
	}
}

// settings are those beside the overlays.
func (d *differ) settings() {
	was, next := d.was, d.next
	vtep6 := "every host's VTEP has an IPv6 address of it"
	if !next.VTEPSubnet6.IsValid() {
		vtep6 = "no host's VTEP has an IPv6 address any more"
	}
	vtep := "what is leased stays; hosts set the length of their VTEP's address"
	if !was.VTEPSubnet.IsValid() {
		vtep = "every host's VTEP has an IPv4 address of it as well; the MACs of those that are there stay"
	}
	d.setting("", "vtep_subnet", text(was.VTEPSubnet), text(next.VTEPSubnet), d.agents, vtep)
	d.setting("", "vtep_subnet6", text(was.VTEPSubnet6), text(next.VTEPSubnet6), d.agents, vtep6)
	d.setting("", "vtep_mac_oui", was.VTEPMACOUI, next.VTEPMACOUI, d.agents, "every VTEP gets another MAC; traffic between hosts pauses for a moment")
	d.setting("", "vtep_mtu", number(was.VTEPMTU), number(next.VTEPMTU), d.agents, "VTEPs and bridges get another MTU; containers have it when they are attached anew")
	d.setting("", "reclaim", was.Reclaim, next.Reclaim, 0, "what becomes of leases of hosts that are gone")
	d.others("", was, next, d.agents, "vtep_subnet", "vtep_subnet6", "vtep_mac_oui", "vtep_mtu", "reclaim", "overlays")
}

func (d *differ) overlays() {
	var order [2][]string
	for _, was := range d.was.Overlays {
		next, ok := d.next.Overlay(was.Name)
		if !ok {
			d.removed(was)
			continue
		}
		order[0] = append(order[0], was.Name)
		d.overlay(was, next)
	}
	for _, next := range d.next.Overlays {
		if _, ok := d.was.Overlay(next.Name); ok {
			order[1] = append(order[1], next.Name)
			continue
		}
		d.added(next)
	}
	if !slices.Equal(order[0], order[1]) {
		d.change("", d.agents, "order of the overlays", "they are listed in another order")
	}
}

func (d *differ) added(o conf.Overlay) {
	ranges := strings.Join(texts(o.Subnet, o.Subnet6), " and ")
	switch kept := d.holders[o.Name]; {
	case kept > 0:
		d.change(o.Name, d.agents, "added, with "+ranges, fmt.Sprintf("%d hosts get back the subnets that they had; the others get new ones", kept))
	case !o.IsEnabled():
		d.change(o.Name, 0, "added, with "+ranges+", not enabled", "nobody gets a subnet before it is enabled")
	default:
		d.change(o.Name, d.agents, "added, with "+ranges, "every host gets a subnet, bridges and the files of the runtimes")
	}
}

func (d *differ) removed(o conf.Overlay) {
	d.change(o.Name, d.holders[o.Name], "removed", "hosts take down its bridges, routes, rules, files and networks of Docker; the leases are kept, and come back with it")
	d.mayGo(o.Name, "overlay "+o.Name)
}

// mayGo refuses to take away what containers are attached to.
func (d *differ) mayGo(overlay, what string) {
	if overlay == d.takeDown {
		return
	}
	var attached, unknown []string
	for _, h := range d.hostsOf(overlay) {
		switch host := fmt.Sprintf("%s (agent %s)", h.AgentIP, h.AgentID); {
		case h.Unknown:
			unknown = append(unknown, host)
		case h.Containers > 0:
			attached = append(attached, fmt.Sprintf("%d on %s", h.Containers, host))
		}
	}
	if attached != nil {
		d.refuse("%[1]s is to go while containers are attached: %[2]s; drain it (overlayctl overlays drain %[3]s), move the containers, and remove it then; "+
			"or take it from under them with overlayctl overlays remove %[3]s --force", what, few(attached), overlay)
	}
	if unknown != nil {
		d.refuse("%s is to go, and these hosts have set it up and have not told whether containers are attached: %s; "+
			"start their agents, or give back the leases of those that are gone (overlayctl agents remove), or use overlayctl overlays remove %s --force", what, few(unknown), overlay)
	}
}

// few names the first of many.
func few(names []string) string {
	const most = 5
	s := strings.Join(names[:min(most, len(names))], ", ")
	if more := len(names) - most; more > 0 {
		s += fmt.Sprintf(" and %d more", more)
	}
	return s
}

// overlay compares an overlay with what it was.
func (d *differ) overlay(was, next conf.Overlay) {
	name, holders := was.Name, d.holders[was.Name]
	d.family(name, "subnet", was.Subnet, next.Subnet, was.Prefix, next.Prefix)
	d.family(name, "subnet6", was.Subnet6, next.Subnet6, was.Prefix6, next.Prefix6)
	enabled := "hosts that have a subnet keep it; nobody gets a new one"
	if next.IsEnabled() {
		enabled = "hosts that have no subnet of it get one"
	}
	d.setting(name, "enabled", flag(was.Enabled), flag(next.Enabled), d.agents, enabled)
	d.setting(name, "isolation", string(was.Isolation), string(next.Isolation), holders, "hosts change their rules; new connections are judged by them")
	d.setting(name, "allow", strings.Join(was.Allow, " "), strings.Join(next.Allow, " "), holders, "hosts change their rules; new connections are judged by them")
	d.setting(name, "antispoof", flag(was.AntiSpoof), flag(next.AntiSpoof), holders, "hosts change what its containers may send from")
	d.halves(was, next)
	d.others(name, was, next, holders, "name", "subnet", "prefix", "subnet6", "prefix6", "enabled", "isolation", "allow", "antispoof", "draining", "halves")
	switch {
	case next.Draining && !was.Draining:
		d.change(name, holders, "drained", "nothing new is attached to it on any host; containers that are go on")
	case was.Draining && !next.Draining:
		d.change(name, holders, "no longer drained", "containers can be attached to it again")
	}
}

// halves compares how an overlay's halves give out addresses. That is settled as long
// as hosts have subnets of it: containers have the gateway and the bridge of then.
func (d *differ) halves(was, next conf.Overlay) {
	name, holders := was.Name, d.holders[was.Name]
	d.setting(name, "halves", was.Halves, next.Halves, holders, "hosts that get a subnet from now on give out its addresses so")
	if was.Shared() != next.Shared() && holders > 0 {
		d.refuse("the halves of overlay %[1]s cannot be changed from %[2]s to %[3]s while hosts have subnets of it, which are %[4]d: their containers have the gateways and bridges of then; "+
			"add another overlay with halves: %[3]s, drain this one (overlayctl overlays drain %[1]s), move the containers, and remove it",
			name, halvesText(was), halvesText(next), holders)
	}
}

func halvesText(o conf.Overlay) string { return cmp.Or(o.Halves, conf.HalvesSplit) }

// others records the settings beside those that there are words for.
func (d *differ) others(overlay string, was, next any, hosts int, known ...string) {
	settings := func(v any) (out map[string]json.RawMessage) {
		if err := json.Unmarshal(encode(v), &out); err != nil {
			panic(err) // it was encoded a moment ago
		}
		return out
	}
	a, b := settings(was), settings(next)
	all := maps.Clone(a)
	maps.Copy(all, b)
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if !slices.Contains(known, key) {
			d.setting(overlay, key, string(a[key]), string(b[key]), hosts, "hosts follow it")
		}
	}
}

func (d *differ) family(name, key string, was, next netip.Prefix, wasBits, nextBits int) {
	family, holders := map[string]string{"subnet": "IPv4", "subnet6": "IPv6"}[key], d.holders[name]
	bits := strings.Replace(key, "subnet", "prefix", 1)
	switch {
	case was == next:
	case !was.IsValid():
		d.change(name, d.agents, fmt.Sprintf("%s (none) -> %s", key, next), "every host gets a subnet of "+family+" as well; containers have addresses of it when they are attached anew")
		return
	case !next.IsValid():
		d.change(name, holders, fmt.Sprintf("%s %s -> (none)", key, was), "hosts take "+family+" away from it; the leases are kept, and come back with it")
		d.mayGo(name, family+" of overlay "+name)
		return
	case next.Contains(was.Addr()) && next.Bits() <= was.Bits():
		d.change(name, holders, fmt.Sprintf("%s %s -> %s", key, was, next), "it has room for more hosts; what is leased stays")
	default:
		d.change(name, holders, fmt.Sprintf("%s %s -> %s", key, was, next), "it hands out another range")
	}
	d.setting(name, bits, number(wasBits), number(nextBits), holders, "agents get subnets of another length")
}

// maxOverlaps bounds what is listed of them.
const maxOverlaps = 100

// overlaps lists routes of others, on hosts, into ranges that are new or larger.
func (d *differ) overlaps() {
	added := newRanges(d.was, d.next)
	if len(added) == 0 {
		return
	}
	for id, a := range d.c.view.agents {
		host, _ := d.c.book.Host(id)
		if host == nil {
			continue
		}
		for _, route := range host.Routes {
			for _, r := range added {
				if r.prefix.Overlaps(route) {
					d.plan.Overlaps = append(d.plan.Overlaps, api.RouteOverlap{Overlay: r.of, Range: r.prefix, AgentID: id, AgentIP: a.IP, Route: route})
				}
			}
		}
	}
	slices.SortFunc(d.plan.Overlaps, func(a, b api.RouteOverlap) int {
		return cmp.Or(a.Range.Addr().Compare(b.Range.Addr()), a.AgentIP.Compare(b.AgentIP), a.Route.Addr().Compare(b.Route.Addr()))
	})
	if more := len(d.plan.Overlaps) - maxOverlaps; more > 0 {
		d.plan.Overlaps = d.plan.Overlaps[:maxOverlaps]
		d.plan.Notes = append(d.plan.Notes, fmt.Sprintf("%d further routes of hosts overlap with new ranges", more))
	}
}

// capacity compares the pools.
func (d *differ) capacity() {
	was, next := d.c.view.pools, newPools(d.next)
	_ = d.c.view.reserveAll(next) // what does not fit is refused, and named there
	add := func(overlay, key string, before, after *api.Capacity) {
		if before != nil || after != nil {
			d.plan.Capacity = append(d.plan.Capacity, api.PoolChange{Overlay: overlay, Key: key, From: before, To: after})
		}
	}
	add("", "vtep_subnet", capacityOf(was.vtep, d.was.VTEPSubnet), capacityOf(next.vtep, d.next.VTEPSubnet))
	add("", "vtep_subnet6", capacityOf(was.vtep6, d.was.VTEPSubnet6), capacityOf(next.vtep6, d.next.VTEPSubnet6))
	var names []string
	for _, o := range slices.Concat(d.was.Overlays, d.next.Overlays) {
		if !slices.Contains(names, o.Name) {
			names = append(names, o.Name)
		}
	}
	for _, name := range names {
		a, _ := d.was.Overlay(name)
		b, _ := d.next.Overlay(name)
		add(name, "subnet", perAgent(capacityOf(was.overlays[name].v4, a.Subnet), a, a.Prefix), perAgent(capacityOf(next.overlays[name].v4, b.Subnet), b, b.Prefix))
		add(name, "subnet6", perAgent(capacityOf(was.overlays[name].v6, a.Subnet6), a, a.Prefix6), perAgent(capacityOf(next.overlays[name].v6, b.Subnet6), b, b.Prefix6))
	}
}

func capacityOf(p *allocate.Pool, of netip.Prefix) *api.Capacity {
	if p == nil {
		return nil
	}
	return &api.Capacity{Range: of, Pool: *poolOf(p)}
}

// perAgent enters how many containers one agent subnet of the overlay holds.
func perAgent(out *api.Capacity, o conf.Overlay, bits int) *api.Capacity {
	if out != nil {
		out.PerHalf, out.Shared = conf.Capacity(o.Part(conf.Mesos, netip.PrefixFrom(out.Range.Addr(), bits))), o.Shared()
	}
	return out
}

// text is an invalid prefix as nothing.
func text(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	return p.String()
}

func texts(ps ...netip.Prefix) (out []string) {
	for _, p := range ps {
		if p.IsValid() {
			out = append(out, p.String())
		}
	}
	return out
}

// number is 0 as nothing.
func number(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

func flag(b *bool) string {
	if b == nil {
		return ""
	}
	return fmt.Sprint(*b)
}
