package doctor

import (
	"fmt"
	"net/netip"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/audit/echo"
)

// plain reports whether a route of ours leads to a peer without VXLAN.
func plain(r rtnl.Route, p conf.Peer) bool {
	return r.Protocol == mark.RouteProtocol && r.Via.IsValid() && r.Via == p.AgentIP
}

// checkDirect sends peers that get packets without VXLAN one with an address of an
// overlay, and one with that of the host. Where only the second is answered, the
// network between drops sources that it does not know.
func checkDirect(h *host) (out []Finding) {
	from := h.gateway()
	if h.state.Datapath.Routing != conf.RoutingDirect || !from.IsValid() {
		return nil
	}
	var asContainer, asHost []echo.Request
	for _, p := range h.peers {
		vtep := p.VTEPOf(p.AgentIP)
		if !vtep.IsValid() || len(asHost) == measured {
			continue
		}
		if r, ok, err := h.conn.Lookup(rtnl.Packet{Dst: vtep.Addr()}); err != nil || !ok || !plain(r, p) {
			continue
		}
		asContainer = append(asContainer, echo.Request{To: vtep.Addr(), From: from})
		asHost = append(asHost, echo.Request{To: p.AgentIP})
	}
	if len(asHost) == 0 {
		return nil
	}
	// Twice: the first packet may wait for a neighbour.
	var heard [2][]bool
	for range 2 {
		for i, requests := range [][]echo.Request{asContainer, asHost} {
			answers, err := echo.Send(h.ctx, patience, requests)
			if err != nil {
				return []Finding{{Severity: Warning, What: "whether packets of containers pass without VXLAN could not be measured", Evidence: err.Error(), Fix: "run this as root"}}
			}
			if heard[i] == nil {
				heard[i] = make([]bool, len(answers))
			}
			for n, a := range answers {
				heard[i][n] = heard[i][n] || a != echo.Silence
			}
		}
	}
	for n, r := range asHost {
		if heard[1][n] && !heard[0][n] {
			out = append(out, Finding{
				Severity: Error, What: fmt.Sprintf("containers do not reach those of host %s: the network between drops packets with addresses of overlays, which are sent without VXLAN", r.To),
				Evidence: fmt.Sprintf("it answers this host at %s and not overlay address %s at %s", r.To, from, asContainer[n].To),
				Fix:      "set routing: vxlan in the agent's configuration, and restart the agent; or have the network let the overlays' addresses pass", Object: r.To.String(),
			})
		}
	}
	return out
}

// gateway is an address of this host in an overlay of the underlay's family that
// hosts may be reached from; invalid: none.
func (h *host) gateway() netip.Addr {
	for _, o := range h.healthy() {
		subnet := o.Subnet
		if h.state.IP.Is6() {
			subnet = o.Subnet6
		}
		if !subnet.IsValid() || o.Info.Isolation.Mode() == conf.IsolationStrict {
			continue
		}
		for _, pool := range o.Pools() {
			return conf.Gateway(o.Info.Part(pool.Half, subnet))
		}
	}
	return netip.Addr{}
}
