package conf

import (
	"net/netip"
	"strings"
	"testing"
)

func TestCheckAgentID(t *testing.T) {
	for id, good := range map[string]bool{
		"a": true, "0123456789abcdef0123456789abcdef": true, "host-1.example_org": true, strings.Repeat("x", 64): true,
		"": false, strings.Repeat("x", 65): false, "-a": false, ".": false, "a b": false, "a/b": false, "ä": false, "a\n": false,
	} {
		if err := CheckAgentID(id); (err == nil) != good {
			t.Errorf("%q: %v, want it to be good: %t", id, err, good)
		}
	}
}

func TestCheckAgentIP(t *testing.T) {
	for ip, problem := range map[string]string{
		"10.0.0.1": "", "169.254.1.1": "", "fd00::1": "", "2001:db8::1": "", "239.255.255.255": "others can reach",
		"0.0.0.0": "others can reach", "0.1.2.3": "others can reach", "127.0.0.1": "others can reach", "240.0.0.1": "others can reach",
		"255.255.255.255": "others can reach", "224.0.0.1": "others can reach",
		"::": "others can reach", "::1": "others can reach", "ff02::1": "others can reach",
		"fe80::1": "link-local", "::ffff:10.0.0.1": "IPv4-mapped", "fd00::1%eth0": "zone",
	} {
		err := CheckAgentIP(netip.MustParseAddr(ip))
		if problem == "" && err != nil || problem != "" && (err == nil || !strings.Contains(err.Error(), problem)) {
			t.Errorf("%s: %v, want %q", ip, err, problem)
		}
	}
	if CheckAgentIP(netip.Addr{}) == nil {
		t.Error("no address is good")
	}
}

func TestCheckInNetwork(t *testing.T) {
	for _, tt := range []struct{ ip, network, problem string }{
		{"10.0.0.1", "10.0.0.9/24", ""}, {"10.0.0.0", "10.0.0.9/24", "is the address of the network 10.0.0.0/24"}, {"10.0.0.255", "10.0.0.9/24", "is the broadcast address of the network 10.0.0.0/24"},
		{"10.0.1.255", "10.0.0.9/24", ""}, {"10.0.0.255", "10.0.0.9/16", ""}, {"10.0.0.4", "10.0.0.5/30", "address of the network"}, {"10.0.0.7", "10.0.0.5/30", "broadcast"},
		{"10.0.0.4", "10.0.0.5/31", ""}, {"10.0.0.5", "10.0.0.5/31", ""}, {"10.0.0.5", "10.0.0.5/32", ""},
		{"fd00::", "fd00::1/64", ""}, {"fd00::ffff:ffff:ffff:ffff", "fd00::1/64", ""},
	} {
		err := CheckInNetwork(netip.MustParseAddr(tt.ip), netip.MustParsePrefix(tt.network))
		if tt.problem == "" && err != nil || tt.problem != "" && (err == nil || !strings.Contains(err.Error(), tt.problem)) {
			t.Errorf("%s in %s: %v, want %q", tt.ip, tt.network, err, tt.problem)
		}
	}
	if err := CheckInNetwork(netip.MustParseAddr("10.0.0.0"), netip.Prefix{}); err != nil {
		t.Error(err)
	}
}
