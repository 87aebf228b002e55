package attach

import (
	"context"
	"hash/fnv"
	"net/netip"
	"slices"
	"strconv"
	"strings"
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
	routes  []cni.Route // of the configuration; nil: the default route
	dns     types.DNS   // of the configuration
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
	if err := checkDelegate(c); err != nil {
		return nil, err
	}
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
	return a, a.readResultKeys()
}

// readResultKeys reads what the configuration says about routes and DNS. What
// stands in ipam for a plugin of others is that plugin's business.
func (a *attaching) readResultKeys() (err error) {
	n := a.call.Conf
	if delegates(n) {
		n.IPAM.Routes, n.IPAM.ResolvConf = nil, ""
	}
	if a.dns, err = cni.DNS(n); err != nil {
		return err
	}
	if a.routes, err = cni.Routes(n); err != nil {
		return err
	}
	for _, r := range a.routes {
		if !slices.ContainsFunc(a.ranges, func(p netip.Prefix) bool { return p.Addr().Is4() == r.Dst.Addr().Is4() }) {
			return cni.Errorf(types.ErrInvalidNetworkConfig, "configuration: ipam.routes: overlay %s has no address of the family of %s on this host", a.overlay.Info.Name, r.Dst)
		}
	}
	return nil
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
	for _, host := range a.hostEnds() {
		if err := s.vacant(host, a.att.IfName); err != nil {
			return nil, kernelError(err)
		}
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
	// Qdiscs would not see what the fast path takes, and find ours in their way.
	if a.call.Conf.Unpublished() && !a.call.Conf.Shaped() {
		pair.group, pair.filtered = mark.FastPathGroup, a.state.Datapath.MayFilter()
	}
	if pair.mac == (conf.MAC{}) {
		pair.mac = mark.ContainerMAC(addressing.addrs)
	}
	if a.call.Conf.ChecksSources() && a.overlay.Info.ChecksSources() {
		if err := a.protect(pair, &alias, addressing.plain()); err != nil {
			return nil, kernelError(err)
		}
		pair.alias = alias.String()
	}
	crash("protected")
	addressing.routes, err = s.connect(ctx, pair, addressing.addrs, a.wantedRoutes(addressing), &a.undo)
	if err != nil {
		return nil, kernelError(err)
	}
	crash("attached")
	result := buildResult(prev, pair, a.call.NetNS, a.dns, addressing)
	return result, a.mapPorts(ctx, result)
}

// hostEnds are the names that a host end with the attachment's address may have: in
// a shared pool the same attachment has the same address, whichever program asks.
func (a *attaching) hostEnds() []string {
	names := []string{a.host}
	for _, half := range conf.Halves {
		if half != a.half && a.overlay.Info.Shared() {
			names = append(names, mark.HostEnd(half, a.att.Key()))
		}
	}
	return names
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
	got, overlay, err := cni.Allocate(ctx, a.call, a.state, a.overlay, a.request)
	if err != nil {
		return addressing{}, err
	}
	a.overlay, a.ranges = overlay, overlay.Ranges(a.half)
	// An address that the attachment had before belongs to an ADD that was
	// killed, or whose result got lost; DEL releases it.
	if !got.Existing {
		a.undo.push(a.release)
	}
	if err := conntrack.Forget(got.Flush); err != nil {
		return addressing{}, kernelError(err)
	}
	var out addressing
	for _, ip := range got.Addrs {
		in := cni.RangeOf(a.ranges, ip)
		out.addrs = append(out.addrs, netip.PrefixFrom(ip, in.Bits()))
		out.gateways = append(out.gateways, conf.Gateway(in))
	}
	for _, r := range a.routes {
		out.routes = append(out.routes, route{dst: r.Dst, gw: r.GW})
	}
	out.completeRoutes()
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

// wantedRoutes adds to each default route what leads to the interface's own
// overlay in a container that is attached to several networks. The default route
// is that of the interface with the lowest rank, whichever was attached first: the
// others have theirs with a higher metric, for when the first is gone, and a route
// to their own overlay (ADR 0020).
func (a *attaching) wantedRoutes(in addressing) (out []wantedRoute) {
	rank := interfaceRank(a.att.IfName)
	for _, r := range in.routes {
		if r.dst.Bits() != 0 {
			out = append(out, wantedRoute{route: r})
			continue
		}
		whole := a.overlay.Info.Subnet
		if r.dst.Addr().Is6() {
			whole = a.overlay.Info.Subnet6
		}
		r.metric = rankMetric(rank, r.dst.Addr())
		own := wantedRoute{route: route{dst: whole, gw: r.gw, metric: r.metric}, optional: true}
		switch {
		case !whole.IsValid():
			out = append(out, wantedRoute{route: r})
		case rank == 0:
			out = append(out, wantedRoute{route: r, instead: &own})
		default:
			out = append(out, own, wantedRoute{route: r, optional: true})
		}
	}
	return out
}

// interfaceRank orders the interfaces of a container: eth0, eth1, ..., then
// those of other names, in an order of their own that never changes.
func interfaceRank(name string) uint32 {
	const numbered = 1000
	if digits, ok := strings.CutPrefix(name, "eth"); ok {
		if n, err := strconv.ParseUint(digits, 10, 32); err == nil && n < numbered {
			return uint32(n)
		}
	}
	h := fnv.New32a()
	h.Write([]byte(name))
	return numbered + h.Sum32()%(1<<20)
}

// rankMetric is the metric of a route of that rank. The kernel's default, for the
// first, is 0 in IPv4 and 1024 in IPv6.
func rankMetric(rank uint32, family netip.Addr) uint32 {
	const kernelsIPv6 = 1024
	if rank > 0 && family.Is6() {
		return kernelsIPv6 + rank
	}
	return rank
}
