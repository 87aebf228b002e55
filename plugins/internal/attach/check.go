package attach

import (
	"context"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/published"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/netns"
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
	if err := checkDelegate(c); err != nil {
		return err
	}
	if delegates(c.Conf) {
		if err := delegateVerb(ctx, c); err != nil {
			return err
		}
	} else if err := cni.CheckAddresses(ctx, c, p.half); err != nil {
		return err
	}
	s, err := openSandbox(c.NetNS)
	if err != nil {
		return kernelError(err)
	}
	defer s.close()
	alias, err := p.checkHost(c, s)
	if err != nil {
		return err
	}
	if err := p.checkContainer(c, s, prev, alias); err != nil {
		return err
	}
	return checkPorts(ctx, c, prev)
}

func missing(format string, args ...any) error {
	return cni.Errorf(cni.ErrCodeMissing, format, args...)
}

// checkHost checks the host end: there, up and a forwarding port of the bridge. It
// returns what the host end says about the attachment.
func (p program) checkHost(c *cni.Call, s *sandbox) (alias mark.Alias, err error) {
	bridgeName := p.bridgeName(c.Conf)
	bridge, ok, err := s.host.Find(bridgeName)
	if err != nil {
		return alias, kernelError(err)
	}
	if !ok || !bridge.Up {
		return alias, cni.Errorf(types.ErrTryAgainLater, "bridge %s is missing or down on this host; the agent repairs it if it runs", bridgeName)
	}
	name := mark.HostEnd(p.half, c.Attachment().Key())
	l, ok, err := s.host.LinkByName(name)
	switch {
	case err != nil:
		return alias, kernelError(err)
	case !ok || !isHostEnd(l, name):
		return alias, missing("interface %s of the container is missing on the host", name)
	case l.Master != bridge.Index:
		return alias, missing("interface %s is not a port of bridge %s", name, bridgeName)
	case !l.Up():
		return alias, missing("interface %s is down on the host", name)
	}
	alias, _ = mark.ParseAlias(l.Alias)
	return alias, nil
}

// bridgeName is the half's bridge, as far as the published state says which: a lease
// that has run out does not make what is attached wrong.
func (p program) bridgeName(n conf.NetConf) string {
	state, _ := published.Load(n.RunDirectory())
	if o, ok := state.Overlay(n.OverlayName()); ok {
		return o.Info.BridgeName(p.half)
	}
	return p.half.Bridge(n.OverlayName())
}

// checkContainer checks the container's end against prevResult.
func (p program) checkContainer(c *cni.Call, s *sandbox, prev *types100.Result, alias mark.Alias) error {
	index, err := ownInterface(c, prev)
	if err != nil {
		return err
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
	families, err := checkAddresses(c, s, l.Index, index, prev, alias)
	if err != nil {
		return err
	}
	return p.checkRoutes(s, prev, families)
}

// ownInterface finds the container's interface in prevResult: of that name and in
// this very namespace, by whatever path. Every index in prevResult must lead to an
// interface.
func ownInterface(c *cni.Call, prev *types100.Result) (index int, err error) {
	index = slices.IndexFunc(prev.Interfaces, func(i *types100.Interface) bool {
		return i.Name == c.IfName && i.Sandbox != "" && netns.Same(i.Sandbox, c.NetNS)
	})
	if index < 0 {
		return 0, missing("prevResult lists no interface %s in the network namespace %s", c.IfName, c.NetNS)
	}
	for _, ip := range prev.IPs {
		if i := ip.Interface; i != nil && (*i < 0 || *i >= len(prev.Interfaces)) {
			return 0, missing("prevResult gives address %s to interface %d, and lists %d interfaces", ip.Address.String(), *i, len(prev.Interfaces))
		}
	}
	return index, nil
}

// checkAddresses: what prevResult gives to the interface is in the kernel, and what
// ADD has given to the attachment is in prevResult. It returns the families.
func checkAddresses(c *cni.Call, s *sandbox, link, index int, prev *types100.Result, alias mark.Alias) (map[int]bool, error) {
	have, err := addresses(s.inside, link)
	if err != nil {
		return nil, kernelError(err)
	}
	families := map[int]bool{}
	var listed []netip.Addr
	for _, ip := range prev.IPs {
		if ip.Interface != nil && *ip.Interface != index {
			continue
		}
		a, ok := prefixOf(ip.Address)
		if !ok || !slices.Contains(have, a) {
			return nil, missing("interface %s does not have address %s", c.IfName, ip.Address.String())
		}
		families[a.Addr().BitLen()] = true
		listed = append(listed, a.Addr())
	}
	for _, a := range alias.Addrs {
		if !slices.Contains(listed, a) {
			return nil, missing("prevResult does not give interface %s its address %s", c.IfName, a)
		}
	}
	return families, nil
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
