package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"time"
)

// checkAgentIP says why an address cannot be the underlay address of a host.
func checkAgentIP(ip netip.Addr) error {
	switch {
	case !ip.IsValid():
		return errors.New("missing")
	case ip.Is4In6() || ip.Zone() != "":
		return fmt.Errorf("%s: no zone and no IPv4-mapped form, please", ip)
	case ip.IsLoopback(), ip.IsUnspecified(), ip.IsMulticast(), ip.Is6() && ip.IsLinkLocalUnicast():
		return fmt.Errorf("%s: other hosts cannot send to it; give an address of this host that they can reach (--agent-ip)", ip)
	}
	return nil
}

// agentIP is the source address this host uses towards the first coordinator
// that has an address. A coordinator on this very host tells nothing about the
// underlay; then the source address of the default route counts.
func agentIP(ctx context.Context, urls []string) (netip.Addr, error) {
	var errs []error
	here := false // a coordinator is on this host
	for _, u := range urls {
		parsed, err := url.Parse(u)
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
			src, err := source(ctx, ip.Unmap())
			if err == nil {
				return src, nil
			}
			errs = append(errs, err)
			here = here || ip.Unmap().IsLoopback()
		}
	}
	// Only then: while names cannot be resolved, the default route of a host
	// with two networks would name the wrong one.
	if here {
		// Documentation addresses. They are routed like anything far away, and
		// nothing is sent.
		for _, far := range []string{"192.0.2.1", "2001:db8::1"} {
			if src, err := source(ctx, netip.MustParseAddr(far)); err == nil {
				return src, nil
			}
		}
	}
	return netip.Addr{}, fmt.Errorf("agent IP: no usable source address towards the coordinator; give one with --agent-ip: %w", errors.Join(errs...))
}

// lookup leaves time for the names of other coordinators.
func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
}

// source is the address the kernel would send from. Connecting a UDP socket
// asks for the route and sends nothing.
func source(ctx context.Context, to netip.Addr) (netip.Addr, error) {
	c, err := new(net.Dialer).DialContext(ctx, "udp", netip.AddrPortFrom(to, discardPort).String())
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	src := c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap().WithZone("")
	return src, checkAgentIP(src)
}

// onHost reports whether an interface of this host has the address. While the
// coordinator does not answer, the way to it, and with it the source address,
// may be a detour; the other hosts go on sending to the address they know.
func onHost(ip netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr() == ip {
			return true
		}
	}
	return false
}

// discardPort is the discard port. Any would do.
const discardPort = 9
