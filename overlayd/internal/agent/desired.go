package agent

import (
	"context"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath"
)

// desired is what the kernel should look like, peers aside, for a lease and the
// agent IP of now (the lease may still carry the last one).
func desired(l conf.Lease, ip netip.Addr) datapath.Host { return datapath.HostOf(l, ip) }

// routing is what this host does without VXLAN: as it is told to or, for a while
// after it was told otherwise, only listens.
func (l *loop) routing() datapath.Direct {
	send := l.opts.Routing == conf.RoutingDirect
	return datapath.Direct{Send: send, Take: send || l.lease.listening}
}

// stopDirect no longer listens to peers that send without VXLAN: all have had the
// time to learn of it.
func (l *loop) stopDirect(ctx context.Context) {
	l.lease.listening = false
	l.reconcile(ctx, false)
}

func samePeer(a, b conf.Peer) bool {
	return a.AgentID == b.AgentID && a.AgentIP == b.AgentIP && a.Epoch == b.Epoch &&
		a.VTEPIP == b.VTEPIP && a.VTEPIP6 == b.VTEPIP6 && a.VTEPMAC == b.VTEPMAC &&
		a.Underlay == b.Underlay && slices.Equal(a.Subnets, b.Subnets)
}

func valid(ps ...netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(ps, func(p netip.Prefix) bool { return !p.IsValid() })
}
