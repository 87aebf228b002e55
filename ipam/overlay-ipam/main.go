// Overlay-ipam is a CNI IPAM plugin on the overlay's address store. It gives a
// container of any main plugin (bridge, ptp, ...) an address of one half of an
// overlay; it makes no interface and touches no namespace.
package main

import (
	"context"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/ipam/cnimain"
)

func main() {
	cnimain.Main(cnimain.Plugin{
		Name:   "overlay-ipam",
		Add:    add,
		Del:    del,
		Check:  withHalf(cnimain.CheckAddresses),
		GC:     withHalf(cnimain.GC),
		Status: withHalf(cnimain.Status),
	})
}

// half is which half of the overlay the configuration asks for.
func half(n conf.NetConf) (conf.Half, error) {
	s := n.IPAM.Half
	if s == "" {
		s = n.Half
	}
	h, err := conf.ParseHalf(string(s))
	if err != nil {
		return "", cnimain.Errorf(types.ErrInvalidNetworkConfig, "configuration: ipam.half: %w", err)
	}
	return h, nil
}

func withHalf(f func(context.Context, *cnimain.Call, conf.Half) error) func(context.Context, *cnimain.Call) error {
	return func(ctx context.Context, c *cnimain.Call) error {
		h, err := half(c.Conf)
		if err != nil {
			return err
		}
		return f(ctx, c, h)
	}
}

func add(ctx context.Context, c *cnimain.Call) (*types100.Result, func(), error) {
	h, err := half(c.Conf)
	if err != nil {
		return nil, nil, err
	}
	state, err := cnimain.LoadState(c.Conf)
	if err != nil {
		return nil, nil, err
	}
	c.BootID = state.BootID
	o, bridge, err := cnimain.Overlay(state, c.Conf.OverlayName(), h)
	if err != nil {
		return nil, nil, err
	}
	request, err := cnimain.AddressRequest(c, h, o)
	if err != nil {
		return nil, nil, err
	}
	// The only way to find out, should DEL never come, that the container is gone.
	request.NetNS = ipam.LookUpNetNS(c.NetNS)
	store, err := cnimain.OpenStore(ctx, c, state.CoolingSeconds)
	if err != nil {
		return nil, nil, err
	}
	defer store.Close()
	got, err := store.Allocate(ctx, request)
	if err != nil {
		return nil, nil, cnimain.StoreError(err)
	}
	undo := func() {
		if !got.Existing {
			_, _ = cnimain.Release(ctx, c) // it cannot be reported any more; GC finds it
		}
	}
	r := &types100.Result{CNIVersion: types100.ImplementedSpecVersion}
	r.IPs, r.Routes = cnimain.Addresses(bridge, got.Addrs)
	return r, undo, nil
}

func del(ctx context.Context, c *cnimain.Call) error {
	_, err := cnimain.Release(ctx, c)
	return err
}
