package antispoof

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// frame is an Ethernet frame with a text at its end by which it is recognised.
type frame struct {
	name string
	data []byte
}

var broadcast = conf.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func ethernet(dst, src conf.MAC, typ uint16, body ...[]byte) []byte {
	b := append(append([]byte{}, dst[:]...), src[:]...)
	b = binary.BigEndian.AppendUint16(b, typ)
	for _, p := range body {
		b = append(b, p...)
	}
	return b
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// packet is an IP packet of either family.
func packet(src, dst netip.Addr, protocol byte, body []byte) []byte {
	var b []byte
	if src.Is4() {
		b = []byte{0x45, 0}
		b = binary.BigEndian.AppendUint16(b, uint16(20+len(body)))
		b = append(b, 0, 1, 0, 0, 64, protocol, 0, 0)
	} else {
		b = []byte{0x60, 0, 0, 0}
		b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
		b = append(b, protocol, 255)
	}
	b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	return append(b, body...)
}

func udp(from, to uint16, text string) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(text)))
	return append(append(b, 0, 0), text...)
}

func ip(dstMAC, srcMAC conf.MAC, src, dst netip.Addr, protocol byte, body []byte) []byte {
	typ := uint16(unix.ETH_P_IP)
	if src.Is6() {
		typ = unix.ETH_P_IPV6
	}
	return ethernet(dstMAC, srcMAC, typ, packet(src, dst, protocol, body))
}

// arp ends with bytes that Ethernet would pad with.
func arp(src conf.MAC, operation byte, sender conf.MAC, senderIP netip.Addr, target conf.MAC, targetIP netip.Addr) []byte {
	return ethernet(broadcast, src, unix.ETH_P_ARP, []byte{0, 1, 8, 0, 6, 4, 0, operation}, sender[:], senderIP.AsSlice(), target[:], targetIP.AsSlice())
}

func icmp6Message(typ byte, rest ...[]byte) []byte {
	b := []byte{typ, 0, 0, 0, 0, 0, 0, 0}
	for _, r := range rest {
		b = append(b, r...)
	}
	return b
}

func lladdr(kind byte, m conf.MAC) []byte { return append([]byte{kind, 1}, m[:]...) }

// The places of the test.
var (
	gatewayMAC  = conf.MAC{0x0a, 0x58, 9, 0, 1, 1}
	ownMAC      = conf.MAC{0x0a, 0x58, 9, 0, 1, 2}
	neighborMAC = conf.MAC{0x0a, 0x58, 9, 0, 1, 3}

	own4, own6           = addr("9.0.1.2"), addr("fd01::2")
	second4              = addr("9.0.1.22")
	gateway4, gateway6   = addr("9.0.1.1"), addr("fd01::1")
	neighbor4, neighbor6 = addr("9.0.1.3"), addr("fd01::3")
	allNodes             = addr("ff02::1")
	allNodesMAC          = conf.MAC{0x33, 0x33, 0, 0, 0, 1}
	unspecified4         = addr("0.0.0.0")
	unspecified6         = addr("::")
)

