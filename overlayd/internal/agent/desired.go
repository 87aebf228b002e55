package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath"
)

// desired is what the kernel should look like for a lease, the agent IP of now
// (the lease may still carry the last one) and the peers. lost says why the
// lease no longer holds, if a peer has part of it.
func desired(l conf.Lease, ip netip.Addr, peers map[string]conf.Peer) (cfg datapath.Config, lost string) {
	cfg.VTEP = datapath.VTEP{Local: ip, MAC: l.VTEP.MAC, IP: l.VTEP.IP, IP6: l.VTEP.IP6, MTU: l.VTEP.MTU}
	for _, g := range l.Grants {
		leased := valid(g.Subnet, g.Subnet6)
		cfg.Overlays = append(cfg.Overlays, datapath.Overlay{
			Name:      g.Overlay.Name,
			Subnets:   valid(g.Overlay.Subnet, g.Overlay.Subnet6),
			Agent:     leased,
			Isolation: g.Overlay.Isolation,
		})
		if len(leased) == 0 {
			continue
		}
		for _, h := range l.Bridges {
			b := datapath.Bridge{Name: h.Bridge(g.Overlay.Name), Overlay: g.Overlay.Name}
			for _, s := range leased {
				b.Addrs = append(b.Addrs, conf.GatewayPrefix(h.Of(s)))
			}
			cfg.Bridges = append(cfg.Bridges, b)
		}
	}
	cfg.Peers, lost = settle(l, ip, peers)
	return cfg, lost
}

func valid(ps ...netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(ps, func(p netip.Prefix) bool { return !p.IsValid() })
}

// settle decides between peers that claim the same thing, and between them and
// our own lease: the highest epoch is right. An agent whose VTEP or agent IP
// somebody newer has is no peer at all; one whose subnet somebody newer has
// loses that subnet. The result is in the order of the ids.
func settle(own conf.Lease, ip netip.Addr, peers map[string]conf.Peer) (settled []conf.Peer, lost string) {
	n := len(peers)
	taken := make(map[netip.Addr]bool, 3*n+3)
	taken[ip] = true
	for _, p := range valid(own.VTEP.IP, own.VTEP.IP6) {
		taken[p.Addr()] = true
	}
	macs := make(map[conf.MAC]bool, n+1)
	macs[own.VTEP.MAC] = true
	subnets := make(map[netip.Prefix]bool, n)
	ours := own.Peer().Subnets

	// Pointers are sorted: this runs for every peer that comes or goes.
	byEpoch := make([]*conf.Peer, 0, n)
	for _, p := range peers {
		byEpoch = append(byEpoch, &p)
	}
	slices.SortFunc(byEpoch, func(a, b *conf.Peer) int {
		if a.Epoch != b.Epoch {
			return cmp.Compare(b.Epoch, a.Epoch)
		}
		return cmp.Compare(a.AgentID, b.AgentID)
	})
	kept := byEpoch[:0]
	for _, p := range byEpoch {
		for _, s := range p.Subnets {
			if p.Epoch > own.Epoch && slices.ContainsFunc(ours, s.Overlaps) {
				lost = fmt.Sprintf("subnet %s is leased to agent %s (%s) since; its epoch is %d, ours %d", s, p.AgentID, p.AgentIP, p.Epoch, own.Epoch)
			}
		}
		if taken[p.AgentIP] || taken[p.VTEPIP] || taken[p.VTEPIP6] || macs[p.VTEPMAC] {
			continue
		}
		taken[p.AgentIP], macs[p.VTEPMAC] = true, true
		for _, a := range []netip.Addr{p.VTEPIP, p.VTEPIP6} {
			if a.IsValid() {
				taken[a] = true
			}
		}
		left := make([]netip.Prefix, 0, len(p.Subnets))
		for _, s := range p.Subnets {
			if !subnets[s] && !slices.ContainsFunc(ours, s.Overlaps) {
				subnets[s] = true
				left = append(left, s)
			}
		}
		p.Subnets = left
		kept = append(kept, p)
	}
	slices.SortFunc(kept, func(a, b *conf.Peer) int { return cmp.Compare(a.AgentID, b.AgentID) })
	settled = make([]conf.Peer, 0, len(kept))
	for _, p := range kept {
		settled = append(settled, *p)
	}
	return settled, lost
}

func samePeer(a, b conf.Peer) bool {
	return a.AgentID == b.AgentID && a.AgentIP == b.AgentIP && a.Epoch == b.Epoch &&
		a.VTEPIP == b.VTEPIP && a.VTEPIP6 == b.VTEPIP6 && a.VTEPMAC == b.VTEPMAC &&
		slices.Equal(a.Subnets, b.Subnets)
}
