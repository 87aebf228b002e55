package explain

import (
	"context"
	"net/netip"

	"overlayd.internal/overlay/overlayd/internal/audit/doctor"
)

// Arrive explains the end of the way from a to b, both addresses, on the host that has
// b: what becomes there of a packet that has come, and the way back of the answer. What
// the host of a sees is what Walk says there.
func Arrive(ctx context.Context, o doctor.Options, a, b string) (Result, error) {
	return run(ctx, o, a, b, func(w *walk) error {
		w.arrives()
		return nil
	})
}

// arrives walks the end of the way, to b.
func (w *walk) arrives() { w.steps(w.holder, w.admitted, w.admission, w.back, w.here) }

// holder looks at the lease and at the container that has b.
func (w *walk) holder() bool {
	step := "container " + w.b.name
	switch {
	case w.b.record != nil:
		return w.container(step, w.b)
	case w.ownAddress(w.b.addr):
		return w.pass("destination", "%s is this host", w.b.addr)
	case w.b.peer != nil:
		return w.stop("lease", "%s is not in a subnet of this host, but of host %s: the hosts do not agree; overlayctl peers on both", w.b.addr, w.b.peer.AgentIP)
	}
	return w.nobody(step, w.b, "no container of this host has %s; overlayctl containers lists those there are", w.b.addr)
}

// admission looks at what drops packets that come through the VXLAN for b.
func (w *walk) admission() bool {
	if w.b.record == nil {
		return true
	}
	bridge := w.b.overlay.Info.BridgeName(w.b.record.Half)
	return w.sound("forwarding", []string{"forwarding"}, bridge, w.comesBy(w.a.peer)) &&
		w.sound("firewall", []string{"forward-policy", "firewalld", "docker-options"}, netip.PrefixFrom(w.b.addr, w.b.addr.BitLen()).String()) &&
		w.pass("forwarding", "this host forwards, and its firewall asks the overlay's rules first")
}

// back walks to the host of a, where a is in an overlay.
func (w *walk) back() bool {
	if w.a.overlay == nil || w.a.record != nil || w.ownAddress(w.a.addr) {
		return true
	}
	if w.a.peer == nil {
		return w.stop("way back", "this host knows no other host with a lease of the subnet of %s; overlayctl peers, overlayctl status", w.a.addr)
	}
	w.a, w.b = w.b, w.a
	defer func() { w.a, w.b = w.b, w.a }()
	return w.pass("way back", "%s is in a subnet of host %s, VTEP %s", w.b.addr, w.b.peer.AgentIP, w.vtepOf(w.b.peer)) && w.toHost()
}

// here asks b itself.
func (w *walk) here() bool {
	if w.b.record == nil {
		return true
	}
	return w.answers("container "+w.b.name, w.b.addr, netip.Addr{}, "it does not answer its own host; look inside of it")
}
