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
	if err := cni.Status(ctx, c, p.half); err != nil {
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
	if _, err := where.findBridge(conn); err != nil {
		return cni.Errorf(types.ErrLimitedConnectivity, "%v", err)
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
