package datapath

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// index is what the kernel should have after the last Set, for those who watch
// it: a notification matters if it contradicts the index. Our own changes are
// entered before they are made, so they do not.
type index struct {
	mu       sync.RWMutex
	entries  // what Set last asked for
	links    map[int]expected
	vtep     int // index of the VTEP
	underlay int // index of the link that has the agent IP, 0 if none has
	local    netip.Addr
}

// expected is a link as we want to keep it. The underlay link is among them: if
// its MTU changes, ours has to follow.
type expected struct {
	name  string
	mac   conf.MAC // zero: whatever it is; bridges keep what they have
	mtu   int
	ours  bool
	addrs []netip.Prefix
}

// Changes announces that somebody else changed or removed something of ours:
// link, address, route, neighbour or FDB entry, forwarding, firewall rule, or the
// MTU or address of the underlay. Rules made with the legacy flavour of iptables
// make no such noise, nor do most sysctls; they are looked at when Set reads the
// kernel. Announcements are coalesced and never lost, if sometimes needless. The
// channel is closed when ctx ends.
func (d *Datapath) Changes(ctx context.Context) <-chan struct{} {
	out := make(chan struct{}, 1)
	var watching sync.WaitGroup
	for _, s := range []struct {
		family   int
		groups   []uint
		filter   []unix.SockFilter
		concerns func(nlmsg) bool
	}{
		{unix.NETLINK_ROUTE, routeGroups, withoutOwn(d.conn.port), d.index.contradicts},
		{unix.NETLINK_NETFILTER, []uint{unix.NFNLGRP_NFTABLES}, nil, concernsFirewall},
	} {
		f, err := subscribe(s.family, s.groups, s.filter)
		if err != nil {
			d.log.Error("kernel notifications are not to be had; changes by others are only repaired now and then", "family", s.family, "err", err)
			continue
		}
		stop := context.AfterFunc(ctx, func() { f.Close() })
		watching.Go(func() {
			defer stop()
			watch(f, s.concerns, out)
			if ctx.Err() == nil {
				d.log.Error("kernel notifications ended; changes by others are only repaired now and then", "family", s.family)
			}
		})
	}
	go func() {
		watching.Wait()
		<-ctx.Done()
		close(out)
	}()
	return out
}

var routeGroups = []uint{
	unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF,
}

// withoutOwn is a filter for a socket that drops the news of routes and
// neighbours that the socket with this port made: thousands when a host joins,
// which would have to be read only to be found right. Other news are let
// through, whoever caused them, because one change may have several effects;
// so are FDB entries, of which VXLAN does not say who made them.
func withoutOwn(port uint32) []unix.SockFilter {
	const load, jumpIfEqual, answer = unix.BPF_LD | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	// Filters load numbers in network order, netlink has them in the machine's.
	swap32 := func(n uint32) uint32 { return binary.BigEndian.Uint32(native.AppendUint32(nil, n)) }
	swap16 := func(n uint16) uint32 { return uint32(binary.BigEndian.Uint16(native.AppendUint16(nil, n))) }
	return []unix.SockFilter{
		{Code: load | unix.BPF_W, K: 12}, // nlmsg_pid
		{Code: jumpIfEqual, K: swap32(port), Jf: 4},
		{Code: load | unix.BPF_H, K: 4}, // nlmsg_type
		{Code: jumpIfEqual, K: swap16(unix.RTM_NEWROUTE), Jt: 1},
		{Code: jumpIfEqual, K: swap16(unix.RTM_NEWNEIGH), Jf: 1},
		{Code: answer, K: 0},
		{Code: answer, K: 1<<32 - 1},
	}
}

func subscribe(family int, of []uint, filter []unix.SockFilter) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, family)
	if err != nil {
		return nil, err
	}
	var groups uint32
	for _, g := range of {
		groups |= 1 << (g - 1)
	}
	growReceiveBuffer(fd)
	if len(filter) > 0 {
		// Without it we only read more.
		unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "netlink"), nil
}

// watch reads notifications until f is closed, and announces those that concern
// us.
func watch(f *os.File, concerns func(nlmsg) bool, out chan<- struct{}) {
	announce := func() {
		select {
		case out <- struct{}{}:
		default: // one is waiting already
		}
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		switch {
		case errors.Is(err, unix.ENOBUFS):
			announce() // some were lost; one of them may have been ours
		case err != nil:
			return
		default:
			matters := false
			err := eachMessage(buf[:n], func(h nlmsg) { matters = matters || concerns(h) })
			if matters || err != nil {
				announce()
			}
		}
	}
}

