// Package conntrack makes the kernel forget connections: those of an address
// that changes hands, and those that are no longer allowed.
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

	attrTupleIP    = 1 // inside of which are four, two for each family
	attrTupleProto = 2

	attrIPv4Source, attrIPv6Source = 1, 3
	attrProtoNumber                = 1
)

// Flow is a connection.
type Flow struct {
	Src, Dst           netip.Addr // as its first packet had them
	ReplySrc, ReplyDst netip.Addr // as answers have them, after translation
	Protocol           byte

	raw []byte // as the kernel wrote it: all of its attributes name it when it is removed
}

// Forget removes what connection tracking remembers of the last owner of
// addresses that did not rest long enough: the replies of his peers would reach
// the new one. It reads the whole table, so that it is only done where an
// address is reused early.
func Forget(addrs []netip.Addr) error {
	for _, a := range addrs {
		if _, err := remove(family(a), func(f *Flow) bool {
			return f.Src == a || f.Dst == a || f.ReplySrc == a || f.ReplyDst == a
		}); err != nil {
			return fmt.Errorf("remove connection tracking entries of %s: %w", a, err)
		}
	}
	return nil
}

// Remove removes the connections of both families that which says, and returns
// how many it removed.
func Remove(which func(*Flow) bool) (removed int, err error) {
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		n, err := remove(family, which)
		removed += n
		if err != nil {
			return removed, fmt.Errorf("remove connection tracking entries: %w", err)
		}
	}
	return removed, nil
}

func family(a netip.Addr) byte {
	if a.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

func remove(family byte, which func(*Flow) bool) (removed int, err error) {
	c, err := rtnl.OpenFamily(unix.NETLINK_NETFILTER)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return 0, nil // a kernel without connection tracking remembers nothing
	}
	if err != nil {
		return 0, err
	}
	defer c.Close()
	header := [4]byte{family}
	flows, err := rtnl.List(c, rtnl.Request{Step: "list connections", Type: msgGet, Header: header[:]}, func(m rtnl.Message) ([]byte, bool) {
		f, ok := parse(m)
		if !ok || !which(&f) {
			return nil, false
		}
		return bytes.Clone(f.raw), true
	})
	// The table may not be there, or may be without this family.
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	if err != nil {
		return 0, err
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
	return len(flows) - len(refused), err
}

func parse(m rtnl.Message) (f Flow, ok bool) {
	if len(m.Data) < 4 {
		return f, false
	}
	f.raw = m.Data[4:]
	rtnl.EachAttr(f.raw, func(typ uint16, v []byte) {
		switch typ {
		case attrTupleOrig:
			f.Src, f.Dst, f.Protocol = tuple(v)
		case attrTupleReply:
			f.ReplySrc, f.ReplyDst, _ = tuple(v)
		}
	})
	return f, f.Src.IsValid() && f.ReplySrc.IsValid()
}

func tuple(b []byte) (src, dst netip.Addr, protocol byte) {
	rtnl.EachAttr(b, func(typ uint16, v []byte) {
		switch typ {
		case attrTupleIP:
			rtnl.EachAttr(v, func(typ uint16, v []byte) {
				ip, _ := netip.AddrFromSlice(v)
				if typ == attrIPv4Source || typ == attrIPv6Source {
					src = ip.Unmap()
				} else {
					dst = ip.Unmap()
				}
			})
		case attrTupleProto:
			rtnl.EachAttr(v, func(typ uint16, v []byte) {
				if typ == attrProtoNumber && len(v) > 0 {
					protocol = v[0]
				}
			})
		}
	})
	return src, dst, protocol
}
