package kernel

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// Expected is what the kernel should have after the last plan, for those who
// watch it: a notification matters if it contradicts this. Our own changes are
// entered before they are made, so they do not.
type Expected struct {
	mu sync.RWMutex
	plan.Entries
	links    map[int]link
	bridges  map[string]int // index of our bridges by name, with those that are left
	overlays []plan.Overlay
	sysctls  []plan.Setting
	ranges   []netip.Prefix // where routes and addresses of others matter
	subnets  []netip.Prefix // this host's agent subnets
	pools    []netip.Prefix // of VTEP addresses
	vtep     int            // index of the VTEP
	underlay int            // index of the link that has the agent IP, 0 if none has
	own      plan.VTEP      // agent IPs and VTEP addresses
	second   int            // index of the second VXLAN device
	under2   int            // index of the link that has the second agent IP
	seeking  bool           // addresses that may be a second agent IP matter
	ways     waysTo
}

// link is a link as we want to keep it. The underlay link is among them: if its
// MTU changes, ours has to follow.
type link struct {
	plan.Device
	mtu  int
	ours bool
	made bool     // by us; a bridge that somebody else made keeps its MAC
	mac  conf.MAC // of one that we made
}

// Before enters what a plan leads to, before it is carried out. Links that are
// about to be made or changed are left out until then.
func (x *Expected) Before(p *plan.Plan, have *plan.State) {
	index := map[string]int{}
	for name, l := range have.Links {
		index[name] = l.Index
	}
	for _, o := range p.Ops {
		if o.ChangesLink() {
			delete(index, o.Dev)
		}
	}
	x.After(p, have, index)
}

// After enters the links with these indexes.
func (x *Expected) After(p *plan.Plan, have *plan.State, index map[string]int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.Entries = p.Entries
	x.own, x.seeking = p.Wanted.VTEP, p.Wanted.Seeking
	x.vtep, x.underlay = index[conf.VTEPName], 0
	x.second, x.under2 = index[mark.SecondVTEP], 0
	x.ways.set(p, index)
	x.links, x.bridges, x.sysctls = map[int]link{}, map[string]int{}, nil
	x.overlays = p.Wanted.Overlays
	x.ranges, x.subnets, x.pools = p.Wanted.Ranges()
	usable := map[string]bool{"": true}
	for _, d := range p.Devices {
		usable[d.Name] = true
		i := index[d.Name]
		if i == 0 {
			continue
		}
		l := link{Device: d, mtu: p.MTUOf(d), ours: true, made: p.Made(d, have), mac: mark.BridgeMACOf(have.Links[d.Name].MAC, d.Addrs)}
		if d.Overlay == "" {
			l.mac = p.Wanted.VTEP.MAC
		} else {
			x.bridges[d.Name] = i
		}
		x.links[i] = l
	}
	for name := range p.LeftBridges {
		x.bridges[name] = have.Links[name].Index
	}
	for _, s := range p.Settings(have.IPv6) {
		if usable[s.Dev] && !announced(s) {
			x.sysctls = append(x.sysctls, s)
		}
	}
	if l, ok := have.Links[have.Second]; ok && p.Wanted.VTEP.Second.IsValid() {
		x.under2 = l.Index
		x.links[l.Index] = link{Device: plan.Device{Name: have.Second}, mtu: l.MTU}
	}
	if l, ok := have.Links[have.Underlay]; ok {
		x.underlay = l.Index
		x.links[l.Index] = link{Device: plan.Device{Name: have.Underlay}, mtu: l.MTU}
	}
}

// Update enters the difference that one plan of peers makes.
func (x *Expected) Update(had, want plan.Entries) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.ways.update(had, want) // before want may become what there is
	for _, device := range [...]string{conf.VTEPName, mark.SecondVTEP} {
		now, before, then := x.On(device), had.On(device), want.On(device)
		now.Neigh = updated(now.Neigh, before.Neigh, then.Neigh)
		now.FDB = updated(now.FDB, before.FDB, then.FDB)
	}
	x.Routes = updated(x.Routes, had.Routes, want.Routes)
}

