// Package mark is everything that tells our kernel objects from others': names
// and aliases of links, MACs, the protocol and the metrics of routes, and the
// names of firewall chains, tables and sets. Nothing without a mark of ours is
// ever changed or removed.
//
// It is pure and links next to nothing, because the CNI programs use it too.
// What the wire shares with DC/OS (VNI, UDP port, name of the VTEP, names of the
// bridges) is vocabulary and stands in conf.
package mark

import (
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
)

// RouteProtocol is on every route of ours (ip route show proto 44), on the host
// and inside containers; no other route is ever removed.
const RouteProtocol = 44

// SecondVTEP is the VXLAN device for hosts of the other underlay family, where the
// host has an agent IP of each. DC/OS knows nothing of it.
const SecondVTEP = conf.VTEPName + "-2"

// The metrics of our routes that lead nowhere. Every other route to the same
// prefix goes before them.
const (
	// BlackholeMetric is that of the routes to this host's own agent subnets.
	BlackholeMetric = 1<<32 - 1
	// UnreachableMetric is that of the routes to the whole range of an overlay.
	UnreachableMetric = 1<<32 - 2
)

// PeerMetric is the metric of the routes to a peer: the place of its VTEP
// address in the pool, which no two peers with IPv4 share. The kernel looks for an equal
// next hop among those with the same device, protocol, scope and metric,
// whatever the gateway; with one metric for all it would compare every new route
// with every peer (docs/adr/0003-distinct-metric-per-peer.md). A VTEP MAC has
// the last three bytes of the address, so pools, and with them metrics, have at
// most 24 bits.
func PeerMetric(vtep netip.Addr, pool netip.Prefix) uint32 {
	ip := vtep.As16()
	n := binary.BigEndian.Uint32(ip[12:]) & (1<<24 - 1)
	if host := vtep.BitLen() - pool.Bits(); pool.IsValid() && host < 24 {
		n &= 1<<host - 1
	}
	return max(n, 1)
}

// FastPathGroup is the link group of host ends that no host port leads to: their
// traffic need not pass connection tracking, so the fast path may take it.
const FastPathGroup = 0x6f766c32

// FilterPrefix starts the names of the BPF filters of the fast path (tc filter
// show dev DEV ingress).
const FilterPrefix = "overlay_"

// The chains of the firewall, with the same names in iptables and nftables. Each
// hook has one jump of ours.
const (
	RawChain        = "OVERLAY-RAW"     // received packets, before connection tracking
	InputChain      = "OVERLAY-INPUT"   // packets to this host
	ForwardChain    = "OVERLAY-FORWARD" // packets through this host
	OutputChain     = "OVERLAY-OUTPUT"  // packets from this host
	MasqueradeChain = "OVERLAY-MASQ"    // source translation
	NeighboursChain = "OVERLAY-NEIGH"   // forwarded packets, in the guard of earlier builds
	// What those jump to.
	HostInChain  = "OVERLAY-HOST-IN"  // packets from a device of ours to this host
	HostOutChain = "OVERLAY-HOST-OUT" // packets from this host to a device of ours
	FromChain    = "OVERLAY-FROM"     // forwarded packets from a device of ours
	ToChain      = "OVERLAY-TO"       // forwarded packets to one, from elsewhere
	ReachChain   = "OVERLAY-REACH"    // where a container may send to
	EncapChain   = "OVERLAY-ENCAP"    // VXLAN that a container made
	HopsChain    = "OVERLAY-HOPS"     // whose next hop is another than lately
	// UserChain is the administrator's: asked about forwarded packets before any
	// chain of ours, and never changed by us.
	UserChain = "OVERLAY-USER"
	// OldVXLANChain was a chain of the table nat. Releases before had it.
	OldVXLANChain = "OVERLAY-VXLAN"
)

// IsOurChain reports whether a chain is ours, and not the administrator's.
func IsOurChain(name string) bool {
	switch name {
	case RawChain, InputChain, ForwardChain, OutputChain, MasqueradeChain,
		HostInChain, HostOutChain, FromChain, ToChain, ReachChain, EncapChain, OldVXLANChain,
		NeighboursChain, HopsChain:
		return true
	}
	return false
}

// SetPrefix starts the names of our sets in ipset, whose names are shared by all
// programs of a host.
const SetPrefix = "overlay-"

// FirewalldZone is the zone of firewalld that holds VTEP and bridges.
const FirewalldZone = "overlay"

// FirewalldPolicy is the policy of firewalld that opens the VXLAN port.
const FirewalldPolicy = "overlay-vxlan"

// The objects of nftables: one table of this name in each family that needs one.
const (
	NFTable = "overlay"
	// NFGuardTable belongs to the agent's process, where the kernel can do that.
	NFGuardTable = "guard-overlay"
	// SourcesSet holds, in family bridge, what each host end may send from.
	SourcesSet = "sources"
)

// bridgePrefix starts the alias of every bridge we made. Bridges that somebody
// else made (Docker) are used but never removed.
const bridgePrefix = "overlay: "

// BridgeAlias is the alias of a bridge we made: "overlay: <overlay>/<half>".
func BridgeAlias(overlay string, half conf.Half) string {
	return bridgePrefix + overlay + "/" + string(half)
}

// ParseBridgeAlias reads what BridgeAlias wrote. ok is false for the alias of a
// bridge that is not ours.
func ParseBridgeAlias(alias string) (overlay string, half conf.Half, ok bool) {
	rest, ok := strings.CutPrefix(alias, bridgePrefix)
	if !ok {
		return "", "", false
	}
	overlay, h, ok := strings.Cut(rest, "/")
	return overlay, conf.Half(h), ok
}

// HalfOf is the half whose bridges are named so. ok is false for other names.
func HalfOf(bridge string) (half conf.Half, ok bool) {
	for _, h := range conf.Halves {
		if strings.HasPrefix(bridge, h.Bridge("")) {
			return h, true
		}
	}
	return "", false
}

// BridgeMAC is the MAC of a bridge with these gateway addresses: it follows from the
// first of IPv4, or else of IPv6. It is the same at every start, so that containers
// need not learn a new one when a bridge is made anew, and given at creation, so
// that neither the first port nor systemd-udevd changes it.
func BridgeMAC(addrs []netip.Prefix) conf.MAC {
	var m conf.MAC
	for _, a := range addrs {
		if a.Addr().Is4() {
			return macOfIPv4(a.Addr())
		}
		if m != (conf.MAC{}) {
			continue // a further one, which comes and goes
		}
		h := sha256.Sum256(a.Addr().AsSlice())
		m = conf.MAC{0x02, h[0], h[1], h[2], h[3], h[4]}
	}
	return m
}

// BridgeMACOf is the MAC that a bridge is to have which has one already: that stays
// where it follows from one of the addresses. So it does when IPv4 is added to an
// overlay, and its containers find their gateway as before.
func BridgeMACOf(has conf.MAC, addrs []netip.Prefix) conf.MAC {
	of6 := slices.DeleteFunc(slices.Clone(addrs), func(a netip.Prefix) bool { return a.Addr().Is4() })
	if len(of6) > 0 && has == BridgeMAC(of6) {
		return has
	}
	return BridgeMAC(addrs)
}

func macOfIPv4(a netip.Addr) conf.MAC {
	ip := a.As4()
	return conf.MAC{0x0a, 0x58, ip[0], ip[1], ip[2], ip[3]}
}
