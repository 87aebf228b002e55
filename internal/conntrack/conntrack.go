// Package conntrack makes the kernel forget the connections of an address that
// changes hands.
package conntrack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Forget removes what connection tracking remembers of the last owner of
// addresses that did not rest long enough: the replies of his peers would reach
// the new one. It reads the whole table, so that it is only done where an
// address is reused early.
func Forget(addrs []netip.Addr) error {
	for _, a := range addrs {
		family := netlink.InetFamily(unix.AF_INET)
		if a.Is6() {
			family = unix.AF_INET6
		}
		_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, ofAddress(a))
		// A kernel without connection tracking remembers nothing, and an entry
		// that went meanwhile is no loss.
		if err != nil && !errors.Is(err, unix.EPROTONOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove connection tracking entries of %s: %w", a, err)
		}
	}
	return nil
}

// ofAddress matches every connection that an address takes part in, before or
// after translation.
type ofAddress netip.Addr

// MatchConntrackFlow implements netlink's filter.
func (o ofAddress) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	for _, t := range [...]netlink.IPTuple{f.Forward, f.Reverse} {
		for _, ip := range [...]net.IP{t.SrcIP, t.DstIP} {
			if a, ok := netip.AddrFromSlice(ip); ok && a.Unmap() == netip.Addr(o) {
				return true
			}
		}
	}
	return false
}
