package attach

import (
	"context"
	"net/netip"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/conntrack"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/ipam"
)

// undoTimeout bounds what a failed ADD takes back, whose own time may be over.
const undoTimeout = 10 * time.Second

// attaching is one ADD, checked.
type attaching struct {
	program
	place
	call *cni.Call
	att  conf.Attachment
	host string // name of the host end
	mtu  int
	mac  conf.MAC // zero: derived from the address
	// request is what to ask the address store for.
	request ipam.Request
	undo    undoStack
}

// add attaches a container: everything is checked before anything is touched,
// and what was done is taken back, last first, if a later step fails.
func (p program) add(ctx context.Context, c *cni.Call) (*types100.Result, func(), error) {
	a, err := p.prepare(c)
	if err != nil {
		return nil, nil, err
	}
	prev, err := cni.PrevResult(c)
	if err != nil {
		return nil, nil, err
	}
	// Held until the program ends: the result may yet have to be taken back.
	if _, err := lock(ctx, c.Conf.RunDirectory(), a.att.Key()); err != nil {
		return nil, nil, kernelError(err)
	}
	defer a.takeBackOnPanic()
	result, err := a.run(ctx, prev)
	if err != nil {
		a.takeBack()
		return nil, nil, err
	}
	return result, a.takeBack, nil
}

// takeBackOnPanic is deferred: a defect of ours is reported by the frame, and
// must not leave anything behind either.
func (a *attaching) takeBackOnPanic() {
	if r := recover(); r != nil {
		a.takeBack()
		panic(r)
	}
}

// prepare checks all input and what the agent published.
func (p program) prepare(c *cni.Call) (*attaching, error) {
	rebuildFromLinks(c)
	where, err := p.place(c.Conf)
	if err != nil {
		return nil, err
	}
	c.BootID = where.state.BootID
	a := &attaching{program: p, place: where, call: c, att: c.Attachment()}
	a.host = mark.HostEnd(p.half, a.att.Key())
	if a.mtu, err = a.chooseMTU(); err != nil {
		return nil, err
	}
	if a.mac, err = requestedMAC(c); err != nil {
		return nil, err
	}
	if a.request, err = cni.AddressRequest(c, p.half, a.overlay); err != nil {
		return nil, err
	}
	return a, nil
}

// chooseMTU is the configured MTU, or that of the overlay. A larger one would
// lose packets between hosts, and a smaller one than the family's least does
// not carry it.
func (a *attaching) chooseMTU() (int, error) {
	mtu := a.call.Conf.MTU
	if mtu == 0 {
		return a.state.MTU, nil
	}
	least := 68
	for _, r := range a.ranges {
		if r.Addr().Is6() {
			least = 1280
		}
	}
	if mtu < least || mtu > a.state.MTU {
		return 0, cni.Errorf(types.ErrInvalidNetworkConfig, "mtu %d: must be from %d to %d on this host, or left out", mtu, least, a.state.MTU)
	}
	return mtu, nil
}

// requestedMAC is the MAC asked for by capability or, failing that, by
// CNI_ARGS.
func requestedMAC(c *cni.Call) (conf.MAC, error) {
	text := c.Conf.RuntimeConfig.MAC
	if text == "" {
		text = c.Args.MAC
	}
	if text == "" {
		return conf.MAC{}, nil
	}
	mac, err := conf.ParseMAC(text)
	if err != nil {
		return conf.MAC{}, cni.Errorf(types.ErrInvalidNetworkConfig, "%v", err)
	}
	if mac[0]&1 != 0 || mac == (conf.MAC{}) {
		return conf.MAC{}, cni.Errorf(types.ErrInvalidNetworkConfig, "MAC address %s: is not a unicast address", mac)
	}
	return mac, nil
}

