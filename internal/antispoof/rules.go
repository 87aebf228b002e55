package antispoof

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// The chains: the hook, what is asked about frames of a port of ours, and about
// its neighbour discovery.
const (
	hookChain     = "prerouting"
	rightChain    = "RIGHT" // what has a right source
	sourcesChain  = "SOURCES"
	neighborChain = "NEIGHBOURS"
)

// The types of set fields, as the program nft numbers them; several in one key
// are put together with six bits each.
const (
	typeIPv4, typeIPv6, typeEther, typeDevice = 7, 8, 9, 41

	deviceAndMAC = unix.IFNAMSIZ + 8 // bytes, whole words
)

// The first register of 32 bits: a key is loaded from there on.
const register = unix.NFT_REG32_00

// From linux/netfilter_bridge.h and linux/netfilter.h.
const (
	bridgePrerouting = 0
	dropVerdict      = 0
	acceptVerdict    = 1
)

// ICMPv6 types.
const (
	routerSolicit, routerAdvert, neighbourSolicit, neighbourAdvert, redirect, listenerReport = 133, 134, 135, 136, 137, 143
)

// Ports of UDP that only a server of DHCP sends from.
const (
	dhcpServer  = 67
	dhcp6Server = 547
)

// makeTable makes the table, its sets and chains where they are missing, and the
// rules anew. Elements stay.
func makeTable(b *rtnl.Batch) {
	begin(b, "make table bridge "+mark.NFTable, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE)
	b.AttrString(unix.NFTA_TABLE_NAME, mark.NFTable)
	makeSet(b, 1, portsSet, typeDevice, unix.IFNAMSIZ)
	const prefix = typeDevice<<12 | typeEther<<6
	makeSet(b, 2, sources4Set, prefix|typeIPv4, deviceAndMAC+4)
	makeSet(b, 3, sources6Set, prefix|typeIPv6, deviceAndMAC+16)
	for _, chain := range []string{neighborChain, sourcesChain, rightChain, hookChain} {
		makeChain(b, chain)
	}
	rightRules(b)
	rule(b, hookChain, device, in(portsSet), jump(sourcesChain))
	sourceRules(b)
	neighbourRules(b)
}

// rightRules let most frames pass with a single look-up: only a port that is
// checked is in these sets. What they do not match is asked everything.
func rightRules(b *rtnl.Batch) {
	rule(b, hookChain, etherType(unix.ETH_P_IP), device, sourceMAC, load(network, 12, 4, 6), in(sources4Set), jump(rightChain))
	rule(b, hookChain, etherType(unix.ETH_P_IPV6), notProtocol(unix.IPPROTO_ICMPV6), source6, compare(unix.NFT_CMP_NEQ, make([]byte, 16)),
		device, sourceMAC, load(network, 8, 16, 6), in(sources6Set), jump(rightChain))
	rule(b, rightChain, protocol(unix.IPPROTO_UDP), sourcePort(dhcpServer), etherType(unix.ETH_P_IP), drop)
	rule(b, rightChain, protocol(unix.IPPROTO_UDP), sourcePort(dhcp6Server), etherType(unix.ETH_P_IPV6), drop)
	rule(b, rightChain, accept)
}

// sourceRules are asked about every other frame of a port. What is not accepted
// is dropped at the end.
func sourceRules(b *rtnl.Batch) {
	add := func(parts ...expression) { rule(b, sourcesChain, parts...) }

	add(etherType(unix.ETH_P_IP), protocol(unix.IPPROTO_UDP), sourcePort(dhcpServer), drop)
	add(etherType(unix.ETH_P_IP), device, sourceMAC, load(network, 12, 4, 6), in(sources4Set), accept)

	// ARP: the sender must be right in the frame and in what it says. One that
	// asks whether its address is taken has none yet.
	add(etherType(unix.ETH_P_ARP), device, sourceMAC, load(network, 14, 4, 6), in(sources4Set),
		device, load(network, 8, 6, 4), load(network, 14, 4, 6), in(sources4Set), accept)
	add(etherType(unix.ETH_P_ARP), load(network, 14, 4, 0), equals(0, 0, 0, 0), load(network, 6, 2, 0), equals(0, 1),
		device, sourceMAC, load(network, 24, 4, 6), in(sources4Set),
		device, load(network, 8, 6, 4), load(network, 24, 4, 6), in(sources4Set), accept)

	ip6 := etherType(unix.ETH_P_IPV6)
	// What a container reports when its addresses come up goes to all others on the
	// bridge, none of which is interested, and neither is the bridge (ADR 0049).
	for n := range uint16(reportedGroups) {
		add(solicitedOnly(ip6, n+1)...)
	}
	// What a packet is cannot be told where its fragments begin with further headers;
	// nobody has to send such (RFC 7112).
	for _, header := range []byte{unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_FRAGMENT, unix.IPPROTO_AH, unix.IPPROTO_DSTOPTS} {
		add(ip6, fragmentOf(header), drop)
	}
	add(ip6, protocol(unix.IPPROTO_UDP), sourcePort(dhcp6Server), drop)
	for _, forbidden := range []byte{routerAdvert, redirect} {
		add(ip6, icmp6(forbidden), drop)
	}
	for _, discovery := range []byte{neighbourSolicit, neighbourAdvert, routerSolicit} {
		add(ip6, icmp6(discovery), jump(neighborChain))
	}
	// Without an address of its own one only says which groups it listens to, and
	// asks for routers.
	add(ip6, source6, equals(make([]byte, 16)...), notProtocol(unix.IPPROTO_ICMPV6), drop)
	add(ip6, device, sourceMAC, load(network, 8, 16, 6), in(sources6Set), accept)
	add(drop)
}

