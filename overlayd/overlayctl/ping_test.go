package main

import (
	"net/netip"
	"testing"

	"overlayd.internal/overlay/conf"
)

// An address is that of a host or a container also where it is written as an IPv6 one
// that has an IPv4 one in it.
func TestPingMappedAddress(t *testing.T) {
	a := netip.MustParseAddr
	state := conf.State{IP: a("10.0.0.1")}
	peers := []conf.Peer{{AgentID: "two", AgentIP: a("10.0.0.2"), VTEPIP: a("44.128.0.2"), Subnets: []netip.Prefix{netip.MustParsePrefix("9.0.1.0/24")}}}
	for name, want := range map[string]string{"::ffff:10.0.0.2": "44.128.0.2", "::ffff:44.128.0.2": "44.128.0.2", "::ffff:9.0.1.130": "9.0.1.130"} {
		if got, err := pingTarget(state, peers, name); err != nil || got.Address != a(want) {
			t.Errorf("%s: %v, %v, want %s", name, got.Address, err, want)
		}
	}
}