// run does the work. What it did is on the undo stack, whatever it returns.
func (a *attaching) run(ctx context.Context, prev *types100.Result) (*types100.Result, error) {
	s, err := openSandbox(a.call.NetNS)
	if err != nil {
		return nil, kernelError(err)
	}
	// Closed by the end of the program, so that an undo can use it.
	bridge, err := a.findBridge(s.host)
	if err != nil {
		return nil, err
	}
	if err := s.vacant(a.host, a.att.IfName); err != nil {
		return nil, kernelError(err)
	}
	crash("checked")
	addressing, err := a.address(ctx)
	if err != nil {
		return nil, err
	}
	crash("reserved")

	key := a.att.Key()
	alias := mark.NewAlias(a.overlay.Info.Name, a.half, a.att, addressing.plain(), conf.Boottime())
	pair := pair{
		host: a.host, hostMAC: mark.HostEndMAC(key), alias: alias.String(),
		bridge: a.bridge, bridgeIdx: bridge.Index, hairpin: a.call.Conf.Hairpin(),
		name: a.att.IfName, mac: a.mac, netns: s.netns.FD, mtu: a.mtu,
	}
	if a.call.Conf.Unpublished() {
		pair.group = mark.FastPathGroup
	}
	if pair.mac == (conf.MAC{}) {
		pair.mac = mark.ContainerMAC(addressing.addrs)
	}
	addressing.routes, err = s.connect(ctx, pair, addressing.addrs, a.wantedRoutes(addressing), &a.undo)
	if err != nil {
		return nil, kernelError(err)
	}
	crash("attached")
	result := buildResult(prev, pair, a.call.NetNS, addressing)
	return result, a.mapPorts(ctx, result)
}

// takeBack undoes an ADD.
func (a *attaching) takeBack() {
	if err := a.undo.run(); err != nil {
		a.warn(a.call, "take back a failed ADD: %v; DEL will try again", err)
	}
}

// addressing is what a container gets.
type addressing struct {
	addrs    []netip.Prefix
	gateways []netip.Addr // of addrs; zero: none
	routes   []route
	dns      types.DNS
}

func (a addressing) plain() (out []netip.Addr) {
	for _, p := range a.addrs {
		out = append(out, p.Addr())
	}
	return out
}

// address reserves the addresses, in process or through the configured plugin.
func (a *attaching) address(ctx context.Context) (addressing, error) {
	if delegates(a.call.Conf) {
		return a.addressByPlugin(ctx)
	}
	store, err := cni.OpenStore(ctx, a.call, a.state.CoolingSeconds)
	if err != nil {
		return addressing{}, err
	}
	got, err := store.Allocate(ctx, a.request)
	// Others need not wait for what follows: a large connection table takes longer
	// to read than they would.
	store.Close()
	if err != nil {
		return addressing{}, cni.StoreError(err)
	}
	// An address that the attachment had before belongs to an ADD that was
	// killed, or whose result got lost; DEL releases it.
	if !got.Existing {
		a.undo.push(a.release)
	}
	if err := conntrack.Forget(got.Flush); err != nil {
		return addressing{}, kernelError(err)
	}
	var out addressing
	for i, ip := range got.Addrs {
		gateway := conf.Gateway(a.ranges[i])
		out.addrs = append(out.addrs, netip.PrefixFrom(ip, a.ranges[i].Bits()))
		out.gateways = append(out.gateways, gateway)
		out.routes = append(out.routes, defaultVia(gateway))
	}
	return out, nil
}

// release gives the addresses of a failed ADD back.
func (a *attaching) release() error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	_, err := cni.Release(ctx, a.call)
	return err
}

func defaultVia(gateway netip.Addr) route {
	all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if gateway.Is6() {
		all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return route{dst: all, gw: gateway}
}

// wantedRoutes adds to each default route what to do in a container that has
// one already, because it is attached to several networks: then this interface
// leads to its own overlay only.
func (a *attaching) wantedRoutes(in addressing) (out []wantedRoute) {
	for _, r := range in.routes {
		w := wantedRoute{route: r}
		whole := a.overlay.Info.Subnet
		if r.dst.Addr().Is6() {
			whole = a.overlay.Info.Subnet6
		}
		if r.dst.Bits() == 0 && whole.IsValid() {
			w.instead = &wantedRoute{route: route{dst: whole, gw: r.gw}, optional: true}
		}
		out = append(out, w)
	}
	return out
}
