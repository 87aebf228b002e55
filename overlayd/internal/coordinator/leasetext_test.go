package coordinator

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
)

// viaJSON is what appendSignedLease is to make.
func viaJSON(l conf.Lease, claim uint64, second string, sign func(string) [][]byte) string {
	l.SecondError, l.Signed = "", nil
	signed := string(encode(claiming{l, claim}))
	l.SecondError, l.Signed = second, &conf.SignedLease{Lease: signed, Signatures: sign(signed)}
	return string(encode(l)) + "\n"
}

func signatures(n int) func(string) [][]byte {
	return func(signed string) (out [][]byte) {
		for i := range n {
			out = append(out, []byte(fmt.Sprint(i, len(signed), signed[:9])))
		}
		return out
	}
}

// awkward are texts that JSON escapes, each in a way of its own.
var awkward = []string{"", "plain", `a "b" \ c`, "<&>", "\x00\n\t\x7f", "Straße", "\u2028\u2029", "bad \xff\xc0", "\U0001F600"}

// TestLeaseText: a lease encoded by hand is what encoding/json makes, as it is signed
// and as it is answered, whatever is in it, also when there is a field more.
func TestLeaseText(t *testing.T) {
	if known := 2; reflect.TypeFor[conf.SignedLease]().NumField() != known {
		t.Errorf("a SignedLease has other fields than the %d that viaJSON fills", known)
	}
	yes := true
	n := newNetwork(conf.Network{Overlays: []conf.Overlay{
		{Name: "both", Subnet: netip.MustParsePrefix("9.0.0.0/8"), Prefix: 24, Subnet6: netip.MustParsePrefix("fd01:b::/64"), Prefix6: 80},
		{Name: "other", Allow: []string{"<a>"}, Enabled: &yes, Halves: conf.HalvesShared, Isolation: "strict"},
	}}, 3)
	four, six := netip.MustParsePrefix("9.0.1.0/24"), netip.MustParsePrefix("fd01:b::/80")
	zone := netip.MustParseAddr(`fe80::1%e"<0`)
	var filled conf.Lease
	fill(reflect.ValueOf(&filled).Elem())
	leases := []conf.Lease{
		{}, filled,
		{Bridges: []conf.Half{}, Grants: []conf.Grant{}, TakenDown: []string{}},
		{AgentIP: zone, Underlay: conf.Underlay{SecondIP: zone, MTU: -1}},
		{AgentIP: netip.MustParseAddr("::ffff:10.0.0.1"), VTEP: conf.VTEP{IP: netip.PrefixFrom(netip.MustParseAddr("44.0.0.1"), 99), IP6: six, MTU: 1450}},
		{Bridges: conf.Halves[:], Grants: []conf.Grant{
			{Overlay: n.Overlays[0], Subnet: four, Blocks: []conf.Block{{}, {Subnet: four}, {Subnet6: six}, {Subnet: four, Subnet6: six}}},
			{Overlay: n.Overlays[1], Subnet6: six, Error: "why"}, {Overlay: n.Overlays[0], Subnet: four, Subnet6: six, Blocks: []conf.Block{}},
		}},
	}
	for _, s := range awkward {
		leases = append(leases, conf.Lease{ClusterID: s, AgentID: s, Bridges: []conf.Half{conf.Half(s)}, TakenDown: []string{s, s},
			Grants: []conf.Grant{{Overlay: conf.Overlay{Name: s, Allow: []string{s}}, Error: s}}})
	}
	for _, l := range leases {
		for i, second := range awkward {
			claim := uint64(i) << 61
			got := string(appendSignedLease(n, &l, claim, second, signatures(i%3)))
			if diff := cmp.Diff(viaJSON(l, claim, second, signatures(i%3)), got); diff != "" {
				t.Errorf("lease %+v (-json +by hand):\n%s", l, diff)
			}
		}
	}
}

// FuzzLeaseText looks for a text that is not encoded as encoding/json does.
func FuzzLeaseText(f *testing.F) {
	for i, s := range awkward {
		f.Add(s, awkward[len(awkward)-1-i], uint64(i), 1400*i)
	}
	n := newNetwork(conf.Network{}, 1)
	f.Fuzz(func(t *testing.T, a, b string, epoch uint64, mtu int) {
		ip, _ := netip.ParseAddr(a)
		subnet, _ := netip.ParsePrefix(b)
		l := conf.Lease{ClusterID: a, AgentID: b, AgentIP: ip, Epoch: epoch, TermSeconds: mtu, Bridges: []conf.Half{conf.Half(a), conf.Half(b)},
			VTEP: conf.VTEP{IP: subnet, IP6: subnet, MTU: mtu}, Underlay: conf.Underlay{SecondIP: ip, MTU: mtu, TwoFamilies: mtu > 0}, TakenDown: []string{b, a},
			Grants: []conf.Grant{{Overlay: conf.Overlay{Name: a}, Subnet: subnet, Error: b, Blocks: []conf.Block{{Subnet6: subnet}}}}}
		got := string(appendSignedLease(n, &l, epoch, a, signatures(len(b)%3)))
		if diff := cmp.Diff(viaJSON(l, epoch, a, signatures(len(b)%3)), got); diff != "" {
			t.Errorf("lease (-json +by hand):\n%s", diff)
		}
	})
}

// BenchmarkLease is what the answer with a lease takes, and what encoding/json would.
func BenchmarkLease(b *testing.B) {
	n := newNetwork(conf.Network{VTEPSubnet: netip.MustParsePrefix("44.0.0.0/8"), VTEPMACOUI: "70:B3:D5:00:00:00",
		Overlays: []conf.Overlay{{Name: "v4", Subnet: netip.MustParsePrefix("9.0.0.0/8"), Prefix: 24}}}, 1)
	a := &agent{id: "agent-12345", mod: 7, record: record{Bridges: conf.Halves[:],
		IP: netip.MustParseAddr("10.1.2.3"), VTEP: netip.MustParseAddr("44.1.2.3"), Subnets: []held{{Overlay: "v4", Subnet: netip.MustParsePrefix("9.1.2.0/24")}}}}
	c := &Coordinator{clusterID: "0123456789abcdef0123456789abcdef", term: DefaultTerm}
	l := c.leaseOf(n, a, nil)
	none := func(string) [][]byte { return nil }
	if !json.Valid(appendSignedLease(n, &l, 0, "", none)) {
		b.Fatal("not JSON")
	}
	b.Run("by hand", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			appendSignedLease(n, &l, 0, "", none)
		}
	})
	b.Run("by json", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			viaJSON(l, 0, "", none)
		}
	})
}
