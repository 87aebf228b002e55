package datapath

import (
	"fmt"
	"net/netip"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// op is one change to the kernel. Which fields count depends on obj.
type op struct {
	act     action
	obj     object
	dev     string       // the device it is about or on
	overlay string       // to which a failure is attributed; empty: the host
	prefix  netip.Prefix // of an address, or the destination of a route
	addr    netip.Addr   // gateway, neighbour, FDB destination, VTEP's local, source of a connected route
	mac     conf.MAC     //
	metric  uint32       //
	mtu     int          //
	key     string       // sysctl, as a path below /proc/sys
	value   string       // of a sysctl or an alias
}

type action uint8

const (
	keep action = iota
	add
	replace
	set
	del
)

func (a action) String() string { return [...]string{"keep", "add", "replace", "set", "delete"}[a] }

type object uint8

const (
	vtepLink object = iota
	bridgeLink
	linkAlias
	linkMTU
	linkUp
	sysctl
	address
	connected // the route the kernel makes for an address
	neighbour
	fdbEntry
	routeTo // an agent subnet: via a peer's VTEP, or blackhole
)

// isLink: the operation makes or removes a device.
func (o op) isLink() bool { return o.obj == vtepLink || o.obj == bridgeLink }

// changesLink: until the operation is done, nothing certain can be said of the
// device itself.
func (o op) changesLink() bool {
	switch o.obj {
	case vtepLink, bridgeLink, linkAlias, linkMTU, linkUp:
		return true
	}
	return false
}

// needsIndex: a device is made by its name; whatever is done to it afterwards
// goes by its index, because a name may be another name (altname) of a link that
// is not ours.
func (o op) needsIndex() bool {
	switch o.obj {
	case vtepLink, bridgeLink:
		return o.act != add
	case sysctl:
		return false
	case routeTo:
		return o.dev != "" && o.act != del
	}
	return true
}

// String is the change as one would type it after "ip" (or "bridge", "sysctl").
func (o op) String() string {
	switch o.obj {
	case vtepLink:
		if o.act == del {
			return "link delete " + o.dev
		}
		return fmt.Sprintf("link add %s mtu %d address %s type vxlan id %d dstport %d local %s nolearning",
			o.dev, o.mtu, o.mac, conf.VNI, conf.VXLANPort, o.addr)
	case bridgeLink:
		if o.act == del {
			return "link delete " + o.dev
		}
		return fmt.Sprintf("link add %s address %s type bridge", o.dev, o.mac)
	case linkAlias:
		return fmt.Sprintf("link set %s alias %q", o.dev, o.value)
	case linkMTU:
		return fmt.Sprintf("link set %s mtu %d", o.dev, o.mtu)
	case linkUp:
		return fmt.Sprintf("link set %s up", o.dev)
	case sysctl:
		return fmt.Sprintf("sysctl %s=%s", o.key, o.value)
	case address:
		return fmt.Sprintf("addr %s %s dev %s", o.act, o.prefix, o.dev)
	case connected:
		return fmt.Sprintf("route %s %s dev %s proto kernel src %s", o.act, o.prefix, o.dev, o.addr)
	case neighbour:
		return fmt.Sprintf("neigh %s %s lladdr %s dev %s", o.act, o.addr, o.mac, o.dev)
	case fdbEntry:
		return fmt.Sprintf("fdb %s %s dev %s dst %s", o.act, o.mac, o.dev, o.addr)
	case routeTo:
		if !o.addr.IsValid() {
			return fmt.Sprintf("route %s blackhole %s proto %d metric %d", o.act, o.prefix, mark.RouteProtocol, o.metric)
		}
		return fmt.Sprintf("route %s %s via %s dev %s proto %d metric %d", o.act, o.prefix, o.addr, o.dev, mark.RouteProtocol, o.metric)
	}
	return fmt.Sprintf("unknown operation %d", o.obj)
}
