package conf_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
)

// documented is the default configuration of DC/OS.
func documented() conf.Network {
	return conf.Network{
		VTEPSubnet:  netip.MustParsePrefix("44.128.0.0/20"),
		VTEPSubnet6: netip.MustParsePrefix("fd01:a::/64"),
		VTEPMACOUI:  "70:B3:D5:00:00:00",
		Overlays: []conf.Overlay{
			{Name: "dcos", Subnet: netip.MustParsePrefix("9.0.0.0/8"), Prefix: 24},
			{Name: "dcos6", Subnet6: netip.MustParsePrefix("fd01:b::/64"), Prefix6: 80},
		},
	}
}

func TestValidateAccepts(t *testing.T) {
	no := false
	tests := []struct {
		name   string
		change func(*conf.Network)
	}{
		{"documented default", func(*conf.Network) {}},
		{"dual stack", func(n *conf.Network) {
			n.Overlays[1].Subnet, n.Overlays[1].Prefix = netip.MustParsePrefix("10.0.0.0/8"), 26
		}},
		{"IPv4 alone needs no vtep_subnet6", func(n *conf.Network) {
			n.Overlays, n.VTEPSubnet6 = n.Overlays[:1], netip.Prefix{}
		}},
		{"vtep_subnet6 without an IPv6 overlay, as DC/OS 2.1 demands", func(n *conf.Network) { n.Overlays = n.Overlays[:1] }},
		{"IPv6 alone needs no vtep_subnet", func(n *conf.Network) {
			n.Overlays, n.VTEPSubnet = n.Overlays[1:], netip.Prefix{}
		}},
		{"one agent", func(n *conf.Network) { n.Overlays[0].Prefix = 8 }},
		{"smallest agent subnets", func(n *conf.Network) { n.Overlays[0].Prefix, n.Overlays[1].Prefix6 = 29, 125 }},
		{"largest VTEP subnet", func(n *conf.Network) { n.VTEPSubnet = netip.MustParsePrefix("44.0.0.0/8") }},
		{"smallest VTEP subnets", func(n *conf.Network) {
			n.VTEPSubnet, n.VTEPSubnet6 = netip.MustParsePrefix("44.128.0.0/30"), netip.MustParsePrefix("fd01:a::/126")
		}},
		{"longest name", func(n *conf.Network) { n.Overlays[0].Name = "thirteen-byte" }},
		{"disabled", func(n *conf.Network) { n.Overlays[0].Enabled = &no }},
		{"least MTU with IPv6", func(n *conf.Network) { n.VTEPMTU = 1280 }},
		{"least MTU without", func(n *conf.Network) { n.Overlays, n.VTEPMTU = n.Overlays[:1], 552 }},
		{"greatest MTU", func(n *conf.Network) { n.VTEPMTU = 65535 }},
		{"neighbouring ranges", func(n *conf.Network) {
			n.VTEPSubnet = netip.MustParsePrefix("8.255.240.0/20")
			n.Overlays = append(n.Overlays, conf.Overlay{Name: "x", Subnet: netip.MustParsePrefix("10.0.0.0/8"), Prefix: 24})
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := documented()
			tt.change(&n)
			if got := n.Validate(); got != nil {
				t.Errorf("Validate() = %v, want no problem", got)
			}
		})
	}
}

