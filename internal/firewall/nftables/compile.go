package nftables

import (
	"encoding/binary"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/firewall"
)

// The first register, and the first of those with 32 bits, which hold the fields
// of a key one after the other.
const (
	register   = unix.NFT_REG_1
	register32 = unix.NFT_REG32_00
)

// ctDNAT is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const ctDNAT = 1 << 5

// compile turns a rule into one of the kernel's, or one of each family.
func compile(in firewall.Rule, all firewall.Ruleset, sets map[string]*nftables.Set) [][]expr.Any {
	r := &rule{sets: sets, all: all}
	if !in.HasAddresses() {
		return [][]expr.Any{r.compileFor(in, nil)}
	}
	var out [][]expr.Any
	for _, ip6 := range []bool{false, true} {
		if ip6 && all.IPv6 || !ip6 && all.IPv4 {
			r = &rule{sets: sets, all: all}
			out = append(out, r.compileFor(in, &ip6))
		}
	}
	return out
}

// rule collects the expressions of one rule.
type rule struct {
	out  []expr.Any
	ip6  bool
	sets map[string]*nftables.Set
	all  firewall.Ruleset
}

func (r *rule) add(e ...expr.Any) { r.out = append(r.out, e...) }

func (r *rule) equals(data []byte) {
	r.add(&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: data})
}

func (r *rule) lookup(set string, from uint32, invert bool) {
	r.add(&expr.Lookup{SourceRegister: from, SetName: set, SetID: r.sets[set].ID, Invert: invert})
}

func (r *rule) device(key expr.MetaKey, set string) {
	if set != "" {
		r.add(&expr.Meta{Key: key, Register: register})
		r.lookup(set, register, false)
	}
}

// address loads the source or the destination.
func (r *rule) address(source bool, into uint32) {
	offset, size := uint32(12), uint32(4) // in the header of IPv4
	if r.ip6 {
		offset, size = 8, 16
	}
	if !source {
		offset += size
	}
	r.add(&expr.Payload{DestRegister: into, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size})
}

func (r *rule) addressIn(source bool, set string, invert bool) {
	if set != "" {
		r.address(source, register)
		r.lookup(setName(set, r.ip6), register, invert)
	}
}

// pair looks an address and a device up together.
func (r *rule) pair(source bool, key expr.MetaKey, set string, invert bool) {
	if set == "" {
		return
	}
	words := uint32(1)
	if r.ip6 {
		words = 4
	}
	r.address(source, register32)
	r.add(&expr.Meta{Key: key, Register: register32 + words})
	r.lookup(setName(set, r.ip6), register32, invert)
}

func (r *rule) protocol(n byte) {
	r.add(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register})
	r.equals([]byte{n})
}

// bits matches a word of connection tracking that has any of the bits.
func (r *rule) bits(key expr.CtKey, mask uint32) {
	r.add(
		&expr.Ct{Key: key, Register: register},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: make([]byte, 4)},
	)
}

// compileFor is compile for one family; nil: for both at once. What is cheap and
// decides often comes first.
func (r *rule) compileFor(in firewall.Rule, ip6 *bool) []expr.Any {
	if in.UDPPort != 0 {
		r.protocol(unix.IPPROTO_UDP)
		r.add(&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2})
		r.equals(binary.BigEndian.AppendUint16(nil, in.UDPPort))
	}
	if in.Established {
		r.bits(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
	}
	if in.NotLoopback {
		r.add(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: register})
		r.add(&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: device("lo")})
	}
	if in.InDevice != "" {
		r.add(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: register})
		r.equals(device(in.InDevice))
	}
	r.device(expr.MetaKeyIIFNAME, in.In)
	r.device(expr.MetaKeyOIFNAME, in.Out)
	if ip6 != nil {
		r.ip6 = *ip6
		r.addresses(in)
	}
	if in.NotOthers {
		r.add(&expr.Fib{Register: register, FlagDADDR: true, ResultADDRTYPE: true})
		r.add(&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_UNICAST)})
	}
	if in.Redirected {
		r.bits(expr.CtKeySTATUS, ctDNAT)
	}
	if in.OverIn != "" {
		r.add(&expr.Meta{Key: expr.MetaKeyIIF, Register: register})
		r.over(in.OverIn, in.OverIn)
	}
	r.add(action(in)...)
	return r.out
}

// nextHop loads the next hop of the route and the device that leads to it.
func (r *rule) nextHop() {
	key, words := expr.RtKey(unix.NFT_RT_NEXTHOP4), uint32(1)
	if r.ip6 {
		key, words = unix.NFT_RT_NEXTHOP6, 4
	}
	r.add(&expr.Rt{Register: register32, Key: key})
	r.add(&expr.Meta{Key: expr.MetaKeyOIF, Register: register32 + words})
}

// over matches what exceeds the limit that a set has for what is in the register.
func (r *rule) over(set, name string) {
	var limit firewall.Limit
	if s, err := r.all.Set(set); err == nil {
		limit = s.Limit
	}
	r.add(&expr.Dynset{
		SrcRegKey: register, SetName: name, SetID: r.sets[name].ID, Operation: unix.NFT_DYNSET_OP_UPDATE,
		Exprs: []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: limit.PerSecond, Burst: limit.Burst, Unit: expr.LimitTimeSecond, Over: true}},
	})
}

// hops adds what is about next hops.
func (r *rule) hops(in firewall.Rule) {
	if in.Toward != "" {
		key := expr.RtKey(unix.NFT_RT_NEXTHOP4)
		if r.ip6 {
			key = unix.NFT_RT_NEXTHOP6
		}
		r.add(&expr.Rt{Register: register, Key: key})
		r.lookup(setName(in.Toward, r.ip6), register, false)
	}
	for _, set := range []string{in.Hop, in.AddHop} {
		if set == "" {
			continue
		}
		name := setName(set, r.ip6)
		r.nextHop()
		if set == in.Hop {
			r.lookup(name, register32, false) // and does not stay longer for that
			continue
		}
		r.add(&expr.Dynset{SrcRegKey: register32, SetName: name, SetID: r.sets[name].ID, Operation: unix.NFT_DYNSET_OP_UPDATE})
	}
	if in.OverSrc != "" {
		r.address(true, register)
		r.over(in.OverSrc, setName(in.OverSrc, r.ip6))
	}
}

// addresses adds what differs between the families.
func (r *rule) addresses(in firewall.Rule) {
	family, icmp := byte(unix.NFPROTO_IPV4), byte(unix.IPPROTO_ICMP)
	if r.ip6 {
		family, icmp = unix.NFPROTO_IPV6, unix.IPPROTO_ICMPV6
	}
	r.add(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: register})
	r.equals([]byte{family})
	if in.ICMP {
		r.protocol(icmp)
	}
	r.addressIn(true, in.Src, false)
	r.addressIn(false, in.Dst, false)
	r.addressIn(false, in.NotDst, true)
	r.pair(true, expr.MetaKeyIIFNAME, in.SrcIn, false)
	r.pair(true, expr.MetaKeyIIFNAME, in.NotSrcIn, true)
	r.pair(false, expr.MetaKeyIIFNAME, in.DstIn, false)
	r.pair(true, expr.MetaKeyOIFNAME, in.SrcOut, false)
	r.hops(in)
}

func action(in firewall.Rule) []expr.Any {
	switch in.Action {
	case firewall.Accept:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	case firewall.Drop: // counted, for those who look for what stops a packet
		return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
	case firewall.Jump:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: in.Chain}}
	case firewall.Goto:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: in.Chain}}
	case firewall.Masquerade:
		return []expr.Any{&expr.Masq{}}
	}
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}
}
