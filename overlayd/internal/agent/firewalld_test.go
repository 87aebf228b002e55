package agent

import (
	"fmt"
	"net/netip"
	"testing"

	"overlayd.internal/overlay/conf"
)

// What an earlier run told firewalld of is known from what it published: nothing,
// where it took no packets without VXLAN.
func TestToldSources(t *testing.T) {
	four := conf.AgentOverlay{Info: conf.Overlay{Name: "four", Subnet: netip.MustParsePrefix("9.0.0.0/8")}}
	four.Backend.VXLAN.VTEPIP = netip.MustParsePrefix("44.128.0.2/20")
	six := conf.AgentOverlay{Info: conf.Overlay{Name: "six", Subnet6: netip.MustParsePrefix("fd01:b::/64")}}
	six.Backend.VXLAN.VTEPIP6 = netip.MustParsePrefix("fd01:a::2/64")
	for _, tc := range []struct {
		routing  conf.Routing
		ip, want string
	}{
		{conf.RoutingDirect, "172.16.0.2", "[9.0.0.0/8 44.128.0.0/20]"},
		{conf.RoutingDirect, "fd00::2", "[fd01:b::/64 fd01:a::/64]"},
		{conf.RoutingVXLAN, "172.16.0.2", "[]"},
		{"", "172.16.0.2", "[]"}, // of a release that had no other way
	} {
		s := conf.State{IP: netip.MustParseAddr(tc.ip), Overlays: []conf.AgentOverlay{four, six}}
		s.Datapath.Routing = tc.routing
		if got := fmt.Sprint(toldSources(s)); got != tc.want {
			t.Errorf("routing %q, agent IP %s: sources are %s, want %s", tc.routing, tc.ip, got, tc.want)
		}
	}
}
