package plan

import (
	"maps"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// possible is the wanted state less the overlays whose range holds a network of
// this host: their bridges and routes would cut the host off from it. What
// containers are attached to stays, and the overlay's status says so in any case.
func (p *Plan) possible(w Wanted, have *State) Wanted {
	left := w
	left.Overlays, left.Bridges = nil, nil
	refused := map[string]bool{}
	for _, o := range w.Overlays {
		what := have.conflict(w, o)
		if what == "" {
			left.Overlays = append(left.Overlays, o)
			continue
		}
		if have.attached(w, o.Name) {
			p.complain(o.Name, "overlay %s holds a network of this host: %s; containers are attached, so the overlay stays, and the host cannot reach that network; give the overlay another range or the host another network", o.Name, what)
			left.Overlays = append(left.Overlays, o)
			continue
		}
		refused[o.Name] = true
		p.Refused = append(p.Refused, o.Name)
		p.complain(o.Name, "overlay %s is not set up here, because its range holds a network of this host: %s; give the overlay another range or the host another network", o.Name, what)
	}
	if len(refused) == 0 {
		return w
	}
	for _, b := range w.Bridges {
		if !refused[b.Overlay] {
			left.Bridges = append(left.Bridges, b)
		}
	}
	for _, o := range w.Overlays {
		if refused[o.Name] {
			left.Refused = append(left.Refused, o.Subnets...)
		}
	}
	return left
}

// attached reports whether a bridge of the overlay has ports.
func (s *State) attached(w Wanted, overlay string) bool {
	return slices.ContainsFunc(w.Bridges, func(b Bridge) bool { return b.Overlay == overlay && s.Links[b.Name].Ports > 0 })
}

// conflict names a network of this host inside an overlay, or nothing.
func (s *State) conflict(w Wanted, o Overlay) string {
	serving := s.serving(w)
	for _, r := range o.Subnets {
		for _, a := range s.Others {
			if !serving[a.Dev] && (r.Contains(a.Prefix.Addr()) || inside(a.Prefix.Masked(), r)) {
				return "interface " + a.Dev + " has " + a.Prefix.String() + s.routeTo(a, r)
			}
		}
		for _, dst := range s.foreignIn(r) {
			f := s.Foreign[dst]
			if serving[f.Dev] || !f.Leads {
				continue
			}
			own := slices.ContainsFunc(o.Agent, func(a netip.Prefix) bool { return a.Overlaps(dst) })
			if f.Kernel || own {
				return "route " + f.Text
			}
		}
	}
	return ""
}

// routeTo names the route that came with an address, if that lies in r.
func (s *State) routeTo(a AddrKey, r netip.Prefix) string {
	f, ok := s.Foreign[a.Prefix.Masked()]
	if !ok || !inside(a.Prefix.Masked(), r) || f.Dev != a.Dev {
		return ""
	}
	return " (route " + f.Text + ")"
}

// serving are the links of others with a gateway address of ours: bridges and
// veths of other main plugins on our addresses (ipam: overlay-ipam).
func (s *State) serving(w Wanted) map[string]bool {
	gateways := map[netip.Addr]bool{}
	for _, o := range w.Overlays {
		for _, a := range o.Agent {
			if o.Shared {
				gateways[conf.Gateway(a)] = true
				continue
			}
			for _, h := range conf.Halves {
				if half := h.Of(a); half.IsValid() {
					gateways[conf.Gateway(half)] = true
				}
			}
		}
	}
	serving := map[string]bool{}
	for _, a := range s.Others {
		if gateways[a.Prefix.Addr()] {
			serving[a.Dev] = true
		}
	}
	return serving
}

// foreignIn lists the foreign routes to prefixes inside r, in order.
func (s *State) foreignIn(r netip.Prefix) []netip.Prefix {
	var in []netip.Prefix
	for dst := range s.Foreign {
		if inside(dst, r) {
			in = append(in, dst)
		}
	}
	slices.SortFunc(in, netip.Prefix.Compare)
	return in
}

// poolIsFree reports whether the VTEP's address can be given to this host: its
// pool must not hold a network of the host. A VTEP that is there stays.
func (p *Plan) poolIsFree(have *State) bool {
	v := p.Wanted.VTEP
	for _, pool := range [...]netip.Prefix{v.IP, v.IP6} {
		if !pool.IsValid() {
			continue
		}
		for _, a := range have.Others {
			if !pool.Contains(a.Prefix.Addr()) && !inside(a.Prefix.Masked(), pool.Masked()) {
				continue
			}
			p.complain("", "the VTEP pool %s holds a network of this host: interface %s has %s; configure another vtep_subnet or give the host another network",
				pool.Masked(), a.Dev, a.Prefix)
			_, there := have.Links[conf.VTEPName]
			return there
		}
	}
	return true
}

// takenFromPeers complains about routes of others inside the subnet of a peer:
// they are more specific than ours, so that packets follow them.
func (p *Plan) takenFromPeers(foreign map[netip.Prefix]ForeignRoute) {
	if len(foreign) == 0 {
		return
	}
	lengths := map[int]bool{}
	for dst := range p.Entries.Routes {
		lengths[dst.Bits()] = true
	}
	for _, dst := range slices.SortedFunc(maps.Keys(foreign), netip.Prefix.Compare) {
		for _, bits := range slices.Sorted(maps.Keys(lengths)) {
			if bits >= dst.Bits() {
				continue
			}
			subnet, err := dst.Addr().Prefix(bits)
			if err != nil {
				continue // longer than an IPv4 address
			}
			if r, ok := p.Entries.Routes[subnet]; ok && r.leads() {
				p.complain(p.Wanted.OverlayOf(dst), "route %s is not ours and takes traffic of peer subnet %s, which is via %s; remove it (%s)",
					foreign[dst].Text, subnet, r.gateway(), showRoute(dst))
			}
		}
	}
}

func showRoute(dst netip.Prefix) string {
	if is6(dst) {
		return "ip -6 route show " + dst.String()
	}
	return "ip route show " + dst.String()
}

// maxDiverted is how many diverted subnets of one overlay are reported: a rule
// diverts all of them or some.
const maxDiverted = 3

// diverted complains about ways that packets to peers take although the main
// table says otherwise.
func (p *Plan) diverted(have *State) {
	reported := map[string]int{}
	for _, d := range have.Diverted {
		o := p.Wanted.OverlayOf(d.Dst)
		if reported[o]++; reported[o] <= maxDiverted {
			p.complain(o, "packets to peer subnet %s %s, because of a rule that is not ours (ip rule show); see: %s", d.Dst, d.Way, d.Command)
		}
	}
}

// underlayForwards complains where the host does not forward what comes back
// from outside.
func (p *Plan) underlayForwards(have *State) {
	key := ForwardingKey(have.Underlay)
	if have.Underlay != "" && have.Sysctls[key] == "0" && have.Sysctls[forward4] == "1" {
		p.complain("", "interface %s does not forward, so containers get no answers from outside: sysctl %s is 0; set it to 1 (sysctl -w net.ipv4.conf.%s.forwarding=1)",
			have.Underlay, key, have.Underlay)
	}
}

// unreachableRange is the route to the whole of an overlay.
func unreachableRange() Route { return Route{Metric: mark.UnreachableMetric, Kind: Unreachable} }

// TouchedBy reports whether a route of somebody else leads into a subnet that
// the plan has a route to.
func (p *Plan) TouchedBy(foreign map[netip.Prefix]ForeignRoute) bool {
	for dst := range foreign {
		for subnet, r := range p.Entries.Routes {
			if r.leads() && inside(dst, subnet) {
				return true
			}
		}
	}
	return false
}

// Takes reports whether the plan wants something that belongs already to a peer
// that did not change or to this host: all is what there is, had what the peers
// that changed had.
func (p *Plan) Takes(all, had Entries) bool {
	for _, device := range [...]string{conf.VTEPName, mark.SecondVTEP} {
		there, before, want := all.On(device), had.On(device), p.Entries.On(device)
		if takes(there.Neigh, before.Neigh, want.Neigh) || takes(there.FDB, before.FDB, want.FDB) {
			return true
		}
	}
	return takes(all.Routes, had.Routes, p.Entries.Routes)
}

func takes[K, V comparable](all, had, want map[K]V) bool {
	for k := range want {
		_, there := all[k]
		_, changes := had[k]
		if there && !changes {
			return true
		}
	}
	return false
}
