package doctor

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/internal/veth"
)

const cut = "other hosts cannot be reached"

func checkVTEP(h *host) (out []Finding) {
	want, ok := h.vtep()
	if !ok {
		return nil
	}
	l, ok := h.links[conf.VTEPName]
	bad := func(evidence, fix string, safe bool) {
		out = append(out, Finding{Severity: Error, What: conf.VTEPName + " is not as it should be: " + cut, Evidence: evidence, Fix: fix, Object: conf.VTEPName, safe: safe})
	}
	if !ok {
		bad("there is no "+conf.VTEPName, restart, false)
		return out
	}
	if l.Kind != "vxlan" || l.VXLAN.VNI != conf.VNI || l.VXLAN.Port != conf.VXLANPort {
		bad(fmt.Sprintf("it is a %s with VNI %d on UDP port %d", kind(l.Kind), l.VXLAN.VNI, l.VXLAN.Port), "ip link delete "+conf.VTEPName+" && "+restart, false)
		return out
	}
	if l.VXLAN.Local != h.state.IP {
		bad(fmt.Sprintf("it sends from %s, the agent IP is %s", l.VXLAN.Local, h.state.IP), "ip link delete "+conf.VTEPName+" && "+restart, false)
	}
	if !l.Up() {
		bad("it is down", "ip link set "+conf.VTEPName+" up", true)
	}
	if l.MTU != h.state.MTU {
		bad(fmt.Sprintf("its MTU is %d, published is %d", l.MTU, h.state.MTU), fmt.Sprintf("ip link set %s mtu %d", conf.VTEPName, h.state.MTU), true)
	}
	for _, p := range []netip.Prefix{want.VTEPIP, want.VTEPIP6} {
		if p.IsValid() && !slices.Contains(h.addresses[l.Index], p) {
			bad("it does not have the address "+p.String(), "ip address add "+p.String()+" dev "+conf.VTEPName, true)
		}
	}
	return append(out, checkSecondVTEP(h)...)
}

// checkSecondVTEP looks at the device for hosts of the other underlay family.
func checkSecondVTEP(h *host) (out []Finding) {
	ip := h.secondIP()
	if !ip.IsValid() {
		return nil
	}
	bad := func(evidence, fix string, safe bool) {
		out = append(out, Finding{Severity: Error, What: mark.SecondVTEP + " is not as it should be: hosts that have no agent IP of the family of " + h.state.IP.String() + " cannot be reached",
			Evidence: evidence, Fix: fix, Object: mark.SecondVTEP, safe: safe})
	}
	l, ok := h.links[mark.SecondVTEP]
	switch {
	case !ok:
		bad("there is no "+mark.SecondVTEP, restart, false)
	case l.Kind != "vxlan" || l.VXLAN.VNI != conf.VNI || l.VXLAN.Port != conf.VXLANPort || l.VXLAN.Local != ip:
		bad(fmt.Sprintf("it is a %s with VNI %d on UDP port %d from %s, the second agent IP is %s", kind(l.Kind), l.VXLAN.VNI, l.VXLAN.Port, l.VXLAN.Local, ip),
			"ip link delete "+mark.SecondVTEP+" && "+restart, false)
	case !l.Up():
		bad("it is down", "ip link set "+mark.SecondVTEP+" up", true)
	}
	return out
}

// secondIP is the second agent IP if a link has it; invalid: there is none. Without the
// address the agent does without at once, and says so to the others; what it publishes
// is that of its lease, until it has been able to renew that.
func (h *host) secondIP() netip.Addr {
	if !h.state.SecondIP.IsValid() || !h.hasAddress(h.state.SecondIP) {
		return netip.Addr{}
	}
	return h.state.SecondIP
}

// hasAddress reports whether a link has the address.
func (h *host) hasAddress(ip netip.Addr) bool {
	for _, addrs := range h.addresses {
		if slices.ContainsFunc(addrs, func(p netip.Prefix) bool { return p.Addr() == ip }) {
			return true
		}
	}
	return false
}

func kind(k string) string {
	if k == "" {
		return "physical device"
	}
	return k
}

