package conf

import (
	"errors"
	"fmt"
	"net/netip"
)

// MaxAgentIDLen is the longest agent id in bytes.
const MaxAgentIDLen = 64

// CheckAgentID says what is wrong with an agent id, or nil. Agent and
// coordinator obey the same rule: 1 to 64 bytes of [A-Za-z0-9][A-Za-z0-9_.-]*.
func CheckAgentID(id string) error {
	if len(id) > MaxAgentIDLen || !plainName(id) {
		return fmt.Errorf("%.80q: want 1 to %d letters, digits, '_', '.' and '-', starting with a letter or digit", id, MaxAgentIDLen)
	}
	return nil
}

// Address ranges of IPv4 that no host has: this network (RFC 1122) and the
// former class E with the broadcast address (RFC 1112).
var (
	thisNetwork = netip.PrefixFrom(netip.AddrFrom4([4]byte{}), 8)
	reserved    = netip.PrefixFrom(netip.AddrFrom4([4]byte{240}), 4)
)

// CheckAgentIP says why an address cannot be the underlay address of a host,
// or nil. Agent and coordinator obey the same rule.
func CheckAgentIP(ip netip.Addr) error {
	switch {
	case !ip.IsValid():
		return errors.New("missing; want the address of the host on the network that connects the hosts")
	case ip.Is4In6() || ip.Zone() != "":
		return fmt.Errorf("%s: want a plain address without a zone and not IPv4-mapped", ip)
	case ip.IsLoopback(), ip.IsUnspecified(), ip.IsMulticast(), thisNetwork.Contains(ip), reserved.Contains(ip):
		return fmt.Errorf("%s is not the address of a host that others can reach; pass --agent-ip", ip)
	case ip.Is6() && ip.IsLinkLocalUnicast():
		return fmt.Errorf("%s is a link-local address; pass a routed one as --agent-ip", ip)
	}
	return nil
}

// CheckInNetwork says why an address is that of no host in an IPv4 network: it is the
// network's own or its broadcast address. Networks of one or two addresses (/32, /31)
// have neither, and IPv6 has none.
func CheckInNetwork(ip netip.Addr, network netip.Prefix) error {
	network = network.Masked()
	if !network.IsValid() || !network.Contains(ip) || !ip.Is4() || network.Bits() >= 31 {
		return nil
	}
	switch ip {
	case network.Addr():
		return fmt.Errorf("%s is the address of the network %s and of no host in it; pass the host's own as --agent-ip", ip, network)
	case LastAddr(network):
		return fmt.Errorf("%s is the broadcast address of the network %s and that of no host; pass the host's own as --agent-ip", ip, network)
	}
	return nil
}
