package firewall

import (
	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// guard makes the chains for received packets, before connection tracking and on
// their way to this host. VXLAN carries any packet into any overlay, so only
// peers may send it; and who is not behind a device of ours has no overlay
// address.
//
// The first rule decides for the packets of peers, so that the others cost them
// nothing. A container that claims the address of a peer gets through it, and
// is stopped on the way to this host, as is what containers of other hosts send
// to the VXLAN port at an overlay address.
func (b *builder) guard() {
	b.hook(mark.RawChain, Raw,
		Rule{UDPPort: conf.VXLANPort, Src: PeersSet, Action: Return},
		Rule{In: devicesSet, Action: Return},
		Rule{UDPPort: conf.VXLANPort, Local: true, Action: Drop},
		Rule{NotLoopback: true, Src: oursSet, Action: Drop})

	rules := []Rule{
		{Established: true, Action: Return},
		{Action: Jump, Chain: mark.ReachChain},
	}
	if b.strict {
		rules = append(rules, strictInput()...)
	}
	b.chain(mark.HostInChain, Input, rules...)
	b.hook(mark.InputChain, Input,
		Rule{UDPPort: conf.VXLANPort, In: devicesSet, Action: Drop},
		Rule{UDPPort: conf.VXLANPort, Src: PeersSet, Action: Accept},
		Rule{In: devicesSet, Action: Goto, Chain: mark.HostInChain})
}

// encapsulated stops VXLAN that a container made on its way to another host,
// where it would have the address of this one: every packet, also those of a
// flow that was let through.
func encapsulated() []Rule {
	return []Rule{{Out: devicesSet, Action: Return}, {Action: Drop}}
}