// updated puts what is wanted into the place of what was had. Into a map that is
// smaller nothing is copied: it goes into the other, as when a host starts.
func updated[K, V comparable](m, had, want map[K]V) map[K]V {
	for k := range had {
		delete(m, k)
	}
	if len(m) >= len(want) {
		maps.Copy(m, want)
		return m
	}
	for k, v := range m {
		if _, again := want[k]; !again {
			want[k] = v
		}
	}
	return want
}

// knownBridges are those of the last plan.
func (x *Expected) knownBridges() map[string]int {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return maps.Clone(x.bridges)
}

func (x *Expected) link(m rtnl.Message) bool {
	l, ok := rtnl.ParseLink(m)
	if ok && x.ways.link(m, l) {
		return true
	}
	want, watched := x.links[l.Index]
	if !ok || !watched {
		return false
	}
	return m.Type == unix.RTM_DELLINK || l.MTU != want.mtu ||
		want.ours && (!l.Up() || l.Name != want.Name) ||
		want.made && (l.MAC != want.mac || l.Master != 0 || l.STP || l.Snooping || l.VXLAN.Learning || want.Overlay != "" && l.MaxLearned != nil && *l.MaxLearned != plan.MaxLearned)
}

// suspectPort is the index of a container's host end that may not be as it
// should, or 0. Bridges tell of their ports in a family of their own.
func (x *Expected) suspectPort(m rtnl.Message) int {
	if m.Type == unix.RTM_DELLINK && len(m.Data) > 0 && m.Data[0] != unix.AF_BRIDGE {
		return 0
	}
	l, ok := rtnl.ParseLink(m)
	if !ok {
		l, ok = rtnl.ParsePortLink(m)
		if ok && mark.LooksLikeHostEnd(l.Name) {
			return l.Index
		}
		return 0
	}
	if x.contradictsPort(l) {
		return l.Index
	}
	return 0
}

// wrongPort reports whether a container's host end is not a port of its bridge,
// up and forwarding.
func (x *Expected) wrongPort(l rtnl.Link) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.contradictsPort(l)
}

func (x *Expected) contradictsPort(l rtnl.Link) bool {
	alias, ok := mark.IsHostEnd(l.Name, l.Alias)
	if !ok || l.Kind != "veth" {
		return false
	}
	bridge, ours := x.bridges[plan.BridgeOf(x.overlays, alias.Overlay, alias.Half)]
	if !ours { // there is none, see Plan.planPorts
		return l.Master == 0 && l.Up()
	}
	return l.Master != bridge || !l.Up() || plan.WrongPort(l)
}

func (x *Expected) addr(m rtnl.Message) bool {
	a, ok := rtnl.ParseAddress(m)
	if !ok {
		return false
	}
	switch ip := a.Prefix.Addr(); {
	case ip == x.own.Local: // gone from the underlay, come back, or moved to another link
		return (m.Type == unix.RTM_NEWADDR) != (a.Index == x.underlay)
	case ip == x.own.Second:
		return (m.Type == unix.RTM_NEWADDR) != (a.Index == x.under2)
	case x.seeking && m.Type == unix.RTM_NEWADDR && a.Scope == unix.RT_SCOPE_UNIVERSE && ip.Is4() != x.own.Local.Is4() && !x.links[a.Index].ours:
		return true // the agent asks itself whether it can be used
	}
	if a.Scope != unix.RT_SCOPE_UNIVERSE {
		return false
	}
	want, watched := x.links[a.Index]
	if !watched || !want.ours {
		return x.concernsRange(a.Prefix, true)
	}
	return slices.Contains(want.Addrs, a.Prefix) == (m.Type == unix.RTM_DELADDR)
}

// concernsRange reports whether a network of somebody else lies in an overlay.
// What the kernel makes for our own addresses comes while their devices are not
// entered yet, and single addresses inside our own agent subnets are those of
// containers that another main plugin attaches.
func (x *Expected) concernsRange(p netip.Prefix, byKernel bool) bool {
	in := func(r netip.Prefix) bool { return r.Contains(p.Addr()) }
	if (byKernel || p.IsSingleIP()) && (slices.ContainsFunc(x.subnets, in) || slices.Contains(x.pools, p.Masked())) {
		return false
	}
	return slices.ContainsFunc(x.ranges, in) || slices.ContainsFunc(x.pools, in)
}

