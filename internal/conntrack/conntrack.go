// Package conntrack makes the kernel forget the connections of an address that
// changes hands.
package conntrack

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/rtnl"
)

// From linux/netfilter/nfnetlink_conntrack.h.
const (
	msgGet    = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1
	msgDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2

	attrTupleOrig  = 1 // as the first packet had its addresses
	attrTupleReply = 2 // as answers have them, after translation

	attrTupleIP = 1 // inside of which are four, two for each family
)

// Forget removes what connection tracking remembers of the last owner of
// addresses that did not rest long enough: the replies of his peers would reach
// the new one. It reads the whole table, so that it is only done where an
// address is reused early.
func Forget(addrs []netip.Addr) error {
	if len(addrs) == 0 {
		return nil
	}
	c, err := rtnl.OpenFamily(unix.NETLINK_NETFILTER)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil // a kernel without connection tracking remembers nothing
	}
	if err != nil {
		return fmt.Errorf("remove connection tracking entries: %w", err)
	}
	defer c.Close()
	for _, a := range addrs {
		if err := forget(c, a); err != nil {
			return fmt.Errorf("remove connection tracking entries of %s: %w", a, err)
		}
	}
	return nil
}

func forget(c *rtnl.Conn, a netip.Addr) error {
	header := [4]byte{unix.AF_INET}
	if a.Is6() {
		header[0] = unix.AF_INET6
	}
	flows, err := rtnl.List(c, rtnl.Request{Step: "list connections", Type: msgGet, Header: header[:]}, func(m rtnl.Message) (flow, bool) {
		return parse(m, a)
	})
	// The table may not be there, or may be without this family.
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	var b rtnl.Batch
	for _, f := range flows {
		b.Begin("", msgDelete, 0, header[:])
		b.Raw(f)
	}
	refused, err := c.Send(&b)
	for _, r := range refused {
		if !errors.Is(r, unix.ENOENT) { // gone meanwhile
			err = errors.Join(err, r)
		}
	}
	return err
}

// flow is a connection as the kernel wrote it, all of its attributes: they name it
// when it is removed.
type flow []byte

// parse answers with a connection that the address takes part in, before or
// after translation.
func parse(m rtnl.Message, a netip.Addr) (f flow, ok bool) {
	if len(m.Data) < 4 {
		return nil, false
	}
	rest := m.Data[4:]
	rtnl.EachAttr(rest, func(typ uint16, v []byte) {
		if typ == attrTupleOrig || typ == attrTupleReply {
			ok = ok || hasAddress(v, a)
		}
	})
	if !ok {
		return nil, false
	}
	return bytes.Clone(rest), true
}

func hasAddress(tuple []byte, a netip.Addr) (found bool) {
	rtnl.EachAttr(tuple, func(typ uint16, v []byte) {
		if typ != attrTupleIP {
			return
		}
		rtnl.EachAttr(v, func(_ uint16, v []byte) {
			ip, ok := netip.AddrFromSlice(v)
			found = found || ok && ip.Unmap() == a
		})
	})
	return found
}
