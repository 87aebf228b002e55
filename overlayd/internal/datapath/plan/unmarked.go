package plan

import (
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// Docker makes the bridge of its half itself where it starts before the agent. It has
// the name of one of ours and no alias, as any bridge of an administrator may.

// unmarked is the overlay of a bridge without an alias that is of ours all the same;
// empty: it is another's.
func (p *Plan) unmarked(name string, have *State) (overlay string) {
	l := have.Links[name]
	half, named := mark.HalfOf(name)
	overlay = strings.TrimPrefix(name, half.Bridge(""))
	if !named || l.Kind != "bridge" || l.Alias != "" || conf.CheckName(overlay) != nil || have.carriesUnderlay(l.Index) || !p.tied(name, overlay, have) {
		return ""
	}
	return overlay
}

// tied reports whether a bridge that is called like one of an overlay has something
// to do with it: the last plan had it, a container of the overlay is on it, or it has
// an address that this host's half has or had.
func (p *Plan) tied(name, overlay string, have *State) bool {
	l := have.Links[name]
	if have.Known[name] == l.Index {
		return true
	}
	for port, of := range have.Links {
		if alias, ours := mark.IsHostEnd(port, of.Alias); ours && of.Master == l.Index && alias.Overlay == overlay {
			return true
		}
	}
	ranges := slices.Clone(p.Wanted.Withdrawn)
	for _, o := range p.Wanted.Overlays {
		if o.Name == overlay {
			ranges = append(ranges, o.Subnets...)
		}
	}
	return slices.ContainsFunc(have.Others, func(a AddrKey) bool {
		return a.Dev == name && slices.ContainsFunc(ranges, a.Prefix.Overlaps)
	})
}

// carriesUnderlay reports whether what the host sends and receives with an agent IP
// goes by a link: it has the address, or is below or beside the one that has it.
func (s *State) carriesUnderlay(index int) bool {
	byIndex := make(map[int]Link, len(s.Links))
	for _, l := range s.Links {
		byIndex[l.Index] = l
	}
	seen := map[int]bool{0: true}
	next := []int{s.Links[s.Underlay].Index, s.Links[s.Second].Index}
	for len(next) > 0 {
		i := next[0]
		next = next[1:]
		if seen[i] {
			continue
		}
		seen[i] = true
		l := byIndex[i]
		next = append(next, l.Master)
		if l.Kind != "veth" && l.PeerNS < 0 {
			next = append(next, l.Peer)
		}
		for _, port := range s.Links {
			if port.Master == i {
				next = append(next, port.Index)
			}
		}
	}
	return index != 0 && seen[index]
}
