package datapath

import (
	"encoding/binary"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// A container that may send from any MAC fills no more of a bridge's table than
// its limit, and others go on being reached, also new ones.
func TestFDBIsBounded(t *testing.T) {
	n := onlyIPv4
	_, hosts := n.plugHosts(t, 1)
	h, cfg := hosts[0], n.Host(0, 1)
	bridge := cfg.Bridges[0]
	hostile, _ := h.container(bridge.Name, bridge.Addrs[0], 5)
	near, nearAddr := h.container(bridge.Name, bridge.Addrs[0], 6)
	hostile.mustPing("", nearAddr)

	hostile.do(func() {
		if err := sendFromMACs("eth0", 3*plan.MaxLearned); err != nil {
			t.Error(err)
		}
	})
	learned := strings.Count(h.sh("bridge fdb show br "+bridge.Name), "\n")
	t.Logf("%d entries after frames from %d MACs", learned, 3*plan.MaxLearned)
	if learned < plan.MaxLearned || learned > plan.MaxLearned+100 {
		t.Errorf("the bridge has %d entries, want %d and its own", learned, plan.MaxLearned)
	}
	late, lateAddr := h.container(bridge.Name, bridge.Addrs[0], 7)
	near.mustPing("", lateAddr)
	late.mustPing("", nearAddr)
	h.mustPing("", lateAddr)

	// Whoever takes the limit away is noticed.
	changes := h.dp.Changes
	var announced <-chan struct{}
	h.do(func() { announced = changes(t.Context()) })
	h.do(func() {
		conn, err := rtnl.Open()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		l, _, err := conn.LinkByName(bridge.Name)
		if err != nil {
			t.Error(err)
			return
		}
		var b rtnl.Batch
		b.SetLink("", l.Index)
		b.Nest(unix.IFLA_LINKINFO, func() {
			b.AttrString(unix.IFLA_INFO_KIND, "bridge")
			b.Nest(unix.IFLA_INFO_DATA, func() { b.Attr32(unix.IFLA_BR_FDB_MAX_LEARNED, 0) })
		})
		if refused, err := conn.Send(&b); err != nil || len(refused) > 0 {
			t.Error(err, refused)
		}
	})
	<-announced
	if r := h.mustSet(cfg, true); r.Drift.Counts["link"] != 1 {
		t.Errorf("drift %v, want the limit", r.Drift)
	}
	h.mustBeIdle(cfg)
}

// sendFromMACs sends one frame from each of so many MACs.
func sendFromMACs(dev string, count int) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(dev)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
		return err
	}
	to := &unix.SockaddrLinklayer{Ifindex: int(ifr.Uint32())}
	frame := make([]byte, 60)
	copy(frame, []byte{0x02, 0, 0, 0, 0, 1, 0x06}) // to nobody, from a local MAC
	frame[12], frame[13] = 0x88, 0xb5              // an EtherType for experiments
	for i := range count {
		binary.BigEndian.PutUint32(frame[8:12], uint32(i))
		if err := unix.Sendto(fd, frame, 0, to); err != nil && err != unix.ENOBUFS {
			return err
		}
	}
	return nil
}
