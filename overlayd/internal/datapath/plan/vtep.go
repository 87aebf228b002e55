package plan

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// A VXLAN device sends to hosts of one family. A host with an agent IP of each has
// two, with the same VNI, UDP port and MAC (ADR 0063).

// takeSecond leaves the second agent IP out where no link has it, and says what the
// second device takes.
func (w *Wanted) takeSecond(have *State) {
	if !w.VTEP.Second.IsValid() || w.VTEP.Second.Is4() == w.VTEP.Local.Is4() {
		w.VTEP.Second = netip.Addr{}
		return
	}
	under, found := have.Links[have.Second]
	switch mtu := under.MTU - Overhead(w.VTEP.Second); {
	case !found || !under.Loopback() && mtu < conf.MinMTU:
		w.VTEP.Second, w.Seeking = netip.Addr{}, true
	case under.Loopback():
		w.SecondMTU = w.MTU
	default:
		w.SecondMTU = min(mtu, w.MTU)
	}
}

// MTUOf is the MTU of a device of ours.
func (p *Plan) MTUOf(d Device) int {
	if d.Name == mark.SecondVTEP {
		return p.Wanted.SecondMTU
	}
	return p.MTU
}

// localOf is the agent IP that a VXLAN device sends from.
func (v VTEP) localOf(device string) netip.Addr {
	if device == mark.SecondVTEP {
		return v.Second
	}
	return v.Local
}

// say tells what keeps a VXLAN device from being used: without the second one the
// host goes on.
func (p *Plan) say(device, format string, args ...any) {
	if device == mark.SecondVTEP {
		p.Notices = append(p.Notices, fmt.Sprintf(format, args...))
		return
	}
	p.complain("", format, args...)
}

// planVTEP makes the VTEP, or makes it anew where it is not as it should be and
// cannot be changed, and reports whether it can be used.
func (p *Plan) planVTEP(d Device, have *State) bool {
	v := p.Wanted.VTEP
	local := v.localOf(d.Name)
	l, there := have.Links[d.Name]
	if there && l.Kind != "vxlan" {
		p.say(d.Name, "link %s is in the way: the VXLAN device needs that name, but it is a %s; remove or rename it", d.Name, orUnknown(l.Kind))
		return false
	}
	want := rtnl.VXLAN{VNI: conf.VNI, Port: conf.VXLANPort, Local: local}
	is := l.VXLAN
	is.Learning = false // can be changed
	switch {
	case there && p.gone[d.Name]:
	case there && (l.MAC != v.MAC || is != want):
		p.removeVTEP(d.Name, have)
	case there:
		if l.VXLAN.Learning {
			p.add(Op{Act: Set, Obj: VXLANLearning, Dev: d.Name})
		}
		if l.Master != 0 {
			p.add(Op{Act: Set, Obj: LinkMaster, Dev: d.Name})
		}
		return true
	}
	if other := have.nicknamed(d.Name); other != "" {
		p.say(d.Name, "link %s has the other name (altname) %s, which the VXLAN device needs; remove it (ip link property del dev %s altname %s)",
			other, d.Name, other, d.Name)
		return false
	}
	for _, name := range slices.Sorted(maps.Keys(have.Links)) {
		x := have.Links[name].VXLAN
		six := x.Local.Is6() || x.Remote.Is6() // the kernel takes IPv4 where neither is given
		if name != conf.VTEPName && name != mark.SecondVTEP && x.VNI == conf.VNI && x.Port == conf.VXLANPort && six == local.Is6() {
			p.say(d.Name, "link %s is a VXLAN device with our VNI %d and UDP port %d; remove it so that %s can be made",
				name, conf.VNI, conf.VXLANPort, d.Name)
		}
	}
	p.add(Op{Act: Add, Obj: VTEPLink, Dev: d.Name, MAC: v.MAC, Addr: local, MTU: p.MTUOf(d)})
	p.Fresh[d.Name] = true
	return true
}

// removeVTEP removes a VXLAN device so that it can be made anew. With the first one
// goes the address that routes over the second have as their source, and perhaps the
// family that the second has.
func (p *Plan) removeVTEP(device string, have *State) {
	if l, there := have.Links[mark.SecondVTEP]; device == conf.VTEPName && there && isOurVXLAN(l) {
		p.add(Op{Act: Del, Obj: VTEPLink, Dev: mark.SecondVTEP})
		p.gone[mark.SecondVTEP] = true
	}
	p.add(Op{Act: Del, Obj: VTEPLink, Dev: device})
	p.gone[device] = true
}

func isOurVXLAN(l Link) bool {
	return l.Kind == "vxlan" && l.VXLAN.VNI == conf.VNI && l.VXLAN.Port == conf.VXLANPort
}

// planLeftVTEP removes the second device where there is no second agent IP, after
// everything that was on it.
func (p *Plan) planLeftVTEP(have *State) {
	l, there := have.Links[mark.SecondVTEP]
	if there && isOurVXLAN(l) && !p.Wanted.VTEP.Second.IsValid() && !p.gone[mark.SecondVTEP] {
		p.add(Op{Act: Del, Obj: VTEPLink, Dev: mark.SecondVTEP})
	}
}
