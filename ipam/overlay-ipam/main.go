// Overlay-ipam is a CNI IPAM plugin on the overlay's address store. It gives a
// container of any main plugin (bridge, ptp, ...) an address of one half of an
// overlay; it makes no interface and touches no namespace.
package main

import (
	"context"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/netns"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/ipam/rebuild"
)

func gc(ctx context.Context, c *cni.Call, half conf.Half) error {
	_, err := cni.GC(ctx, c, half)
	return err
}

func main() {
	cni.Main(cni.Plugin{
		Name:   "overlay-ipam",
		Add:    add,
		Del:    del,
		Check:  withHalf(cni.CheckAddresses),
		GC:     withHalf(gc),
		Status: withHalf(func(ctx context.Context, c *cni.Call, h conf.Half) error { return cni.Status(ctx, c, h, false) }),
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
		return "", cni.Errorf(types.ErrInvalidNetworkConfig, "configuration: ipam.half: %w", err)
	}
	return h, nil
}

func withHalf(f func(context.Context, *cni.Call, conf.Half) error) func(context.Context, *cni.Call) error {
	return func(ctx context.Context, c *cni.Call) error {
		h, err := half(c.Conf)
		if err != nil {
			return err
		}
		return f(ctx, c, h)
	}
}

func add(ctx context.Context, c *cni.Call) (*types100.Result, func(), error) {
	h, err := half(c.Conf)
	if err != nil {
		return nil, nil, err
	}
	state, err := cni.LoadState(c.Conf)
	if err != nil {
		return nil, nil, err
	}
	c.BootID = state.BootID
	o, _, err := cni.Overlay(state, c.Conf.OverlayName(), h)
	if err != nil {
		return nil, nil, err
	}
	request, err := cni.AddressRequest(c, h, o)
	if err != nil {
		return nil, nil, err
	}
	routes, err := cni.Routes(c.Conf)
	if err != nil {
		return nil, nil, err
	}
	r := &types100.Result{CNIVersion: types100.ImplementedSpecVersion}
	if r.DNS, err = cni.DNS(c.Conf); err != nil {
		return nil, nil, err
	}
	if !cni.StoreExists(c) {
		// The programs after this one take what it makes for all there is. A damaged store
		// is refused: the links tell nothing of what this program has given out.
		c.Rebuild = func(context.Context) (ipam.Known, error) {
			return rebuild.Known(c.Conf.RunDirectory(), c.Conf.OverlayName())
		}
	}
	// The only way to find out, should DEL never come, that the container is gone.
	request.NetNS = netns.Look(c.NetNS)
	got, o, err := cni.Allocate(ctx, c, state, o, request)
	if err != nil {
		return nil, nil, err
	}
	undo := func() {
		if !got.Existing {
			_, _ = cni.Release(ctx, c) // it cannot be reported any more; GC finds it
		}
	}
	r.IPs, r.Routes = cni.Addresses(o.Ranges(h), got.Addrs, routes)
	return r, undo, nil
}

func del(ctx context.Context, c *cni.Call) error {
	_, err := cni.Release(ctx, c)
	return err
}
