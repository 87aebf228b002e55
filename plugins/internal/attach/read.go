package attach

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// isHostEnd reports whether a link is the host end of that name and not a
// stranger's. One without an alias could not be given one and is being undone.
func isHostEnd(l rtnl.Link, name string) bool {
	if l.Kind != "veth" || l.Name != name {
		return false
	}
	_, ok := mark.IsHostEnd(name, l.Alias)
	return ok || l.Alias == ""
}

// addresses reads the addresses of one interface.
func addresses(c *rtnl.Conn, index int) (out []netip.Prefix, err error) {
	all, err := c.Addresses(index)
	for _, a := range all {
		out = append(out, a.Prefix)
	}
	return out, err
}

// routes reads the routes of a namespace that lead somewhere, from all tables:
// a plugin such as sbr moves them to one of its own.
func routes(c *rtnl.Conn) (out []route, err error) {
	for _, family := range [...]uint8{unix.AF_INET, unix.AF_INET6} {
		of, err := rtnl.List(c, rtnl.RoutesRequest(family, 0), rtnl.ParseRoute)
		if err != nil {
			return nil, err
		}
		for _, r := range of {
			if r.Kind == unix.RTN_UNICAST {
				out = append(out, route{dst: r.Dst, gw: r.Via})
			}
		}
	}
	return out, nil
}
