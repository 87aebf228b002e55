package rtnl

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// Link is what the kernel says about one link.
type Link struct {
	Index    int
	Name     string
	Altnames []string // further names, by which the kernel finds it as well
	Kind     string   // "veth", "bridge", "vxlan", ...; empty: a physical or unknown device
	Alias    string
	MAC      conf.MAC
	MTU      int
	Flags    uint32 // IFF_*
	// Operational: the kernel has taken note of the carrier (IF_OPER_UP).
	Operational bool
	Ethernet    bool   // its frames are those of Ethernet
	Master      int    // index of its bridge or the like; 0: none
	Group       uint32 // IFLA_GROUP
	Qdisc       string // that it sends through: "noop" while it is down, "noqueue" where nothing waits
	Peer        int    // index of the other end, or of the link it is on; 0: none
	PeerNS      int32  // what the kernel calls the namespace of Peer; -1: this one, or none
	// PeerNamed: the namespace of the other end has a name of its own here, so
	// it exists; one that is being torn down has none.
	PeerNamed bool
	VXLAN     VXLAN // of a VXLAN device
	STP       bool  // of a bridge: the spanning tree protocol is on
	// Snooping: a bridge keeps account of who listens to which multicast group.
	// Querier: it asks for that itself, and goes by the answers.
	Snooping, Querier bool
	// MaxLearned is how many MACs a bridge learns, 0: without a limit; nil: this is no
	// bridge, or the kernel has no limit (before 6.6).
	MaxLearned *uint32
	Port       *Port // of a port of a bridge
}

// Up reports IFF_UP: somebody set it up.
func (l Link) Up() bool { return l.Flags&unix.IFF_UP != 0 }

// Carrier reports IFF_LOWER_UP: of a veth, the other end is up too.
func (l Link) Carrier() bool { return l.Flags&unix.IFF_LOWER_UP != 0 }

// Loopback reports IFF_LOOPBACK.
func (l Link) Loopback() bool { return l.Flags&unix.IFF_LOOPBACK != 0 }

// VXLAN is the part of a VXLAN device that matters to us.
type VXLAN struct {
	VNI, Port int
	Local     netip.Addr
	Remote    netip.Addr // host or multicast group that it sends to; invalid: none
	Learning  bool
	// Bound to a link, to a multicast group, or by outside metadata.
	Bound bool
}

// Port is how a bridge treats one of its ports. Flags that a port is born with
// are named so that the zero value is the usual port.
type Port struct {
	Hairpin    bool
	NoLearning bool
	NoFlood    bool // unknown unicast, multicast or broadcast
	Isolated   bool
	Blocked    bool // its state is not forwarding
}

// skipStats is RTEXT_FILTER_SKIP_STATS of linux/rtnetlink.h: counters are added
// up over all processors, for nobody.
const skipStats = 1 << 3

// operUp is IF_OPER_UP of linux/if.h.
const operUp = 6

// VethPeer is VETH_INFO_PEER of linux/veth.h.
const VethPeer = 1

// AddrGenNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const AddrGenNone = 1

// PortForwarding is BR_STATE_FORWARDING of linux/if_bridge.h.
const PortForwarding = 3

// LinkByName reads one link. ok is false where none has this name; a link that
// has it as another name (altname) is returned, but not with ok.
func (c *Conn) LinkByName(name string) (l Link, ok bool, err error) {
	l, ok, err = c.getLink("read interface "+name, 0, name)
	return l, ok && l.Name == name, err
}

// LinkByIndex reads one link. ok is false where there is none.
func (c *Conn) LinkByIndex(index int) (l Link, ok bool, err error) {
	return c.getLink("read an interface", index, "")
}

// PeerOf reads the other end of a pair in its own namespace. ok is false where
// it is gone or in none that the kernel can name.
func (c *Conn) PeerOf(l Link) (peer Link, ok bool, err error) {
	if l.PeerNS < 0 || l.Peer == 0 {
		return peer, false, nil
	}
	header := linkHeader(l.Peer, 0, 0)
	err = c.Get(Request{"read the other end of " + l.Name, unix.RTM_GETLINK, header[:], func(b *Batch) {
		b.Attr32(unix.IFLA_TARGET_NETNSID, uint32(l.PeerNS))
		b.Attr32(unix.IFLA_EXT_MASK, skipStats)
	}}, func(m Message) { peer, ok = ParseLink(m) })
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		err = nil
	}
	return peer, ok, err
}

