package firewall_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"overlayd.internal/overlay/internal/firewall"
)

// Subnets of peers come and go by themselves, also side by side; Set finds the same
// as if it had made them, of either family.
func TestNetworks(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) { testNetworks(t, kind) })
	}
}

func testNetworks(t *testing.T, kind string) {
	s := newSpace(t, kind)
	subnets := func(third ...int) (out []firewall.Element) {
		for _, i := range third {
			out = append(out,
				firewall.Element{Prefix: netip.MustParsePrefix(fmt.Sprintf("9.0.%d.0/24", i))},
				firewall.Element{Prefix: netip.MustParsePrefix(fmt.Sprintf("fd01:0:0:%x::/64", i))})
		}
		return out
	}
	with := func(third ...int) firewall.Ruleset {
		return firewall.Build(firewall.Config{Peers: []netip.Addr{netip.MustParseAddr("172.16.0.3")}, Afar: subnets(third...)})
	}
	first := with(5)
	if !first.IPv4 || !first.IPv6 {
		t.Errorf("rules are for IPv4 %t, IPv6 %t", first.IPv4, first.IPv6)
	}
	s.set(first)
	for _, step := range []struct{ add, remove, want []int }{
		{[]int{4, 6}, nil, []int{4, 5, 6}},
		{nil, []int{5}, []int{4, 6}},
		{[]int{5, 7}, []int{4, 9}, []int{5, 6, 7}},
		{[]int{5}, []int{6, 7}, []int{5}},
	} {
		s.do(func() error {
			return s.Elements(t.Context(), firewall.AfarSet, subnets(step.add...), subnets(step.remove...))
		})
		s.mustBeIdle(with(step.want...))
	}
	s.set(with())
	if all := s.all(); strings.Contains(all, firewall.AfarSet) {
		t.Errorf("without any there is still a set:\n%s", all)
	}
}
