package published

import (
	"fmt"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
)

// The MTUs that a device can have; IPv4 needs no less.
const (
	minMTU = 68
	maxMTU = 65535
)

// Contradiction says which values of a published state cannot be true together;
// empty: none. A document that was edited, cut together or written by a program
// gone wrong must not attach a container to a wrong place. Its cost grows with the
// square of the number of overlays.
func Contradiction(s conf.State) string {
	if problem := ofHost(s); problem != "" {
		return problem
	}
	for _, o := range s.Overlays {
		if problem := ofOverlay(s, o); problem != "" {
			return problem
		}
	}
	return ""
}

// ofHost looks at what concerns every overlay.
func ofHost(s conf.State) string {
	switch {
	case (s.MTU != 0 || hasReady(s)) && (s.MTU < minMTU || s.MTU > maxMTU):
		return fmt.Sprintf("mtu is %d, want %d to %d", s.MTU, minMTU, maxMTU)
	case s.CoolingSeconds < 0:
		return fmt.Sprintf("cooling_seconds is %d", s.CoolingSeconds)
	}
	return ""
}

// hasReady reports whether an overlay is set up; before that, the MTU may not be
// known yet.
func hasReady(s conf.State) bool {
	return slices.ContainsFunc(s.Overlays, func(o conf.AgentOverlay) bool { return o.State == nil || o.State.Status == conf.StatusOK })
}

// ofOverlay looks at one overlay and at what the others have in common with it.
func ofOverlay(s conf.State, o conf.AgentOverlay) string {
	if problem := inItself(o); problem != "" {
		return fmt.Sprintf("overlay %s: %s", o.Info.Name, problem)
	}
	same := 0
	for _, other := range s.Overlays {
		switch {
		case other.Info.Name == o.Info.Name:
			if same++; same > 1 {
				return fmt.Sprintf("overlay %s is there twice", o.Info.Name)
			}
		default:
			if a, b, found := common(o.All(), other.All()); found {
				return fmt.Sprintf("overlays %s and %s have the subnets %s and %s, which overlap", o.Info.Name, other.Info.Name, a, b)
			}
		}
	}
	return ""
}

// common finds two subnets that overlap, one of each list.
func common(ours, others []conf.Block) (a, b netip.Prefix, found bool) {
	for _, x := range ours {
		for _, y := range others {
			switch {
			case overlap(x.Subnet, y.Subnet):
				return x.Subnet, y.Subnet, true
			case overlap(x.Subnet6, y.Subnet6):
				return x.Subnet6, y.Subnet6, true
			}
		}
	}
	return a, b, false
}

func inItself(o conf.AgentOverlay) string {
	if err := conf.CheckName(o.Info.Name); err != nil {
		return err.Error()
	}
	for _, family := range [...]struct{ subnet, overlay netip.Prefix }{{o.Subnet, o.Info.Subnet}, {o.Subnet6, o.Info.Subnet6}} {
		if family.subnet.IsValid() && family.overlay.IsValid() && !inside(family.subnet, family.overlay) {
			return fmt.Sprintf("the subnet of this host, %s, is not in the overlay's, %s", family.subnet, family.overlay)
		}
	}
	if problem := ofBlocks(o); problem != "" {
		return problem
	}
	for _, half := range conf.Halves {
		b := o.Bridge(half)
		if b == nil {
			continue
		}
		if want := o.Info.BridgeName(half); b.Name != want {
			return fmt.Sprintf("the bridge of the %s half is %q, want %s", half, b.Name, want)
		}
		for _, family := range [...]struct{ half, subnet netip.Prefix }{{b.IP, o.Subnet}, {b.IP6, o.Subnet6}} {
			switch {
			case !family.half.IsValid():
			case !inside(family.half, family.subnet):
				return fmt.Sprintf("the %s half, %s, is not in the subnet of this host, %s", half, family.half, family.subnet)
			case conf.Containers(family.half) == 0:
				return fmt.Sprintf("the %s half, %s, has no address for a container", half, family.half)
			}
		}
	}
	return ""
}

// ofBlocks looks at the further blocks: parts of the overlay, each of its own, with
// addresses for containers in both halves.
func ofBlocks(o conf.AgentOverlay) string {
	for i, b := range o.Blocks {
		for _, family := range [...]struct{ subnet, overlay netip.Prefix }{{b.Subnet, o.Info.Subnet}, {b.Subnet6, o.Info.Subnet6}} {
			switch {
			case !family.subnet.IsValid():
			case family.overlay.IsValid() && !inside(family.subnet, family.overlay):
				return fmt.Sprintf("the further subnet of this host, %s, is not in the overlay's, %s", family.subnet, family.overlay)
			case conf.Containers(o.Info.Part(conf.Mesos, family.subnet)) == 0:
				return fmt.Sprintf("the further subnet of this host, %s, has no address for a container", family.subnet)
			}
		}
		if a, b, found := common(o.All()[:i+1], []conf.Block{b}); found {
			return fmt.Sprintf("the subnets of this host, %s and %s, overlap", a, b)
		}
	}
	return ""
}

// inside reports whether all of p is in the larger one.
func inside(p, larger netip.Prefix) bool {
	return larger.IsValid() && p.Bits() >= larger.Bits() && larger.Contains(p.Addr())
}

func overlap(a, b netip.Prefix) bool { return a.IsValid() && b.IsValid() && a.Overlaps(b) }