// checkMACs looks for devices whose MAC somebody changed, as udev does with
// MACAddressPolicy=persistent.
func checkMACs(h *host) (out []Finding) {
	look := func(name string, want conf.MAC) {
		if l, ok := h.links[name]; ok && l.MAC != want {
			out = append(out, Finding{
				Severity: Error, What: name + " has another MAC than it was made with: packets to it are lost",
				Evidence: fmt.Sprintf("%s, should be %s; udev changes it where a .link file says MACAddressPolicy=persistent", l.MAC, want),
				Fix:      fmt.Sprintf("ip link set %s address %s", name, want), Object: name, safe: true,
			})
		}
	}
	if v, ok := h.vtep(); ok {
		look(conf.VTEPName, v.VTEPMAC)
		look(mark.SecondVTEP, v.VTEPMAC)
	}
	for _, b := range h.bridges() {
		if l := h.links[b.name]; strings.HasPrefix(l.Alias, "overlay: ") { // Docker's own have its MAC
			look(b.name, mark.BridgeMACOf(l.MAC, b.gateways))
		}
	}
	return out
}

func checkOtherVXLAN(h *host) (out []Finding) {
	for name, l := range h.links {
		if l.Kind != "vxlan" || name == conf.VTEPName || name == mark.SecondVTEP {
			continue
		}
		switch {
		case l.VXLAN.VNI == conf.VNI && l.VXLAN.Port == conf.VXLANPort:
		case l.VXLAN.Port == conf.VXLANPort && l.VXLAN.VNI == 0:
		default:
			continue
		}
		out = append(out, Finding{
			Severity: Error, What: "VXLAN device " + name + " takes the packets of " + conf.VTEPName + ": " + cut,
			Evidence: fmt.Sprintf("%s has VNI %d on UDP port %d", name, l.VXLAN.VNI, l.VXLAN.Port), Fix: "ip link delete " + name,
		})
	}
	return out
}

// checkPort looks for a program that has the VXLAN port. The kernel's own socket
// is that of the VTEP.
func checkPort(h *host) (out []Finding) {
	if l, ok := h.links[conf.VTEPName]; ok && l.Up() {
		return nil // it has the port
	}
	if len(checkOtherVXLAN(h)) > 0 {
		return nil // so does that one
	}
	c, err := net.ListenUDP("udp4", &net.UDPAddr{Port: conf.VXLANPort})
	if err == nil {
		c.Close()
		return nil
	}
	if !errors.Is(err, os.ErrPermission) {
		out = append(out, Finding{
			Severity: Error, What: fmt.Sprintf("another program has UDP port %d: %s cannot be set up and %s", conf.VXLANPort, conf.VTEPName, cut),
			Evidence: err.Error(), Fix: fmt.Sprintf("ss --listening --udp --numeric --processes 'sport = %d' names it; stop it and %s", conf.VXLANPort, restart),
		})
	}
	return out
}

func checkBridges(h *host) (out []Finding) {
	for _, b := range h.bridges() {
		bad := func(evidence, fix string, safe bool) {
			out = append(out, Finding{Severity: Error, What: "bridge " + b.name + " is not as it should be: containers on it are cut off",
				Evidence: evidence, Fix: fix, Object: b.name, safe: safe})
		}
		l, ok := h.links[b.name]
		switch {
		case !ok:
			bad("there is no "+b.name, restart, false)
			continue
		case l.Kind != "bridge":
			bad(b.name+" is a "+kind(l.Kind), "ip link set "+b.name+" name "+b.name[:2]+"other && "+restart, false)
			continue
		case !l.Up():
			bad("it is down", "ip link set "+b.name+" up", true)
		}
		if l.STP {
			bad("the spanning tree protocol is on: a new port forwards nothing for 30 s", "ip link set "+b.name+" type bridge stp_state 0", true)
		}
		if l.MTU != h.state.MTU {
			bad(fmt.Sprintf("its MTU is %d, published is %d", l.MTU, h.state.MTU), fmt.Sprintf("ip link set %s mtu %d", b.name, h.state.MTU), true)
		}
		for _, g := range b.gateways {
			if !slices.Contains(h.addresses[l.Index], g) {
				bad("it does not have the gateway's address "+g.String(), "ip address add "+g.String()+" dev "+b.name, true)
			}
		}
	}
	return out
}

