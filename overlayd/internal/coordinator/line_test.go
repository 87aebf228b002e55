package coordinator

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// TestLines: an event is one line of the JSON that any encoder makes of it, whatever
// it holds, and takes hardly more memory.
func TestLines(t *testing.T) {
	for _, peers := range []int{0, 1, 2, 1000} {
		e := api.PeerEvent{Revision: 7, Run: "r", Snapshot: true, Partial: true, Delete: []string{"a", `"put":[`}, Register: true, Report: true}
		for n := range peers {
			e.Put = append(e.Put, conf.Peer{
				AgentID: fmt.Sprintf("agent-<%d>", n), AgentIP: netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), Epoch: uint64(n),
				Subnets: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{9, byte(n >> 8), byte(n), 0}), 24)},
			})
		}
		want, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		got := encodeLine(e)
		if diff := cmp.Diff(string(want)+"\n", string(got)); diff != "" {
			t.Errorf("%d peers (-json +line):\n%s", peers, diff)
		}
		if len(got) > 4096 && cap(got) > len(got)+len(got)/8+8192 {
			t.Errorf("%d peers: a line of %d bytes takes %d", peers, len(got), cap(got))
		}
	}
}

// TestPeers: a peer made and encoded by hand is the one that the lease and encoding/json
// make, also when there is a field more.
func TestPeers(t *testing.T) {
	n := newNetwork(conf.Network{
		VTEPSubnet: netip.MustParsePrefix("44.128.0.0/16"), VTEPSubnet6: netip.MustParsePrefix("fd01:a::/64"), VTEPMACOUI: "70:B3:D5:00:00:00",
		Overlays: []conf.Overlay{
			{Name: "both", Subnet: netip.MustParsePrefix("9.0.0.0/8"), Prefix: 24, Subnet6: netip.MustParsePrefix("fd01:b::/64"), Prefix6: 80},
			{Name: "four", Subnet: netip.MustParsePrefix("10.0.0.0/8"), Prefix: 24},
			{Name: "none", Subnet: netip.MustParsePrefix("11.0.0.0/8"), Prefix: 24},
		},
	}, 3)
	four := *n
	four.VTEPSubnet6 = netip.Prefix{}
	four.Overlays = n.Overlays[1:]
	sixOnly := *n
	sixOnly.VTEPSubnet = netip.Prefix{}
	block := func(four, six string) (b conf.Block) {
		if four != "" {
			b.Subnet = netip.MustParsePrefix(four)
		}
		if six != "" {
			b.Subnet6 = netip.MustParsePrefix(six)
		}
		return b
	}
	both := held{Overlay: "both", Subnet: netip.MustParsePrefix("9.0.1.0/24"), Subnet6: netip.MustParsePrefix("fd01:b:0:0:1::/80"),
		Blocks: []conf.Block{block("9.0.2.0/24", "fd01:b:0:0:2::/80"), block("", "fd01:b:0:0:3::/80")}}
	only6 := held{Overlay: "four", Subnet6: both.Subnet6, Blocks: []conf.Block{block("10.0.2.0/24", ""), block("", "fd01:b:0:0:3::/80")}}
	whole := record{IP: netip.MustParseAddr("10.0.0.1"), VTEP: netip.MustParseAddr("44.128.0.1"), VTEP6: netip.MustParseAddr("fd01:a::1"),
		Subnets: []held{both, only6}, Underlay: conf.Underlay{Direct: true, MTU: 1450}}
	six := record{IP: netip.MustParseAddr("fd00::7"), VTEP: netip.MustParseAddr("44.128.0.2"), Subnets: []held{{Overlay: "four", Subnet: netip.MustParsePrefix("10.0.7.0/24")}, {Overlay: "gone"}}}
	// It had its IPv6 VTEP address before there was an IPv4 one, or has that alone.
	later := record{IP: whole.IP, VTEP: whole.VTEP, VTEP6: whole.VTEP6, MAC6: true, Subnets: []held{both}}
	alone := record{IP: six.IP, VTEP6: whole.VTEP6, MAC6: true, Subnets: []held{both}}
	c := &Coordinator{}
	c.epochBase.Store(1000)
	for _, a := range []*agent{{id: "a-1.b", mod: 7, record: whole}, {id: "<b>&\"", record: six}, {id: "ä", record: record{IP: netip.MustParseAddr("fe80::1%eth<0"), VTEP: whole.VTEP}}, {record: record{VTEP: whole.VTEP}},
		{id: "later", mod: 8, record: later}, {id: "alone", mod: 9, record: alone}} {
		for _, n := range []*network{n, &four, &sixOnly} {
			want := c.leaseOf(n, a, nil).Peer()
			got := peerOf(n, a, 1000)
			if diff := cmp.Diff(fmt.Sprintf("%+v", want), fmt.Sprintf("%+v", got)); diff != "" {
				t.Errorf("peer (-lease +made):\n%s", diff)
			}
			if diff := cmp.Diff(string(encode(want)), string(appendPeer(nil, got))); diff != "" {
				t.Errorf("peer (-json +appended):\n%s", diff)
			}
		}
	}
	filled := conf.Peer{}
	fill(reflect.ValueOf(&filled).Elem())
	if diff := cmp.Diff(string(encode(filled)), string(appendPeer(nil, filled))); diff != "" {
		t.Errorf("every field (-json +appended):\n%s", diff)
	}
}

// fill gives every field a value that is not left out.
func fill(v reflect.Value) {
	switch x := v.Addr().Interface().(type) {
	case *netip.Addr:
		*x = netip.MustParseAddr("fd00::1")
		return
	case *netip.Prefix:
		*x = netip.MustParsePrefix("9.1.0.0/16")
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fallthrough
	case reflect.Array:
		for i := range v.Len() {
			fill(v.Index(i))
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(5)
	case reflect.Uint8, reflect.Uint64:
		v.SetUint(200)
	default:
		panic(v.Type())
	}
}

// BenchmarkPeer is what a peer takes, and what the lease and encoding/json would.
func BenchmarkPeer(b *testing.B) {
	n := newNetwork(conf.Network{VTEPSubnet: netip.MustParsePrefix("44.0.0.0/8"), VTEPMACOUI: "70:B3:D5:00:00:00",
		Overlays: []conf.Overlay{{Name: "v4", Subnet: netip.MustParsePrefix("9.0.0.0/8"), Prefix: 24}}}, 1)
	a := &agent{id: "agent-12345", mod: 7, record: record{
		IP: netip.MustParseAddr("10.1.2.3"), VTEP: netip.MustParseAddr("44.1.2.3"), Subnets: []held{{Overlay: "v4", Subnet: netip.MustParsePrefix("9.1.2.0/24")}}}}
	c := &Coordinator{}
	b.Run("by hand", func(b *testing.B) {
		b.ReportAllocs()
		var line []byte
		for b.Loop() {
			line = appendPeer(line[:0], peerOf(n, a, 0))
		}
	})
	b.Run("by lease and json", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			encode(c.leaseOf(n, a, nil).Peer())
		}
	})
}