func (c *Conn) getLink(step string, index int, name string) (l Link, ok bool, err error) {
	header := linkHeader(index, 0, 0)
	err = c.Get(Request{step, unix.RTM_GETLINK, header[:], func(b *Batch) {
		if name != "" {
			b.AttrString(unix.IFLA_IFNAME, name)
		}
		b.Attr32(unix.IFLA_EXT_MASK, skipStats)
	}}, func(m Message) { l, ok = ParseLink(m) })
	if errors.Is(err, unix.ENODEV) {
		err = nil
	}
	return l, ok, err
}

// Links lists every link of the namespace.
func (c *Conn) Links() ([]Link, error) {
	header := linkHeader(0, 0, 0)
	return List(c, Request{"list links", unix.RTM_GETLINK, header[:], func(b *Batch) { b.Attr32(unix.IFLA_EXT_MASK, skipStats) }}, ParseLink)
}

// Ports lists the links that have this link as their master.
func (c *Conn) Ports(master int) ([]Link, error) {
	header := linkHeader(0, 0, 0)
	return List(c, Request{"list the ports of a bridge", unix.RTM_GETLINK, header[:], func(b *Batch) {
		b.Attr32(unix.IFLA_MASTER, uint32(master))
		b.Attr32(unix.IFLA_EXT_MASK, skipStats)
	}}, ParseLink)
}

// ParseLink reads an RTM_NEWLINK or RTM_DELLINK. ok is false for messages of
// another family, which bridges send about their ports.
func ParseLink(m Message) (l Link, ok bool) {
	if len(m.Data) < unix.SizeofIfInfomsg || m.Data[0] != unix.AF_UNSPEC {
		return l, false
	}
	return parseLink(m), true
}

// ParsePortLink reads the index and name of a port from a message of the bridge
// family.
func ParsePortLink(m Message) (l Link, ok bool) {
	if len(m.Data) < unix.SizeofIfInfomsg || m.Data[0] != unix.AF_BRIDGE {
		return l, false
	}
	return parseLink(m), true
}

func parseLink(m Message) Link {
	l := Link{
		Index: int(int32(native.Uint32(m.Data[4:]))), Flags: native.Uint32(m.Data[8:]),
		Ethernet: native.Uint16(m.Data[2:]) == unix.ARPHRD_ETHER, PeerNS: -1,
	}
	EachAttr(m.Data[unix.SizeofIfInfomsg:], func(typ uint16, v []byte) {
		switch {
		case typ == unix.IFLA_IFNAME:
			l.Name = unix.ByteSliceToString(v)
		case typ == unix.IFLA_PROP_LIST:
			EachAttr(v, func(typ uint16, v []byte) {
				if typ == unix.IFLA_ALT_IFNAME {
					l.Altnames = append(l.Altnames, unix.ByteSliceToString(v))
				}
			})
		case typ == unix.IFLA_IFALIAS:
			l.Alias = unix.ByteSliceToString(v)
		case typ == unix.IFLA_QDISC:
			l.Qdisc = unix.ByteSliceToString(v)
		case typ == unix.IFLA_ADDRESS:
			copy(l.MAC[:], v)
		case typ == unix.IFLA_OPERSTATE:
			l.Operational = len(v) > 0 && v[0] == operUp
		case typ == unix.IFLA_LINKINFO:
			l.parseInfo(v)
		case len(v) < 4:
		case typ == unix.IFLA_MTU:
			l.MTU = int(native.Uint32(v))
		case typ == unix.IFLA_MASTER:
			l.Master = int(native.Uint32(v))
		case typ == unix.IFLA_LINK_NETNSID:
			l.PeerNS = int32(native.Uint32(v))
			l.PeerNamed = l.PeerNS >= 0
		case typ == unix.IFLA_GROUP:
			l.Group = native.Uint32(v)
		case typ == unix.IFLA_LINK:
			l.Peer = int(native.Uint32(v))
		}
	})
	return l
}

// parseInfo reads IFLA_LINKINFO, in which the kind precedes its data.
func (l *Link) parseInfo(b []byte) {
	var master string
	EachAttr(b, func(typ uint16, v []byte) {
		switch {
		case typ == unix.IFLA_INFO_KIND:
			l.Kind = unix.ByteSliceToString(v)
		case typ == unix.IFLA_INFO_SLAVE_KIND:
			master = unix.ByteSliceToString(v)
		case typ == unix.IFLA_INFO_DATA && l.Kind == "vxlan":
			l.VXLAN = parseVXLAN(v)
		case typ == unix.IFLA_INFO_DATA && l.Kind == "bridge":
			EachAttr(v, func(typ uint16, v []byte) {
				if typ == unix.IFLA_BR_STP_STATE && len(v) == 4 {
					l.STP = native.Uint32(v) != 0
				}
				if typ == unix.IFLA_BR_MCAST_SNOOPING && len(v) == 1 {
					l.Snooping = v[0] != 0
				}
				if typ == unix.IFLA_BR_MCAST_QUERIER && len(v) == 1 {
					l.Querier = v[0] != 0
				}
				if typ == unix.IFLA_BR_FDB_MAX_LEARNED && len(v) == 4 {
					n := native.Uint32(v)
					l.MaxLearned = &n
				}
			})
		case typ == unix.IFLA_INFO_SLAVE_DATA && master == "bridge":
			l.Port = parsePort(v)
		}
	})
}

