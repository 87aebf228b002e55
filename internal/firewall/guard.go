package firewall

import (
	"time"

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
//
// Where peers may send without VXLAN, their subnets are sources at the device
// that leads to them, and what comes so is treated as if it came from the VTEP.
func (b *builder) guard() {
	if !b.Guarded {
		raw := b.received()
		if b.Direct != nil {
			raw = append(raw, Rule{SrcIn: DirectSet, Action: Return})
		}
		b.hook(mark.RawChain, Raw, append(raw, b.foreignSources()...)...)
	}

	rules := []Rule{
		{Established: true, Action: Return},
		{Action: Jump, Chain: mark.ReachChain},
	}
	if b.strict {
		rules = append(rules, b.strictInput()...)
	}
	b.chain(mark.HostInChain, Input, rules...)
	var input []Rule
	if !b.Guarded {
		input = []Rule{ownVXLAN}
	}
	input = append(input,
		Rule{UDPPort: conf.VXLANPort, Src: PeersSet, Action: Accept},
		Rule{In: devicesSet, Action: Goto, Chain: mark.HostInChain})
	if b.Direct != nil {
		input = append(input, Rule{SrcIn: DirectSet, Action: Goto, Chain: mark.HostInChain})
	}
	b.hook(mark.InputChain, Input, input...)
}

// ownVXLAN is what containers send to this host's VXLAN port.
var ownVXLAN = Rule{UDPPort: conf.VXLANPort, In: devicesSet, Action: Drop}

// foreignSources stops who has an overlay address and is not behind a device of
// ours: also one of an overlay that is not here, to which this host routes all the
// same.
func (b *builder) foreignSources() []Rule {
	rules := []Rule{{NotLoopback: true, Src: oursSet, Action: Drop}}
	if len(b.Afar) > 0 {
		rules = append(rules, Rule{NotLoopback: true, Src: AfarSet, Action: Drop})
	}
	return rules
}

// received decides about VXLAN before connection tracking. What this host only
// forwards is not its own to refuse; a broadcast or multicast packet it takes.
func (b *builder) received() []Rule {
	return []Rule{
		{UDPPort: conf.VXLANPort, Src: PeersSet, Action: Return},
		{In: devicesSet, Action: Return},
		{UDPPort: conf.VXLANPort, NotOthers: true, Action: Drop},
	}
}

// BuildGuard is the part of Build that keeps VXLAN of others out, for a table of
// its own that nobody else can flush. It also bounds what containers make the host
// resolve, which not every kernel that has such tables can do: bounded asks for it.
// Every chain that a hook asks costs each packet more than a few rules do, so
// there is one at each.
func BuildGuard(c Config, bounded bool) Ruleset {
	b := builder{Config: c}
	whole := Build(c)
	if len(whole.Chains) == 0 {
		return Ruleset{}
	}
	b.r.IPv4, b.r.IPv6 = whole.IPv4, whole.IPv6
	names := []string{PeersSet, devicesSet, oursSet}
	raw := b.received()
	if c.Direct == nil {
		raw = append(raw, b.foreignSources()...)
		names = append(names, AfarSet)
	} else { // what goes to containers without VXLAN, see encapsulated
		names[2] = overlaysSet
	}
	for _, name := range names {
		if s, err := whole.Set(name); err == nil {
			b.r.Sets = append(b.r.Sets, *s)
		}
	}
	b.hook(mark.RawChain, Raw, raw...)
	b.hook(mark.InputChain, Input, ownVXLAN)
	b.chain(mark.EncapChain, Forward, b.encapsulated()...)
	forward := []Rule{{UDPPort: conf.VXLANPort, In: devicesSet, Action: Jump, Chain: mark.EncapChain}}
	if bounded {
		forward = append(forward, b.neighbours()...)
	}
	b.hook(mark.ForwardChain, Forward, forward...)
	return b.r
}

// What containers may make a host resolve (ADR 0050). The kernel asks for an
// address for 3 s by default and throws away what did not answer when it needs
// the room; so a source holds no more entries than its burst and what it may add
// in 3 s: 500 of the 1,024 that the kernel's table has by default. A next hop is
// remembered no longer than that: otherwise a packet to it would have the kernel
// ask once more without being counted.
const hopStays = 3 * time.Second

// limitStays is longer than a limit takes to have its whole burst again, so that
// nothing is gained by being forgotten, and short, so that false sources do not
// fill the set.
const limitStays = 4 * time.Second

var (
	perSource = Limit{PerSecond: 100, Burst: 200}
	// perDevice is for sources that nobody checks: a container that Docker attached
	// can send from any address. It is more than perSource, so that one source does
	// not use up what the others of its device may do.
	perDevice = Limit{PerSecond: 150, Burst: 300}
)

// neighbours bounds what containers make the host resolve: each address on a link
// of the host that is sent to is an entry of a table that the whole host shares,
// whether or not anybody has the address. Packets of connections that were
// answered pass; so does what goes to other hosts, of which there are as many as
// there are peers, and what goes where others went lately. It returns what is
// asked about every forwarded packet.
func (b *builder) neighbours() []Rule {
	rules := []Rule{
		{Established: true, Action: Return},
		{In: devicesSet, Action: Goto, Chain: mark.HopsChain},
	}
	if b.Direct != nil {
		rules = append(rules, Rule{Src: overlaysSet, Action: Goto, Chain: mark.HopsChain})
	}
	b.chain(mark.HopsChain, Forward,
		Rule{Out: tunnelSet, Action: Return}, // the agent keeps all of those entries itself
		Rule{Toward: PeersSet, Action: Return},
		Rule{Hop: hopsSet, Action: Return},
		Rule{OverSrc: sendersSet, Action: Drop},
		Rule{OverIn: arrivalsSet, Action: Drop},
		Rule{AddHop: hopsSet, Action: Return})
	b.r.Sets = append(b.r.Sets,
		Set{Name: tunnelSet, Kind: Devices, Elements: b.tunnels()},
		Set{Name: hopsSet, Kind: NextHops, Stay: hopStays},
		Set{Name: sendersSet, Kind: LimitedSources, Stay: limitStays, Limit: perSource},
		Set{Name: arrivalsSet, Kind: LimitedDevices, Stay: limitStays, Limit: perDevice})
	return rules
}

// encapsulated stops VXLAN that a container made on its way to another host,
// where it would have the address of this one: every packet, also those of a
// flow that was let through. What goes to containers is theirs; it leaves by the
// underlay where their host is sent to without VXLAN, and that host drops what is
// for its own port.
func (b *builder) encapsulated() []Rule {
	rules := []Rule{{Out: devicesSet, Action: Return}}
	if b.Direct != nil {
		rules = append(rules, Rule{Src: overlaysSet, Dst: overlaysSet, Action: Return})
	}
	return append(rules, Rule{Action: Drop})
}
