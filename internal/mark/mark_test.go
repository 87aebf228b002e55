package mark

import (
	"net/netip"
	"testing"

	"overlayd.internal/overlay/conf"
)

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func TestBridgeAlias(t *testing.T) {
	overlay, half, ok := ParseBridgeAlias(BridgeAlias("dcos", conf.Docker))
	if overlay != "dcos" || half != conf.Docker || !ok {
		t.Errorf("read back: %q %q %v", overlay, half, ok)
	}
	for _, s := range []string{"", "overlay", "overlay1 dcos docker", "uplink", "overlay: dcos"} {
		if overlay, half, ok := ParseBridgeAlias(s); ok {
			t.Errorf("ParseBridgeAlias(%q) = %q, %q, want it to be nobody's", s, overlay, half)
		}
	}
}

func TestHalfOf(t *testing.T) {
	for name, want := range map[string]conf.Half{"m-dcos": conf.Mesos, "d-m-": conf.Docker, "docker0": "", "m": "", "": ""} {
		if got, ok := HalfOf(name); got != want || ok != (want != "") {
			t.Errorf("HalfOf(%q) = %q, %v, want %q", name, got, ok, want)
		}
	}
}

// The MACs are remembered by neighbours across an upgrade.
func TestMACs(t *testing.T) {
	key := conf.Attachment{Network: "dcos", ContainerID: "c", IfName: "eth0"}.Key()
	for _, tt := range []struct {
		what string
		got  conf.MAC
		want string
	}{
		{"bridge", BridgeMAC(prefixes("9.0.0.1/25")), "0a:58:09:00:00:01"},
		{"bridge of both families", BridgeMAC(prefixes("fd01::1/65", "9.0.0.1/25")), "0a:58:09:00:00:01"},
		{"bridge of IPv6", BridgeMAC(prefixes("fd01:b::1/81")), "02:58:b2:09:18:b5"},
		{"container", ContainerMAC(prefixes("9.0.0.2/25")), "0a:58:09:00:00:02"},
		{"host end", HostEndMAC(key), "0e:" + key.String()[2:4] + ":" + key.String()[4:6] + ":" + key.String()[6:8] + ":" + key.String()[8:10] + ":" + key.String()[10:12]},
	} {
		if tt.got.String() != tt.want {
			t.Errorf("%s: %s, want %s", tt.what, tt.got, tt.want)
		}
	}
	for _, s := range []string{"fd01:b::2/81", "fd01:b::3/81", "fd01:b::4/81"} {
		if m := ContainerMAC(prefixes(s)); m[0]&3 != 2 {
			t.Errorf("container of %s: %s is not a locally administered unicast address", s, m)
		}
	}
}

func TestLooksLikeHostEnd(t *testing.T) {
	for name, want := range map[string]bool{
		"vm0123456789ab": true, "vdabcdef012345": true, "vx0123456789ab": false, "vm0123456789aB": false, "vm0123": false, "eth0": false,
	} {
		if got := LooksLikeHostEnd(name); got != want {
			t.Errorf("LooksLikeHostEnd(%q) = %v", name, got)
		}
	}
}

func TestMayBeHostEnd(t *testing.T) {
	for _, tt := range []struct {
		name       string
		more, want bool
	}{
		{"vm0123456789ab", false, true}, {"vm01", false, false}, {"vm01", true, true}, {"v", true, true}, {"", true, true},
		{"vmbr", true, false}, {"vmbr0", false, false}, {"veth", true, false}, {"vm0123456789abc", true, false},
	} {
		if got := MayBeHostEnd(tt.name, tt.more); got != tt.want {
			t.Errorf("MayBeHostEnd(%q, %v) = %v", tt.name, tt.more, got)
		}
	}
}
