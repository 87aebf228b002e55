package iptables

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/rtnl"
)

// Words of ipset's messages (linux/netfilter/ipset/ip_set.h) that add and remove
// elements.
const (
	ipsetAdd = 9
	ipsetDel = 10

	ipsetAttrList   = 8
	ipsetAttrLine   = 9
	ipsetAttrIP     = 1 // in an element, as those that follow
	ipsetAttrCIDR   = 3
	ipsetAttrDevice = 23
	ipsetAttrIPv4   = 1 // in an address
	ipsetAttrIPv6   = 2
)

// perMessage is how many elements one message to the kernel holds: its list of
// them has a length of 16 bits, and an element takes at most 56 bytes.
const perMessage = 1000

// add has the set of that name hold the elements. One message carries many of
// them: a cluster has more hosts than there is time for an answer each.
func (s sets) add(name string, kind firewall.Kind, elements []entry) error {
	return s.alter("add to ipset "+name, ipsetAdd, name, kind, elements)
}

// remove is the opposite of add.
func (s sets) remove(name string, kind firewall.Kind, elements []entry) error {
	return s.alter("remove from ipset "+name, ipsetDel, name, kind, elements)
}

func (s sets) alter(step string, command uint16, name string, kind firewall.Kind, elements []entry) error {
	for chunk := range slices.Chunk(elements, perMessage) {
		step := fmt.Sprintf("%s %d elements, %v %s first", step, len(chunk), chunk[0].prefix, chunk[0].device)
		var b rtnl.Batch
		// Without NLM_F_EXCL it is no error that an element is there, or gone, already.
		b.Begin(step, unix.NFNL_SUBSYS_IPSET<<8|command, 0, []byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0})
		b.Attr(ipsetAttrProtocol, ipsetProtocol)
		b.AttrString(ipsetAttrName, name)
		// The kernel takes a list only with the number of a line, as of a file that is restored.
		b.Attr(ipsetAttrLine|unix.NLA_F_NET_BYTEORDER, 0, 0, 0, 0)
		b.Nest(ipsetAttrList|unix.NLA_F_NESTED, func() {
			for _, e := range chunk {
				b.Nest(ipsetAttrData|unix.NLA_F_NESTED, func() { e.encode(&b, kind) })
			}
		})
		if err := s.conn.Each(&b)[0]; err != nil {
			return err
		}
	}
	return nil
}

func (e entry) encode(b *rtnl.Batch, kind firewall.Kind) {
	b.Nest(ipsetAttrIP|unix.NLA_F_NESTED, func() {
		if e.prefix.Addr().Is4() {
			b.AttrAddr(ipsetAttrIPv4|unix.NLA_F_NET_BYTEORDER, e.prefix.Addr())
		} else {
			b.AttrAddr(ipsetAttrIPv6|unix.NLA_F_NET_BYTEORDER, e.prefix.Addr())
		}
	})
	if kind != firewall.Addresses {
		b.Attr(ipsetAttrCIDR, byte(e.prefix.Bits()))
	}
	if e.device != "" {
		b.AttrString(ipsetAttrDevice, e.device)
	}
}
