package attach

import (
	"net/netip"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/rtnl"
)

// FuzzDelegateResult: whatever an IPAM plugin of others prints, what is taken
// over is usable: one address of each family, in the half, with valid routes.
func FuzzDelegateResult(f *testing.F) {
	for _, s := range []string{
		`{}`, `null`, `5`, `[]`, `{`,
		`{"cniVersion":"1.0.0","ips":[{"address":"9.0.1.5/25","gateway":"9.0.1.1"}],"routes":[{"dst":"0.0.0.0/0"}],"dns":{"nameservers":["9.9.9.9"]}}`,
		`{"cniVersion":"0.4.0","ips":[{"version":"4","address":"9.0.1.5/25"},{"version":"6","address":"fd01::5/81"}],"routes":[{"dst":"10.0.0.0/8","gw":"9.0.1.9"}]}`,
		`{"cniVersion":"0.2.0","ip4":{"ip":"9.0.1.5/25","routes":[{"dst":"0.0.0.0/0","gw":"9.0.1.1"}]},"ip6":{"ip":"fd01::5/81"}}`,
		`{"ip4":{"ip":"9.0.1.5/25"}}`, `{"ip4":{}}`, `{"ip4":{"routes":[{}]}}`,
		`{"cniVersion":"1.0.0","ips":[null],"routes":[null]}`, `{"cniVersion":"1.0.0","ips":[{"address":"9.0.1.5/25"}],"routes":[null]}`,
		`{"cniVersion":"1.0.0","ips":[{"address":"9.0.1.1/25"}]}`, `{"cniVersion":"1.0.0","ips":[{"address":"9.0.1.127/25"}]}`, `{"cniVersion":"1.0.0","ips":[{"address":"192.0.2.1/24"}]}`,
		`{"cniVersion":"1.0.0","ips":[{"address":"9.0.1.5/25"},{"address":"9.0.1.6/25"}]}`, `{"cniVersion":"1.0.0","ips":[{}]}`, `{"cniVersion":"0.3.1","ips":[null]}`,
	} {
		f.Add([]byte(s), "1.0.0")
		f.Add([]byte(s), "")
	}
	ranges := []netip.Prefix{netip.MustParsePrefix("9.0.1.0/25"), netip.MustParsePrefix("fd01::/81")}
	f.Fuzz(func(t *testing.T, b []byte, version string) {
		r, err := cni.ParseResult(b, version)
		if err != nil {
			return
		}
		a := &attaching{program: program{half: conf.Mesos}, place: place{ranges: ranges}}
		got, err := a.accept(r)
		if err != nil {
			return
		}
		seen := map[int]bool{}
		for _, p := range got.addrs {
			if seen[p.Addr().BitLen()] || !p.IsValid() || !ranges[0].Contains(p.Addr()) && !ranges[1].Contains(p.Addr()) {
				t.Errorf("%s: took over %v", b, got.addrs)
			}
			seen[p.Addr().BitLen()] = true
		}
		if len(got.addrs) == 0 || len(got.gateways) != len(got.addrs) {
			t.Errorf("%s: addresses %v, gateways %v", b, got.addrs, got.gateways)
		}
		for _, r := range got.routes {
			if !r.dst.IsValid() {
				t.Errorf("%s: route %+v", b, r)
			}
			addRoute(new(rtnl.Batch), 1, r)
		}
	})
}
