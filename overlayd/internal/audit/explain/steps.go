package explain

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/internal/veth"
	"overlayd.internal/overlay/overlayd/internal/audit/echo"
)

// patience is how long an answer to a probe is waited for.
const patience = 1500 * time.Millisecond

// source looks at where the packet comes from.
func (w *walk) source() bool {
	step := "container " + w.a.name
	switch {
	case w.a.record != nil:
		return w.container(step, w.a)
	case w.ownAddress(w.a.addr):
		return w.pass("source", "%s is no container: what this host sends is looked at", w.a.name)
	case w.a.overlay != nil:
		return w.nobody(step, w.a, "nobody has the address on this host, and no other host has a lease of its subnet")
	}
	return w.stop("source", "%s is in no overlay, and no address of this host: what it sends is not seen here", w.a.addr)
}

// container looks at the container of this host that has an address.
func (w *walk) container(step string, e end) bool {
	r := e.record
	if e.overlay == nil { // it was taken from under the container
		return w.stop(step, "container %s has %s, which is in no overlay of this host any more; overlayctl overlays lists those of the cluster; delete the container",
			r.ContainerID, e.addr)
	}
	bridge := e.overlay.Info.BridgeName(r.Half)
	linked := slices.ContainsFunc(w.books.Links, func(l veth.Link) bool { return l.Key() == mark.KeyOf(r.Attachment) })
	if !linked && !r.IsDocker() && r.NetNS.Path == "" {
		return w.stop(step, "container %s has %s, and its interface on this host is gone; delete the container", r.ContainerID, e.addr)
	}
	return w.sound(step, []string{"bridge-port"}, r.ContainerID) &&
		w.sound(step, []string{"bridge", "mac-policy", "rp-filter"}, bridge) &&
		w.pass(step, "%s is a container of this host, on bridge %s", e.addr, bridge)
}

func (w *walk) isolation() bool {
	if w.a.record == nil {
		return true
	}
	return w.admitted()
}

// admitted looks whether the overlay of b lets in what comes from that of a.
func (w *walk) admitted() bool {
	a, b := w.a.overlay, w.b.overlay
	if a == nil || b == nil || a.Info.Name == b.Info.Name {
		return true
	}
	open := a.Info.Isolation.Mode() == conf.IsolationNone && b.Info.Isolation.Mode() == conf.IsolationNone
	if !open && !slices.Contains(b.Info.Allow, a.Info.Name) {
		return w.stop("isolation", "overlay %s does not let in what comes from overlay %s; name it in allow of %s, or set isolation: none for both",
			b.Info.Name, a.Info.Name, b.Info.Name)
	}
	return w.pass("isolation", "overlay %s lets in what comes from overlay %s", b.Info.Name, a.Info.Name)
}

func (w *walk) forwarding() bool {
	a, b := w.a.record, w.b.record
	oneBridge := a != nil && b != nil && w.a.overlay != nil && w.b.overlay != nil &&
		w.a.overlay.Info.Name == w.b.overlay.Info.Name && w.a.overlay.Info.Pool(a.Half) == w.a.overlay.Info.Pool(b.Half)
	if oneBridge || a == nil {
		return true
	}
	devices := []string{w.a.overlay.Info.BridgeName(a.Half)}
	switch { // where answers come from
	case b != nil && w.b.overlay != nil:
		devices = append(devices, w.b.overlay.Info.BridgeName(b.Half))
	case w.b.peer != nil:
		devices = append(devices, w.comesBy(w.b.peer))
	}
	return w.sound("forwarding", []string{"forwarding"}, devices...) &&
		w.sound("firewall", []string{"forward-policy", "firewalld"}) &&
		w.pass("forwarding", "this host forwards, and its firewall asks the overlay's rules first")
}

// destination looks at where the packet goes to.
func (w *walk) destination() bool {
	step := "container " + w.b.name
	switch {
	case w.b.record != nil:
		dst := netip.PrefixFrom(w.b.addr, w.b.addr.BitLen()).String()
		return w.container(step, w.b) && w.sound("firewall", []string{"docker-options"}, dst) &&
			w.answers(step, w.b.addr, netip.Addr{}, "it does not answer this host; look inside of it")
	case w.b.peer != nil:
		return w.remote(step)
	case w.b.overlay != nil && !w.ownAddress(w.b.addr):
		return w.nobody("lease", w.b, "%s belongs to overlay %s; no container of this host has it, and no other host has a lease of its subnet",
			w.b.addr, w.b.overlay.Info.Name)
	}
	return w.outside()
}

