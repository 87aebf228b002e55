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
	DirectSet    = "direct"    // what peers send from without VXLAN, and the device they send to
	hopsSet      = "hops"      // where packets of containers went lately
	sendersSet   = "senders"   // who sent them elsewhere
	arrivalsSet  = "arrivals"  // by which device they came
	tunnelSet    = "tunnel"    // the VTEP
)

// SetNames are the names of all sets that Build may make.
func SetNames() []string {
	return []string{
		PeersSet, devicesSet, bridgesSet, overlaysSet, poolsSet, oursSet, staySet, ownSet,
		reachSet, openSet, openOwnSet, guestsSet, strictSet, strictOwnSet, linkSet, DirectSet,
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
	Direct    *Direct      // nil: overlay packets come in VXLAN only
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
// there where an overlay has it.
func Build(c Config) Ruleset {
	b := builder{Config: c}
	for _, o := range c.Overlays {
		b.strict = b.strict || o.Isolation.Mode() == conf.IsolationStrict
		for _, s := range o.Subnets {
			b.r.IPv6 = b.r.IPv6 || s.Addr().Is6()
			b.r.IPv4 = b.r.IPv4 || s.Addr().Is4()
		}
	}
	if !b.r.IPv4 && !b.r.IPv6 {
		return Ruleset{}
	}
	b.r.IPv4 = b.r.IPv4 || !c.Underlay6 || c.Second
	b.r.IPv6 = b.r.IPv6 || c.Underlay6 || c.Second
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
// few patterns, the patterns stand for it.
func (b *builder) devices() {
	patterns := []string{conf.Mesos.Bridge("+"), conf.Docker.Bridge("+")}
	var bridges []Element
	for _, br := range b.Bridges {
		bridges = append(bridges, Element{Device: br.Name})
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
