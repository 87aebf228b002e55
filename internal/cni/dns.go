package cni

import (
	"encoding/json"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"overlayd.internal/overlay/conf"
)

// DNS is what the result of ADD says about name servers: the dns of the network
// configuration, else what the file ipam.resolvConf says. Nothing of it is changed
// in the container: that is the runtime's work.
func DNS(n conf.NetConf) (types.DNS, error) {
	if !n.DNS.IsEmpty() {
		return types.DNS{Nameservers: n.DNS.Nameservers, Domain: n.DNS.Domain, Search: n.DNS.Search, Options: n.DNS.Options}, nil
	}
	if n.IPAM.ResolvConf == "" {
		return types.DNS{}, nil
	}
	b, err := conf.ReadFile(n.IPAM.ResolvConf)
	if err != nil {
		return types.DNS{}, Errorf(types.ErrInvalidNetworkConfig, "configuration: ipam.resolvConf: %w", err)
	}
	return parseResolvConf(string(b)), nil
}

// parseResolvConf reads a resolv.conf as resolv.conf(5) describes it: the last
// domain and search count, what is not known is skipped.
func parseResolvConf(text string) (d types.DNS) {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "#") || strings.HasPrefix(line, ";") {
			continue
		}
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			d.Nameservers = append(d.Nameservers, f[1])
		case "domain":
			d.Domain = f[1]
		case "search":
			d.Search = f[1:]
		case "options":
			d.Options = append(d.Options, f[1:]...)
		}
	}
	return d
}

// Route is one of the configuration's routes. GW is zero where the half's gateway
// is meant.
type Route struct {
	Dst netip.Prefix
	GW  netip.Addr
}

// Routes are the routes of ipam.routes, which a container gets instead of the
// default route; nil where the configuration has none. The error has a CNI code.
func Routes(n conf.NetConf) ([]Route, error) {
	if len(n.IPAM.Routes) == 0 || string(n.IPAM.Routes) == "null" {
		return nil, nil
	}
	var texts []struct{ Dst, GW string }
	if err := json.Unmarshal(n.IPAM.Routes, &texts); err != nil {
		return nil, Errorf(types.ErrInvalidNetworkConfig, `configuration: ipam.routes: want a list of {"dst": "9.0.0.0/8", "gw": "9.0.1.1"}: %w`, err)
	}
	var out []Route
	for i, t := range texts {
		var r Route
		var err error
		if r.Dst, err = netip.ParsePrefix(t.Dst); err == nil && t.GW != "" {
			r.GW, err = netip.ParseAddr(t.GW)
		}
		switch {
		case err != nil:
			return nil, Errorf(types.ErrInvalidNetworkConfig, "configuration: ipam.routes[%d]: %w", i, err)
		case r.Dst.Addr().Is4In6() || r.GW.Is4In6() || r.GW.Zone() != "":
			return nil, Errorf(types.ErrInvalidNetworkConfig, "configuration: ipam.routes[%d]: no zone and no IPv4-mapped form, please", i)
		case r.GW.IsValid() && r.GW.Is4() != r.Dst.Addr().Is4():
			return nil, Errorf(types.ErrInvalidNetworkConfig, "configuration: ipam.routes[%d]: %s and %s are of two families", i, r.Dst, r.GW)
		}
		r.Dst = r.Dst.Masked()
		out = append(out, r)
	}
	return out, nil
}
