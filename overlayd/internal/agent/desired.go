package agent

import (
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath"
)

// desired is what the kernel should look like, peers aside, for a lease and the
// agent IP of now (the lease may still carry the last one).
func desired(l conf.Lease, ip netip.Addr) (cfg datapath.Host) {
	cfg.VTEP = datapath.VTEP{Local: ip, MAC: l.VTEP.MAC, IP: l.VTEP.IP, IP6: l.VTEP.IP6, MTU: l.VTEP.MTU}
	for _, g := range l.Grants {
		leased := valid(g.Subnet, g.Subnet6)
		cfg.Overlays = append(cfg.Overlays, datapath.Overlay{
			Name:      g.Overlay.Name,
			Subnets:   valid(g.Overlay.Subnet, g.Overlay.Subnet6),
			Agent:     leased,
			Isolation: g.Overlay.Isolation,
			Allow:     g.Overlay.Allow,
			AnySource: !g.Overlay.ChecksSources(),
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
	return cfg
}

func valid(ps ...netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(ps, func(p netip.Prefix) bool { return !p.IsValid() })
}

func samePeer(a, b conf.Peer) bool {
	return a.AgentID == b.AgentID && a.AgentIP == b.AgentIP && a.Epoch == b.Epoch &&
		a.VTEPIP == b.VTEPIP && a.VTEPIP6 == b.VTEPIP6 && a.VTEPMAC == b.VTEPMAC &&
		slices.Equal(a.Subnets, b.Subnets)
}
