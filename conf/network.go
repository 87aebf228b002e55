package conf

import (
	"net/netip"
)

// Network is the cluster configuration: the object under the key
// dcos_overlay_network. The JSON form is what DC/OS serves as "network".
// A Network that came from clusterfile.Load, or for which Validate returned no
// problem, keeps every rule that Validate checks.
type Network struct {
	Overlays   []Overlay `json:"overlays"`
	Reclaim    string    `json:"reclaim,omitempty"` // ReclaimExpired or ReclaimNever; empty: expired, and not printed
	VTEPMACOUI string    `json:"vtep_mac_oui"`      // as the operator wrote it
	VTEPMTU    int       `json:"vtep_mtu,omitzero"`
	// VTEPSubnet is invalid, and printed as "", where no overlay has IPv4: readers of
	// DC/OS's document find the key in any case.
	VTEPSubnet  netip.Prefix `json:"vtep_subnet"`
	VTEPSubnet6 netip.Prefix `json:"vtep_subnet6,omitzero"`
}

// What becomes of the leases of agents that are long gone.
const (
	ReclaimExpired = "expired" // given to others when nothing else is left, oldest first
	ReclaimNever   = "never"   // kept until somebody deletes the agent
)

// Overlay is one named virtual network. At least one family is configured; in
// each, Prefix is the length of an agent subnet cut from Subnet.
type Overlay struct {
	Allow     []string `json:"allow,omitempty"`     // overlays whose containers may reach this one
	AntiSpoof *bool    `json:"antispoof,omitempty"` // nil: on, and not printed
	// BlocksPerAgent is how many agent subnets one agent can have; 0: DefaultBlocksPerAgent, and not printed.
	BlocksPerAgent int          `json:"blocks_per_agent,omitzero"`
	Draining       bool         `json:"draining,omitempty"` // nothing new is attached; of the cluster, not of a file
	Enabled        *bool        `json:"enabled,omitempty"`  // nil: enabled, and not printed
	Halves         string       `json:"halves,omitempty"`   // HalvesSplit or HalvesShared; empty: split, and not printed
	Isolation      Isolation    `json:"isolation,omitzero"` // empty: overlay, and not printed
	Name           string       `json:"name"`
	Prefix         int          `json:"prefix,omitzero"`
	Prefix6        int          `json:"prefix6,omitzero"`
	Subnet         netip.Prefix `json:"subnet,omitzero"`
	Subnet6        netip.Prefix `json:"subnet6,omitzero"`
}

// IsEnabled reports whether new leases of this overlay are given out. An agent
// that has one keeps it.
func (o Overlay) IsEnabled() bool { return o.Enabled == nil || *o.Enabled }

// DefaultBlocksPerAgent is how many agent subnets of an overlay one agent can have
// where the configuration does not say it. MaxBlocksPerAgent is the most it can say.
const (
	DefaultBlocksPerAgent = 4
	MaxBlocksPerAgent     = 64
)

// Blocks is how many agent subnets of the overlay one agent can have.
func (o Overlay) Blocks() int {
	if o.BlocksPerAgent == 0 {
		return DefaultBlocksPerAgent
	}
	return o.BlocksPerAgent
}

// ChecksSources reports whether containers of the overlay may only send from
// their own addresses, where the configuration of a network says nothing else.
func (o Overlay) ChecksSources() bool { return o.AntiSpoof == nil || *o.AntiSpoof }

// OUI is the parsed VTEPMACOUI of a valid Network.
func (n Network) OUI() MAC {
	m, _ := ParseMAC(n.VTEPMACOUI)
	return m
}

// Overlay returns the overlay of that name.
func (n Network) Overlay(name string) (Overlay, bool) {
	for _, o := range n.Overlays {
		if o.Name == name {
			return o, true
		}
	}
	return Overlay{}, false
}

// macHosts is how many bits of a VTEP's address its MAC has room for.
const macHosts = 24

// VTEPPool6 is the part of VTEPSubnet6 that VTEP addresses are given from: all of
// it, or where MACs are made of them, because there is no VTEPSubnet, so much of it
// that no two make the same.
func (n Network) VTEPPool6() netip.Prefix {
	p := n.VTEPSubnet6
	if n.VTEPSubnet.IsValid() || !p.IsValid() {
		return p
	}
	return netip.PrefixFrom(p.Addr(), max(p.Bits(), p.Addr().BitLen()-macHosts))
}

// HasIPv4 reports whether any overlay has an IPv4 subnet.
func (n Network) HasIPv4() bool {
	for _, o := range n.Overlays {
		if o.Subnet.IsValid() {
			return true
		}
	}
	return false
}

// HasIPv6 reports whether any overlay has an IPv6 subnet.
func (n Network) HasIPv6() bool {
	for _, o := range n.Overlays {
		if o.Subnet6.IsValid() {
			return true
		}
	}
	return false
}

// Problem is one thing wrong with a configuration.
type Problem struct {
	Path string // overlays[1].prefix; empty: the whole document
	Text string // what is wrong and what to do
}

func (p Problem) String() string {
	if p.Path == "" {
		return p.Text
	}
	return p.Path + ": " + p.Text
}
