package firewall

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/conntrack"
)

// Cut ends the connections that were let through once and are no longer
// allowed, and those that left the overlays with an address of theirs: rules are
// asked about the first packet of a connection only, and there may have been none.
// It goes on, in the namespace of the calling thread, until wait returns how many
// there were.
func Cut(c Config) (wait func() (int, error)) {
	if len(c.Overlays) == 0 {
		return func() (int, error) { return 0, nil }
	}
	return conntrack.Begin(func(f *conntrack.Flow) bool {
		return !c.allows(f.Src, f.ReplySrc, f.Dst != f.ReplySrc, f.Protocol) || c.unmasked(f)
	})
}

// unmasked reports whether a connection from a container to outside lacks the
// address of the host. Its packets would never get one, and no answer.
func (c Config) unmasked(f *conntrack.Flow) bool {
	in := func(ps []netip.Prefix) bool {
		return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(f.ReplySrc) })
	}
	return f.ReplyDst == f.Src && c.overlayOf(f.Src) != nil && c.overlayOf(f.ReplySrc) == nil &&
		!in(c.VTEPPools) && !in(linkLocal()) && !slices.Contains(c.Local, f.ReplySrc)
}

// allows reports whether the rules let a connection be opened from one address
// to another; redirected: through a published port.
func (c Config) allows(from, to netip.Addr, redirected bool, protocol byte) bool {
	x, y := c.overlayOf(from), c.overlayOf(to)
	strict := func(o *Overlay) bool { return o != nil && o.Isolation.Mode() == conf.IsolationStrict }
	icmp := protocol == unix.IPPROTO_ICMP || protocol == unix.IPPROTO_ICMPV6
	own := func(a netip.Addr) bool { return slices.Contains(c.Local, a) }
	switch {
	case (strict(x) && own(to) || strict(y) && own(from)) && !redirected:
		return icmp && (x != nil && y != nil) // with a gateway, whose address is of the overlay
	case x != nil && y != nil:
		return Permits(*x, *y)
	case strict(x):
		return !c.ofCluster(to)
	case strict(y):
		return redirected
	}
	return true
}

func (c Config) overlayOf(a netip.Addr) *Overlay {
	for i := range c.Overlays {
		for _, s := range c.Overlays[i].Subnets {
			if s.Contains(a) {
				return &c.Overlays[i]
			}
		}
	}
	return nil
}

// ofCluster reports whether the address is one of a host, as far as known.
func (c Config) ofCluster(a netip.Addr) bool {
	return slices.ContainsFunc(c.VTEPPools, func(p netip.Prefix) bool { return p.Contains(a) }) || slices.Contains(c.Peers, a)
}
