package coordinator

import (
	"net/netip"
	"strconv"

	"overlayd.internal/overlay/conf"
)

// Peers are made and encoded more often than anything else: when a cluster joins at
// once each agent goes to all streams as a change, and again in every snapshot that
// somebody needs meanwhile. So both are done by hand here; what comes out is what
// Lease.Peer and encoding/json make of it.

// peerOf is what others see of an agent under a network.
func peerOf(n *network, a *agent, epochBase uint64) conf.Peer {
	vtep := n.vtepOf(&a.record)
	p := conf.Peer{
		AgentID: a.id, AgentIP: a.IP, Epoch: epochBase + a.mod,
		VTEPIP: vtep.IP.Addr(), VTEPIP6: vtep.IP6.Addr(), VTEPMAC: vtep.MAC, Underlay: a.Underlay,
	}
	for i := range n.Overlays {
		o := &n.Overlays[i]
		first, further := a.held(o.Name).granted(o)
		if first == (conf.Block{}) {
			continue
		}
		p.Subnets = appendPrefixes(p.Subnets, first)
		for _, b := range further {
			p.Subnets = appendPrefixes(p.Subnets, b)
		}
	}
	return p
}

func appendPrefixes(to []netip.Prefix, b conf.Block) []netip.Prefix {
	if b.Subnet.IsValid() {
		to = append(to, b.Subnet)
	}
	if b.Subnet6.IsValid() {
		to = append(to, b.Subnet6)
	}
	return to
}

// appendPeer appends a peer in JSON.
func appendPeer(b []byte, p conf.Peer) []byte {
	if !plain(p.AgentID) || p.AgentIP.Zone()+p.SecondIP.Zone()+p.VTEPIP.Zone()+p.VTEPIP6.Zone() != "" {
		return append(b, encode(p)...)
	}
	b = append(append(b, `{"id":"`...), p.AgentID...)
	b = appendAddr(append(b, `","ip":"`...), p.AgentIP)
	b = strconv.AppendUint(append(b, `","epoch":`...), p.Epoch, 10)
	b = appendAddr(append(b, `,"vtep_ip":"`...), p.VTEPIP)
	if p.VTEPIP6 != (netip.Addr{}) {
		b = appendAddr(append(b, `","vtep_ip6":"`...), p.VTEPIP6)
	}
	b = p.VTEPMAC.Append(append(b, `","vtep_mac":"`...))
	b = append(b, '"')
	for i, s := range p.Subnets {
		if i == 0 {
			b = append(b, `,"subnets":["`...)
		} else {
			b = append(b, `","`...)
		}
		b = appendPrefix(b, s)
	}
	if len(p.Subnets) > 0 {
		b = append(b, `"]`...)
	}
	b = appendUnderlay(b, &p.Underlay)
	return append(b, '}')
}

// plain reports whether a text is the same in JSON, between quotes.
func plain(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			return false
		}
	}
	return true
}

// appendAddr is nothing for an address that is not valid, as MarshalText says.
func appendAddr(b []byte, a netip.Addr) []byte {
	if !a.IsValid() {
		return b
	}
	return a.AppendTo(b)
}

func appendPrefix(b []byte, p netip.Prefix) []byte {
	return p.AppendTo(b) // nothing for the zero Prefix
}