func TestValidateRefuses(t *testing.T) {
	prefix := netip.MustParsePrefix
	tests := []struct {
		name   string
		change func(*conf.Network)
		want   []string // every problem: its path, a colon, and a part of its text
	}{
		{"no overlays", func(n *conf.Network) { n.Overlays = nil }, []string{"overlays: missing or empty"}},

		{"no name", func(n *conf.Network) { n.Overlays[0].Name = "" }, []string{"overlays[0].name: missing"}},
		{"name too long", func(n *conf.Network) { n.Overlays[0].Name = "fourteen-bytes" },
			[]string{`overlays[0].name: "fourteen-bytes" has 14 bytes, at most 13`}},
		{"name with a slash", func(n *conf.Network) { n.Overlays[0].Name = "a/b" }, []string{`overlays[0].name: "a/b" has a character`}},
		{"name with a space", func(n *conf.Network) { n.Overlays[0].Name = "a b" }, []string{`overlays[0].name: "a b" has a character`}},
		{"name that starts with a dot", func(n *conf.Network) { n.Overlays[0].Name = ".." }, []string{`overlays[0].name: ".." has a character`}},
		{"name host", func(n *conf.Network) { n.Overlays[0].Name = "host" }, []string{`overlays[0].name: "host" is reserved`}},
		{"name bridge", func(n *conf.Network) { n.Overlays[0].Name = "bridge" }, []string{`overlays[0].name: "bridge" is reserved`}},
		{"name default", func(n *conf.Network) { n.Overlays[0].Name = "default" }, []string{`overlays[0].name: "default" is reserved`}},
		{"name none", func(n *conf.Network) { n.Overlays[0].Name = "none" }, []string{`overlays[0].name: "none" is reserved`}},
		{"duplicate name", func(n *conf.Network) { n.Overlays[1].Name = "dcos" },
			[]string{`overlays[1].name: "dcos" is the name of overlays[0] already`}},

		{"no family", func(n *conf.Network) { n.Overlays[0].Subnet, n.Overlays[0].Prefix = netip.Prefix{}, 0 },
			[]string{"overlays[0]: neither subnet nor subnet6"}},
		{"subnet without prefix", func(n *conf.Network) { n.Overlays[0].Prefix = 0 },
			[]string{"overlays[0].prefix: missing; give the length of the subnet each agent gets from 9.0.0.0/8"}},
		{"prefix without subnet", func(n *conf.Network) { n.Overlays[0].Subnet = netip.Prefix{} },
			[]string{"overlays[0].subnet: missing, but its prefix 24 is given"}},
		{"subnet6 without prefix6", func(n *conf.Network) { n.Overlays[1].Prefix6 = 0 }, []string{"overlays[1].prefix6: missing"}},
		{"prefix6 without subnet6", func(n *conf.Network) { n.Overlays[1].Subnet6 = netip.Prefix{} },
			[]string{"overlays[1].subnet6: missing, but its prefix 80 is given"}},
		{"prefix shorter than the subnet", func(n *conf.Network) { n.Overlays[0].Prefix = 7 },
			[]string{"overlays[0].prefix: 7 is shorter than the overlay 9.0.0.0/8"}},
		{"prefix longer than /29", func(n *conf.Network) { n.Overlays[0].Prefix = 30 },
			[]string{"overlays[0].prefix: 30 is too long: the halves would hold no container; use 8 to 29"}},
		{"prefix6 shorter than subnet6", func(n *conf.Network) { n.Overlays[1].Prefix6 = 63 },
			[]string{"overlays[1].prefix6: 63 is shorter than the overlay fd01:b::/64"}},
		{"prefix6 longer than /125", func(n *conf.Network) { n.Overlays[1].Prefix6 = 126 },
			[]string{"overlays[1].prefix6: 126 is too long: the halves would hold no container; use 64 to 125"}},
		{"negative prefix", func(n *conf.Network) { n.Overlays[0].Prefix = -1 }, []string{"overlays[0].prefix: -1 is shorter"}},
		{"subnet too small for any prefix", func(n *conf.Network) { n.Overlays[0].Subnet, n.Overlays[0].Prefix = prefix("9.0.0.0/30"), 30 },
			[]string{"overlays[0].subnet: 9.0.0.0/30 is too small"}},

		{"host bits in subnet", func(n *conf.Network) { n.Overlays[0].Subnet = prefix("9.0.0.1/8") },
			[]string{"overlays[0].subnet: 9.0.0.1/8 has host bits set; write 9.0.0.0/8"}},
		{"host bits in subnet6", func(n *conf.Network) { n.Overlays[1].Subnet6 = prefix("fd01:b::1/64") },
			[]string{"overlays[1].subnet6: fd01:b::1/64 has host bits set; write fd01:b::/64"}},
		{"host bits in vtep_subnet", func(n *conf.Network) { n.VTEPSubnet = prefix("44.128.0.1/20") },
			[]string{"vtep_subnet: 44.128.0.1/20 has host bits set; write 44.128.0.0/20"}},
		{"host bits in vtep_subnet6", func(n *conf.Network) { n.VTEPSubnet6 = prefix("fd01:a::1/64") },
			[]string{"vtep_subnet6: fd01:a::1/64 has host bits set; write fd01:a::/64"}},

		{"IPv6 in subnet", func(n *conf.Network) { n.Overlays[0].Subnet = prefix("fd02::/64") },
			[]string{"overlays[0].subnet: fd02::/64 is IPv6, this field is for IPv4; write it as subnet6"}},
		{"IPv4 in subnet6", func(n *conf.Network) { n.Overlays[1].Subnet6 = prefix("10.0.0.0/8") },
			[]string{"overlays[1].subnet6: 10.0.0.0/8 is IPv4, this field is for IPv6; write it as subnet"}},
		{"IPv6 in vtep_subnet", func(n *conf.Network) { n.VTEPSubnet = prefix("fd02::/64") },
			[]string{"vtep_subnet: fd02::/64 is IPv6, this field is for IPv4; write it as vtep_subnet6"}},
		{"IPv4 in vtep_subnet6", func(n *conf.Network) { n.VTEPSubnet6 = prefix("10.0.0.0/8") },
			[]string{"vtep_subnet6: 10.0.0.0/8 is IPv4, this field is for IPv6; write it as vtep_subnet"}},
		{"IPv4-mapped", func(n *conf.Network) { n.Overlays[1].Subnet6 = prefix("::ffff:10.0.0.0/104") },
			[]string{"overlays[1].subnet6: ::ffff:10.0.0.0/104 is an IPv4-mapped IPv6 range; write it as plain IPv4"}},

		{"overlays overlap", func(n *conf.Network) {
			n.Overlays = append(n.Overlays, conf.Overlay{Name: "x", Subnet: prefix("9.1.0.0/16"), Prefix: 24})
		}, []string{"overlays[2].subnet: 9.1.0.0/16 overlaps overlays[0].subnet (9.0.0.0/8)"}},
		{"IPv6 overlays overlap", func(n *conf.Network) {
			n.Overlays = append(n.Overlays, conf.Overlay{Name: "x", Subnet6: prefix("fd01::/16"), Prefix6: 64})
		}, []string{"overlays[2].subnet6: fd01::/16 overlaps vtep_subnet6 (fd01:a::/64)", "overlays[2].subnet6: fd01::/16 overlaps overlays[1].subnet6 (fd01:b::/64)"}},
		{"an overlay and the VTEPs overlap", func(n *conf.Network) { n.Overlays[0].Subnet = prefix("44.0.0.0/8") },
			[]string{"overlays[0].subnet: 44.0.0.0/8 overlaps vtep_subnet (44.128.0.0/20)"}},
		{"overlap behind host bits", func(n *conf.Network) {
			n.Overlays = append(n.Overlays, conf.Overlay{Name: "x", Subnet: prefix("9.1.0.1/16"), Prefix: 24})
		}, []string{"overlays[2].subnet: 9.1.0.1/16 has host bits", "overlays[2].subnet: 9.1.0.0/16 overlaps"}},

		{"loopback", func(n *conf.Network) { n.Overlays[0].Subnet = prefix("127.0.0.0/16") },
			[]string{"overlays[0].subnet: 127.0.0.0/16 lies in or holds the loopback range 127.0.0.0/8"}},
		{"multicast", func(n *conf.Network) { n.Overlays[0].Subnet = prefix("224.0.0.0/8") }, []string{"overlays[0].subnet: 224.0.0.0/8 lies in or holds the multicast"}},
		{"link-local", func(n *conf.Network) { n.Overlays[0].Subnet = prefix("169.254.0.0/16") }, []string{"overlays[0].subnet: 169.254.0.0/16 lies in or holds the link-local"}},
		{"everything", func(n *conf.Network) { n.Overlays[0].Subnet = prefix("0.0.0.0/0") },
			[]string{"overlays[0].subnet: 0.0.0.0/0 lies in or holds the unspecified", "overlays[0].subnet: 0.0.0.0/0 overlaps vtep_subnet"}},
		{"broadcast", func(n *conf.Network) { n.VTEPSubnet = prefix("255.255.255.0/24") }, []string{"vtep_subnet: 255.255.255.0/24 lies in or holds the broadcast"}},
		{"IPv6 loopback", func(n *conf.Network) { n.VTEPSubnet6 = prefix("::1/128") },
			[]string{"vtep_subnet6: ::1/128 lies in or holds the loopback", "vtep_subnet6: ::1/128 is too small"}},
		{"IPv6 multicast", func(n *conf.Network) { n.Overlays[1].Subnet6 = prefix("ff00::/64") }, []string{"overlays[1].subnet6: ff00::/64 lies in or holds the multicast"}},
		{"IPv6 link-local", func(n *conf.Network) { n.Overlays[1].Subnet6 = prefix("fe80::/64") }, []string{"overlays[1].subnet6: fe80::/64 lies in or holds the link-local"}},

		{"no vtep_subnet", func(n *conf.Network) { n.VTEPSubnet = netip.Prefix{} },
			[]string{"vtep_subnet: missing, but an overlay has subnet; give the IPv4 range"}},
		{"neither vtep_subnet nor vtep_subnet6 where all overlays have IPv6 alone", func(n *conf.Network) {
			n.VTEPSubnet, n.VTEPSubnet6, n.Overlays = netip.Prefix{}, netip.Prefix{}, n.Overlays[1:2]
		}, []string{"vtep_subnet6: missing, but an overlay has subnet6"}},
		{"vtep_subnet shorter than /8", func(n *conf.Network) { n.VTEPSubnet = prefix("44.0.0.0/7") },
			[]string{"vtep_subnet: 44.0.0.0/7 is too large: VTEP MACs are made from the last 24 bits"}},
		{"vtep_subnet longer than /30", func(n *conf.Network) { n.VTEPSubnet = prefix("44.128.0.0/31") },
			[]string{"vtep_subnet: 44.128.0.0/31 is too small to hold a VTEP; use a /30"}},
		{"vtep_subnet6 longer than /126", func(n *conf.Network) { n.VTEPSubnet6 = prefix("fd01:a::/127") },
			[]string{"vtep_subnet6: fd01:a::/127 is too small to hold a VTEP; use a /126"}},
		{"IPv6 overlay without vtep_subnet6", func(n *conf.Network) { n.VTEPSubnet6 = netip.Prefix{} },
			[]string{"vtep_subnet6: missing, but an overlay has subnet6"}},

		{"no OUI", func(n *conf.Network) { n.VTEPMACOUI = "" }, []string{"vtep_mac_oui: missing"}},
		{"OUI of three bytes", func(n *conf.Network) { n.VTEPMACOUI = "70:B3:D5" }, []string{"vtep_mac_oui: MAC address \"70:B3:D5\": want six bytes"}},
		{"OUI not hex", func(n *conf.Network) { n.VTEPMACOUI = "7g:B3:D5:00:00:00" }, []string{`vtep_mac_oui: MAC address "7g:B3:D5:00:00:00": "7g" is not a hex byte`}},
		{"OUI with dashes", func(n *conf.Network) { n.VTEPMACOUI = "70-B3-D5-00-00-00" }, []string{"vtep_mac_oui: MAC address \"70-B3-D5-00-00-00\": want colons"}},
		{"OUI with low bytes", func(n *conf.Network) { n.VTEPMACOUI = "70:B3:D5:00:00:01" },
			[]string{`vtep_mac_oui: "70:B3:D5:00:00:01": the last three bytes come from the VTEP's address and must be 0; write 70:b3:d5:00:00:00`}},
		{"OUI with the multicast bit", func(n *conf.Network) { n.VTEPMACOUI = "71:B3:D5:00:00:00" },
			[]string{`vtep_mac_oui: "71:B3:D5:00:00:00": the first byte has the multicast bit set (it is odd), so no device can have such an address; write 70:b3:d5:00:00:00`}},

		{"MTU below 552", func(n *conf.Network) { n.Overlays, n.VTEPMTU = n.Overlays[:1], 551 }, []string{"vtep_mtu: 551: must be between 552 and 65535, or left out"}},
		{"MTU below 1280 with IPv6", func(n *conf.Network) { n.VTEPMTU = 1279 }, []string{"vtep_mtu: 1279: must be between 1280 and 65535 because an overlay has subnet6"}},
		{"MTU above 65535", func(n *conf.Network) { n.VTEPMTU = 65536 }, []string{"vtep_mtu: 65536: must be between"}},
		{"negative MTU", func(n *conf.Network) { n.VTEPMTU = -1 }, []string{"vtep_mtu: -1: must be between"}},

		{"everything at once", func(n *conf.Network) {
			*n = conf.Network{VTEPMTU: 1, Overlays: []conf.Overlay{
				{Name: "none"},
				{Name: "a", Subnet: prefix("10.1.2.3/8"), Prefix: 31},
				{Name: "a", Subnet6: prefix("10.0.0.0/8")},
			}}
		}, []string{
			"vtep_subnet: missing",
			"vtep_subnet6: missing",
			"vtep_mac_oui: missing",
			"vtep_mtu: 1: must be between 1280",
			`overlays[0].name: "none" is reserved`,
			"overlays[0]: neither",
			"overlays[1].subnet: 10.1.2.3/8 has host bits",
			"overlays[1].prefix: 31 is too long",
			`overlays[2].name: "a" is the name of overlays[1]`,
			"overlays[2].subnet6: 10.0.0.0/8 is IPv4",
			"overlays[2].prefix6: missing",
		}},
		{"nothing", func(n *conf.Network) { *n = conf.Network{} },
			[]string{"vtep_subnet: missing", "vtep_mac_oui: missing", "overlays: missing or empty"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := documented()
			tt.change(&n)
			got := n.Validate()
			matches := len(got) == len(tt.want)
			for i := 0; matches && i < len(got); i++ {
				matches = strings.HasPrefix(got[i].String(), tt.want[i])
			}
			if !matches {
				t.Errorf("Validate() =\n%s\nwant, as the beginning of each line,\n%s", lines(got), strings.Join(tt.want, "\n"))
			}
		})
	}
}

