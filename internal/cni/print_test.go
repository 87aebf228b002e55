package cni

import (
	"bytes"
	"math/rand/v2"
	"net"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
)

// network reads "9.0.1.5/25" as it stands, host bits included.
func network(t *testing.T, cidr string) net.IPNet {
	t.Helper()
	ip, n, err := net.ParseCIDR(cidr)
	if err != nil {
		t.Fatal(err)
	}
	if v4 := ip.To4(); v4 != nil {
		ip = v4
	}
	return net.IPNet{IP: ip, Mask: n.Mask}
}

// A result like our own is printed without encoding/json, and nobody can tell.
func TestResultText(t *testing.T) {
	full := &types100.Result{
		Interfaces: []*types100.Interface{
			{Name: "vm0123456789ab", Mac: "0e:00:00:00:00:01", Mtu: 1450},
			{Name: "eth0", Mac: "0a:58:09:00:01:05", Mtu: 1450, Sandbox: "/run/netns/x"},
		},
		IPs: []*types100.IPConfig{
			{Interface: types100.Int(1), Address: network(t, "9.0.1.5/25"), Gateway: net.IPv4(9, 0, 1, 1).To4()},
			{Interface: types100.Int(0), Address: network(t, "fd01:b::5/81"), Gateway: net.ParseIP("fd01:b::1")},
			{Address: network(t, "9.0.1.6/25")},
		},
		Routes: []*types.Route{
			{Dst: network(t, "0.0.0.0/0"), GW: net.IPv4(9, 0, 1, 1).To4()},
			{Dst: network(t, "::/0"), GW: net.ParseIP("fd01:b::1")},
			{Dst: network(t, "9.0.0.0/8")},
		},
	}
	one := &types100.Result{IPs: full.IPs[:1]}
	for name, r := range map[string]*types100.Result{"full": full, "one address": one, "IPv6": {IPs: full.IPs[1:2], Routes: full.Routes[1:2]}} {
		for _, v := range supportedVersions {
			converted, err := r.GetAsVersion(v)
			if err != nil {
				t.Fatal(err)
			}
			var want bytes.Buffer
			if err := printJSON(&want, converted); err != nil {
				t.Fatal(err)
			}
			got, ok := resultText(converted)
			if diff := cmp.Diff(want.String(), string(got)); diff != "" || !ok {
				t.Errorf("%s, %s: ok %v, encoding/json -, ours +\n%s", name, v, ok, diff)
			}
		}
	}
}

// What has more in it than our own results is printed the same or left to
// encoding/json.
func TestResultTextOdd(t *testing.T) {
	const rounds = 20000
	rnd := rand.New(rand.NewPCG(1, 2))
	pick := func(all ...string) string { return all[rnd.IntN(len(all))] }
	number := func() int { return []int{0, 1, 1450, -1, 1 << 40}[rnd.IntN(5)] }
	text := func() string { return pick("", "a", "a<b", `a"b`, `a\b`, "a&b", "ä", "a\n", "\x7f", "\xff", "{", "[") }
	ip := func() net.IP {
		return net.IP(pick("", "\x09\x00\x00\x01", string(net.ParseIP("fd01::1")), string(net.ParseIP("9.0.0.1")), "xyz"))
	}
	ipNet := func() net.IPNet {
		if rnd.IntN(8) == 0 {
			return net.IPNet{IP: ip(), Mask: net.IPMask(ip())}
		}
		return network(t, pick("9.0.1.5/25", "fd01::5/64", "0.0.0.0/0"))
	}
	rare := func(f func()) {
		if rnd.IntN(6) == 0 {
			f()
		}
	}
	same := 0
	for range rounds {
		r := &types100.Result{}
		rare(func() { r.DNS = types.DNS{Domain: text(), Search: []string{text()}[:rnd.IntN(2)]} })
		for range rnd.IntN(3) {
			i := &types100.Interface{Name: "eth0"}
			rare(func() { *i = types100.Interface{Name: text(), Mac: text(), Mtu: number(), Sandbox: text()} })
			rare(func() { i.SocketPath, i.PciID = text(), text() })
			r.Interfaces = append(r.Interfaces, i)
		}
		for range rnd.IntN(4) {
			c := &types100.IPConfig{Address: ipNet()}
			rare(func() { c.Gateway = ip() })
			rare(func() { c.Interface = types100.Int(number()) })
			r.IPs = append(r.IPs, c)
		}
		for range rnd.IntN(3) {
			route := &types.Route{Dst: ipNet(), GW: ip()}
			rare(func() { *route = types.Route{Dst: ipNet(), MTU: number(), AdvMSS: number(), Priority: number()} })
			rare(func() { route.Table = types100.Int(number()) })
			rare(func() { route.Scope = types100.Int(number()) })
			r.Routes = append(r.Routes, route)
		}
		converted, err := r.GetAsVersion(pick(supportedVersions[:]...))
		if err != nil {
			continue // 0.2.0 wants an address
		}
		got, ok := resultText(converted)
		if !ok {
			continue
		}
		var want bytes.Buffer
		if err := printJSON(&want, converted); err != nil {
			t.Fatalf("%+v: encoding/json: %v; we print\n%s", converted, err, got)
		}
		if diff := cmp.Diff(want.String(), string(got)); diff != "" {
			t.Fatalf("encoding/json -, ours +\n%s", diff)
		}
		same++
	}
	if same < rounds/10 {
		t.Errorf("only %d of %d results were printed by us", same, rounds)
	}
}