// checkPorts looks at the host ends of containers.
func checkPorts(h *host) (out []Finding) {
	var all []string
	for name := range h.links {
		all = append(all, name)
	}
	slices.Sort(all)
	for _, name := range all {
		l := h.links[name]
		for _, end := range veth.Of([]rtnl.Link{l}) {
			bridge := h.bridgeOf(end)
			bad := func(evidence, fix string) {
				out = append(out, Finding{Severity: Error, What: fmt.Sprintf("container %s is cut off", end.Attachment.ContainerID), Evidence: evidence, Fix: fix, Object: end.Attachment.ContainerID, safe: true})
			}
			b, ok := h.links[bridge]
			switch {
			case !ok: // said by another check
			case l.Master != b.Index:
				bad(name+" is not a port of "+bridge, "ip link set "+name+" master "+bridge+" up")
			case !l.Up():
				bad(name+" is down", "ip link set "+name+" up")
			}
		}
	}
	return out
}

// bridgeOf is the bridge that a host end should be a port of.
func (h *host) bridgeOf(l veth.Link) string {
	if o, ok := h.state.Overlay(l.Overlay); ok {
		return o.Info.BridgeName(l.Half)
	}
	return l.Half.Bridge(l.Overlay)
}

// checkRPFilter: strict filtering drops what comes back another way, such as
// answers of a container to another host's VTEP address.
func checkRPFilter(h *host) (out []Finding) {
	all, _ := h.sysctlNumber("net/ipv4/conf/all/rp_filter")
	for _, dev := range h.devices() {
		own, ok := h.sysctlNumber("net/ipv4/conf/" + dev + "/rp_filter")
		if ok && max(all, own) == 1 {
			out = append(out, Finding{
				Severity: Error, What: "reverse path filtering of " + dev + " is strict: packets between hosts and containers are dropped",
				Evidence: fmt.Sprintf("net.ipv4.conf.%s.rp_filter is %d, of all it is %d", dev, own, all),
				Fix:      "echo 2 > /proc/sys/net/ipv4/conf/" + dev + "/rp_filter", Object: dev, safe: true,
			})
		}
	}
	return out
}

func checkForwarding(h *host) (out []Finding) {
	off := func(key, where, object, before string) {
		if n, ok := h.sysctlNumber(key); ok && n == 0 {
			out = append(out, Finding{
				Severity: Error, What: "the host does not forward packets " + where + ": containers reach nobody beyond their bridge",
				Evidence: strings.ReplaceAll(key, "/", ".") + " is 0; something else sets it, see /etc/sysctl.d",
				Fix:      before + "echo 1 > /proc/sys/" + key, Object: object, safe: true,
			})
		}
	}
	if len(h.healthy()) == 0 {
		return nil
	}
	off("net/ipv4/ip_forward", "at all", "", "")
	for _, dev := range h.devices() {
		off("net/ipv4/conf/"+dev+"/forwarding", "of "+dev, dev, "")
	}
	if r, ok, err := h.conn.Path(netip.AddrFrom4([4]byte{1, 1, 1, 1}), 0); err == nil && ok {
		dev := h.linkName(r.OIF) // what comes back from outside of the overlays arrives there
		off("net/ipv4/conf/"+dev+"/forwarding", "of "+dev, "", "")
	}
	if h.has6() {
		off("net/ipv6/conf/all/forwarding", "of IPv6", "", h.keepRouters())
	}
	return out
}

// keepRouters has links listen to routers also when the host forwards, as the agent
// does: with accept_ra 1 it would lose the default route that it has from them.
func (h *host) keepRouters() (commands string) {
	for _, name := range slices.Sorted(maps.Keys(h.links)) {
		key := "net/ipv6/conf/" + name + "/accept_ra"
		n, _ := h.sysctlNumber(key)
		if n == 1 && name != "lo" && h.links[name].Master == 0 && !slices.Contains(h.devices(), name) {
			commands += "echo 2 > /proc/sys/" + key + " && "
		}
	}
	return commands
}
