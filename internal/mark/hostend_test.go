package mark

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
)

var equal = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestAliasRoundTrip(t *testing.T) {
	v4, v6 := netip.MustParseAddr("255.255.255.254"), netip.MustParseAddr("fd01:bbbb:cccc:dddd:eeee:ffff:1111:2222")
	long := strings.Repeat("x", 255)
	tests := []struct {
		name       string
		overlay    string
		attachment conf.Attachment
		addrs      []netip.Addr
		keeps      conf.Attachment // what can be read back
	}{
		{"plain", "dcos", conf.Attachment{Network: "dcos", ContainerID: "c1", IfName: "eth0"}, []netip.Addr{v4},
			conf.Attachment{Network: "dcos", ContainerID: "c1", IfName: "eth0"}},
		{"network of another name", "dcos", conf.Attachment{Network: "mesos-net", ContainerID: "c1", IfName: "eth0"}, []netip.Addr{v6},
			conf.Attachment{Network: "mesos-net", ContainerID: "c1", IfName: "eth0"}},
		{"longest fields with a 64-digit id", "thirteenchars", conf.Attachment{Network: "thirteenchars", ContainerID: strings.Repeat("a", 64), IfName: "fifteen-letters"}, []netip.Addr{v4, v6},
			conf.Attachment{Network: "thirteenchars", ContainerID: strings.Repeat("a", 64), IfName: "fifteen-letters"}},
		{"id of three nested containers", "dcos", conf.Attachment{Network: "dcos", ContainerID: strings.Repeat("b", 36*3+2), IfName: "eth0"}, []netip.Addr{v4},
			conf.Attachment{Network: "dcos", ContainerID: strings.Repeat("b", 36*3+2), IfName: "eth0"}},
		{"id does not fit", "dcos", conf.Attachment{Network: "other", ContainerID: long, IfName: "eth0"}, []netip.Addr{v4},
			conf.Attachment{Network: "other", ContainerID: "~" + conf.Attachment{Network: "other", ContainerID: long, IfName: "eth0"}.Key().String(), IfName: "eth0"}},
		{"network does not fit", "dcos", conf.Attachment{Network: long, ContainerID: "c1", IfName: "eth0"}, []netip.Addr{v4},
			conf.Attachment{Network: hashOf(long), ContainerID: "~" + conf.Attachment{Network: long, ContainerID: "c1", IfName: "eth0"}.Key().String(), IfName: "eth0"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := NewAlias(tt.overlay, conf.Docker, tt.attachment, tt.addrs, 90*time.Second+5)
			text := in.String()
			if len(text) > maxAlias {
				t.Fatalf("alias has %d bytes, at most %d fit: %s", len(text), maxAlias, text)
			}
			got, ok := ParseAlias(text)
			if !ok {
				t.Fatalf("ParseAlias(%q) does not know it", text)
			}
			if !got.InNetwork(tt.attachment.Network) || got.InNetwork("stranger") {
				t.Errorf("%q: belongs to the wrong network", text)
			}
			want := Alias{Overlay: tt.overlay, Half: conf.Docker, Addrs: tt.addrs,
				Since: 90 * time.Second, Attachment: tt.keeps}
			if got.Key() != tt.attachment.Key() {
				t.Errorf("%q: key is %s, want %s", text, got.Key(), tt.attachment.Key())
			}
			if diff := cmp.Diff(want, got, equal); diff != "" {
				t.Errorf("read back (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseAliasOfOthers(t *testing.T) {
	ours := NewAlias("dcos", conf.Mesos, conf.Attachment{Network: "dcos", ContainerID: "c", IfName: "eth0"},
		[]netip.Addr{netip.MustParseAddr("9.0.1.2")}, 0).String()
	for _, s := range []string{
		"", "overlay1", "uplink to rack 7", ours + " more",
		strings.Replace(ours, "overlay1", "overlay2", 1),
		strings.Replace(ours, "mesos", "third", 1),
		strings.Replace(ours, "9.0.1.2", "9.0.1", 1),
		strings.Replace(ours, " 0 ", " now ", 1),
	} {
		if a, ok := ParseAlias(s); ok {
			t.Errorf("ParseAlias(%q) = %+v, want it to be nobody's", s, a)
		}
	}
}

func TestHostEnd(t *testing.T) {
	a := conf.Attachment{Network: "dcos", ContainerID: "c", IfName: "eth0"}
	m, d := HostEnd(conf.Mesos, a.Key()), HostEnd(conf.Docker, a.Key())
	if m != "vm"+a.Key().String()[:12] || d != "vd"+a.Key().String()[:12] || len(m) > 15 {
		t.Errorf("names are %s and %s", m, d)
	}
}

// The names of whatever an alias holds in place of an attachment's own.
func TestShortNames(t *testing.T) {
	addrs := []netip.Addr{netip.MustParseAddr("9.0.1.2")}
	for name, a := range map[string]conf.Attachment{
		"long container id":            {Network: "dcos", ContainerID: strings.Repeat("c", 1024), IfName: "eth0"},
		"long container id, long name": {Network: strings.Repeat("n", 255), ContainerID: strings.Repeat("c", 1024), IfName: "eth0"},
		"short container id":           {Network: strings.Repeat("n", 255), ContainerID: "c", IfName: "eth0"},
	} {
		said, ok := ParseAlias(NewAlias("dcos", conf.Docker, a, addrs, 0).String())
		if !ok || !slices.Contains(ShortNames(a), said.Attachment) {
			t.Errorf("%s: the alias says %+v, and ShortNames %+v", name, said.Attachment, ShortNames(a))
		}
	}
}
