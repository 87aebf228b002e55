package firewall

import (
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// The sets.
const (
	PeersSet     = "peers"     // underlay addresses of the other hosts
	devicesSet   = "devices"   // VTEP and bridges
	bridgesSet   = "bridges"   //
	leftSet      = "left"      // bridges that are left of overlays which are not here
	overlaysSet  = "overlays"  // all overlays
	poolsSet     = "pools"     // VTEP addresses
	oursSet      = "ours"      // overlays and VTEP addresses
	staySet      = "stay"      // destinations for which a packet keeps its source
	ownSet       = "own"       // an overlay and its bridges
	reachSet     = "reach"     // where containers of a bridge may send to
	openSet      = "open"      // overlays without isolation
	openOwnSet   = "openown"   // such an overlay and its bridges
	guestsSet    = "guests"    // overlays that another one allows
	strictSet    = "strict"    // strictly isolated overlays
	strictOwnSet = "strictown" // such an overlay and its bridges
	linkSet      = "link"      // what never leaves a link
	AfarSet      = "afar"      // subnets of peers in overlays that are not here
	DirectSet    = "direct"    // what peers send from without VXLAN, and the device they send to
	hopsSet      = "hops"      // where packets of containers went lately
	sendersSet   = "senders"   // who sent them elsewhere
	arrivalsSet  = "arrivals"  // by which device they came
	tunnelSet    = "tunnel"    // the VTEP
)

// SetNames are the names of all sets that Build may make.
func SetNames() []string {
	return []string{
		PeersSet, devicesSet, bridgesSet, leftSet, overlaysSet, poolsSet, oursSet, staySet, ownSet,
		reachSet, openSet, openOwnSet, guestsSet, strictSet, strictOwnSet, linkSet, DirectSet, AfarSet,
	}
}

// Config is what a host has and who may talk to whom.
type Config struct {
	VTEPPools []netip.Prefix // where all VTEP addresses come from, one per family
	Overlays  []Overlay
	Bridges   []Bridge
	Peers     []netip.Addr // underlay addresses that may send VXLAN
	Local     []netip.Addr // addresses of this host: gateways, VTEP, underlay
	Underlay6 bool         // VXLAN comes in IPv6
	Second    bool         // there is a second VXLAN device, for the other family
	Underlay  []string     // devices of others that have addresses of Local
	Afar      []Element    // subnets of peers in overlays of which this host has nothing
	Direct    *Direct      // nil: overlay packets come in VXLAN only
	// Guarded: the table of BuildGuard is there, and as long as the rules. What it
	// does is not done twice.
	Guarded bool
}

// Direct is what is taken without VXLAN.
type Direct struct {
	// Sources are subnets of peers, each with the device that it sends to.
	Sources []Element
}

// Overlay is one overlay network.
type Overlay struct {
	Name      string
	Subnets   []netip.Prefix // one per family
	Isolation conf.Isolation
	Allow     []string // overlays whose containers may reach this one
}

// Bridge is the bridge of one half of an overlay on this host.
type Bridge struct {
	Name, Overlay string
	// Only: containers on it reach nothing but this of their overlay; nil: all of it.
	Only []netip.Prefix
}

// Build is the firewall of a host. It has the same chains and rules whatever the
// number of overlays, containers and peers is; those of strict isolation are
// there where an overlay has it. A host without overlays still has something to
// keep apart (ADR 0069): containers on bridges that are left, and peers, to whom it
// would pass on VXLAN of others as its own. Without those either it has no rules.
func Build(c Config) Ruleset {
	b := builder{Config: c}
	for _, o := range c.Overlays {
		b.strict = b.strict || o.Isolation.Mode() == conf.IsolationStrict
		for _, s := range o.Subnets {
			b.r.IPv6 = b.r.IPv6 || s.Addr().Is6()
			b.r.IPv4 = b.r.IPv4 || s.Addr().Is4()
		}
	}
	if c.leftUnknown() {
		b.r.IPv4, b.r.IPv6 = true, true
	}
	if !b.r.IPv4 && !b.r.IPv6 && len(c.Peers) == 0 {
		return Ruleset{}
	}
	b.r.IPv4 = b.r.IPv4 || !c.Underlay6 || c.Second
	b.r.IPv6 = b.r.IPv6 || c.Underlay6 || c.Second
	for _, e := range c.Afar {
		b.r.IPv6 = b.r.IPv6 || e.Prefix.Addr().Is6()
		b.r.IPv4 = b.r.IPv4 || e.Prefix.Addr().Is4()
	}
	// The guard does not know what peers send without VXLAN.
	b.Guarded = c.Guarded && c.Direct == nil
	b.sets()
	b.chain(mark.ReachChain, Forward, reach()...)
	b.guard()
	b.forward()
	if b.strict {
		b.output()
	}
	b.masquerade()
	return b.r
}

// leftUnknown reports whether a bridge is left of an overlay of which this host has
// nothing any more, so that there is no telling what its containers speak.
func (c Config) leftUnknown() bool { return len(c.unknown()) > 0 }

// unknown are such bridges.
func (c Config) unknown() (out []Bridge) {
	for _, b := range c.Bridges {
		if !slices.ContainsFunc(c.Overlays, func(o Overlay) bool { return o.Name == b.Overlay && len(o.Subnets) > 0 }) {
			out = append(out, b)
		}
	}
	return out
}

type builder struct {
	Config
	strict bool
	r      Ruleset
}

// hook adds the chain that is asked at a hook, chain one that is jumped to from
// there.
func (b *builder) hook(name string, at Hook, rules ...Rule) {
	b.r.Chains = append(b.r.Chains, Chain{Name: name, Hook: at, Rules: rules})
}

func (b *builder) chain(name string, table Hook, rules ...Rule) {
	b.r.Chains = append(b.r.Chains, Chain{Name: name, Table: table, Rules: rules})
}

func (b *builder) set(name string, kind Kind, elements []Element) {
	b.r.Sets = append(b.r.Sets, Set{Name: name, Kind: kind, Elements: elements})
}

func prefixes(in ...netip.Prefix) (out []Element) {
	for _, p := range in {
		out = append(out, Element{Prefix: p.Masked()})
	}
	return out
}

// linkLocal are destinations on the link only.
func linkLocal() []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
	}
}