// ownAddress reports whether this host itself has an address, such as a gateway.
func (w *walk) ownAddress(a netip.Addr) bool {
	local, err := w.conn.IsLocal(a)
	return err == nil && local
}

// answers sends a probe.
func (w *walk) answers(step string, to, from netip.Addr, otherwise string) bool {
	for range 2 { // the first may meet a neighbour that is being looked for
		round, err := echo.Send(w.ctx, patience, []echo.Request{{To: to, From: from}})
		if err != nil {
			return w.stop(step, "no probe could be sent: %v; run this as root", err)
		}
		if round[0] != echo.Silence {
			return w.pass(step, "%s answers after %s", to, round[0].Round(time.Microsecond))
		}
	}
	w.result.Silent = true
	return w.stop(step, "%s: %s", to, otherwise)
}

// remote walks to a container of another host.
func (w *walk) remote(step string) bool {
	host := w.b.peer.AgentIP.String()
	w.pass("lease", "%s is in a subnet of host %s, VTEP %s", w.b.addr, host, w.vtepOf(w.b.peer))
	if !w.toHost() {
		return false
	}
	if w.b.overlay != nil && w.b.overlay.Info.Isolation.Mode() == conf.IsolationStrict {
		return w.pass(step, "not probed: overlay %s is strict, its containers answer each other only", w.b.overlay.Info.Name)
	}
	return w.answers(step, w.b.addr, w.sourceFor(w.b.addr),
		fmt.Sprintf("host %s is reached and the container does not answer: is it there? On host %s: overlayctl containers, overlayctl doctor", host, host))
}

// toHost walks to the host that has b.
func (w *walk) toHost() bool {
	p := w.b.peer
	host := p.AgentIP.String()
	device, ok := w.tunnel(p)
	if !ok {
		return w.stop("underlay", "agent IP %s here and %s there are of two families, and VXLAN is sent by one; start one of the agents with an --agent-ip of each family, or both with one of the same", w.books.State.IP, host)
	}
	if !w.books.State.VTEPOf(p).IsValid() {
		return w.stop("VTEP", "this host and host %s have no VTEP addresses of one family; overlayctl status", host)
	}
	if !w.sound("VTEP", []string{"vtep", "vxlan-conflict", "vxlan-port", "mac-policy", "rp-filter"}, device) ||
		!w.route() || !w.sound("neighbour", []string{"neighbour"}, host) {
		return false
	}
	silent := fmt.Sprintf("host %s does not answer through the VXLAN: does it run, and does UDP port %d pass between both? On it: overlayctl doctor", host, conf.VXLANPort)
	vtep := w.vtepOf(p)
	return w.answers("underlay", vtep, w.sourceFor(vtep), silent) && w.sound("underlay", []string{"path-mtu"}, host)
}

// tunnel is the VXLAN device that a peer is behind; ok is false where no family is
// common to both hosts.
func (w *walk) tunnel(p *conf.Peer) (device string, ok bool) {
	first, second := w.books.State.IP, w.books.State.SecondIP
	if second.IsValid() && !w.ownAddress(second) {
		second = netip.Addr{} // the agent does without
	}
	if !p.AgentIP.IsValid() || !first.IsValid() {
		return conf.VTEPName, true
	}
	from, _, ok := p.Reach(first, second)
	if ok && from != first {
		return mark.SecondVTEP, true
	}
	return conf.VTEPName, ok
}

// comesBy is the device by which packets of a host come through the VXLAN; nil: one that
// is not known.
func (w *walk) comesBy(p *conf.Peer) string {
	if p == nil {
		return conf.VTEPName
	}
	device, _ := w.tunnel(p)
	return device
}

// vtepOf is the VTEP address by which a peer is reached, or one that it has.
func (w *walk) vtepOf(p *conf.Peer) netip.Addr { return cmp.Or(w.books.State.VTEPOf(p), p.VTEP()) }

// isTunnel reports whether a device is a VXLAN device of ours.
func isTunnel(l rtnl.Link) bool { return l.Name == conf.VTEPName || l.Name == mark.SecondVTEP }

