// Package teardown takes everything of ours off a host, and nothing else: what
// goes is told by its marks, whoever made it and whenever.
package teardown

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/antispoof"
	"overlayd.internal/overlay/internal/fastpath"
	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/firewall/iptables"
	"overlayd.internal/overlay/internal/firewall/nftables"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// Attached lists what is attached to the overlays in this network namespace, for
// people: containers by their host ends, and other ports of our bridges.
func Attached() ([]string, error) {
	conn, err := rtnl.Open()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	links, err := conn.Links()
	if err != nil {
		return nil, err
	}
	bridges := map[int]string{}
	for _, l := range links {
		if isBridge(l) || isDockerBridge(l) {
			bridges[l.Index] = l.Name
		}
	}
	var out []string
	for _, l := range links {
		switch a, ok := mark.IsHostEnd(l.Name, l.Alias); {
		case ok:
			out = append(out, fmt.Sprintf("container %s (%s of overlay %s, link %s)", a.Attachment.ContainerID, a.Attachment.IfName, a.Overlay, l.Name))
		case bridges[l.Master] != "":
			out = append(out, fmt.Sprintf("link %s (port of %s)", l.Name, bridges[l.Master]))
		}
	}
	slices.Sort(out)
	return out, nil
}

// isBridge reports whether a link is a bridge that we made.
func isBridge(l rtnl.Link) bool {
	overlay, half, ok := mark.ParseBridgeAlias(l.Alias)
	return ok && l.Kind == "bridge" && l.Name == half.Bridge(overlay)
}

// isDockerBridge reports whether a link may be the bridge of a Docker network of
// ours, which Docker made; it goes with the network.
func isDockerBridge(l rtnl.Link) bool {
	half, ok := mark.HalfOf(l.Name)
	return ok && half == conf.Docker && l.Kind == "bridge" && l.Alias == ""
}

// isVTEP reports whether a link is a VXLAN device of ours.
func isVTEP(l rtnl.Link) bool {
	return (l.Name == conf.VTEPName || l.Name == mark.SecondVTEP) && l.Kind == "vxlan" && l.VXLAN.VNI == conf.VNI && l.VXLAN.Port == conf.VXLANPort
}

// Kernel removes links, routes, the fast path and the rules of both kinds of
// firewall, and reports how many objects there were. It goes on past failures.
func Kernel(ctx context.Context, log *slog.Logger) (removed int, err error) {
	conn, err := rtnl.Open()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	var errs []error
	step := func(what string, n int, err error) {
		removed += n
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		} else if n > 0 {
			log.Info("removed", logkey.What, what, logkey.Objects, n)
		}
	}
	n, err := fastpath.Remove()
	step("fast path", n, err)
	n, err = removeRoutes(conn)
	step("routes", n, err)
	n, err = removeLinks(conn)
	step("links", n, err)
	n, err = removeRules(ctx)
	step("firewall rules", n, err)
	n, err = new(antispoof.Table).Remove()
	if antispoof.Unsupported(err) {
		err = nil
	}
	step("checks of what containers send", n, err)
	return removed, errors.Join(errs...)
}

// removeLinks removes host ends, the VTEP and the bridges, by index.
func removeLinks(conn *rtnl.Conn) (removed int, err error) {
	links, err := conn.Links()
	if err != nil {
		return 0, err
	}
	var b rtnl.Batch
	// Bridges last: packets of ports that are being removed go nowhere else.
	for _, bridge := range []bool{false, true} {
		for _, l := range links {
			_, hostEnd := mark.IsHostEnd(l.Name, l.Alias)
			if isBridge(l) == bridge && (bridge || hostEnd || isVTEP(l)) {
				b.DeleteLink("remove link "+l.Name, l.Index)
				removed++
			}
		}
	}
	return removed, send(conn, &b, unix.ENODEV)
}

// removeRoutes removes every route with our protocol, in every table.
func removeRoutes(conn *rtnl.Conn) (removed int, err error) {
	var b rtnl.Batch
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		routes, err := rtnl.List(conn, rtnl.RoutesRequest(family, 0), rtnl.ParseRoute)
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return 0, err
		}
		for _, r := range routes {
			if r.Protocol != mark.RouteProtocol || r.Table != unix.RT_TABLE_MAIN {
				continue
			}
			b.DeleteRoute("remove route "+r.Dst.String(), r)
			removed++
		}
	}
	return removed, send(conn, &b, unix.ESRCH)
}

// send sends a batch; what is gone already is no failure.
func send(conn *rtnl.Conn, b *rtnl.Batch, gone unix.Errno) error {
	refused, err := conn.Send(b)
	errs := []error{err}
	for _, err := range refused {
		if !errors.Is(err, gone) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removeRules removes the rules of both kinds: an earlier agent may have used
// the other.
func removeRules(ctx context.Context) (removed int, err error) {
	var errs []error
	var all []firewall.Firewall
	if nftables.Usable() == nil {
		all = append(all, nftables.New(), nftables.NewGuard())
	}
	if iptables.Usable() == nil {
		ipt, err := iptables.New()
		if err == nil {
			defer ipt.Close()
			all = append(all, ipt)
		}
		errs = append(errs, err)
	}
	for _, f := range all {
		n, err := f.Remove(ctx)
		removed += n
		errs = append(errs, err)
	}
	return removed, errors.Join(errs...)
}

// Refusal is the error for a host that has containers.
func Refusal(attached []string) error {
	const most = 10
	shown := attached
	if more := len(attached) - most; more > 0 {
		shown = append(slices.Clone(attached[:most]), fmt.Sprintf("and %d more", more))
	}
	return fmt.Errorf("%d attached: %s; stop them first, or pass --force to take the network from under them", len(attached), strings.Join(shown, "; "))
}
