package agent

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// When a subnet of this host turns out to be another host's, its addresses must not
// be here any more: the bridges lose theirs, and packets follow the peer's route.
// Containers that have some stay as they are, on bridges that lead nowhere, until they
// have gone; then the overlay is set up with what the lease has now.
//
//	a peer has a subnet of ours, with a higher epoch ---> withheld, lease lost
//	a registration answers with another subnet ---------> withheld, until drained
//	no container is left on the bridges ----------------> set up as leased
//
// That is so for the first subnet of an overlay. A further block goes alone, and the
// bridges stay with everything else that they have.

// subnetsOf are the subnets of a grant, with those of further blocks.
func subnetsOf(g conf.Grant) (out []netip.Prefix) {
	for _, b := range g.All() {
		out = append(out, b.Prefixes()...)
	}
	return out
}

// firstOf are the subnets of a grant without those of further blocks.
func firstOf(g conf.Grant) []netip.Prefix {
	return conf.Block{Subnet: g.Subnet, Subnet6: g.Subnet6}.Prefixes()
}

// withdraw takes in that a lease has other first subnets than the one before. What it
// has again is no longer withdrawn, nor is what an overlay had that is not served now:
// its containers keep their addresses, which nobody gets.
func (l *loop) withdraw(before *heldLease) {
	left := map[string][]netip.Prefix{}
	for _, g := range l.lease.held.Grants {
		name, now := g.Overlay.Name, subnetsOf(g)
		was := slices.Clone(l.lease.left[name])
		if before != nil {
			used := before.inUse().Grants // a block that was given back is no loss
			if i := slices.IndexFunc(used, func(b conf.Grant) bool { return b.Overlay.Name == name }); i >= 0 {
				was = append(was, firstOf(used[i])...)
				l.warnOfBlocks(used[i], now)
			}
		}
		for _, s := range was {
			again := slices.ContainsFunc(now, s.Overlaps)
			served := s.Addr().Is4() && g.Overlay.Subnet.IsValid() || s.Addr().Is6() && g.Overlay.Subnet6.IsValid()
			if !again && served && !slices.Contains(left[name], s) {
				left[name] = append(left[name], s)
			}
		}
		if n := len(left[name]); n > len(l.lease.left[name]) {
			l.log.Warn("a subnet of this host was granted elsewhere; its containers go on without it, and the overlay is set up anew when they have gone",
				logkey.Overlay, name, logkey.Subnets, left[name])
		}
	}
	l.lease.left = left
}

// warnOfBlocks says which further blocks that were in use a lease no longer has.
func (l *loop) warnOfBlocks(used conf.Grant, now []netip.Prefix) {
	for _, b := range used.Blocks {
		for _, s := range b.Prefixes() {
			if !slices.ContainsFunc(now, s.Overlaps) {
				l.log.Warn("a further subnet of this host was granted elsewhere; containers with addresses of it have to be started anew",
					logkey.Overlay, used.Overlay.Name, logkey.Subnets, s)
			}
		}
	}
}

// withheld says of an overlay of the lease why it is not set up at present, if it is not.
func (l *loop) withheld(g conf.Grant) string {
	for _, s := range firstOf(g) {
		if why, ok := l.peers.claims.elsewhere[s]; ok {
			return why + l.stillOn(g.Overlay.Name)
		}
	}
	left := l.lease.left[g.Overlay.Name]
	if len(left) == 0 {
		return ""
	}
	next := "a new one has not been granted yet"
	if now := subnetsOf(g); len(now) > 0 {
		next = fmt.Sprintf("%s is set up when nothing is left", now[0])
	} else if g.Error != "" {
		next = g.Error
	}
	return fmt.Sprintf("subnet %s was granted to another host%s; %s", left[0], l.stillOn(g.Overlay.Name), next)
}

// stillOn is how many containers are left on the bridges of an overlay that is withheld.
func (l *loop) stillOn(overlay string) string {
	switch n := l.outcome.left[overlay]; n {
	case 0:
		return ""
	case 1:
		return ", and 1 container here is left with an address of it: remove it, or start it anew"
	default:
		return fmt.Sprintf(", and %d containers here are left with addresses of it: remove them, or start them anew", n)
	}
}

// effective is the lease less the overlays that are withheld, which have the reason
// in place of their subnets, and less further blocks that are another's.
func (l *loop) effective() conf.Lease {
	lease := l.lease.held.inUse()
	lease.Grants = slices.Clone(lease.Grants)
	for i, g := range lease.Grants {
		if why := l.withheld(g); why != "" {
			lease.Grants[i] = conf.Grant{Overlay: g.Overlay, Error: why}
			continue
		}
		lease.Grants[i].Blocks = slices.DeleteFunc(slices.Clone(g.Blocks), func(b conf.Block) bool {
			return slices.ContainsFunc(b.Prefixes(), func(s netip.Prefix) bool { _, lost := l.peers.claims.elsewhere[s]; return lost })
		})
	}
	return lease
}

// withdrawn are the subnets that were this host's and are another's.
func (l *loop) withdrawn() (out []netip.Prefix) {
	out = slices.Collect(maps.Keys(l.peers.claims.elsewhere))
	for _, left := range l.lease.left {
		out = append(out, left...)
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int { return cmp.Or(a.Addr().Compare(b.Addr()), a.Bits()-b.Bits()) })
	return slices.Compact(out)
}

// withFiles are the overlays whose files the runtimes keep: those that are withheld, too,
// because a container is taken away with the file it was attached with.
func (l *loop) withFiles() []conf.AgentOverlay {
	lease := l.lease.held.Lease
	lease.Grants = slices.Clone(lease.Grants)
	for i, g := range lease.Grants {
		if left := l.lease.left[g.Overlay.Name]; len(subnetsOf(g)) == 0 && len(left) > 0 {
			lease.Grants[i].Subnet = left[0] // the files do not tell of it
		}
	}
	return lease.AgentOverlays(nil)
}

// drained takes in how many containers the datapath has found on bridges that are not
// wanted, and reports whether an overlay that was withheld can be set up now.
func (l *loop) drained(r datapath.Report) bool {
	if r.Left == nil || r.Err != nil {
		return false
	}
	l.outcome.left = r.Left
	over := false
	for overlay := range l.lease.left {
		if r.Left[overlay] == 0 {
			l.log.Info("no container is left with an address of a subnet that was granted elsewhere", logkey.Overlay, overlay, logkey.Subnets, l.lease.left[overlay])
			delete(l.lease.left, overlay)
			over = true
		}
	}
	if over {
		l.saveLease()
	}
	return over
}