// reportedGroups is how many groups a report has at most that says only which
// groups of neighbour discovery are listened to: those of the link-local address
// and of one address more.
const reportedGroups = 2

// solicitedOnly drops the reports of so many groups (RFC 3810) that are all of
// neighbour discovery, ff02::1:ff00:0/104.
func solicitedOnly(ip6 expression, groups uint16) []expression {
	const header, record = 8, 20
	out := []expression{ip6, icmp6(listenerReport), equalsAt(transport, 6, be16(groups)...)}
	for i := range uint32(groups) {
		// After the type: nothing besides and no sources, so that the next record
		// follows, and the group.
		out = append(out, equalsAt(transport, header+i*record+1, 0, 0, 0, 0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff))
	}
	return append(out, drop)
}

// neighbourRules are asked about solicitations, those of routers as well, and
// advertisements. A message has no option, or one: the MAC of the sender, which has to
// be right, because whoever gets it sends there. Linux adds a nonce to those that ask
// whether an address is taken.
func neighbourRules(b *rtnl.Batch) {
	add := func(parts ...expression) { rule(b, neighborChain, parts...) }
	own := []expression{device, sourceMAC, load(network, 8, 16, 6), in(sources6Set)}
	target := []expression{device, sourceMAC, load(transport, 8, 16, 6), in(sources6Set)}
	with := func(first []expression, rest ...expression) []expression {
		return append(first[:len(first):len(first)], rest...)
	}
	// The option's type and length, and its MAC together with an address.
	option := func(kind byte) expression { return equalsAt(transport, 24, kind, 1) }
	optionMAC := func(base uint32, offset uint32) []expression {
		return []expression{device, load(transport, 26, 6, 4), load(base, offset, 16, 6), in(sources6Set)}
	}

	advert := []expression{icmp6(neighbourAdvert)}
	add(with(with(with(advert, length(24)), own...), with(target, accept)...)...)
	add(with(with(with(advert, length(32), option(2)), own...), with(target, with(optionMAC(transport, 8), accept)...)...)...)

	// A router's solicitation has no target before the option.
	router := []expression{icmp6(routerSolicit)}
	add(with(with(with(router, length(8)), own...), accept)...)
	add(with(with(with(router, length(16), equalsAt(transport, 8, 1, 1)), own...),
		device, load(transport, 10, 6, 4), load(network, 8, 16, 6), in(sources6Set), accept)...)

	solicit := []expression{icmp6(neighbourSolicit)}
	none := []expression{source6, equals(make([]byte, 16)...)}
	// To ask whether one's own address is taken, with a nonce or without.
	add(with(with(with(solicit, none...), length(24)), with(target, accept)...)...)
	add(with(with(with(solicit, none...), length(32), option(14)), with(target, accept)...)...)
	add(with(with(solicit, none...), drop)...)
	add(with(with(with(solicit, length(24)), own...), accept)...)
	add(with(with(with(solicit, length(32), option(1)), own...), with(optionMAC(network, 8), accept)...)...)
	add(drop)
}

func makeSet(b *rtnl.Batch, id uint32, name string, typ, size uint32) {
	begin(b, "make set "+name, unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE)
	b.AttrString(unix.NFTA_SET_TABLE, mark.NFTable)
	b.AttrString(unix.NFTA_SET_NAME, name)
	number(b, unix.NFTA_SET_FLAGS, 0)
	number(b, unix.NFTA_SET_KEY_TYPE, typ)
	number(b, unix.NFTA_SET_KEY_LEN, size)
	number(b, unix.NFTA_SET_ID, id)
}

// makeChain makes a chain where it is missing and takes its rules out.
func makeChain(b *rtnl.Batch, name string) {
	begin(b, "make chain "+name, unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE)
	b.AttrString(unix.NFTA_CHAIN_TABLE, mark.NFTable)
	b.AttrString(unix.NFTA_CHAIN_NAME, name)
	if name == hookChain {
		const early = ^uint32(0) - 299 // -300
		b.Nest(unix.NLA_F_NESTED|unix.NFTA_CHAIN_HOOK, func() {
			number(b, unix.NFTA_HOOK_HOOKNUM, bridgePrerouting)
			number(b, unix.NFTA_HOOK_PRIORITY, early)
		})
		number(b, unix.NFTA_CHAIN_POLICY, acceptVerdict)
		b.AttrString(unix.NFTA_CHAIN_TYPE, "filter")
	}
	begin(b, "empty chain "+name, unix.NFT_MSG_DELRULE, 0)
	b.AttrString(unix.NFTA_RULE_TABLE, mark.NFTable)
	b.AttrString(unix.NFTA_RULE_CHAIN, name)
}

func rule(b *rtnl.Batch, chain string, parts ...expression) {
	begin(b, "add a rule to chain "+chain, unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND)
	b.AttrString(unix.NFTA_RULE_TABLE, mark.NFTable)
	b.AttrString(unix.NFTA_RULE_CHAIN, chain)
	b.Nest(unix.NLA_F_NESTED|unix.NFTA_RULE_EXPRESSIONS, func() {
		for _, p := range parts {
			p(b)
		}
	})
}

func be16(n uint16) []byte { return binary.BigEndian.AppendUint16(nil, n) }
