package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
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
		filter   rtnl.Filter
		concerns func(rtnl.Message) bool
	}{
		{unix.NETLINK_ROUTE, routeGroups, rtnl.WithoutOwn(d.port), d.index.contradicts},
		{unix.NETLINK_NETFILTER, []uint{unix.NFNLGRP_NFTABLES}, nil, concernsFirewall},
	} {
		f, err := rtnl.Subscribe(s.family, s.groups, s.filter)
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

// watch reads notifications until f is closed, and announces those that concern
// us.
func watch(f *rtnl.Subscription, concerns func(rtnl.Message) bool, out chan<- struct{}) {
	announce := func() {
		select {
		case out <- struct{}{}:
		default: // one is waiting already
		}
	}
	buf := make([]byte, 64<<10)
	for {
		matters := false
		err := f.Read(buf, func(m rtnl.Message) { matters = matters || concerns(m) })
		if err != nil && !errors.Is(err, rtnl.ErrOverrun) {
			return
		}
		if matters || err != nil { // of those that were lost one may have been ours
			announce()
		}
	}
}

// contradicts says whether a notification tells of something that is not as it
// should be.
func (x *index) contradicts(h rtnl.Message) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	switch h.Type {
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
func (x *index) netconf(h rtnl.Message) bool {
	if len(h.Data) < 4 { // a family, padded
		return false
	}
	ifindex, forwarding, rpFilter := int32(0), int32(1), int32(rpFilterLoose)
	rtnl.EachAttr(h.Data[4:], func(typ uint16, v []byte) {
		if len(v) != 4 {
			return
		}
		switch n := int32(binary.NativeEndian.Uint32(v)); typ {
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
// everything in place costs a few milliseconds. New elements of sets are not
// looked at: they come with every peer and every container.
func concernsFirewall(h rtnl.Message) bool {
	const header = 4 // struct nfgenmsg: family, version, resource
	if h.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(h.Data) < header {
		return false
	}
	family := h.Data[0]
	names := map[uint16]string{}
	rtnl.EachAttr(h.Data[header:], func(typ uint16, v []byte) { names[typ] = unix.ByteSliceToString(v) })
	// The name of the table is the first attribute of all messages.
	table, chain := names[unix.NFTA_TABLE_NAME], names[unix.NFTA_RULE_CHAIN]
	ours := table == mark.NFTable && (family == unix.NFPROTO_INET || family == unix.NFPROTO_BRIDGE)
	theirs := family == unix.NFPROTO_IPV4 || family == unix.NFPROTO_IPV6
	switch h.Type & 0xff {
	case unix.NFT_MSG_DELTABLE:
		return ours || theirs && (table == "filter" || table == "nat" || table == "raw")
	case unix.NFT_MSG_DELCHAIN:
		return ours || theirs && mark.IsOurChain(names[unix.NFTA_CHAIN_NAME])
	case unix.NFT_MSG_DELRULE:
		return ours && chain != mark.UserChain || theirs && (mark.IsOurChain(chain) || isHook(chain))
	case unix.NFT_MSG_NEWRULE:
		return ours && chain != mark.UserChain || theirs && (mark.IsOurChain(chain) || isHook(chain))
	case unix.NFT_MSG_NEWCHAIN: // a policy
		return ours
	case unix.NFT_MSG_DELSET:
		return ours
	case unix.NFT_MSG_DELSETELEM:
		return ours && family == unix.NFPROTO_INET
	}
	return false
}

// isHook reports whether a chain is one of those that ours are jumped to from.
func isHook(chain string) bool {
	switch chain {
	case "PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING":
		return true
	}
	return false
}

func (x *index) link(h rtnl.Message) bool {
	l, ok := rtnl.ParseLink(h)
	want, known := x.links[l.Index]
	if !ok || !known {
		return false
	}
	return h.Type == unix.RTM_DELLINK || l.MTU != want.mtu ||
		want.ours && (!l.Up() || l.Name != want.name) ||
		want.mac != conf.MAC{} && l.MAC != want.mac
}

func (x *index) addr(h rtnl.Message) bool {
	a, ok := rtnl.ParseAddress(h)
	if !ok {
		return false
	}
	if a.Prefix.Addr() == x.local {
		// Gone from the underlay, come back, or moved to another link.
		return (h.Type == unix.RTM_NEWADDR) != (a.Index == x.underlay)
	}
	want, known := x.links[a.Index]
	if !known || !want.ours || a.Scope != unix.RT_SCOPE_UNIVERSE {
		return false
	}
	return slices.Contains(want.addrs, a.Prefix) == (h.Type == unix.RTM_DELADDR)
}

func (x *index) route(h rtnl.Message) bool {
	r, ok := rtnl.ParseRoute(h)
	if !ok || r.Table != unix.RT_TABLE_MAIN {
		return false
	}
	want, wanted := x.routes[r.Dst]
	switch {
	case r.Protocol == mark.RouteProtocol && h.Type == unix.RTM_NEWROUTE:
		return !wanted || asOurs(r, x.vtep) != want
	case r.Protocol == mark.RouteProtocol:
		return wanted && r.Metric == want.metric
	case h.Type == unix.RTM_NEWROUTE: // somebody else's, perhaps instead of ours
		return wanted && r.Metric <= want.metric && want.via.IsValid()
	case r.Protocol == unix.RTPROT_KERNEL: // the one that came with an address
		for _, a := range x.links[r.OIF].addrs {
			if x.links[r.OIF].ours && a.Masked() == r.Dst {
				return true
			}
		}
	}
	return false
}

func (x *index) neighbour(h rtnl.Message) bool {
	n, ok := rtnl.ParseNeighbour(h)
	if !ok || n.Index != x.vtep || x.vtep == 0 {
		return false
	}
	if n.Family == unix.AF_BRIDGE {
		want, wanted := x.fdb[n.MAC]
		if h.Type == unix.RTM_DELNEIGH {
			return wanted && want == n.IP
		}
		return !wanted || want != n.IP
	}
	want, wanted := x.neigh[n.IP]
	if h.Type == unix.RTM_DELNEIGH {
		return wanted
	}
	if n.State&unix.NUD_PERMANENT == 0 {
		return wanted // the kernel forgets temporary ones of its own by itself
	}
	return !wanted || want != n.MAC
}

// expect enters what a plan leads to, before it is carried out. Links that are
// about to be made or changed are left out until then.
func (x *index) expect(p *planned, have *state) {
	indexes := map[string]int{}
	for name, l := range have.links {
		indexes[name] = l.index
	}
	for _, o := range p.ops {
		if o.changesLink() {
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
