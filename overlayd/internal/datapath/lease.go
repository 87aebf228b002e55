package datapath

import (
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
)

// HostOf is what the kernel should look like, peers aside, for a lease and the
// agent IP of now (the lease may still carry the last one). A second agent IP is used
// when the lease has it, so when the peers know of it.
func HostOf(l conf.Lease, ip netip.Addr) (h Host) {
	h.VTEP = VTEP{Local: ip, Second: l.SecondBeside(ip), MAC: l.VTEP.MAC, IP: l.VTEP.IP, IP6: l.VTEP.IP6, MTU: l.VTEP.MTU}
	h.TakenDown = l.TakenDown
	for _, g := range l.Grants {
		var leased []netip.Prefix
		for _, b := range g.All() {
			leased = append(leased, b.Prefixes()...)
		}
		h.Overlays = append(h.Overlays, Overlay{
			Name:      g.Overlay.Name,
			Subnets:   valid(g.Overlay.Subnet, g.Overlay.Subnet6),
			Agent:     leased,
			Isolation: g.Overlay.Isolation,
			Allow:     g.Overlay.Allow,
			AnySource: !g.Overlay.ChecksSources(),
			Shared:    g.Overlay.Shared(),
		})
		if len(leased) == 0 {
			continue
		}
		for _, half := range g.Overlay.Pools(l.Bridges) {
			b := Bridge{Name: half.Bridge(g.Overlay.Name), Overlay: g.Overlay.Name}
			for _, s := range leased {
				b.Addrs = append(b.Addrs, conf.GatewayPrefix(g.Overlay.Part(half, s)))
			}
			h.Bridges = append(h.Bridges, b)
		}
	}
	return h
}

func valid(ps ...netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(ps, func(p netip.Prefix) bool { return !p.IsValid() })
}