// spoofed are frames that a container must not send.
func spoofed() []frame {
	var out []frame
	add := func(name string, data []byte) { out = append(out, frame{name, data}) }
	for _, v := range []struct{ who, a4, a6 string }{
		{"the gateway", "9.0.1.1", "fd01::1"}, {"a neighbour", "9.0.1.3", "fd01::3"}, {"a container of another host", "9.0.2.5", "fd01:0:0:1::5"},
		{"another overlay", "10.8.0.5", "fd02::5"}, {"the host", "172.16.0.2", "fd00::2"}, {"nobody", "0.0.0.0", "::"},
	} {
		add("IPv4 source of "+v.who, ip(gatewayMAC, ownMAC, addr(v.a4), gateway4, unix.IPPROTO_UDP, udp(1, 2, "x")))
		add("IPv6 source of "+v.who, ip(gatewayMAC, ownMAC, addr(v.a6), gateway6, unix.IPPROTO_UDP, udp(1, 2, "x")))
	}
	add("IPv6 link-local source of a neighbour", ip(gatewayMAC, ownMAC, linkLocalOf(neighborMAC), gateway6, unix.IPPROTO_UDP, udp(1, 2, "x")))
	for who, m := range map[string]conf.MAC{"the gateway": gatewayMAC, "a neighbour": neighborMAC, "nobody": {2, 2, 2, 2, 2, 2}} {
		add("source MAC of "+who+", IPv4", ip(broadcast, m, own4, gateway4, unix.IPPROTO_UDP, udp(1, 2, "x")))
		add("source MAC of "+who+", IPv6", ip(allNodesMAC, m, own6, allNodes, unix.IPPROTO_UDP, udp(1, 2, "x")))
		add("source MAC of "+who+", ARP", arp(m, 1, ownMAC, own4, conf.MAC{}, gateway4))
		add("source MAC of "+who+", MLD", ip(allNodesMAC, m, unspecified6, addr("ff02::16"), unix.IPPROTO_ICMPV6, icmp6Message(143)))
	}
	add("gratuitous ARP for the gateway", arp(ownMAC, 1, ownMAC, gateway4, conf.MAC{}, gateway4))
	add("ARP answer for the gateway", arp(ownMAC, 2, ownMAC, gateway4, neighborMAC, neighbor4))
	add("ARP answer for a neighbour", arp(ownMAC, 2, ownMAC, neighbor4, gatewayMAC, gateway4))
	add("ARP with the MAC of another inside", arp(ownMAC, 2, neighborMAC, own4, gatewayMAC, gateway4))
	add("ARP probe for the gateway", arp(ownMAC, 1, ownMAC, unspecified4, conf.MAC{}, gateway4))
	add("ARP answer without a sender", arp(ownMAC, 2, ownMAC, unspecified4, conf.MAC{}, own4))

	advert := func(src, target netip.Addr, option ...[]byte) []byte {
		return ip(allNodesMAC, ownMAC, src, allNodes, unix.IPPROTO_ICMPV6, icmp6Message(neighbourAdvert, append([][]byte{target.AsSlice()}, option...)...))
	}
	solicit := func(src, target netip.Addr, option ...[]byte) []byte {
		return ip(allNodesMAC, ownMAC, src, allNodes, unix.IPPROTO_ICMPV6, icmp6Message(neighbourSolicit, append([][]byte{target.AsSlice()}, option...)...))
	}
	add("advertisement for the gateway", advert(own6, gateway6, lladdr(2, ownMAC)))
	add("advertisement for the gateway, with its source", advert(gateway6, gateway6, lladdr(2, ownMAC)))
	add("advertisement for a neighbour", advert(own6, neighbor6, lladdr(2, ownMAC)))
	add("advertisement for a neighbour without its MAC", advert(own6, neighbor6))
	add("advertisement with the MAC of another", advert(own6, own6, lladdr(2, neighborMAC)))
	add("advertisement with two MACs", advert(own6, own6, lladdr(2, ownMAC), lladdr(2, neighborMAC)))
	add("solicitation with the MAC of another", solicit(own6, gateway6, lladdr(1, neighborMAC)))
	add("solicitation with two MACs", solicit(own6, gateway6, lladdr(1, ownMAC), lladdr(1, neighborMAC)))
	add("solicitation from a neighbour", solicit(neighbor6, gateway6, lladdr(1, ownMAC)))
	add("probe for the gateway", solicit(unspecified6, gateway6))
	add("probe with the MAC of another", solicit(unspecified6, own6, lladdr(1, neighborMAC)))
	for _, src := range []netip.Addr{own6, linkLocalOf(ownMAC), linkLocalOf(gatewayMAC)} {
		add("router advertisement from "+src.String(), ip(allNodesMAC, ownMAC, src, allNodes, unix.IPPROTO_ICMPV6, icmp6Message(routerAdvert, make([]byte, 8))))
		add("redirect from "+src.String(), ip(allNodesMAC, ownMAC, src, allNodes, unix.IPPROTO_ICMPV6, icmp6Message(redirect, neighbor6.AsSlice(), gateway6.AsSlice())))
	}
	add("router advertisement behind an extension header", ip(allNodesMAC, ownMAC, linkLocalOf(ownMAC), allNodes, 0, append([]byte{unix.IPPROTO_ICMPV6, 0, 1, 4, 0, 0, 0, 0}, icmp6Message(routerAdvert, make([]byte, 8))...)))
	add("advertisement behind an extension header", ip(allNodesMAC, ownMAC, own6, allNodes, 60, append([]byte{unix.IPPROTO_ICMPV6, 0, 1, 4, 0, 0, 0, 0}, icmp6Message(neighbourAdvert, gateway6.AsSlice())...)))
	for _, src := range []netip.Addr{own6, linkLocalOf(ownMAC), unspecified6} {
		add("router solicitation with the MAC of another from "+src.String(), ip(allNodesMAC, ownMAC, src, addr("ff02::2"), unix.IPPROTO_ICMPV6, icmp6Message(routerSolicit, lladdr(1, neighborMAC))))
	}
	add("router solicitation with two MACs", ip(allNodesMAC, ownMAC, own6, addr("ff02::2"), unix.IPPROTO_ICMPV6, icmp6Message(routerSolicit, lladdr(1, ownMAC), lladdr(1, neighborMAC))))
	add("router solicitation with the MAC of another behind an extension header", ip(allNodesMAC, ownMAC, own6, addr("ff02::2"), 60,
		append([]byte{unix.IPPROTO_ICMPV6, 0, 1, 4, 0, 0, 0, 0}, icmp6Message(routerSolicit, lladdr(1, neighborMAC))...)))
	// The second fragments of packets whose first ones have nothing but further headers.
	for name, header := range map[string]byte{"hop-by-hop options": 0, "a routing header": 43, "a fragment header": 44, "an authentication header": 51, "destination options": 60} {
		offset := []byte{header, 0, 0, 1 << 3, 0, 0, 0, 7}
		add("DHCPv6 answer in fragments behind "+name, ip(allNodesMAC, ownMAC, linkLocalOf(ownMAC), allNodes, unix.IPPROTO_FRAGMENT, append(offset, udp(547, 546, "advertise")...)))
	}
	add("DHCP answer", ip(broadcast, ownMAC, own4, addr("255.255.255.255"), unix.IPPROTO_UDP, udp(67, 68, "offer")))
	add("DHCPv6 answer", ip(allNodesMAC, ownMAC, linkLocalOf(ownMAC), allNodes, unix.IPPROTO_UDP, udp(547, 546, "advertise")))
	add("VXLAN with the address of a peer", ip(gatewayMAC, ownMAC, addr("172.16.0.3"), addr("172.16.0.2"), unix.IPPROTO_UDP, udp(1, 64000, "x")))
	add("a VLAN around an IPv4 packet of the gateway", ethernet(gatewayMAC, ownMAC, unix.ETH_P_8021Q, []byte{0, 1, 8, 0}, packet(gateway4, neighbor4, unix.IPPROTO_UDP, udp(1, 2, "x"))))
	add("another protocol than IP", ethernet(broadcast, ownMAC, 0x88cc, make([]byte, 46)))
	return out
}

