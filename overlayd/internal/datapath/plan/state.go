package plan

import (
	"net/netip"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// State is what the kernel has, as far as it concerns us.
type State struct {
	IPv6     bool            // the kernel has it
	Links    map[string]Link // every link of the host, by name
	Underlay string          // name of the link that has the agent IP; empty: none
	Second   string          // the same of the second agent IP
	Known    map[string]int  // bridges of the last plan, with those that were left, by name their index
	Addrs    map[AddrKey]struct{}
	// Connected and Local hold the routes the kernel keeps for the addresses: to
	// their network, and to this host itself.
	Connected map[AddrKey]struct{}
	Local     map[AddrKey]struct{}
	Others    []AddrKey // global addresses on links that are not ours
	// Ways, Narrow and PathMTU are as in Wanted.
	Ways    map[netip.Addr]string
	Narrow  []netip.Prefix
	PathMTU map[netip.Addr]int
	Entries
	More    []RouteTo // further routes of ours to a prefix in Routes
	Compare *Comparison
	// Foreign are routes of others to prefixes inside overlays and inside the
	// VTEP pool, the one with the lowest metric of each prefix.
	Foreign map[netip.Prefix]ForeignRoute
	// Elsewhere are ranges outside of overlays and VTEP pool that routes of others
	// lead to, less the default route and what no overlay can be in.
	Elsewhere map[netip.Prefix]struct{}
	// Diverted are peers' subnets to which packets take another way than ours,
	// although no route in the main table says so: because of a rule (ip rule).
	Diverted []Diverted
	Sysctls  map[string]string // by path below /proc/sys
	// AcceptRA names the links that take router advertisements only as long as
	// the host does not forward.
	AcceptRA []string
}

// Link is a link with the number of its ports, if it is a bridge.
type Link struct {
	rtnl.Link
	Ports int
}

// AddrKey is an address on a device.
type AddrKey struct {
	Dev    string
	Prefix netip.Prefix
}

// Entries are what one peer more or less changes: everything on the VXLAN devices,
// and our routes.
type Entries struct {
	Forwarding            // on vtep1024
	Second     Forwarding // on the second device
	Routes     map[netip.Prefix]Route
}

// Forwarding is what one VXLAN device has of peers.
type Forwarding struct {
	Neigh map[netip.Addr]conf.MAC
	FDB   map[conf.MAC]netip.Addr
}

// MakeEntries makes empty ones for so many peers.
func MakeEntries(peers int) Entries {
	return Entries{
		Forwarding: makeForwarding(peers), Second: makeForwarding(0),
		Routes: make(map[netip.Prefix]Route, peers),
	}
}

func makeForwarding(peers int) Forwarding {
	return Forwarding{Neigh: make(map[netip.Addr]conf.MAC, peers), FDB: make(map[conf.MAC]netip.Addr, peers)}
}

// Peers is how many peers are forwarded to.
func (e *Entries) Peers() int { return len(e.FDB) + len(e.Second.FDB) }

// On is what a device has.
func (e *Entries) On(device string) *Forwarding {
	if device == mark.SecondVTEP {
		return &e.Second
	}
	return &e.Forwarding
}

// Route is a route of ours.
type Route struct {
	Metric uint32
	Via    netip.Addr // of a route to a peer
	Kind   RouteKind
	Dev    string // of a direct route, or one by the second VXLAN device
	MTU    int    // what the peer or the way to it takes, where that is less than ours; 0: as much
}

// RouteKind says where a route of ours leads.
type RouteKind uint8

const (
	ToPeer      RouteKind = iota // via a peer's VTEP address
	Blackhole                    // nowhere: an own agent subnet, as far as no bridge has it
	Unreachable                  // nowhere, with an answer to the sender: the rest of an overlay
	Plain                        // via a peer's agent IP
	ToVTEP                       // to a peer's VTEP address, which is behind the second VXLAN device
	Alien                        // as read: something we never make, so it is equal to nothing wanted
)

// leads reports whether the route leads to a peer.
func (r Route) leads() bool { return r.Kind == ToPeer || r.Kind == Plain || r.Kind == ToVTEP }

// bySecond reports whether the route leads over the second VXLAN device.
func (r Route) bySecond() bool { return r.Dev == mark.SecondVTEP && r.Kind != Plain }

// gateway is who the route leads to, for people.
func (r Route) gateway() string {
	switch r.Kind {
	case Plain:
		return "host " + r.Via.String()
	case ToVTEP:
		return "device " + r.Dev
	}
	return "VTEP " + r.Via.String()
}

// RouteTo is a route with its destination.
type RouteTo struct {
	Dst netip.Prefix
	Route
}

// ForeignRoute is a route of somebody else.
type ForeignRoute struct {
	Metric uint32
	Dev    string
	Text   string // as ip route prints it
	Kernel bool   // the kernel made it for an address
	Leads  bool   // somewhere: it is no blackhole or the like
}

// Diverted tells of one peer's subnet which way packets take instead.
type Diverted struct {
	Dst     netip.Prefix
	Way     string // where the packets go
	Command string // that shows it
}

// IsOurs reports whether a link is a bridge that we made, or the VTEP.
func (l Link) IsOurs() bool {
	_, _, ours := mark.ParseBridgeAlias(l.Alias)
	return ours && l.Kind == "bridge" || (l.Name == conf.VTEPName || l.Name == mark.SecondVTEP) && l.Kind == "vxlan"
}

// Comparison tells whether the kernel has exactly the wanted entries while they
// are being read. One that comes twice makes it say no; they come in a row.
type Comparison struct {
	Want    Entries
	differs bool

	neigh, fdb, routes int // how many were met
	lastDevice         string
	lastMAC            conf.MAC
	lastRoute          netip.Prefix
}

// Route takes in one route of ours.
func (c *Comparison) Route(dst netip.Prefix, r Route) {
	want, ok := c.Want.Routes[dst]
	c.differs = c.differs || !ok || want != r || dst == c.lastRoute
	c.lastRoute = dst
	c.routes++
}

// FDBEntry takes in one FDB entry of a VXLAN device.
func (c *Comparison) FDBEntry(device string, mac conf.MAC, ip netip.Addr) {
	want, ok := c.Want.On(device).FDB[mac]
	c.differs = c.differs || !ok || want != ip || c.fdb > 0 && device == c.lastDevice && mac == c.lastMAC
	c.lastDevice, c.lastMAC = device, mac
	c.fdb++
}

// Neighbour takes in one neighbour of a VXLAN device.
func (c *Comparison) Neighbour(device string, ip netip.Addr, mac conf.MAC) {
	want, ok := c.Want.On(device).Neigh[ip]
	c.differs = c.differs || !ok || want != mac
	c.neigh++
}

// Equal is the outcome.
func (c *Comparison) Equal() bool {
	w := &c.Want
	return !c.differs && c.neigh == len(w.Neigh)+len(w.Second.Neigh) && c.fdb == w.Peers() && c.routes == len(w.Routes)
}