// contradicts says whether a notification tells of something that is not as it
// should be.
func (x *index) contradicts(h nlmsg) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	switch h.typ {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return x.link(h)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return x.addr(h)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return x.route(h)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		return x.neighbour(h)
	case unix.RTM_NEWNETCONF:
		return x.netconf(h)
	}
	return false
}

// The attributes of RTM_NEWNETCONF, linux/netconf.h.
const (
	netconfIfindex    = 1
	netconfForwarding = 2
	netconfRPFilter   = 3
	netconfAllDevices = -1
)

// netconf is about forwarding and source validation, of one device or of all.
func (x *index) netconf(h nlmsg) bool {
	if len(h.data) < 4 { // a family, padded
		return false
	}
	ifindex, forwarding, rpFilter := int32(0), int32(1), int32(rpFilterLoose)
	eachAttr(h.data[4:], func(typ uint16, v []byte) {
		if len(v) != 4 {
			return
		}
		switch n := int32(native.Uint32(v)); typ {
		case netconfIfindex:
			ifindex = n
		case netconfForwarding:
			forwarding = n
		case netconfRPFilter:
			rpFilter = n
		}
	})
	if ifindex == netconfAllDevices {
		return forwarding == 0
	}
	return x.links[int(ifindex)].ours && (forwarding == 0 || rpFilter != rpFilterLoose)
}

// concernsFirewall says whether a notification of nftables, which iptables is
// made of today, may tell of the loss of a rule of ours, or of another that
// comes before the jump to them. It cannot tell who did it; a look that finds
// everything in place costs a few milliseconds.
func concernsFirewall(h nlmsg) bool {
	const header = 4 // struct nfgenmsg: family, version, resource
	if h.typ>>8 != unix.NFNL_SUBSYS_NFTABLES || len(h.data) < header ||
		h.data[0] != unix.AF_INET && h.data[0] != unix.AF_INET6 {
		return false
	}
	names := map[uint16]string{}
	eachAttr(h.data[header:], func(typ uint16, v []byte) { names[typ] = unix.ByteSliceToString(v) })
	switch h.typ & 0xff {
	case unix.NFT_MSG_DELTABLE:
		name := names[unix.NFTA_TABLE_NAME]
		return name == "filter" || name == "nat"
	case unix.NFT_MSG_DELCHAIN:
		name := names[unix.NFTA_CHAIN_NAME]
		return name == mark.VXLANChain || name == mark.ForwardChain || name == mark.MasqueradeChain
	case unix.NFT_MSG_DELRULE:
		name := names[unix.NFTA_RULE_CHAIN]
		return name == mark.VXLANChain || name == mark.ForwardChain || name == mark.MasqueradeChain ||
			name == "PREROUTING" || name == "FORWARD" || name == "POSTROUTING"
	case unix.NFT_MSG_NEWRULE:
		name := names[unix.NFTA_RULE_CHAIN]
		return name == "FORWARD" || name == "PREROUTING" && names[unix.NFTA_RULE_TABLE] == "nat"
	}
	return false
}

func (x *index) link(h nlmsg) bool {
	if len(h.data) < unix.SizeofIfInfomsg {
		return false
	}
	// Ports of a bridge send messages of the bridge family about themselves.
	want, known := x.links[int(native.Uint32(h.data[4:]))]
	if !known || h.data[0] != unix.AF_UNSPEC {
		return false
	}
	if h.typ == unix.RTM_DELLINK || want.ours && native.Uint32(h.data[8:])&unix.IFF_UP == 0 {
		return true
	}
	differs := false
	eachAttr(h.data[unix.SizeofIfInfomsg:], func(typ uint16, v []byte) {
		switch {
		case typ == unix.IFLA_MTU && len(v) == 4:
			differs = differs || int(native.Uint32(v)) != want.mtu
		case typ == unix.IFLA_ADDRESS && want.mac != conf.MAC{}:
			differs = differs || !bytes.Equal(v, want.mac[:])
		case typ == unix.IFLA_IFNAME && want.ours && len(v) > 0:
			differs = differs || string(v[:len(v)-1]) != want.name
		}
	})
	return differs
}

