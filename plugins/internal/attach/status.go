package attach

import (
	"context"

	"github.com/containernetworking/cni/pkg/types"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/rtnl"
)

// status says whether ADD would work: 50 where it would not, 51 where what runs
// is in danger too.
func (p program) status(ctx context.Context, c *cni.Call) error {
	rebuildFromLinks(c)
	if err := checkDelegate(c); err != nil {
		return err
	}
	if err := cni.Status(ctx, c, p.half, true); err != nil {
		return err
	}
	where, err := p.place(c.Conf)
	if err != nil {
		return cni.StatusError(err)
	}
	conn, err := rtnl.Open()
	if err != nil {
		return cni.StatusError(kernelError(err))
	}
	defer conn.Close()
	bridge, err := where.findBridge(conn)
	if err != nil {
		return cni.Errorf(types.ErrLimitedConnectivity, "%v", err)
	}
	if err := where.hasPort(conn, bridge.Index); err != nil {
		return cni.StatusError(err)
	}
	if vtep, ok, err := conn.Find(conf.VTEPName); err != nil {
		return cni.StatusError(kernelError(err))
	} else if !ok || !vtep.Up {
		return cni.Errorf(types.ErrLimitedConnectivity, "%s is missing or down: other hosts cannot be reached; the agent repairs it if it runs", conf.VTEPName)
	}
	if delegates(c.Conf) {
		return delegateVerb(ctx, c)
	}
	return nil
}

// hasPort says that the bridge has no port left for a container. Not all of its
// ports need be of ours: only the kernel knows them. A half that runs out of
// addresses first is not asked about.
func (p place) hasPort(c *rtnl.Conn, bridge int) error {
	addresses := map[int]uint64{}
	for _, r := range p.ranges {
		addresses[r.Addr().BitLen()] += min(conf.Containers(r), conf.BridgePorts)
	}
	for _, n := range addresses {
		if n < conf.BridgePorts {
			return nil
		}
	}
	ports, err := c.Ports(bridge)
	if err != nil {
		return kernelError(err)
	}
	if len(ports) >= conf.BridgePorts {
		return cni.Errorf(types.ErrTryAgainLater, "overlay %s: bridge %s has %d ports: %s", p.overlay.Info.Name, p.bridge, len(ports), noPort())
	}
	return nil
}
