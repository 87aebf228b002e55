package fastpath

import (
	"net/netip"
	"strings"
	"testing"
)

// A host is found suitable, and the reason when it is not.
func TestUnsuitable(t *testing.T) {
	r := newRig(t, false)
	h := r.hosts[0]
	look := func(w Wanted) string {
		t.Helper()
		reason := ""
		if err := h.ns.Inside(func() (err error) { reason, err = Unsuitable(t.Context(), w); return err }); err != nil {
			t.Fatal(err)
		}
		return reason
	}
	if reason := look(h.wanted()); reason != "" {
		t.Errorf("unsuitable: %s", reason)
	}
	for _, tt := range []struct{ name, reason, do, undo string }{
		{"segmentation", "tx-udp_tnl-segmentation off", "ethtool -K eth0 tx-udp_tnl-segmentation off", "ethtool -K eth0 tx-udp_tnl-segmentation on"},
		{"checksum", "tx-checksum-ip-generic off", "ethtool -K eth0 tx off tso off", "ethtool -K eth0 tx on tso on"},
		{"IPsec", "IPsec", "ip xfrm policy add dir out src 172.30.0.1 dst 172.30.0.2 tmpl proto esp mode transport", "ip xfrm policy flush"},
		{"queue of the VXLAN device", "vtep1024 has the qdisc tbf", "tc qdisc add dev vtep1024 root tbf rate 10mbit burst 12500 latency 25ms", "tc qdisc del dev vtep1024 root"},
		{"queue of a bridge", "m-net has the qdisc tbf", "tc qdisc add dev m-net root tbf rate 10mbit burst 12500 latency 25ms", "tc qdisc del dev m-net root"},
		{"rule", "--dport 22", "iptables -I FORWARD -p tcp --dport 22 -j DROP", "iptables -D FORWARD -p tcp --dport 22 -j DROP"},
	} {
		h.run(strings.Fields(tt.do)...)
		if reason := look(h.wanted()); !strings.Contains(reason, tt.reason) {
			t.Errorf("%s: reason %q, want %q in it", tt.name, reason, tt.reason)
		}
		h.run(strings.Fields(tt.undo)...)
	}
	if reason := look(h.wanted()); reason != "" {
		t.Errorf("unsuitable after all was undone: %s", reason)
	}
	// Without VXLAN it comes and goes by the underlay's device.
	h.run("iptables", "-I", "FORWARD", "-i", "eth0", "-p", "tcp", "--dport", "22", "-j", "DROP")
	if reason := look(h.wanted()); reason != "" {
		t.Errorf("unsuitable because of a rule about the underlay: %s", reason)
	}
	for _, send := range []bool{false, true} {
		direct := h.wanted()
		direct.Send, direct.Take = send, true
		if reason := look(direct); !strings.Contains(reason, "-i eth0") {
			t.Errorf("without VXLAN, send %v: reason %q, want the rule about the underlay", send, reason)
		}
	}
	six := h.wanted()
	six.Local = netip.MustParseAddr("fd00:30::1")
	if reason := look(six); !strings.Contains(reason, "IPv6") {
		t.Errorf("on an IPv6 underlay: %q", reason)
	}
}
