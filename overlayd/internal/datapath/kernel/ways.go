package kernel

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// askWays asks the kernel by which route packets to peers go, those of the host
// and those of containers: rules of others (ip rule) can send them elsewhere
// whatever the main table says.
func (r *reader) askWays() error {
	vtep, ok := r.Links[conf.VTEPName]
	if !ok || vtep.Kind != "vxlan" || !vtep.Up() {
		return nil
	}
	for _, family := range r.families() {
		others, err := r.conn.Rules(family)
		if err != nil {
			return err
		}
		if others == 0 {
			continue // the main table, which was read, says everything
		}
		for _, dst := range r.samples() {
			if dst.Addr().Is4() != (family == unix.AF_INET) {
				continue
			}
			if err := r.askWay(dst, vtep.Index); err != nil {
				return err
			}
		}
	}
	return nil
}

// askWay asks for one peer's subnet, of the host and of a container.
func (r *reader) askWay(dst netip.Prefix, vtep int) error {
	to := conf.FirstContainer(dst)
	packets := []rtnl.Packet{{Dst: to}}
	commands := []string{"ip route get " + to.String()}
	for _, b := range r.want.Bridges {
		l, ok := r.Links[b.Name]
		if !ok || b.Overlay != r.want.OverlayOf(dst) || !l.Up() {
			continue
		}
		for _, a := range b.Addrs {
			if a.Addr().Is6() == to.Is6() {
				from := conf.FirstContainer(a.Masked())
				packets = append(packets, rtnl.Packet{Dst: to, Src: from, IIF: l.Index})
				commands = append(commands, fmt.Sprintf("ip route get %s from %s iif %s", to, from, b.Name))
			}
		}
	}
	for i, p := range packets {
		way, ok, err := r.conn.Lookup(p)
		if err != nil {
			return err
		}
		if ok && (r.isOurs(way, vtep) || way.Table == unix.RT_TABLE_MAIN) {
			continue // ours, or one that the plan has seen in the main table
		}
		d := plan.Diverted{Dst: dst, Way: "are refused", Command: commands[i]}
		if ok {
			d.Way = fmt.Sprintf("take route %s of table %d", text(way, r.names), way.Table)
		}
		r.Diverted = append(r.Diverted, d)
		return nil
	}
	return nil
}

// isOurs reports whether a route leads to a VXLAN device of ours. One with several
// next hops has no device, nor has a second device that is not there an index.
func (r *reader) isOurs(way rtnl.Route, vtep int) bool {
	second := r.Links[mark.SecondVTEP].Index
	return !way.Multipath && (way.OIF == vtep || second != 0 && way.OIF == second)
}

// maxSamples is of how many peers' subnets the kernel is asked where it sends
// packets.
const maxSamples = 256

// samples are some of the peers' subnets that have a route of ours, spread over
// all of them and always the same.
func (r *reader) samples() (out []netip.Prefix) {
	routes := r.Routes
	if r.Compare != nil {
		routes = r.Compare.Want.Routes
	}
	var all []netip.Prefix
	for dst, route := range routes {
		if route.Kind == plan.ToPeer || route.Kind == plan.Plain && r.want.OverlayOf(dst) != "" {
			all = append(all, dst)
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	for i := 0; i < len(all); i += max(1, len(all)/maxSamples) {
		out = append(out, all[i])
	}
	return out
}
