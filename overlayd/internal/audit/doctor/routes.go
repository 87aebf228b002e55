package doctor

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// most bounds how many findings of one kind are listed: a host without its VTEP
// lacks thousands of entries.
const most = 5

// checkRoutes compares the kernel's routes with the peers, and looks for routes
// of others that lead into an overlay.
func checkRoutes(h *host) (out []Finding) {
	if _, ok := h.links[conf.VTEPName]; !ok || len(h.state.Overlays) == 0 {
		return nil // said already
	}
	routes, err := h.routes()
	if err != nil {
		return unread("routes", err)
	}
	ours := map[netip.Prefix]rtnl.Route{}
	for _, r := range routes {
		if r.Protocol == mark.RouteProtocol && r.OIF != 0 {
			ours[r.Dst] = r
		}
	}
	missing := 0
	for _, p := range h.peers {
		if !h.sharesFamily(p) {
			continue // nothing leads there
		}
		for _, s := range p.Subnets {
			if !h.meets(p, s.Addr()) {
				continue // of that family there is nothing to send it by
			}
			if r, there := ours[s]; there && (r.OIF == h.links[h.deviceTo(p)].Index || plain(r, p)) || !h.carries(s) {
				continue
			}
			if missing++; missing > most {
				continue
			}
			out = append(out, Finding{
				Severity: Error, What: fmt.Sprintf("the containers of host %s are not reached: the route to %s is missing", p.AgentIP, s),
				Evidence: "ip route show " + s.String() + " proto " + fmt.Sprint(mark.RouteProtocol) + " prints nothing that leads there", Fix: restart, Object: p.AgentIP.String(),
			})
		}
	}
	for _, r := range routes {
		if h.foreign(r) {
			out = append(out, Finding{
				Severity: Error, What: fmt.Sprintf("a route that is not ours takes the packets to %s of an overlay", r.Dst),
				Evidence: fmt.Sprintf("%s dev %s, protocol %d, table %d", r.Dst, h.linkName(r.OIF), r.Protocol, r.Table),
				Fix:      fmt.Sprintf("ip route delete %s table %d", r.Dst, r.Table), Object: r.Dst.String(),
			})
		}
	}
	return out
}

func unread(what string, err error) []Finding {
	return []Finding{{Severity: Warning, What: "the kernel's " + what + " could not be read", Evidence: err.Error(), Fix: "run this as root, again"}}
}

func (h *host) routes() (out []rtnl.Route, _ error) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		rs, err := rtnl.List(h.conn, rtnl.RoutesRequest(family, 0), rtnl.ParseRoute)
		if err != nil {
			return nil, err
		}
		out = append(out, rs...)
	}
	return out, nil
}

// carries reports whether a subnet is of an overlay that is set up on this host:
// of others it has no routes.
func (h *host) carries(s netip.Prefix) bool { return overlaps(h.healthy(), s) }

func overlaps(overlays []conf.AgentOverlay, s netip.Prefix) bool {
	return slices.ContainsFunc(overlays, func(o conf.AgentOverlay) bool {
		return o.Info.Subnet.IsValid() && o.Info.Subnet.Overlaps(s) || o.Info.Subnet6.IsValid() && o.Info.Subnet6.Overlaps(s)
	})
}

// foreign reports whether a route of others leads into an overlay, which may be
// why that is not set up.
func (h *host) foreign(r rtnl.Route) bool {
	if r.Protocol == mark.RouteProtocol || r.Kind != unix.RTN_UNICAST || r.Table == unix.RT_TABLE_LOCAL {
		return false
	}
	if device := h.linkName(r.OIF); device == conf.VTEPName || device == mark.SecondVTEP {
		return false
	}
	for _, o := range h.state.Overlays {
		for _, whole := range []netip.Prefix{o.Info.Subnet, o.Info.Subnet6} {
			if whole.IsValid() && whole.Contains(r.Dst.Addr()) && r.Dst.Bits() >= whole.Bits() {
				return !slices.ContainsFunc(conf.Halves[:], func(half conf.Half) bool { return h.links[half.Bridge(o.Info.Name)].Index == r.OIF })
			}
		}
	}
	return false
}

