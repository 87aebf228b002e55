package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// Addresses are the result's ips and routes: every address with the mask and gateway
// of the range that it is from, and the given routes. A family without any has a
// default route.
func Addresses(ranges []netip.Prefix, addrs []netip.Addr, given []Route) (ips []*types100.IPConfig, routes []*types.Route) {
	for _, addr := range addrs {
		p := RangeOf(ranges, addr)
		bits := p.Addr().BitLen()
		gateway := net.IP(conf.Gateway(p).AsSlice())
		ips = append(ips, &types100.IPConfig{
			Address: net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(p.Bits(), bits)},
			Gateway: gateway,
		})
		routed := false
		for _, r := range given {
			if r.Dst.Addr().BitLen() != bits {
				continue
			}
			routed = true
			via := gateway
			if r.GW.IsValid() {
				via = r.GW.AsSlice()
			}
			routes = append(routes, &types.Route{Dst: net.IPNet{IP: r.Dst.Addr().AsSlice(), Mask: net.CIDRMask(r.Dst.Bits(), bits)}, GW: via})
		}
		if !routed {
			routes = append(routes, &types.Route{Dst: net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}, GW: gateway})
		}
	}
	return ips, routes
}

// RangeOf is the range that an address is from.
func RangeOf(ranges []netip.Prefix, a netip.Addr) netip.Prefix {
	for _, p := range ranges {
		if p.Contains(a) {
			return p
		}
	}
	return netip.PrefixFrom(a, a.BitLen()) // none; the store gives no such address
}

// ForVersion is the result without what came to the specification later than the
// version: MTU, socket path and PCI device of an interface, and everything but
// destination and gateway of a route, are of 1.1.0. The library leaves them in.
func ForVersion(r *types100.Result, version string) *types100.Result {
	if !olderThan(version, "1.1.0") {
		return r
	}
	out := *r
	out.Interfaces = slices.Clone(r.Interfaces)
	for i, in := range out.Interfaces {
		if in != nil {
			out.Interfaces[i] = &types100.Interface{Name: in.Name, Mac: in.Mac, Sandbox: in.Sandbox}
		}
	}
	out.Routes = slices.Clone(r.Routes)
	for i, route := range out.Routes {
		if route != nil {
			out.Routes[i] = &types.Route{Dst: route.Dst, GW: route.GW}
		}
	}
	return &out
}

// PrevResult is the configuration's prevResult, whatever its version; nil if
// there is none.
func PrevResult(c *Call) (*types100.Result, error) {
	raw := c.Conf.PrevResult
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	if _, err := create.DecodeVersion(raw); err != nil {
		return nil, Errorf(types.ErrDecodingFailure, "configuration: prevResult: %w", err)
	}
	r, err := ParseResult(raw, c.Conf.CNIVersion)
	if err != nil {
		return nil, Errorf(types.ErrInvalidNetworkConfig, "configuration: prevResult: %w", err)
	}
	return r, nil
}

// ParseResult reads a result of any version. Many plugins leave the version
// out; then it is the configuration's. What it returns has no holes: no list
// has a null in it, every address and every destination is one.
func ParseResult(b []byte, version string) (*types100.Result, error) {
	var said map[string]any
	if err := json.Unmarshal(b, &said); err != nil {
		return nil, err
	}
	if v, _ := said["cniVersion"].(string); v != "" {
		version = v
	} else {
		if version == "" {
			version = defaultVersion
		}
		if said == nil { // "null"
			said = map[string]any{}
		}
		said["cniVersion"] = version
		b, _ = json.Marshal(said) // it was read from JSON
	}
	// The conversion between versions would meet the nulls.
	var lists struct{ Interfaces, IPs, Routes []*struct{} }
	if err := json.Unmarshal(b, &lists); err != nil {
		return nil, err
	}
	if slices.Contains(lists.Interfaces, nil) || slices.Contains(lists.IPs, nil) || slices.Contains(lists.Routes, nil) {
		return nil, errors.New("null in a list")
	}
	parsed, err := create.Create(version, b)
	if err != nil {
		return nil, err
	}
	r, err := types100.NewResultFromResult(parsed)
	if err != nil {
		return nil, err
	}
	for i, ip := range r.IPs {
		if !isNetwork(ip.Address) {
			return nil, fmt.Errorf("address %d is none", i+1)
		}
	}
	for i, route := range r.Routes {
		if !isNetwork(route.Dst) {
			return nil, fmt.Errorf("route %d leads nowhere", i+1)
		}
	}
	return r, nil
}

func isNetwork(n net.IPNet) bool {
	a, ok := netip.AddrFromSlice(n.IP)
	_, size := n.Mask.Size()
	return ok && size == a.Unmap().BitLen()
}

// CheckAddresses is CHECK of the store: the attachment has addresses in this
// half, and they are in prevResult.
func CheckAddresses(ctx context.Context, c *Call, half conf.Half) error {
	prev, err := PrevResult(c)
	if err != nil {
		return err
	}
	if prev == nil {
		return Errorf(types.ErrInvalidNetworkConfig, "configuration: prevResult: missing; CHECK compares with it")
	}
	var rec ipam.Record
	found := false
	if StoreExists(c) {
		s, err := OpenStore(ctx, c, 0)
		if err != nil {
			return err
		}
		defer s.Close()
		if rec, found, err = s.Get(ctx, c.Attachment()); err != nil {
			return StoreError(err)
		}
	}
	if !found || rec.Half != half {
		return Errorf(ErrCodeMissing, "%s has no address in the %s half of overlay %s", c.Attachment(), half, c.Conf.OverlayName())
	}
	for _, a := range rec.Addrs {
		if !slices.ContainsFunc(prev.IPs, func(ip *types100.IPConfig) bool {
			b, ok := netip.AddrFromSlice(ip.Address.IP)
			return ok && b.Unmap() == a
		}) {
			return Errorf(ErrCodeMissing, "%s has address %s, which prevResult does not list", c.Attachment(), a)
		}
	}
	return nil
}
