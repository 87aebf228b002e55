// Package plantest makes up clusters for tests.
package plantest

import (
	"fmt"
	"net/netip"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// Network says which overlays a test cluster has.
type Network struct {
	Overlays []plan.Overlay
	Length   int // of IPv4 agent subnets
	Length6  int // of IPv6 agent subnets
	Under6   bool
	Only6    bool // no host has an IPv4 VTEP address
	Direct   bool // every host sends without VXLAN where it can
}

func Overlay4(name string, subnet string) plan.Overlay {
	return plan.Overlay{Name: name, Subnets: []netip.Prefix{netip.MustParsePrefix(subnet)}, Isolation: conf.IsolationNone}
}

var (
	OnlyIPv4 = Network{Overlays: []plan.Overlay{Overlay4("dcos", "9.0.0.0/8")}, Length: 24, Length6: 80}
	OnlyIPv6 = Network{Overlays: []plan.Overlay{Overlay4("dcos6", "fd01:b::/64")}, Length: 24, Length6: 80}
	BothIP   = Network{Overlays: []plan.Overlay{Overlay4("dcos", "9.0.0.0/8"), Overlay4("dcos6", "fd01:b::/64")}, Length: 24, Length6: 80}
)

var OUI = conf.MAC{0x70, 0xb3, 0xd5}

// Nth is subnet number i of that length in pool.
func Nth(pool netip.Prefix, length, i int) netip.Prefix {
	b := pool.Masked().Addr().AsSlice()
	for bit := length - 1; i > 0; bit, i = bit-1, i>>1 {
		if i&1 == 1 {
			b[bit/8] |= 0x80 >> (bit % 8)
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(a, length)
}

func (n Network) AgentIP(i int) netip.Addr {
	if n.Under6 {
		return Nth(netip.MustParsePrefix("fd00:1::/64"), 128, i+2).Addr()
	}
	return Nth(netip.MustParsePrefix("172.16.0.0/12"), 32, i+2).Addr()
}

// vtepPool is that of a test cluster: wide enough for the largest benchmark.
var (
	vtepPool  = netip.MustParsePrefix("44.128.0.0/14")
	vtepPool6 = netip.MustParsePrefix("fd01:a::/64")
)

// Peer is host i as others see it.
func (n Network) Peer(i int) conf.Peer {
	p := conf.Peer{
		AgentID: fmt.Sprint("agent-", i), AgentIP: n.AgentIP(i), Epoch: uint64(i + 1),
		VTEPIP:  Nth(vtepPool, 32, i+1).Addr(),
		VTEPIP6: Nth(vtepPool6, 128, i+1).Addr(),
	}
	if n.Only6 {
		p.VTEPIP = netip.Addr{}
	}
	p.VTEPMAC, p.Direct = conf.VTEPMAC(OUI, p.VTEP()), n.Direct
	for _, o := range n.Overlays {
		p.Subnets = append(p.Subnets, n.AgentSubnet(o, i))
	}
	return p
}

func (n Network) AgentSubnet(o plan.Overlay, i int) netip.Prefix {
	if o.Subnets[0].Addr().Is6() {
		return Nth(o.Subnets[0], n.Length6, i)
	}
	return Nth(o.Subnets[0], n.Length, i)
}

// Host is what host i of size hosts is given.
func (n Network) Host(i, size int) plan.Wanted {
	self := n.Peer(i)
	c := plan.Wanted{VTEP: plan.VTEP{
		Local: self.AgentIP, MAC: self.VTEPMAC,
		IP:  netip.PrefixFrom(self.VTEPIP, vtepPool.Bits()),
		IP6: netip.PrefixFrom(self.VTEPIP6, vtepPool6.Bits()),
	}}
	c.Direct = plan.Direct{Take: n.Direct, Send: n.Direct}
	for _, o := range n.Overlays {
		own := n.AgentSubnet(o, i)
		for _, h := range conf.Halves {
			c.Bridges = append(c.Bridges, plan.Bridge{Name: h.Bridge(o.Name), Overlay: o.Name, Addrs: []netip.Prefix{conf.GatewayPrefix(h.Of(own))}})
		}
		o.Agent = []netip.Prefix{own}
		c.Overlays = append(c.Overlays, o)
	}
	for j := range size {
		if j != i {
			c.Peers = append(c.Peers, n.Peer(j))
		}
	}
	return c
}
