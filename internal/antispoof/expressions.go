package antispoof

import (
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/rtnl"
)

// expression adds one or a few expressions of nftables to a rule.
type expression func(*rtnl.Batch)

// Where a load counts from.
const (
	link      = unix.NFT_PAYLOAD_LL_HEADER
	network   = unix.NFT_PAYLOAD_NETWORK_HEADER
	transport = unix.NFT_PAYLOAD_TRANSPORT_HEADER
)

func named(b *rtnl.Batch, name string, data func()) {
	b.Nest(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, func() {
		b.AttrString(unix.NFTA_EXPR_NAME, name)
		b.Nest(unix.NLA_F_NESTED|unix.NFTA_EXPR_DATA, data)
	})
}

func meta(key, word uint32) expression {
	return func(b *rtnl.Batch) {
		named(b, "meta", func() {
			number(b, unix.NFTA_META_KEY, key)
			number(b, unix.NFTA_META_DREG, register+word)
		})
	}
}

// load reads bytes of the frame into the key, from a word on. What the last word
// has beyond them is zero.
func load(base, offset, size, word uint32) expression {
	return func(b *rtnl.Batch) {
		named(b, "payload", func() {
			number(b, unix.NFTA_PAYLOAD_DREG, register+word)
			number(b, unix.NFTA_PAYLOAD_BASE, base)
			number(b, unix.NFTA_PAYLOAD_OFFSET, offset)
			number(b, unix.NFTA_PAYLOAD_LEN, size)
		})
	}
}

func compare(op uint32, value []byte) expression {
	return func(b *rtnl.Batch) {
		named(b, "cmp", func() {
			number(b, unix.NFTA_CMP_SREG, register)
			number(b, unix.NFTA_CMP_OP, op)
			b.Nest(unix.NLA_F_NESTED|unix.NFTA_CMP_DATA, func() { b.Attr(unix.NFTA_DATA_VALUE, value...) })
		})
	}
}

// equals compares the first words of the key.
func equals(value ...byte) expression { return compare(unix.NFT_CMP_EQ, value) }

// in looks the key up.
func in(set string) expression {
	return func(b *rtnl.Batch) {
		named(b, "lookup", func() {
			b.AttrString(unix.NFTA_LOOKUP_SET, set)
			number(b, unix.NFTA_LOOKUP_SREG, register)
		})
	}
}

func both(x, y expression) expression {
	return func(b *rtnl.Batch) { x(b); y(b) }
}

// equalsAt compares bytes of the frame.
func equalsAt(base, offset uint32, value ...byte) expression {
	return both(load(base, offset, uint32(len(value)), 0), equals(value...))
}

func etherType(n uint16) expression { return equalsAt(link, 12, be16(n)...) }

func protocol(n byte) expression { return both(meta(unix.NFT_META_L4PROTO, 0), equals(n)) }

func notProtocol(n byte) expression {
	return both(meta(unix.NFT_META_L4PROTO, 0), compare(unix.NFT_CMP_NEQ, []byte{n}))
}

func sourcePort(n uint16) expression { return equalsAt(transport, 0, be16(n)...) }

// icmp6 is the type of an ICMPv6 message.
func icmp6(n byte) expression {
	return both(protocol(unix.IPPROTO_ICMPV6), equalsAt(transport, 0, n))
}

// fragmentOf is the header that follows the fragment header of an IPv6 packet.
func fragmentOf(n byte) expression {
	return both(func(b *rtnl.Batch) {
		named(b, "exthdr", func() {
			number(b, unix.NFTA_EXTHDR_DREG, register)
			b.Attr(unix.NFTA_EXTHDR_TYPE, unix.IPPROTO_FRAGMENT)
			number(b, unix.NFTA_EXTHDR_OFFSET, 0)
			number(b, unix.NFTA_EXTHDR_LEN, 1)
		})
	}, equals(n))
}

// length is that of the IPv6 packet without its header.
func length(n uint16) expression { return equalsAt(network, 4, be16(n)...) }

// device is the first field of all keys, the MAC the second.
func device(b *rtnl.Batch)    { meta(unix.NFT_META_IIFNAME, 0)(b) }
func sourceMAC(b *rtnl.Batch) { load(link, 6, 6, 4)(b) }
func source6(b *rtnl.Batch)   { load(network, 8, 16, 0)(b) }

func accept(b *rtnl.Batch) { verdict(b, acceptVerdict, "") }

// drop counts, for those who look for what stops a frame.
func drop(b *rtnl.Batch) {
	named(b, "counter", func() {})
	verdict(b, dropVerdict, "")
}

// jump goes to a chain and does not come back.
func jump(chain string) expression {
	return func(b *rtnl.Batch) { verdict(b, unix.NFT_GOTO, chain) }
}

func verdict(b *rtnl.Batch, code int32, chain string) {
	named(b, "immediate", func() {
		number(b, unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
		b.Nest(unix.NLA_F_NESTED|unix.NFTA_IMMEDIATE_DATA, func() {
			b.Nest(unix.NLA_F_NESTED|unix.NFTA_DATA_VERDICT, func() {
				number(b, unix.NFTA_VERDICT_CODE, uint32(code))
				if chain != "" {
					b.AttrString(unix.NFTA_VERDICT_CHAIN, chain)
				}
			})
		})
	})
}
