// Package attach is the whole of m-overlay and d-overlay: it attaches a
// container to one half of an overlay on this host, detaches it, and checks
// both.
//
//	container's namespace          our namespace
//	 eth0 ----------------------- vm0123456789ab --- m-dcos (bridge, gateway)
//	 9.0.1.2/25                     alias: whose         |
//	 default via 9.0.1.1                              routing, vtep1024
//
// A plugin owns one veth pair and what is inside the container; bridges,
// gateways, forwarding and masquerade belong to the agent. It needs nothing but
// what the agent last published and the kernel: no daemon, no network.
package attach

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/ipam/rebuild"
)

// Main runs the CNI program of one half and exits.
func Main(half conf.Half) { cni.Main(New(half)) }

// New returns the CNI program of one half: m-overlay or d-overlay.
func New(half conf.Half) cni.Plugin {
	p := program{half: half, name: string(half[0]) + "-overlay"}
	return cni.Plugin{
		Name: p.name, Interface: true,
		Add: p.add, Del: p.del, Check: p.check, GC: p.gc, Status: p.status,
	}
}

type program struct {
	name string
	half conf.Half
}

// ownIPAM is the IPAM plugin whose work is done in process.
const ownIPAM = "overlay-ipam"

// delegates reports whether the configuration names an IPAM plugin of others.
func delegates(n conf.NetConf) bool { return n.IPAM.Type != "" && n.IPAM.Type != ownIPAM }

// place is where containers of a configuration are attached on this host.
type place struct {
	state   conf.State
	overlay conf.AgentOverlay
	bridge  string
	ranges  []netip.Prefix // of the half; conf.AgentOverlay.Ranges
}

// place reads the published state. Its error says what the agent has not done
// yet, or no longer does.
func (p program) place(n conf.NetConf) (place, error) {
	state, err := cni.LoadState(n)
	if err != nil {
		return place{}, err
	}
	overlay, bridge, err := cni.Overlay(state, n.OverlayName(), p.half)
	if err != nil {
		return place{}, err
	}
	if s := overlay.State; s != nil && s.Status != conf.StatusOK {
		return place{}, cni.Errorf(types.ErrTryAgainLater, "overlay %s is not ready on this host: %s", overlay.Info.Name, why(*s))
	}
	return place{state: state, overlay: overlay, bridge: bridge.Name, ranges: overlay.Ranges(p.half)}, nil
}

func why(s conf.OverlayStatus) string {
	if s.Error != "" {
		return s.Error
	}
	return "the agent is still setting it up"
}

// findBridge looks the half's bridge up in the kernel.
func (p place) findBridge(c *rtnl.Conn) (rtnl.Interface, error) {
	bridge, ok, err := c.Find(p.bridge)
	switch {
	case err != nil:
		return bridge, kernelError(err)
	case !ok:
		return bridge, cni.Errorf(types.ErrTryAgainLater, "bridge %s is missing on this host; the agent makes it again if it runs", p.bridge)
	case !bridge.Up:
		return bridge, cni.Errorf(types.ErrTryAgainLater, "bridge %s is down on this host; the agent brings it up if it runs", p.bridge)
	}
	return bridge, nil
}

// rebuildFromLinks tells the address store what the kernel knows.
func rebuildFromLinks(c *cni.Call) {
	c.Rebuild = func(context.Context) (ipam.Known, error) {
		return rebuild.Known(c.Conf.RunDirectory(), c.Conf.OverlayName())
	}
}

// noPort says what the kernel's "exchange full" means.
func noPort() string {
	return fmt.Sprintf("a Linux bridge has at most %d ports; remove containers or start them on another host", conf.BridgePorts)
}

// kernelError is the CNI error of a refusal by the kernel; the text names the
// step.
func kernelError(err error) error {
	if err == nil || errors.As(err, new(*types.Error)) {
		return err
	}
	switch {
	case errors.Is(err, errExists):
		return cni.Errorf(cni.ErrCodeExists, "%v", err)
	case errors.Is(err, unix.EXFULL):
		return cni.Errorf(types.ErrTryAgainLater, "%v: %s", err, noPort())
	case errors.Is(err, errLocked), errors.Is(err, context.DeadlineExceeded):
		return cni.Errorf(types.ErrTryAgainLater, "%v", err)
	}
	return cni.Errorf(cni.ErrCodeKernel, "%v", err)
}

// warn tells the runtime's log about something that is not an error.
func (p program) warn(c *cni.Call, format string, args ...any) {
	fmt.Fprintf(c.Stderr, p.name+": "+format+"\n", args...)
}
