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
		case overlap(other.Subnet, o.Subnet):
			return fmt.Sprintf("overlays %s and %s have the subnets %s and %s, which overlap", o.Info.Name, other.Info.Name, o.Subnet, other.Subnet)
		case overlap(other.Subnet6, o.Subnet6):
			return fmt.Sprintf("overlays %s and %s have the subnets %s and %s, which overlap", o.Info.Name, other.Info.Name, o.Subnet6, other.Subnet6)
		}
	}
	return ""
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
	for _, half := range conf.Halves {
		b := o.Bridge(half)
		if b == nil {
			continue
		}
		if b.Name != half.Bridge(o.Info.Name) {
			return fmt.Sprintf("the bridge of the %s half is %q, want %s", half, b.Name, half.Bridge(o.Info.Name))
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

// inside reports whether all of p is in the larger one.
func inside(p, larger netip.Prefix) bool {
	return larger.IsValid() && p.Bits() >= larger.Bits() && larger.Contains(p.Addr())
}

func overlap(a, b netip.Prefix) bool { return a.IsValid() && b.IsValid() && a.Overlaps(b) }
