package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/rtnl"
)

// agentIP is the address other hosts reach this host at: the source address of
// the route to the first coordinator that has an address. Of a coordinator on
// this very host it is the address in the URL, by which the other hosts reach
// it; where that is a loopback address, the default route counts.
//
// It is never an address of our own devices, and none that is about to go: see
// underlay. current is the agent IP so far; it stays where the route only
// suggests a worse one.
func agentIP(ctx context.Context, urls []string, current netip.Addr) (netip.Addr, error) {
	u, err := readUnderlay()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("agent IP: %w", err)
	}
	defer u.close()
	var errs []error
	here := false // a coordinator is on this host
	for _, s := range urls {
		parsed, err := url.Parse(s)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		ips, err := lookup(ctx, parsed.Hostname())
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, ip := range ips {
			ip = ip.Unmap()
			if a, found := u.find(ip.WithZone("")); found && u.usable(a) && !u.links[a.link].loopback {
				if u.has(current) {
					return current, nil
				}
				return a.ip, nil
			}
			src, err := u.source(ip, current)
			if err == nil {
				return src, nil
			}
			errs = append(errs, err)
			here = here || ip.IsLoopback() || u.has(ip.WithZone(""))
		}
	}
	// Only then: while names cannot be resolved, the default route of a host
	// with two networks would name the wrong one.
	if here {
		for _, far := range farAway { // nothing is sent
			src, err := u.source(far, current)
			if err == nil {
				return src, nil
			}
			errs = append(errs, err)
		}
	}
	return netip.Addr{}, fmt.Errorf("agent IP: no usable source address towards the coordinator; give one with --agent-ip: %w", errors.Join(errs...))
}

// lookup leaves time for the names of other coordinators.
func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{ip}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
}

// source is the address to send from towards an address: the one the kernel
// would take, or a better one of the same interface.
func (u *underlay) source(to, current netip.Addr) (netip.Addr, error) {
	route, ok, err := u.path(to)
	if err != nil {
		return netip.Addr{}, err
	}
	if !ok {
		return netip.Addr{}, fmt.Errorf("no route leads to %s", to)
	}
	fail := func(why string) (netip.Addr, error) {
		return netip.Addr{}, fmt.Errorf("route to %s through %s: %s", to, u.links[route.OIF].name, why)
	}
	if u.links[route.OIF].loopback {
		return fail("it is this host")
	}
	chosen, found := u.find(route.PrefSrc)
	best, other := u.best(route.OIF, route.PrefSrc)
	lasting := found && u.usable(chosen) && !chosen.temporary
	switch l := u.links[chosen.link]; {
	// The address of another interface is somebody's choice only where the
	// kernel could have taken one of this.
	case lasting && (chosen.link == route.OIF || l.loopback || !l.container && other):
		return chosen.ip, nil
	case u.has(current):
		return current, nil // the other hosts send to it, and still can
	case other:
		return best.ip, nil
	case found && u.usable(chosen) && !l.container:
		return chosen.ip, nil // of another interface, or temporary: better than none
	}
	return fail(u.why(route))
}

// best is the first lasting address of an interface in the family of like, one
// in its network before others.
func (u *underlay) best(link int, like netip.Addr) (best hostAddr, ok bool) {
	for _, a := range u.addrs {
		if a.link != link || a.ip.Is4() != like.Is4() || a.temporary || !u.usable(a) {
			continue
		}
		if near := netip.PrefixFrom(a.ip, a.bits).Contains(like); !ok || near {
			best, ok = a, true
			if near {
				break
			}
		}
	}
	return best, ok
}

// farAway are documentation addresses. They are routed like anything far away.
var farAway = [...]netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}

// second is an address of the other family than the agent IP, for hosts that have
// none of that one: the one given, if the host has it; the one so far; a lasting one
// of the agent IP's interface; or the one that the default route leaves from.
func (u *underlay) second(ip, given, current netip.Addr) netip.Addr {
	fits := func(a netip.Addr) bool {
		found, ok := u.find(a)
		return ok && a.Is4() != ip.Is4() && u.usable(found) && !found.temporary && !u.links[found.link].loopback
	}
	if given.IsValid() {
		if !fits(given) {
			return netip.Addr{}
		}
		return given
	}
	if fits(current) {
		return current
	}
	far := farAway[0]
	if ip.Is4() {
		far = farAway[1]
	}
	if at, ok := u.find(ip); ok && !u.links[at.link].loopback {
		if best, ok := u.best(at.link, far); ok {
			return best.ip
		}
	}
	if src, err := u.source(far, netip.Addr{}); err == nil && fits(src) {
		return src
	}
	return netip.Addr{}
}

// usable reports whether other hosts may be told the address: it is not ours,
// not on its way out, and not still being probed for duplicates.
func (u *underlay) usable(a hostAddr) bool {
	return !a.fading && !u.links[a.link].ours && conf.CheckAgentIP(a.ip) == nil && u.checkIP(a.ip) == nil
}

// checkIP says why an address is that of no host in a network of this host's, as its
// interfaces say how long those are.
func (u *underlay) checkIP(ip netip.Addr) error {
	for _, a := range u.addrs {
		if err := conf.CheckInNetwork(ip, netip.PrefixFrom(a.ip, a.bits)); err != nil && !u.links[a.link].ours {
			return fmt.Errorf("%w (interface %s)", err, u.links[a.link].name)
		}
	}
	return nil
}

// checkGivenIP is checkIP of the address that the operator gave. A kernel that cannot
// be asked is said elsewhere.
func checkGivenIP(ip netip.Addr) error {
	u, err := readUnderlay()
	if err != nil {
		return nil
	}
	defer u.close()
	return u.checkIP(ip)
}

// why says what is wrong with the addresses there are.
func (u *underlay) why(r rtnl.Route) string {
	chosen, _ := u.find(r.PrefSrc)
	l := u.links[chosen.link]
	switch {
	case l.ours:
		return fmt.Sprintf("its source address would be %s of %s, which is the overlay's own; the interface has no address that can be used", r.PrefSrc, l.name)
	case chosen.link != r.OIF:
		return fmt.Sprintf("its source address would be %s of %s; the interface has no address that can be used", r.PrefSrc, l.name)
	case chosen.fading:
		return fmt.Sprintf("%s is deprecated or not yet usable, and there is no other", r.PrefSrc)
	}
	if err := cmp.Or(conf.CheckAgentIP(r.PrefSrc), u.checkIP(r.PrefSrc)); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%s cannot be used", r.PrefSrc)
}

// onHost reports whether an interface of this host that is not ours has the
// address. While the coordinator does not answer, the way to it, and with it the
// source address, may be a detour; the other hosts go on sending to the address
// they have.
func onHost(ip netip.Addr) bool {
	u, err := readUnderlay()
	if err != nil {
		return false
	}
	defer u.close()
	return u.has(ip)
}
