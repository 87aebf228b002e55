package rtnl

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// News of our own routes and neighbours are not read; those of the same made by
// somebody else are, and so is everything that is not of that kind.
func TestWithoutOwn(t *testing.T) {
	inNS(t, func() {
		own, other := open(t), open(t)
		index := makeBridge(t, own, "br0")
		port, err := own.Port()
		if err != nil {
			t.Fatal(err)
		}
		s, err := Subscribe(unix.NETLINK_ROUTE, []uint{unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_ROUTE}, WithoutOwn(port))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		for i, c := range []*Conn{own, other} {
			n := byte(7 + i)
			via := netip.AddrFrom4([4]byte{44, 128, 0, n})
			r := Route{Dst: netip.PrefixFrom(netip.AddrFrom4([4]byte{9, 0, n, 0}), 24), Via: via, OIF: index, Metric: uint32(n),
				Protocol: 99, Kind: unix.RTN_UNICAST, Flags: unix.RTNH_F_ONLINK}
			var b Batch
			b.ReplaceNeighbour("", Neighbour{Family: unix.AF_INET, Index: index, State: unix.NUD_PERMANENT, IP: via, MAC: conf.MAC{2, 0, 0, 0, 0, n}})
			b.AddRoute("", 0, r)
			b.DeleteRoute("", r)
			obeyed(t, c, &b)
		}
		var got []uint16
		// The kernel has queued what it has to tell by the time it answers.
		buf := make([]byte, 64<<10)
		for len(got) < 4 {
			if err := s.Read(buf, func(m Message) { got = append(got, m.Type) }); err != nil {
				t.Fatal(err)
			}
		}
		// Deletions are few, and may be the effect of something else.
		want := []uint16{unix.RTM_DELROUTE, unix.RTM_NEWNEIGH, unix.RTM_NEWROUTE, unix.RTM_DELROUTE}
		for i := range want {
			if got[i] != want[i] {
				t.Fatalf("news %v, want %v", got, want)
			}
		}
	})
}
