package plan

import (
	"fmt"
	"net/netip"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// Op is one change to the kernel. Which fields count depends on Obj.
type Op struct {
	Act     Action
	Obj     Object
	Dev     string       // the device it is about or on
	Overlay string       // to which a failure is attributed; empty: the host
	Prefix  netip.Prefix // of an address, or the destination of a route
	Addr    netip.Addr   // gateway, neighbour, FDB destination, VTEP's local, source of a connected route
	MAC     conf.MAC     //
	Metric  uint32       //
	MTU     int          //
	Kind    RouteKind    // of a route
	Source  netip.Addr   // that this host sends from by a route; invalid: the kernel chooses
	Master  string       // the bridge of a port; empty: none
	Blocked bool         // a port that is to forward again
	Key     string       // sysctl, as a path below /proc/sys
	Value   string       // of a sysctl or an alias
}

// Action is what an operation does to its object.
type Action uint8

const (
	Keep Action = iota
	Add
	Replace
	Set
	Del
)

func (a Action) String() string { return [...]string{"keep", "add", "replace", "set", "delete"}[a] }

// Object is what an operation is about. The order has no meaning.
type Object uint8

const (
	VTEPLink Object = iota
	BridgeLink
	LinkAlias
	LinkMTU
	LinkMAC
	LinkUp
	LinkDown         // of a port whose bridge is removed, or gone
	LinkMaster       // a port into its bridge, or a device out of one
	BridgePort       // how a bridge treats a port
	BridgeSTPOff     // no spanning tree
	BridgeLimit      // how many MACs it learns
	BridgeNoSnooping // multicast goes to all ports
	BridgeNoDelay    // before a port forwards, as bridges are made; only without spanning tree
	VXLANLearning    // off
	Sysctl
	Address
	ConnectedRoute // the route the kernel makes for the network of an address
	LocalRoute     // and for the address itself
	Neighbour
	FDBEntry
	PeerRoute // of ours, whatever its kind
)

// Subjects are what Op.Subject can be.
func Subjects() []string {
	return []string{"link", "bridge_port", "address", "route", "neighbour", "fdb", "sysctl"}
}

// Subject is what an operation is about, for those who count.
func (o Op) Subject() string {
	switch o.Obj {
	case Address:
		return "address"
	case ConnectedRoute, LocalRoute, PeerRoute:
		return "route"
	case Neighbour:
		return "neighbour"
	case FDBEntry:
		return "fdb"
	case Sysctl:
		return "sysctl"
	}
	if o.OfPort() {
		return "bridge_port"
	}
	return "link"
}

// OfPort reports whether the operation is about the host end of a container, which
// may go at any moment.
func (o Op) OfPort() bool { return o.Master != "" || o.Obj == LinkDown }

// IsLink reports whether the operation makes or removes a device.
func (o Op) IsLink() bool { return o.Obj == VTEPLink || o.Obj == BridgeLink }

// ChangesLink reports whether nothing certain can be said of the device itself
// until the operation is done.
func (o Op) ChangesLink() bool {
	switch o.Obj {
	case VTEPLink, BridgeLink, LinkAlias, LinkMTU, LinkMAC, LinkUp, LinkDown, LinkMaster, VXLANLearning, BridgeSTPOff, BridgeNoDelay, BridgeNoSnooping, BridgeLimit:
		return true
	}
	return false
}

// NeedsIndex reports whether the device goes by its index. It is made by its
// name; whatever is done to it afterwards goes by index, because a name may be
// another name (altname) of a link that is not ours.
func (o Op) NeedsIndex() bool {
	switch o.Obj {
	case VTEPLink, BridgeLink:
		return o.Act != Add
	case Sysctl:
		return false
	case PeerRoute:
		return o.Dev != "" && o.Act != Del
	}
	return true
}

// String is the change as one would type it after "ip" (or "bridge", "sysctl").
func (o Op) String() string {
	switch o.Obj {
	case VTEPLink, BridgeLink, LinkAlias, LinkMTU, LinkMAC, LinkUp, LinkDown, LinkMaster, BridgePort, BridgeSTPOff, BridgeNoDelay, BridgeNoSnooping, BridgeLimit, VXLANLearning:
		return o.linkString()
	case Sysctl:
		return fmt.Sprintf("sysctl %s=%s", o.Key, o.Value)
	case Address:
		return fmt.Sprintf("addr %s %s dev %s", o.Act, o.Prefix, o.Dev)
	case ConnectedRoute:
		return fmt.Sprintf("route %s %s dev %s proto kernel src %s", o.Act, o.Prefix, o.Dev, o.Addr)
	case LocalRoute:
		return fmt.Sprintf("route %s local %s dev %s table local proto kernel src %s", o.Act, o.Addr, o.Dev, o.Addr)
	case Neighbour:
		return fmt.Sprintf("neigh %s %s lladdr %s dev %s", o.Act, o.Addr, o.MAC, o.Dev)
	case FDBEntry:
		return fmt.Sprintf("fdb %s %s dev %s dst %s", o.Act, o.MAC, o.Dev, o.Addr)
	case PeerRoute:
		switch {
		case o.Kind == Unreachable:
			return fmt.Sprintf("route %s unreachable %s proto %d metric %d", o.Act, o.Prefix, mark.RouteProtocol, o.Metric)
		case o.Kind == ToVTEP:
			return fmt.Sprintf("route %s %s dev %s proto %d metric %d src %s", o.Act, o.Prefix, o.Dev, mark.RouteProtocol, o.Metric, o.Source)
		case !o.Addr.IsValid():
			return fmt.Sprintf("route %s blackhole %s proto %d metric %d", o.Act, o.Prefix, mark.RouteProtocol, o.Metric)
		}
		text := fmt.Sprintf("route %s %s via %s dev %s proto %d metric %d", o.Act, o.Prefix, o.Addr, o.Dev, mark.RouteProtocol, o.Metric)
		if o.MTU != 0 {
			text += fmt.Sprintf(" mtu %d", o.MTU)
		}
		if o.Source.IsValid() {
			text += " src " + o.Source.String()
		}
		return text
	}
	return fmt.Sprintf("unknown operation %d", o.Obj)
}

func (o Op) linkString() string {
	switch {
	case o.IsLink() && o.Act == Del:
		return "link delete " + o.Dev
	case o.Obj == VTEPLink:
		return fmt.Sprintf("link add %s mtu %d address %s type vxlan id %d dstport %d local %s nolearning",
			o.Dev, o.MTU, o.MAC, conf.VNI, conf.VXLANPort, o.Addr)
	case o.Obj == BridgeLink:
		return fmt.Sprintf("link add %s address %s type bridge", o.Dev, o.MAC)
	}
	set := "link set " + o.Dev + " "
	switch o.Obj {
	case LinkAlias:
		return set + fmt.Sprintf("alias %q", o.Value)
	case LinkMTU:
		return set + fmt.Sprintf("mtu %d", o.MTU)
	case LinkMAC:
		return set + "address " + o.MAC.String()
	case LinkMaster:
		if o.Master == "" {
			return set + "nomaster"
		}
		return set + "master " + o.Master
	case BridgePort:
		if o.Blocked {
			set += "type bridge_slave state 3 "
		} else {
			set += "type bridge_slave "
		}
		return set + "hairpin on learning on flood on mcast_flood on bcast_flood on isolated off"
	case BridgeSTPOff:
		return set + "type bridge stp_state 0"
	case BridgeLimit:
		return set + fmt.Sprintf("type bridge fdb_max_learned %d", MaxLearned)
	case BridgeNoDelay:
		return set + "type bridge forward_delay 0"
	case BridgeNoSnooping:
		return set + "type bridge mcast_snooping 0"
	case VXLANLearning:
		return set + "type vxlan nolearning"
	case LinkDown:
		return set + "down"
	}
	return set + "up"
}