func (x *Expected) route(m rtnl.Message) bool {
	r, ok := rtnl.ParseRoute(m)
	if !ok {
		return false
	}
	if x.ways.route(r) {
		return true
	}
	dev := x.links[r.OIF]
	if r.Table != unix.RT_TABLE_MAIN {
		return r.Table == unix.RT_TABLE_LOCAL && r.Kind == unix.RTN_LOCAL && m.Type == unix.RTM_DELROUTE && dev.ours &&
			slices.ContainsFunc(dev.Addrs, func(a netip.Prefix) bool { return a.Addr() == r.Dst.Addr() })
	}
	want, wanted := x.Routes[r.Dst]
	switch {
	case r.Protocol == mark.RouteProtocol && m.Type == unix.RTM_NEWROUTE:
		return !wanted || asOurs(r, devices{vtep: x.vtep, second: x.second}, x.ways.devices[r.OIF], x.own) != want
	case r.Protocol == mark.RouteProtocol:
		return wanted && r.Metric == want.Metric
	case dev.ours: // the one that came with an address
		return r.Protocol == unix.RTPROT_KERNEL && m.Type == unix.RTM_DELROUTE &&
			slices.ContainsFunc(dev.Addrs, func(a netip.Prefix) bool { return a.Masked() == r.Dst })
	}
	return x.concernsRange(r.Dst, r.Protocol == unix.RTPROT_KERNEL) // somebody else's, perhaps instead of ours
}

func (x *Expected) neighbour(m rtnl.Message) bool {
	n, ok := rtnl.ParseNeighbour(m)
	if !ok || n.Index == 0 {
		return false
	}
	var expected *plan.Forwarding
	switch n.Index {
	case x.vtep:
		expected = x.On(conf.VTEPName)
	case x.second:
		expected = x.On(mark.SecondVTEP)
	default:
		return false
	}
	if n.Family == unix.AF_BRIDGE {
		want, wanted := expected.FDB[n.MAC]
		if m.Type == unix.RTM_DELNEIGH {
			return wanted && want == n.IP
		}
		return !wanted || want != n.IP
	}
	want, wanted := expected.Neigh[n.IP]
	if m.Type == unix.RTM_DELNEIGH {
		return wanted
	}
	if n.State&unix.NUD_PERMANENT == 0 {
		return wanted // the kernel forgets temporary ones of its own by itself
	}
	return !wanted || want != n.MAC
}

// The attributes of RTM_NEWNETCONF, linux/netconf.h.
const (
	netconfIfindex    = 1
	netconfForwarding = 2
	netconfRPFilter   = 3
	netconfAllDevices = -1
)

// netconf is about forwarding and source validation, of one device or of all.
func (x *Expected) netconf(m rtnl.Message) bool {
	if len(m.Data) < 4 { // a family, padded
		return false
	}
	ifindex, forwarding, rpFilter := int32(0), int32(1), int32(plan.RPFilterLoose)
	rtnl.EachAttr(m.Data[4:], func(typ uint16, v []byte) {
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
	if int(ifindex) == x.underlay {
		return m.Data[0] == unix.AF_INET
	}
	return x.links[int(ifindex)].ours && (forwarding == 0 || rpFilter != plan.RPFilterLoose)
}

// announced reports whether the kernel tells of every change of a sysctl; see
// netconf.
func announced(s plan.Setting) bool {
	return s.Dev != "" && (strings.HasSuffix(s.Key, "/forwarding") || strings.HasSuffix(s.Key, "/rp_filter"))
}

// wrongSysctls reads the sysctls and answers with those that are not as they
// should be.
func (x *Expected) wrongSysctls() map[string]string {
	x.mu.RLock()
	settings := x.sysctls
	x.mu.RUnlock()
	wrong := map[string]string{}
	for _, s := range settings {
		if v, ok := readSysctl(s.Key); ok && v != s.Value {
			wrong[s.Key] = v
		}
	}
	return wrong
}
