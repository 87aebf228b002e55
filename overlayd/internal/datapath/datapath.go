// Package datapath turns the wanted end state of a host's overlay into kernel
// objects: VTEP, bridges, addresses, routes, neighbours, FDB entries, sysctls
// and firewall rules.
//
// The caller states what should be (Config); the package reads what is, plans
// the difference (pure) and applies it. The same path serves first start, one
// more peer, a flushed firewall and an upgrade. Everything of ours can be told
// by its name, its route protocol or its chain, and nothing else is touched.
package datapath

import (
	"net/netip"

	"overlayd.internal/overlay/conf"
)

// Config is the wanted end state of one host. The zero value of an address
// means that the family is not there.
type Config struct {
	VTEP     VTEP
	Bridges  []Bridge
	Overlays []Overlay
	Peers    []conf.Peer // every agent but this one
}

// VTEP is the host's VXLAN device.
type VTEP struct {
	Local netip.Addr   // agent IP: source of the outer packets
	MAC   conf.MAC     //
	IP    netip.Prefix // with the length of its pool
	IP6   netip.Prefix //
	MTU   int          // 0: MTU of the underlay route less the encapsulation
}

// Bridge is one half of one agent subnet.
type Bridge struct {
	Name    string         // m-<overlay> or d-<overlay>
	Overlay string         //
	Addrs   []netip.Prefix // gateway address of each family, with the half's length
}

// Overlay is one overlay network as the firewall and the local routes see it.
type Overlay struct {
	Name      string
	Subnets   []netip.Prefix // the whole overlay, one per family
	Agent     []netip.Prefix // this host's agent subnets, one per family
	Isolation bool           // no traffic from or to other overlays
}

// Report says what could not be had. The datapath goes on past every failure,
// so that one overlay that cannot be configured does not stop the others.
type Report struct {
	MTU      int              // of VTEP, bridges and container interfaces
	Overlays map[string]error // by name; absent: fine
	Err      error            // what concerns the whole host
	Changed  int              // kernel objects added, changed or removed
}
