package attach

import (
	"context"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/mark"
)

// check compares what ADD said, as later plugins of the chain have changed it,
// with the kernel and the address store. It changes nothing.
func (p program) check(ctx context.Context, c *cni.Call) error {
	rebuildFromLinks(c)
	prev, err := cni.PrevResult(c)
	if err != nil {
		return err
	}
	if prev == nil {
		return cni.Errorf(types.ErrInvalidNetworkConfig, "configuration: prevResult: missing; CHECK compares with it")
	}
	if delegates(c.Conf) {
		err = delegateVerb(ctx, c)
	} else {
		err = cni.CheckAddresses(ctx, c, p.half)
	}
	if err != nil {
		return err
	}
	s, err := openSandbox(c.NetNS)
	if err != nil {
		return kernelError(err)
	}
	defer s.close()
	if err := p.checkHost(c, s); err != nil {
		return err
	}
	if err := p.checkContainer(c, s, prev); err != nil {
		return err
	}
	return checkPorts(ctx, c, prev)
}

func missing(format string, args ...any) error {
	return cni.Errorf(cni.ErrCodeMissing, format, args...)
}

// checkHost checks the host end: there, up and a forwarding port of the bridge.
func (p program) checkHost(c *cni.Call, s *sandbox) error {
	bridgeName := p.half.Bridge(c.Conf.OverlayName())
	bridge, ok, err := s.host.Find(bridgeName)
	if err != nil {
		return kernelError(err)
	}
	if !ok || !bridge.Up {
		return cni.Errorf(types.ErrTryAgainLater, "bridge %s is missing or down on this host; the agent repairs it if it runs", bridgeName)
	}
	name := mark.HostEnd(p.half, c.Attachment().Key())
	l, ok, err := s.host.LinkByName(name)
	switch {
	case err != nil:
		return kernelError(err)
	case !ok || !isHostEnd(l, name):
		return missing("interface %s of the container is missing on the host", name)
	case l.Master != bridge.Index:
		return missing("interface %s is not a port of bridge %s", name, bridgeName)
	case !l.Up():
		return missing("interface %s is down on the host", name)
	}
	return nil
}

// checkContainer checks the container's end against prevResult.
func (p program) checkContainer(c *cni.Call, s *sandbox, prev *types100.Result) error {
	index := slices.IndexFunc(prev.Interfaces, func(i *types100.Interface) bool {
		return i.Name == c.IfName && i.Sandbox != ""
	})
	if index < 0 {
		return missing("prevResult lists no interface %s in a container", c.IfName)
	}
	want := prev.Interfaces[index]
	l, ok, err := s.inside.LinkByName(c.IfName)
	switch {
	case err != nil:
		return kernelError(err)
	case !ok:
		return missing("interface %s is missing in the container", c.IfName)
	case !l.Up():
		return missing("interface %s is down in the container", c.IfName)
	case l.Kind != "veth":
		return missing("interface %s in the container is a %s and not the veth that ADD made", c.IfName, l.Kind)
	}
	// A plugin later in the chain may have changed it, and says so.
	if mac, err := conf.ParseMAC(want.Mac); err == nil && mac != l.MAC {
		return missing("interface %s has MAC %s, and prevResult says %s", c.IfName, l.MAC, mac)
	}
	// Of an MTU it does not say so (tuning). A smaller one harms nobody else.
	if want.Mtu != 0 && want.Mtu < l.MTU {
		return missing("interface %s has MTU %d, and prevResult says %d", c.IfName, l.MTU, want.Mtu)
	}
	have, err := addresses(s.inside, l.Index)
	if err != nil {
		return kernelError(err)
	}
	families := map[int]bool{}
	for _, ip := range prev.IPs {
		if ip.Interface != nil && *ip.Interface != index {
			continue
		}
		a, ok := prefixOf(ip.Address)
		if !ok || !slices.Contains(have, a) {
			return missing("interface %s does not have address %s", c.IfName, ip.Address.String())
		}
		families[a.Addr().BitLen()] = true
	}
	return p.checkRoutes(s, prev, families)
}

// checkRoutes checks the routes of our families. The container may have more, and
// in any table.
func (p program) checkRoutes(s *sandbox, prev *types100.Result, families map[int]bool) error {
	have, err := routes(s.inside)
	if err != nil {
		return kernelError(err)
	}
	for _, r := range prev.Routes {
		dst, ok := prefixOf(r.Dst)
		if !ok || !families[dst.Addr().BitLen()] || r.Table != nil {
			continue
		}
		want := route{dst: dst.Masked(), gw: addrOf(r.GW)}
		if !slices.ContainsFunc(have, func(h route) bool {
			return h.dst == want.dst && (!want.gw.IsValid() || h.gw == want.gw)
		}) {
			return missing("the container has no route to %s", want)
		}
	}
	return nil
}
