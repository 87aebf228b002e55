package datapath

import (
	"net"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan/plantest"
)

// A container whose overlay has gone from the host is kept from the others in both
// directions: its addresses are nobody's any more, but they lead to it. So are those
// that it has talked to before.
func TestLeftReach(t *testing.T) { eachFirewall(t, testLeftReach) }

func testLeftReach(t *testing.T) {
	for _, overlays := range [][2]string{{"10.8.0.0/16", "9.0.0.0/8"}, {"fd01:b::/64", "fd01:c::/64"}} {
		n := network{plantest.Network{Overlays: []plan.Overlay{plantest.Overlay4("gone", overlays[0]), plantest.Overlay4("here", overlays[1])}, Length: 24, Length6: 80}}
		_, hosts := n.plugHosts(t, 1)
		h, cfg := hosts[0], n.Host(0, 1)
		gone, other, here := cfg.Bridges[0], cfg.Bridges[1], cfg.Bridges[2]
		left, leftAddr := h.container(gone.Name, gone.Addrs[0], 5)
		second, secondAddr := h.container(other.Name, other.Addrs[0], 5)
		near, nearAddr := h.container(here.Name, here.Addrs[0], 5)
		near.mustPing("", leftAddr)
		left.mustPing("", nearAddr)
		out, back := newFlow(t, near, left, leftAddr), newFlow(t, left, near, nearAddr)
		h.eventually(func() bool { return out.goesOn() && back.goesOn() }, "nothing is answered in the first place")

		cfg.Overlays, cfg.Bridges = cfg.Overlays[1:], cfg.Bridges[2:]
		cfg.Overlays[0].Isolation = conf.IsolationOverlay
		h.mustSet(cfg, true)
		if out.goesOn() || back.goesOn() {
			t.Error("what was let through before its overlay had gone goes on")
		}
		near.mustNotPing("", leftAddr)
		left.mustNotPing("", nearAddr)
		left.mustPing("", secondAddr)
		second.mustPing("", leftAddr)
		own := cfg.VTEP.IP
		if leftRange := gone.Addrs[0]; is6(leftRange) {
			own = cfg.VTEP.IP6
		}
		left.mustPing("", own.Addr().String())
		near.mustPing("", here.Addrs[0].Addr().String())
		h.mustBeIdle(cfg)
	}
}

// flow is a socket whose datagrams are sent back.
type flow struct{ net.Conn }

func newFlow(t *testing.T, from, to *netNS, addr string) flow {
	t.Helper()
	server := listenUDP(t, to, addr)
	go func() {
		for b := make([]byte, 100); ; {
			n, who, err := server.ReadFrom(b)
			if err != nil {
				return
			}
			server.WriteTo(b[:n], who)
		}
	}()
	var f flow
	var err error
	from.do(func() { f.Conn, err = net.Dial("udp", server.LocalAddr().String()) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// goesOn says whether a datagram is answered.
func (f flow) goesOn() bool {
	if _, err := f.Write([]byte("x")); err != nil {
		return false
	}
	f.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	_, err := f.Read(make([]byte, 100))
	return err == nil
}