// sourceFor is the address of this host's VTEP, from which probes are sent; of
// IPv6 the kernel chooses it.
func (w *walk) sourceFor(to netip.Addr) netip.Addr {
	for _, o := range w.books.State.Overlays {
		if to.Is4() {
			return o.Backend.VXLAN.VTEPIP.Addr()
		}
	}
	return netip.Addr{}
}

// peerFromKernel is the host that the kernel sends to, for one that joined a
// moment ago and is not among the stored peers yet. nil: none.
func (w *walk) peerFromKernel(to netip.Addr) *conf.Peer {
	r, ok, err := w.conn.Lookup(rtnl.Packet{Dst: to})
	if err != nil || !ok {
		return nil
	}
	vtep, ok, err := w.conn.LinkByIndex(r.OIF)
	if err != nil || !ok || !isTunnel(vtep) || r.Protocol != mark.RouteProtocol || !r.Via.IsValid() {
		return nil
	}
	p := &conf.Peer{Subnets: []netip.Prefix{r.Dst}, Underlay: conf.Underlay{TwoFamilies: true}} // it is sent to
	family := uint8(unix.AF_INET)
	if r.Via.Is6() {
		family, p.VTEPIP6 = unix.AF_INET6, r.Via
	} else {
		p.VTEPIP = r.Via
	}
	for _, f := range []uint8{family, unix.AF_BRIDGE} {
		ns, err := rtnl.List(w.conn, rtnl.NeighboursRequest(f, vtep.Index), rtnl.ParseNeighbour)
		if err != nil {
			return nil
		}
		for _, n := range ns {
			switch {
			case f == family && n.IP == r.Via:
				p.VTEPMAC = n.MAC
			case f == unix.AF_BRIDGE && n.MAC == p.VTEPMAC:
				p.AgentIP = n.IP
			}
		}
	}
	return p
}

// packet is one of the container to b: the rules of the host may treat it other
// than one of the host itself.
func (w *walk) packet() rtnl.Packet {
	p := rtnl.Packet{Dst: w.b.addr}
	if w.a.record == nil {
		return p
	}
	if l, ok, err := w.conn.LinkByName(w.a.overlay.Info.BridgeName(w.a.record.Half)); err == nil && ok {
		p.Src, p.IIF = w.a.addr, l.Index
	}
	return p
}

// route asks the kernel for the way to b, which has to lead through the VTEP.
func (w *walk) route() bool {
	r, ok, err := w.conn.Lookup(w.packet())
	if err != nil {
		return w.stop("route", "the kernel does not say: %v", err)
	}
	if !ok || r.OIF == 0 {
		return w.stop("route", "there is no route to %s; overlayctl doctor says why", w.b.addr)
	}
	out, _, err := w.conn.LinkByIndex(r.OIF)
	switch {
	case err != nil:
		return w.stop("route", "the kernel does not say: %v", err)
	case r.Protocol == mark.RouteProtocol && w.b.peer != nil && r.Via == w.b.peer.AgentIP:
		return w.pass("route", "%s via %s dev %s, without VXLAN", r.Dst, r.Via, out.Name)
	case !isTunnel(out):
		return w.stop("route", "%s through %s takes the packets, a route that is not ours; ip route delete %s", r.Dst, out.Name, r.Dst)
	}
	return w.pass("route", "%s via %s dev %s", r.Dst, r.Via, out.Name)
}

// outside walks to an address that is in no overlay, or one of this host.
func (w *walk) outside() bool {
	switch {
	case w.b.addr.IsUnspecified():
		return w.stop("destination", "%s is nobody's address", w.b.addr)
	case w.b.addr.IsLoopback() && w.a.record != nil:
		return w.stop("destination", "%s is the container itself, not this host", w.b.addr)
	case w.ownAddress(w.b.addr):
		return w.pass("destination", "%s is this host", w.b.addr)
	}
	r, ok, err := w.conn.Lookup(w.packet())
	if err != nil {
		return w.stop("route", "the kernel does not say: %v", err)
	}
	if !ok {
		return w.stop("route", "this host has no route to %s", w.b.addr)
	}
	out, _, _ := w.conn.LinkByIndex(r.OIF) // for the text alone
	w.pass("route", "outside of all overlays, through %s; the outside sees the address of this host", out.Name)
	return w.answers("outside", w.b.addr, netip.Addr{}, "it does not answer this host itself, or lets no echo request pass")
}
