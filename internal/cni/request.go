package cni

import (
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// Attachment is the key of the call's address.
func (c *Call) Attachment() conf.Attachment {
	return conf.Attachment{Network: c.Conf.Name, ContainerID: c.ContainerID, IfName: c.IfName}
}

// AddressRequest is what to ask the store for: an address of every family the
// half has, by name where the runtime gave one.
func AddressRequest(c *Call, half conf.Half, o conf.AgentOverlay) (ipam.Request, error) {
	ranges := o.Ranges(half)
	if ranges == nil {
		return ipam.Request{}, Errorf(ErrCodeNoOverlay, "overlay %s has no bridge for the %s half on this host", o.Info.Name, half)
	}
	want, err := wantedAddrs(c)
	if err != nil {
		return ipam.Request{}, Errorf(types.ErrInvalidNetworkConfig, "requested address: %w", err)
	}
	return ipam.Request{Attachment: c.Attachment(), Half: o.Info.Pool(half), By: half, Ranges: ranges, Want: want, Origin: c.Origin}, nil
}

// wantedAddrs collects the four ways to ask for an address. Runtimes use more
// than one at a time for the same address.
func wantedAddrs(c *Call) ([]netip.Addr, error) {
	texts := slices.Concat(c.Conf.RuntimeConfig.IPs, c.Conf.Args.CNI.IPs)
	if len(c.Conf.Args.CNI.IPs) == 0 { // CNI's conventions: it outranks CNI_ARGS
		texts = append(texts, c.Args.IP...)
	}
	if info := c.Conf.Args.Mesos.NetworkInfo; info != nil {
		for _, a := range info.IPAddresses {
			if a.IPAddress != "" { // else only a protocol was asked for
				texts = append(texts, a.IPAddress)
			}
		}
	}
	all, err := conf.ParseAddrs(texts)
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range all {
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out, nil
}