func (x *index) addr(h nlmsg) bool {
	if len(h.data) < unix.SizeofIfAddrmsg {
		return false
	}
	var ip, local netip.Addr
	eachAttr(h.data[unix.SizeofIfAddrmsg:], func(typ uint16, v []byte) {
		switch typ {
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(v)
		case unix.IFA_ADDRESS:
			ip, _ = netip.AddrFromSlice(v)
		}
	})
	if local.IsValid() {
		ip = local // they differ on point-to-point links
	}
	dev := int(native.Uint32(h.data[4:]))
	if ip == x.local {
		// Gone from the underlay, come back, or moved to another link.
		return (h.typ == unix.RTM_NEWADDR) != (dev == x.underlay)
	}
	want, known := x.links[dev]
	if !known || !want.ours || h.data[3] != unix.RT_SCOPE_UNIVERSE {
		return false
	}
	there := false
	for _, a := range want.addrs {
		there = there || a == netip.PrefixFrom(ip, int(h.data[1]))
	}
	return there == (h.typ == unix.RTM_DELADDR)
}

func (x *index) route(h nlmsg) bool {
	r, ok := parseRoute(h)
	if !ok || r.table != unix.RT_TABLE_MAIN {
		return false
	}
	want, wanted := x.routes[r.dst]
	switch {
	case r.protocol == mark.RouteProtocol && h.typ == unix.RTM_NEWROUTE:
		return !wanted || r.ours(x.vtep) != want
	case r.protocol == mark.RouteProtocol:
		return wanted && r.metric == want.metric
	case h.typ == unix.RTM_NEWROUTE: // somebody else's, perhaps instead of ours
		return wanted && r.metric <= want.metric && want.via.IsValid()
	case r.protocol == unix.RTPROT_KERNEL: // the one that came with an address
		for _, a := range x.links[r.oif].addrs {
			if x.links[r.oif].ours && a.Masked() == r.dst {
				return true
			}
		}
	}
	return false
}

func (x *index) neighbour(h nlmsg) bool {
	n, ok := parseNeighbour(h)
	if !ok || n.ifindex != x.vtep || x.vtep == 0 {
		return false
	}
	if n.family == unix.AF_BRIDGE {
		want, wanted := x.fdb[n.mac]
		if h.typ == unix.RTM_DELNEIGH {
			return wanted && want == n.ip
		}
		return !wanted || want != n.ip
	}
	want, wanted := x.neigh[n.ip]
	if h.typ == unix.RTM_DELNEIGH {
		return wanted
	}
	if n.state&unix.NUD_PERMANENT == 0 {
		return wanted // the kernel forgets temporary ones of its own by itself
	}
	return !wanted || want != n.mac
}

// expect enters what a plan leads to, before it is carried out. Links that are
// about to be made or changed are left out until then.
func (x *index) expect(p *planned, have *state) {
	indexes := map[string]int{}
	for name, l := range have.links {
		indexes[name] = l.index
	}
	for _, o := range p.ops {
		if o.obj <= linkUp {
			delete(indexes, o.dev)
		}
	}
	x.expectLinks(p, have, indexes)
}

// expectLinks enters the links with these indexes.
func (x *index) expectLinks(p *planned, have *state, indexes map[string]int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.entries = p.wanted.entries
	x.local = p.cfg.VTEP.Local
	x.vtep, x.underlay = indexes[conf.VTEPName], 0
	x.links = map[int]expected{}
	for _, dev := range p.devices {
		if i := indexes[dev.name]; i != 0 {
			e := expected{name: dev.name, mtu: p.mtu, ours: true, addrs: dev.addrs}
			if i == x.vtep {
				e.mac = p.cfg.VTEP.MAC
			}
			x.links[i] = e
		}
	}
	if l, ok := have.links[have.underlay]; ok {
		x.underlay = l.index
		x.links[l.index] = expected{name: have.underlay, mtu: l.mtu}
	}
}

// update enters the difference that one plan of peers makes.
func (x *index) update(had, want entries) {
	x.mu.Lock()
	defer x.mu.Unlock()
	updateMap(x.neigh, had.neigh, want.neigh)
	updateMap(x.fdb, had.fdb, want.fdb)
	updateMap(x.routes, had.routes, want.routes)
}

func updateMap[K, V comparable](m, had, want map[K]V) {
	for k := range had {
		delete(m, k)
	}
	for k, v := range want {
		m[k] = v
	}
}
