package attach

import (
	"net"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// buildResult says what the container has now. In a chain it adds to what the
// plugins before it said. The first who says something about DNS counts: the
// configuration, an earlier plugin of the chain, the IPAM plugin.
func buildResult(prev *types100.Result, p pair, netns string, configured types.DNS, in addressing) *types100.Result {
	out := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, DNS: configured}
	if prev != nil {
		out.Interfaces = slices.Clone(prev.Interfaces)
		out.IPs = slices.Clone(prev.IPs)
		out.Routes = slices.Clone(prev.Routes)
		if out.DNS.IsEmpty() {
			out.DNS = prev.DNS
		}
	}
	if out.DNS.IsEmpty() {
		out.DNS = in.dns
	}
	out.Interfaces = append(out.Interfaces,
		&types100.Interface{Name: p.host, Mac: p.hostMAC.String(), Mtu: p.mtu},
		&types100.Interface{Name: p.name, Mac: p.mac.String(), Mtu: p.mtu, Sandbox: netns})
	inside := len(out.Interfaces) - 1
	for i, a := range in.addrs {
		ip := &types100.IPConfig{Interface: types100.Int(inside), Address: *ipNet(a)}
		if g := in.gateways[i]; g.IsValid() {
			ip.Gateway = g.AsSlice()
		}
		out.IPs = append(out.IPs, ip)
	}
	for _, r := range in.routes {
		route := &types.Route{Dst: *ipNet(r.dst), Priority: int(r.metric)}
		if r.gw.IsValid() {
			route.GW = r.gw.AsSlice()
		}
		out.Routes = append(out.Routes, route)
	}
	return out
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefixOf is the reverse of ipNet; ok is false for what is no network.
func prefixOf(n net.IPNet) (p netip.Prefix, ok bool) {
	a, ok := netip.AddrFromSlice(n.IP)
	bits, size := n.Mask.Size()
	if a = a.Unmap(); !ok || size != a.BitLen() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, bits), true
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
