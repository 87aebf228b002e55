package agent

import (
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath"
)

// desired is what the kernel should look like, peers aside, for a lease and the
// agent IP of now (the lease may still carry the last one).
func desired(l conf.Lease, ip netip.Addr) datapath.Host { return datapath.HostOf(l, ip) }

func samePeer(a, b conf.Peer) bool {
	return a.AgentID == b.AgentID && a.AgentIP == b.AgentIP && a.Epoch == b.Epoch &&
		a.VTEPIP == b.VTEPIP && a.VTEPIP6 == b.VTEPIP6 && a.VTEPMAC == b.VTEPMAC &&
		slices.Equal(a.Subnets, b.Subnets)
}

func valid(ps ...netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(ps, func(p netip.Prefix) bool { return !p.IsValid() })
}
