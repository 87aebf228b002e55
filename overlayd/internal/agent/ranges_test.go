package agent

import (
	"fmt"
	"net/netip"
	"testing"

	"overlayd.internal/overlay/conf"
)

// What an earlier run told firewalld of is known from what it published.
func TestRanges(t *testing.T) {
	four := conf.AgentOverlay{Info: conf.Overlay{Name: "four", Subnet: netip.MustParsePrefix("9.0.0.0/8")}}
	four.Backend.VXLAN.VTEPIP = netip.MustParsePrefix("44.128.0.2/20")
	six := conf.AgentOverlay{Info: conf.Overlay{Name: "six", Subnet6: netip.MustParsePrefix("fd01:b::/64")}}
	six.Backend.VXLAN.VTEPIP6 = netip.MustParsePrefix("fd01:a::2/64")
	const want = "[9.0.0.0/8 44.128.0.0/20 fd01:b::/64 fd01:a::/64]"
	if got := fmt.Sprint(ranges(conf.State{Overlays: []conf.AgentOverlay{four, six}})); got != want {
		t.Errorf("ranges are %s, want %s", got, want)
	}
}