// checkNeighbours compares neighbours and forwarding entries of the VXLAN devices
// with the peers.
func checkNeighbours(h *host) (out []Finding) {
	if _, ok := h.links[conf.VTEPName]; !ok || len(h.healthy()) == 0 {
		return nil
	}
	entries := map[string]entries{}
	for _, device := range []string{conf.VTEPName, mark.SecondVTEP} {
		if l, ok := h.links[device]; ok {
			e, err := h.entriesOf(l.Index)
			if err != nil {
				return unread("neighbours", err)
			}
			entries[device] = e
		}
	}
	for _, p := range h.peers {
		if !slices.ContainsFunc(p.Subnets, h.carries) || !h.sharesFamily(p) {
			continue
		}
		device, to, vtep := h.deviceTo(p), h.addressOf(p), h.state.VTEPOf(&p)
		if !vtep.IsValid() {
			continue // the agent leaves it out, and takes notice
		}
		e := entries[device]
		evidence := ""
		switch {
		case e.macs[vtep] != p.VTEPMAC:
			evidence = fmt.Sprintf("ip neighbour show %s dev %s: %s, should be %s", vtep, device, e.macs[vtep], p.VTEPMAC)
		case e.hosts[p.VTEPMAC] != to:
			evidence = fmt.Sprintf("bridge fdb show dev %s, entry %s: %v, should be %s", device, p.VTEPMAC, e.hosts[p.VTEPMAC], to)
		default:
			continue
		}
		if out = append(out, Finding{
			Severity: Error, What: fmt.Sprintf("the containers of host %s are not reached: its entry at %s is wrong", p.AgentIP, device),
			Evidence: evidence, Fix: restart, Object: p.AgentIP.String(),
		}); len(out) == most {
			break
		}
	}
	return out
}

// entries are what a VXLAN device has of peers.
type entries struct {
	macs  map[netip.Addr]conf.MAC
	hosts map[conf.MAC]netip.Addr
}

func (h *host) entriesOf(index int) (entries, error) {
	e := entries{map[netip.Addr]conf.MAC{}, map[conf.MAC]netip.Addr{}}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6, unix.AF_BRIDGE} {
		ns, err := rtnl.List(h.conn, rtnl.NeighboursRequest(family, index), rtnl.ParseNeighbour)
		if err != nil {
			return e, err
		}
		for _, n := range ns {
			if n.Family == unix.AF_BRIDGE {
				e.hosts[n.MAC] = n.IP
			} else {
				e.macs[n.IP] = n.MAC
			}
		}
	}
	return e, nil
}

// sharesFamily reports whether VXLAN goes between this host and a peer: an agent IP
// of each is of one family.
func (h *host) sharesFamily(p conf.Peer) bool {
	if !h.state.IP.IsValid() || !p.AgentIP.IsValid() {
		return true
	}
	_, _, ok := p.Reach(h.state.IP, h.secondIP())
	return ok
}

// meets reports whether this host and a peer both have a VTEP address of the family of
// a.
func (h *host) meets(p conf.Peer, a netip.Addr) bool {
	if len(h.state.Overlays) == 0 {
		return true
	}
	own := h.state.Overlays[0].Backend.VXLAN
	vtep, vtep6 := p.Meet(own.VTEPIP, own.VTEPIP6)
	if a.Is6() {
		return vtep6.IsValid()
	}
	return vtep.IsValid()
}

// addressOf is the agent IP by which a peer is reached.
func (h *host) addressOf(p conf.Peer) netip.Addr {
	if _, to, ok := p.Reach(h.state.IP, h.secondIP()); ok {
		return to
	}
	return p.AgentIP
}

// deviceTo is the VXLAN device that a peer is behind.
func (h *host) deviceTo(p conf.Peer) string {
	if from, _, ok := p.Reach(h.state.IP, h.secondIP()); ok && from != h.state.IP {
		return mark.SecondVTEP
	}
	return conf.VTEPName
}

// checkFamilies names the hosts that have no agent IP of a family of this host's.
func checkFamilies(h *host) (out []Finding) {
	for _, p := range h.peers {
		if h.sharesFamily(p) || !slices.ContainsFunc(p.Subnets, h.carries) {
			continue
		}
		fix := "start one of the agents with an --agent-ip of each family, or both with one of the same"
		if h.secondIP().IsValid() && !p.TwoFamilies {
			fix = "upgrade the agent there: its release does not know that a host may have an agent IP of each family"
		}
		if out = append(out, Finding{
			Severity: Error, What: fmt.Sprintf("the containers of host %s are not reached: its agent IP and this host's are of two families, and VXLAN is sent by one", p.AgentIP),
			Evidence: fmt.Sprintf("agent IP %s here, %s there", h.state.IP, p.AgentIP),
			Fix:      fix, Object: p.AgentIP.String(),
		}); len(out) == most {
			break
		}
	}
	return out
}
