package coordinator_test

import (
	"log/slog"
	"net/http"
	"net/netip"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/coordinator"
)

// TestAgentIPs: an address that no host has is refused, and takes nothing; so is one
// that is the network's own, or its broadcast address, where the coordinator's host is
// in that network.
func TestAgentIPs(t *testing.T) {
	c := startOptions(t, coordinator.Options{
		Network: parseNetwork(t, seedNetwork), Store: newStore(t), Log: slog.New(slog.DiscardHandler), Version: "test",
		Networks: []netip.Prefix{netip.MustParsePrefix("172.17.0.0/16"), netip.MustParsePrefix("10.0.0.8/30"), netip.MustParsePrefix("10.1.0.8/31")},
	})
	for ip, words := range map[string]string{
		"0.0.0.0": "is not the address of a host", "0.1.2.3": "is not the address of a host", "240.0.0.1": "is not the address of a host", "255.255.255.255": "is not the address of a host",
		"224.0.0.5": "is not the address of a host", "127.0.0.1": "is not the address of a host", "::": "is not the address of a host", "::1": "is not the address of a host",
		"ff02::1": "is not the address of a host", "ff0e::5": "is not the address of a host", "::ffff:172.17.0.9": "not IPv4-mapped", "fe80::1": "link-local",
		"172.17.0.0": "is the address of the network 172.17.0.0/16", "172.17.255.255": "is the broadcast address of the network 172.17.0.0/16", "10.0.0.11": "broadcast address of the network 10.0.0.8/30",
	} {
		_, err := c.Register(t.Context(), request("a", ip))
		refused(t, err, http.StatusBadRequest, words)
	}
	if n := len(c.Agents()); n != 0 {
		t.Errorf("%d agents have a lease", n)
	}
	for i, ip := range []string{"172.17.0.255", "10.0.0.9", "10.1.0.8", "10.1.0.9", "fd00::"} {
		if _, err := c.Register(t.Context(), request(string(rune('a'+i)), ip)); err != nil {
			t.Errorf("%s: %v", ip, err)
		}
	}
}
