// Package conntrack makes the kernel forget connections: those of an address
// that changes hands, and those that are no longer allowed.
package conntrack

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"

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

	headerSize = 4 // struct nfgenmsg; its first byte is the family
)

// Flow is a connection.
type Flow struct {
	Src, Dst           netip.Addr // as its first packet had them
	ReplySrc, ReplyDst netip.Addr // as answers have them, after translation
	Protocol           byte
}

// Forget removes what connection tracking remembers of the last owner of
// addresses that did not rest long enough: the replies of his peers would reach
// the new one. It reads the whole table, so that it is only done where an
// address is reused early.
func Forget(addrs []netip.Addr) error {
	if len(addrs) == 0 {
		return nil
	}
	_, err := Remove(func(f *Flow) bool {
		return slices.ContainsFunc(addrs, func(a netip.Addr) bool {
			return f.Src == a || f.Dst == a || f.ReplySrc == a || f.ReplyDst == a
		})
	})
	if err != nil {
		return fmt.Errorf("forget the last owner of %v: %w", addrs, err)
	}
	return nil
}

// Remove removes the connections that which says, and returns how many it removed.
// However few there are, the kernel walks a table that all namespaces of the host
// share, some milliseconds of work; both families are asked for in one walk.
func Remove(which func(*Flow) bool) (removed int, err error) {
	c, err := open()
	if c == nil {
		return 0, err
	}
	return remove(c, which)
}

// Begin is Remove for a caller who has something else to do meanwhile: it goes on, in
// the namespace of the calling thread, until wait returns what came of it.
func Begin(which func(*Flow) bool) (wait func() (removed int, err error)) {
	c, err := open()
	if c == nil {
		return func() (int, error) { return 0, err }
	}
	done := make(chan struct{})
	removed := 0
	go func() {
		defer close(done)
		removed, err = remove(c, which)
	}()
	return func() (int, error) {
		<-done
		return removed, err
	}
}

// open is nil without an error for a kernel without connection tracking, which
// remembers nothing.
func open() (*rtnl.Conn, error) {
	c, err := rtnl.OpenFamily(unix.NETLINK_NETFILTER)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("remove connection tracking entries: %w", err)
	}
	return c, nil
}

func remove(c *rtnl.Conn, which func(*Flow) bool) (removed int, err error) {
	defer c.Close()
	defer func() {
		if err != nil {
			err = fmt.Errorf("remove connection tracking entries: %w", err)
		}
	}()
	all := [4]byte{unix.AF_UNSPEC}
	flows, err := rtnl.List(c, rtnl.Request{Step: "list connections", Type: msgGet, Header: all[:]}, func(m rtnl.Message) ([]byte, bool) {
		f, ok := parse(m)
		if !ok || !which(&f) {
			return nil, false
		}
		return bytes.Clone(m.Data), true
	})
	// The table may not be there.
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	var b rtnl.Batch
	for _, f := range flows { // as the kernel wrote them: all of its attributes name one when it is removed
		b.Begin("", msgDelete, 0, []byte{f[0], unix.NFNETLINK_V0, 0, 0})
		b.Raw(f[headerSize:])
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
	if len(m.Data) < headerSize {
		return f, false
	}
	rtnl.EachAttr(m.Data[headerSize:], func(typ uint16, v []byte) {
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