// rightful are the same from their owner.
func rightful() []frame {
	var out []frame
	add := func(name string, data []byte) { out = append(out, frame{name, data}) }
	nonce := []byte{14, 1, 1, 2, 3, 4, 5, 6}
	for _, a := range []netip.Addr{own4, second4} {
		add("IPv4 from "+a.String(), ip(gatewayMAC, ownMAC, a, gateway4, unix.IPPROTO_UDP, udp(1, 2, "x")))
		add("gratuitous ARP for "+a.String(), arp(ownMAC, 1, ownMAC, a, conf.MAC{}, a))
		add("ARP answer for "+a.String(), arp(ownMAC, 2, ownMAC, a, gatewayMAC, gateway4))
		add("ARP probe for "+a.String(), arp(ownMAC, 1, ownMAC, unspecified4, conf.MAC{}, a))
	}
	add("ARP request", arp(ownMAC, 1, ownMAC, own4, conf.MAC{}, gateway4))
	add("DHCP request", ip(broadcast, ownMAC, own4, addr("255.255.255.255"), unix.IPPROTO_UDP, udp(68, 67, "request")))
	for _, a := range []netip.Addr{own6, linkLocalOf(ownMAC)} {
		add("IPv6 from "+a.String(), ip(gatewayMAC, ownMAC, a, gateway6, unix.IPPROTO_UDP, udp(1, 2, "x")))
		for _, option := range [][]byte{nil, lladdr(2, ownMAC)} {
			add("advertisement", ip(allNodesMAC, ownMAC, a, allNodes, unix.IPPROTO_ICMPV6, icmp6Message(neighbourAdvert, a.AsSlice(), option)))
		}
		for _, option := range [][]byte{nil, lladdr(1, ownMAC)} {
			add("solicitation", ip(allNodesMAC, ownMAC, a, allNodes, unix.IPPROTO_ICMPV6, icmp6Message(neighbourSolicit, gateway6.AsSlice(), option)))
		}
		for _, option := range [][]byte{nil, nonce} {
			add("probe for "+a.String(), ip(allNodesMAC, ownMAC, unspecified6, allNodes, unix.IPPROTO_ICMPV6, icmp6Message(neighbourSolicit, a.AsSlice(), option)))
		}
	}
	add("MLD report", ip(allNodesMAC, ownMAC, unspecified6, addr("ff02::16"), 0, append([]byte{unix.IPPROTO_ICMPV6, 0, 5, 2, 0, 0, 1, 0}, icmp6Message(143)...)))
	for _, src := range []netip.Addr{own6, linkLocalOf(ownMAC), unspecified6} {
		add("router solicitation from "+src.String(), ip(allNodesMAC, ownMAC, src, addr("ff02::2"), unix.IPPROTO_ICMPV6, icmp6Message(routerSolicit)))
	}
	add("router solicitation with its MAC", ip(allNodesMAC, ownMAC, linkLocalOf(ownMAC), addr("ff02::2"), unix.IPPROTO_ICMPV6, icmp6Message(routerSolicit, lladdr(1, ownMAC))))
	for _, offset := range []byte{0, 1 << 3} {
		add("fragment", ip(gatewayMAC, ownMAC, own6, gateway6, unix.IPPROTO_FRAGMENT, append([]byte{unix.IPPROTO_UDP, 0, 0, offset | 1, 0, 0, 0, 7}, udp(1, 2, "x")...)))
	}
	add("echo request", ip(allNodesMAC, ownMAC, own6, allNodes, unix.IPPROTO_ICMPV6, icmp6Message(128)))
	return out
}
