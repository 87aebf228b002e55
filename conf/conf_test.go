package conf_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
)

func TestCheckName(t *testing.T) {
	for _, ok := range []string{"a", "0", "dcos", "dcos6", "A_b.c-d", "thirteen-byte", "hosts", "Host"} {
		if err := conf.CheckName(ok); err != nil {
			t.Errorf("CheckName(%q) = %v", ok, err)
		}
	}
	bad := map[string]string{
		"":               "missing",
		"fourteen-bytes": "has 14 bytes, at most 13 fit",
		"zwölf-Zeichen":  "has 14 bytes, at most 13 fit", // bytes count, not characters
		"übel":           "not allowed",
		"-a":             "not allowed",
		".a":             "not allowed",
		"_a":             "not allowed",
		"a/b":            "not allowed",
		"a b":            "not allowed",
		"a:b":            "not allowed",
		"a\n":            "not allowed",
		"a\x00":          "not allowed",
		"host":           "reserved by Docker",
		"bridge":         "reserved by Docker",
		"default":        "reserved by Docker",
		"none":           "reserved by Docker",
	}
	for name, want := range bad {
		if err := conf.CheckName(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("CheckName(%q) = %v, want an error with %q", name, err, want)
		}
	}
}

// TestHalves is the arithmetic of both halves of an agent subnet.
func TestHalves(t *testing.T) {
	type half struct{ Net, Gateway, First, Last string }
	tests := []struct {
		subnet        string
		mesos, docker half
		containers    uint64 // in each
	}{
		{"9.0.1.0/24",
			half{"9.0.1.0/25", "9.0.1.1/25", "9.0.1.2", "9.0.1.126"},
			half{"9.0.1.128/25", "9.0.1.129/25", "9.0.1.130", "9.0.1.254"}, 125},
		{"9.0.0.0/25",
			half{"9.0.0.0/26", "9.0.0.1/26", "9.0.0.2", "9.0.0.62"},
			half{"9.0.0.64/26", "9.0.0.65/26", "9.0.0.66", "9.0.0.126"}, 61},
		{"9.0.0.64/26",
			half{"9.0.0.64/27", "9.0.0.65/27", "9.0.0.66", "9.0.0.94"},
			half{"9.0.0.96/27", "9.0.0.97/27", "9.0.0.98", "9.0.0.126"}, 29},
		{"9.0.0.0/27",
			half{"9.0.0.0/28", "9.0.0.1/28", "9.0.0.2", "9.0.0.14"},
			half{"9.0.0.16/28", "9.0.0.17/28", "9.0.0.18", "9.0.0.30"}, 13},
		{"9.0.0.0/28",
			half{"9.0.0.0/29", "9.0.0.1/29", "9.0.0.2", "9.0.0.6"},
			half{"9.0.0.8/29", "9.0.0.9/29", "9.0.0.10", "9.0.0.14"}, 5},
		{"9.0.0.248/29",
			half{"9.0.0.248/30", "9.0.0.249/30", "9.0.0.250", "9.0.0.250"},
			half{"9.0.0.252/30", "9.0.0.253/30", "9.0.0.254", "9.0.0.254"}, 1},
		{"9.0.0.0/8",
			half{"9.0.0.0/9", "9.0.0.1/9", "9.0.0.2", "9.127.255.254"},
			half{"9.128.0.0/9", "9.128.0.1/9", "9.128.0.2", "9.255.255.254"}, 1<<23 - 3},
		{"fd01:b:0:0:1::/80",
			half{"fd01:b:0:0:1::/81", "fd01:b::1:0:0:1/81", "fd01:b::1:0:0:2", "fd01:b::1:7fff:ffff:ffff"},
			half{"fd01:b::1:8000:0:0/81", "fd01:b::1:8000:0:1/81", "fd01:b::1:8000:0:2", "fd01:b::1:ffff:ffff:ffff"}, 1<<47 - 2},
		{"fd01::/125",
			half{"fd01::/126", "fd01::1/126", "fd01::2", "fd01::3"},
			half{"fd01::4/126", "fd01::5/126", "fd01::6", "fd01::7"}, 2},
		{"fd00::/16",
			half{"fd00::/17", "fd00::1/17", "fd00::2", "fd00:7fff:ffff:ffff:ffff:ffff:ffff:ffff"},
			half{"fd00:8000::/17", "fd00:8000::1/17", "fd00:8000::2", "fd00:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}, 1<<62 - 2},
	}
	for _, tt := range tests {
		t.Run(tt.subnet, func(t *testing.T) {
			for h, want := range map[conf.Half]half{conf.Mesos: tt.mesos, conf.Docker: tt.docker} {
				p := h.Of(netip.MustParsePrefix(tt.subnet))
				got := half{p.String(), conf.GatewayPrefix(p).String(), conf.FirstContainer(p).String(), conf.LastContainer(p).String()}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s half (-want +got):\n%s", h, diff)
				}
				if got := conf.Containers(p); got != tt.containers {
					t.Errorf("%s half: Containers() = %d, want %d", h, got, tt.containers)
				}
			}
		})
	}
}

func TestHalfOfNothing(t *testing.T) {
	for _, p := range []netip.Prefix{{}, netip.MustParsePrefix("9.0.0.1/32"), netip.MustParsePrefix("fd01::/128")} {
		for _, h := range conf.Halves {
			if got := h.Of(p); got.IsValid() {
				t.Errorf("%s.Of(%v) = %v, want the zero prefix", h, p, got)
			}
		}
	}
	if got := conf.Docker.Of(netip.MustParsePrefix("9.0.1.77/24")); got.String() != "9.0.1.128/25" {
		t.Errorf("Of a subnet with host bits = %v", got)
	}
	for _, s := range []string{"9.0.0.0/31", "9.0.0.0/32", "fd01::/127", "fd01::/128"} {
		if got := conf.Containers(netip.MustParsePrefix(s)); got != 0 {
			t.Errorf("Containers(%s) = %d, want 0", s, got)
		}
	}
}

func TestHalfNames(t *testing.T) {
	for s, bridge := range map[string]string{"mesos": "m-dcos", "docker": "d-dcos"} {
		h, err := conf.ParseHalf(s)
		if err != nil || h.Bridge("dcos") != bridge {
			t.Errorf("ParseHalf(%q) = %q, %v; bridge %q, want %q", s, h, err, h.Bridge("dcos"), bridge)
		}
	}
	for _, s := range []string{"", "Mesos", "none"} {
		if _, err := conf.ParseHalf(s); err == nil || !strings.Contains(err.Error(), `must be "mesos" or "docker"`) {
			t.Errorf("ParseHalf(%q) = %v", s, err)
		}
	}
}

func TestVTEPPool6(t *testing.T) {
	for _, tc := range []struct{ vtep, vtep6, want string }{
		{"44.128.0.0/20", "fd01:a::/64", "fd01:a::/64"},
		{"", "fd01:a::/64", "fd01:a::/104"},
		{"", "fd01:a::ff00/120", "fd01:a::ff00/120"},
		{"44.128.0.0/20", "", "invalid Prefix"},
	} {
		var n conf.Network
		for to, text := range map[*netip.Prefix]string{&n.VTEPSubnet: tc.vtep, &n.VTEPSubnet6: tc.vtep6} {
			if err := to.UnmarshalText([]byte(text)); err != nil {
				t.Fatal(err)
			}
		}
		if got := n.VTEPPool6().String(); got != tc.want {
			t.Errorf("with vtep_subnet %q, of %q: %s, want %s", tc.vtep, tc.vtep6, got, tc.want)
		}
	}
}

func TestMAC(t *testing.T) {
	m, err := conf.ParseMAC("70:B3:d5:00:0A:ff")
	if err != nil || m != (conf.MAC{0x70, 0xb3, 0xd5, 0, 0x0a, 0xff}) || m.String() != "70:b3:d5:00:0a:ff" {
		t.Errorf("ParseMAC = %v, %v", m, err)
	}
	for _, s := range []string{"", "70:b3:d5", "70-b3-d5-00-00-00", "7g:b3:d5:00:00:00", "70:b3:d5:00:00:0", "70:b3:d5:00:00:00:", "70:b3:d5:00:00:000"} {
		if m, err := conf.ParseMAC(s); err == nil || m != (conf.MAC{}) {
			t.Errorf("ParseMAC(%q) = %v, %v; want an error", s, m, err)
		}
	}

	oui := conf.MAC{0x70, 0xb3, 0xd5}
	for addr, want := range map[string]string{
		"44.128.0.1":  "70:b3:d5:80:00:01",
		"44.128.1.0":  "70:b3:d5:80:01:00",
		"10.255.16.9": "70:b3:d5:ff:10:09",

		"fd01:a::1":           "72:b3:d5:00:00:01", // never one that is made of an IPv4 address
		"fd01:a::12:3456":     "72:b3:d5:12:34:56",
		"fd01:a::1:9912:3456": "72:b3:d5:12:34:56", // which is why VTEPPool6 has an end
	} {
		if got := conf.VTEPMAC(oui, netip.MustParseAddr(addr)); got.String() != want {
			t.Errorf("VTEPMAC(%s) = %s, want %s", addr, got, want)
		}
	}

	b, err := json.Marshal(m)
	if err != nil || string(b) != `"70:b3:d5:00:0a:ff"` {
		t.Errorf("JSON = %s, %v", b, err)
	}
	var back conf.MAC
	if err := json.Unmarshal(b, &back); err != nil || back != m {
		t.Errorf("from JSON: %v, %v", back, err)
	}
	if err := json.Unmarshal([]byte(`"x"`), &back); err == nil {
		t.Error("a MAC of \"x\" was read")
	}
}

func TestBootID(t *testing.T) {
	first, err := conf.BootID()
	if err != nil || len(first) != 36 {
		t.Fatalf("BootID() = %q, %v", first, err)
	}
	if again, err := conf.BootID(); err != nil || again != first {
		t.Errorf("BootID() = %q, %v; it was %q", again, err, first)
	}
}

func TestParseAddrs(t *testing.T) {
	got, err := conf.ParseAddrs([]string{"9.0.1.5", "9.0.1.6/25", "fd01:b::5", "fd01:b::6/81"})
	if err != nil {
		t.Fatal(err)
	}
	var text []string
	for _, a := range got {
		text = append(text, a.String())
	}
	if diff := cmp.Diff([]string{"9.0.1.5", "9.0.1.6", "fd01:b::5", "fd01:b::6"}, text); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got, err := conf.ParseAddrs(nil); got != nil || err != nil {
		t.Errorf("ParseAddrs(nil) = %v, %v", got, err)
	}
	for in, want := range map[string]string{
		"":                 "want 9.0.1.5 or 9.0.1.5/25",
		"nine":             "want 9.0.1.5 or 9.0.1.5/25",
		"9.0.1.5/33":       "want 9.0.1.5 or 9.0.1.5/25",
		"9.0.1.05":         "want 9.0.1.5 or 9.0.1.5/25",
		"9.0.1.5 ":         "want 9.0.1.5 or 9.0.1.5/25",
		"fe80::1%eth0":     "no zone",
		"::ffff:9.0.1.5":   "no IPv4-mapped form",
		"::ffff:9.0.1.5/9": "no IPv4-mapped form",
	} {
		if got, err := conf.ParseAddrs([]string{"9.0.1.1", in}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseAddrs(%q) = %v, %v; want an error with %q", in, got, err, want)
		}
	}
}