func parseVXLAN(b []byte) (x VXLAN) {
	EachAttr(b, func(typ uint16, v []byte) {
		switch {
		case typ == unix.IFLA_VXLAN_LOCAL || typ == unix.IFLA_VXLAN_LOCAL6:
			x.Local, _ = netip.AddrFromSlice(v)
		case typ == unix.IFLA_VXLAN_GROUP || typ == unix.IFLA_VXLAN_GROUP6:
			x.Bound = true
			x.Remote, _ = netip.AddrFromSlice(v)
		case typ == unix.IFLA_VXLAN_PORT && len(v) == 2:
			x.Port = int(v[0])<<8 | int(v[1])
		case typ == unix.IFLA_VXLAN_LEARNING && len(v) > 0:
			x.Learning = v[0] != 0
		case typ == unix.IFLA_VXLAN_COLLECT_METADATA && len(v) > 0:
			x.Bound = x.Bound || v[0] != 0
		case len(v) < 4:
		case typ == unix.IFLA_VXLAN_ID:
			x.VNI = int(native.Uint32(v))
		case typ == unix.IFLA_VXLAN_LINK:
			x.Bound = x.Bound || native.Uint32(v) != 0
		}
	})
	return x
}

func parsePort(b []byte) *Port {
	p := &Port{}
	EachAttr(b, func(typ uint16, v []byte) {
		if len(v) == 0 {
			return
		}
		switch on := v[0] != 0; typ {
		case unix.IFLA_BRPORT_MODE:
			p.Hairpin = on
		case unix.IFLA_BRPORT_LEARNING:
			p.NoLearning = !on
		case unix.IFLA_BRPORT_UNICAST_FLOOD, unix.IFLA_BRPORT_MCAST_FLOOD, unix.IFLA_BRPORT_BCAST_FLOOD:
			p.NoFlood = p.NoFlood || !on
		case unix.IFLA_BRPORT_ISOLATED:
			p.Isolated = on
		case unix.IFLA_BRPORT_STATE:
			p.Blocked = v[0] != PortForwarding
		}
	})
	return p
}

// linkHeader is a struct ifinfomsg. change says which of flags count.
func linkHeader(index int, flags, change uint32) (h [unix.SizeofIfInfomsg]byte) {
	native.PutUint32(h[4:], uint32(index))
	native.PutUint32(h[8:], flags)
	native.PutUint32(h[12:], change)
	return h
}

// AddLink begins a message that creates a link, down or up.
func (b *Batch) AddLink(step, name string, up bool) {
	var flags uint32
	if up {
		flags = unix.IFF_UP
	}
	header := linkHeader(0, flags, flags)
	b.Begin(step, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, header[:])
	b.AttrString(unix.IFLA_IFNAME, name)
}

// SetLink begins a message that changes a link. Links are changed by index only:
// a name may be another name (altname) of a link that is not ours.
func (b *Batch) SetLink(step string, index int) {
	header := linkHeader(index, 0, 0)
	b.Begin(step, unix.RTM_NEWLINK, 0, header[:])
}

// LinkUp sets a link up.
func (b *Batch) LinkUp(step string, index int) {
	header := linkHeader(index, unix.IFF_UP, unix.IFF_UP)
	b.Begin(step, unix.RTM_NEWLINK, 0, header[:])
}

// LinkDown sets a link down.
func (b *Batch) LinkDown(step string, index int) {
	header := linkHeader(index, 0, unix.IFF_UP)
	b.Begin(step, unix.RTM_NEWLINK, 0, header[:])
}

// DeleteLink removes a link, and with it the other end of a pair. Index 0 is for
// a group, which is then the message's attribute.
func (b *Batch) DeleteLink(step string, index int) {
	header := linkHeader(index, 0, 0)
	b.Begin(step, unix.RTM_DELLINK, 0, header[:])
}

// ChildLink adds the header of a link inside an attribute, as for the other end
// of a pair.
func (b *Batch) ChildLink() {
	header := linkHeader(0, 0, 0)
	b.Raw(header[:])
}
