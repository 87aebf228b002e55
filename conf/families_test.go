package conf_test

import (
	"fmt"
	"net/netip"
	"testing"

	"overlayd.internal/overlay/conf"
)

// TestReach: both hosts of a pair come to the same two addresses, or both to none.
func TestReach(t *testing.T) {
	addr := func(s string) (a netip.Addr) {
		if s != "" {
			a = netip.MustParseAddr(s)
		}
		return a
	}
	for _, tt := range []struct {
		first, second, peerFirst, peerSecond string
		old                                  bool // the peer is of an earlier release
		own, peer                            string
	}{
		{"10.0.0.1", "", "10.0.0.2", "", false, "10.0.0.1", "10.0.0.2"},
		{"10.0.0.1", "", "10.0.0.2", "", true, "10.0.0.1", "10.0.0.2"},
		{"10.0.0.1", "", "fd00::2", "", false, "", ""},
		{"10.0.0.1", "fd00::1", "10.0.0.2", "", false, "10.0.0.1", "10.0.0.2"},
		{"10.0.0.1", "fd00::1", "fd00::2", "", false, "fd00::1", "fd00::2"},
		{"10.0.0.1", "fd00::1", "fd00::2", "", true, "", ""},
		{"10.0.0.1", "fd00::1", "10.0.0.2", "fd00::2", false, "10.0.0.1", "10.0.0.2"},
		{"fd00::1", "10.0.0.1", "fd00::2", "10.0.0.2", false, "fd00::1", "fd00::2"},
		{"fd00::1", "10.0.0.1", "10.0.0.2", "fd00::2", false, "10.0.0.1", "10.0.0.2"},
		{"fd00::1", "", "10.0.0.2", "fd00::2", false, "fd00::1", "fd00::2"},
	} {
		t.Run(fmt.Sprint(tt), func(t *testing.T) {
			first, second := addr(tt.first), addr(tt.second)
			p := conf.Peer{AgentIP: addr(tt.peerFirst), Underlay: conf.Underlay{SecondIP: addr(tt.peerSecond), TwoFamilies: !tt.old}}
			own, peer, ok := p.Reach(first, second)
			if own != addr(tt.own) || peer != addr(tt.peer) || ok != (tt.own != "") {
				t.Errorf("%s to %s, %v", own, peer, ok)
			}
			if tt.old {
				second = netip.Addr{} // it does not know of it
			}
			here := conf.Peer{AgentIP: first, Underlay: conf.Underlay{SecondIP: second, TwoFamilies: true}}
			if own, peer, ok = here.Reach(p.AgentIP, p.SecondIP); own != addr(tt.peer) || peer != addr(tt.own) || ok != (tt.own != "") {
				t.Errorf("the other way: %s to %s, %v", own, peer, ok)
			}
		})
	}
}
