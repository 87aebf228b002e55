package datapath

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// News of our own routes and neighbours are not read; those of the same made by
// somebody else are, and so is everything that is not of that kind.
func TestFilterOwnNews(t *testing.T) {
	h := newHost(t, "h")
	h.sh("ip link add vtep1024 type bridge; ip link set vtep1024 up; ip addr add 44.128.0.1/14 dev vtep1024")
	other := h.newDatapath()
	var index int
	var err error
	h.do(func() { index, err = h.dp.applier().lookup(conf.VTEPName) })
	if err != nil {
		t.Fatal(err)
	}
	ops := func(n byte) []op {
		via := netip.AddrFrom4([4]byte{44, 128, 0, n})
		dst := netip.PrefixFrom(netip.AddrFrom4([4]byte{9, 0, n, 0}), 24)
		return []op{
			{act: replace, obj: neighbour, dev: conf.VTEPName, addr: via, mac: conf.MAC{2, 0, 0, 0, 0, n}},
			{act: add, obj: routeTo, dev: conf.VTEPName, prefix: dst, addr: via, metric: uint32(n)},
			{act: del, obj: routeTo, dev: conf.VTEPName, prefix: dst, addr: via, metric: uint32(n)},
		}
	}
	var got []uint16
	h.do(func() {
		f, e := subscribe(unix.NETLINK_ROUTE, routeGroups, withoutOwn(h.dp.conn.port))
		if err = e; err != nil {
			return
		}
		defer f.Close()
		for _, step := range []struct {
			dp *Datapath
			n  byte
		}{{h.dp, 7}, {other, 8}} {
			a := step.dp.applier()
			a.index[conf.VTEPName] = index
			if err = a.apply(t.Context(), ops(step.n)); err != nil {
				return
			}
			for _, p := range a.failed {
				t.Error(p.err)
			}
		}
		// The kernel has queued what it has to tell by the time it answers.
		buf := make([]byte, 64<<10)
		for len(got) < 4 {
			n, e := f.Read(buf)
			if err = e; err != nil {
				return
			}
			err = eachMessage(buf[:n], func(m nlmsg) { got = append(got, m.typ) })
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	// Deletions are few, and may be the effect of something else.
	want := []uint16{unix.RTM_DELROUTE, unix.RTM_NEWNEIGH, unix.RTM_NEWROUTE, unix.RTM_DELROUTE}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("news %v, want %v", got, want)
		}
	}
}