func lines(problems []conf.Problem) string {
	var out []string
	for _, p := range problems {
		out = append(out, p.String())
	}
	return strings.Join(out, "\n")
}

// TestNetworkJSON is the form DC/OS serves.
func TestNetworkJSON(t *testing.T) {
	const want = `{"overlays":[{"name":"dcos","prefix":24,"subnet":"9.0.0.0/8"},` +
		`{"name":"dcos6","prefix6":80,"subnet6":"fd01:b::/64"}],` +
		`"vtep_mac_oui":"70:B3:D5:00:00:00","vtep_subnet":"44.128.0.0/20","vtep_subnet6":"fd01:a::/64"}`
	got, err := json.Marshal(documented())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("JSON (-want +got):\n%s", diff)
	}
	no := false
	n := conf.Network{Overlays: []conf.Overlay{{Name: "a", Enabled: &no, Isolation: conf.IsolationOf(true)}}}
	if got, err = json.Marshal(n); err != nil || !strings.Contains(string(got), `{"enabled":false,"isolation":true,"name":"a"}`) {
		t.Errorf("JSON = %s, %v: want enabled and isolation where the configuration says them", got, err)
	}
}

func TestNetworkLookups(t *testing.T) {
	n := documented()
	if o, ok := n.Overlay("dcos6"); !ok || o.Prefix6 != 80 || !o.IsEnabled() {
		t.Errorf("Overlay(dcos6) = %+v, %v", o, ok)
	}
	if _, ok := n.Overlay("x"); ok {
		t.Error("Overlay(x) found something")
	}
	no := false
	if (conf.Overlay{Enabled: &no}).IsEnabled() {
		t.Error("IsEnabled() = true for enabled: false")
	}
	if !n.HasIPv6() || (conf.Network{Overlays: n.Overlays[:1]}).HasIPv6() {
		t.Error("HasIPv6() is wrong")
	}
	if got := n.OUI(); got != (conf.MAC{0x70, 0xb3, 0xd5}) {
		t.Errorf("OUI() = %v", got)
	}
}