// sets makes all sets.
func (b *builder) sets() {
	var all, open, strict []netip.Prefix
	for _, o := range b.Overlays {
		all = append(all, o.Subnets...)
		switch o.Isolation.Mode() {
		case conf.IsolationNone:
			open = append(open, o.Subnets...)
		case conf.IsolationStrict:
			strict = append(strict, o.Subnets...)
		}
	}
	var peers []Element
	for _, p := range b.Peers {
		peers = append(peers, Address(p))
	}
	b.set(PeersSet, Addresses, peers)
	b.devices()
	b.set(overlaysSet, Prefixes, prefixes(all...))
	b.set(oursSet, Prefixes, prefixes(slices.Concat(all, b.VTEPPools)...))
	b.set(staySet, Prefixes, prefixes(slices.Concat(all, b.VTEPPools, linkLocal())...))
	b.pairs()
	b.set(openSet, Prefixes, prefixes(open...))
	if len(b.Afar) > 0 {
		b.set(AfarSet, Networks, b.Afar)
	}
	if b.Direct != nil {
		b.set(DirectSet, SourcesOnDevice, b.Direct.Sources)
	}
	if b.strict {
		b.set(strictSet, Prefixes, prefixes(strict...))
		b.set(poolsSet, Prefixes, prefixes(b.VTEPPools...))
		b.set(linkSet, Prefixes, prefixes(linkLocal()...))
	}
}

// devices makes the sets of device names. Where a set of names is slower than a
// few patterns, the patterns stand for it, but for the rare host whose underlay is
// called like a bridge of ours: there it is the names.
func (b *builder) devices() {
	patterns := []string{conf.Mesos.Bridge("+"), conf.Docker.Bridge("+")}
	named := slices.ContainsFunc(b.Underlay, func(device string) bool {
		_, like := mark.HalfOf(device)
		return like
	})
	if named {
		patterns = nil
	}
	var bridges []Element
	for _, br := range b.Bridges {
		bridges = append(bridges, Element{Device: br.Name})
		if named {
			patterns = append(patterns, br.Name)
		}
	}
	if unknown := b.unknown(); len(unknown) > 0 {
		left := Set{Name: leftSet, Kind: Devices}
		for _, br := range unknown {
			left.Patterns, left.Elements = append(left.Patterns, br.Name), append(left.Elements, Element{Device: br.Name})
		}
		b.r.Sets = append(b.r.Sets, left)
	}
	b.r.Sets = append(b.r.Sets,
		Set{Name: bridgesSet, Kind: Devices, Patterns: patterns, Elements: bridges},
		Set{Name: devicesSet, Kind: Devices, Patterns: append(b.vteps(), patterns...), Elements: append(b.tunnels(), bridges...)})
}

// vteps are the VXLAN devices.
func (b *builder) vteps() []string {
	if b.Second {
		return []string{conf.VTEPName, mark.SecondVTEP}
	}
	return []string{conf.VTEPName}
}

// tunnels are the same as elements of a set.
func (b *builder) tunnels() (out []Element) {
	for _, name := range b.vteps() {
		out = append(out, Element{Device: name})
	}
	return out
}

// fromHosts is a rule for what comes from other hosts in VXLAN.
func (b *builder) fromHosts(r Rule) (out []Rule) {
	for _, name := range b.vteps() {
		r.InDevice = name
		out = append(out, r)
	}
	return out
}
