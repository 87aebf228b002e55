package plan_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan/plantest"
)

var (
	onlyIPv4 = plantest.OnlyIPv4
	onlyIPv6 = plantest.OnlyIPv6
	bothIP   = plantest.BothIP
)

const up = unix.IFF_UP

// bareKernel is a host with one Ethernet and nothing of ours.
func bareKernel(agentIP netip.Addr) *plan.State {
	return &plan.State{
		IPv6:     true,
		Underlay: "eth0",
		Links:    links(rtnl.Link{Name: "lo", Index: 1, MTU: 65536, Flags: up | unix.IFF_LOOPBACK}, rtnl.Link{Name: "eth0", Index: 2, MTU: 1500, Flags: up}),
		Others:   []plan.AddrKey{{Dev: "eth0", Prefix: netip.PrefixFrom(agentIP, 12)}},
		Addrs:    map[plan.AddrKey]struct{}{}, Connected: map[plan.AddrKey]struct{}{}, Local: map[plan.AddrKey]struct{}{},
		Foreign: map[netip.Prefix]plan.ForeignRoute{},
		Entries: plan.MakeEntries(0),
		Sysctls: map[string]string{},
	}
}

func links(ls ...rtnl.Link) map[string]plan.Link {
	m := map[string]plan.Link{}
	for _, l := range ls {
		m[l.Name] = plan.Link{Link: l}
	}
	return m
}

// change replaces a link by what f makes of it.
func change(s *plan.State, name string, f func(*plan.Link)) {
	l := s.Links[name]
	l.Name = name
	f(&l)
	s.Links[name] = l
}

// kernelWith is the kernel after everything for c was done.
func kernelWith(c plan.Wanted) *plan.State {
	s := bareKernel(c.VTEP.Local)
	made := plan.Make(c, bareKernel(c.VTEP.Local))
	for i, d := range c.Devices() {
		l := rtnl.Link{Name: d.Name, Index: 10 + i, Kind: "bridge", MAC: mark.BridgeMAC(d.Addrs), MTU: made.MTU, Flags: up}
		if d.Overlay == "" {
			l.Kind, l.MAC = "vxlan", c.VTEP.MAC
			l.VXLAN = rtnl.VXLAN{VNI: 1024, Port: 64000, Local: c.VTEP.Local}
		} else {
			half, _ := mark.HalfOf(d.Name)
			l.Alias = mark.BridgeAlias(d.Overlay, half)
		}
		s.Links[d.Name] = plan.Link{Link: l}
		for _, a := range d.Addrs {
			k := plan.AddrKey{Dev: d.Name, Prefix: a}
			s.Addrs[k], s.Connected[k], s.Local[k] = struct{}{}, struct{}{}, struct{}{}
		}
	}
	for _, w := range c.Settings(true) {
		s.Sysctls[w.Key] = w.Value
	}
	s.Entries = made.Entries
	return s
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestPlan(t *testing.T) {
	edit := func(c plan.Wanted, f func(*plan.Wanted)) plan.Wanted {
		f(&c)
		return c
	}
	kernel := func(s *plan.State, f func(*plan.State)) *plan.State {
		f(s)
		return s
	}
	v4 := onlyIPv4.Host(0, 3)
	v6 := onlyIPv6.Host(0, 2)
	six := plantest.Network{Overlays: onlyIPv6.Overlays, Length6: 80, Under6: true, Only6: true}
	over6 := plantest.Network{Overlays: onlyIPv4.Overlays, Length: 24, Length6: 80, Under6: true}.Host(0, 2)

	for _, tc := range []struct {
		name string
		want plan.Wanted
		have *plan.State
		ops  string
		bad  string // the problems, one a line

		notices string // one a line
	}{
		{
			name: "bare kernel, IPv4",
			want: edit(onlyIPv4.Host(0, 2), func(c *plan.Wanted) { c.VTEP.IP6 = netip.Prefix{}; c.Bridges = c.Bridges[:1] }),
			have: kernel(bareKernel(onlyIPv4.AgentIP(0)), func(s *plan.State) { s.IPv6 = false }),
			ops: `
				link add vtep1024 mtu 1450 address 70:b3:d5:80:00:01 type vxlan id 1024 dstport 64000 local 172.16.0.2 nolearning
				link add m-dcos address 0a:58:09:00:00:01 type bridge
				link set m-dcos alias "overlay: dcos/mesos"
				link set m-dcos mtu 1450
				sysctl net/ipv4/ip_forward=1
				sysctl net/ipv4/conf/vtep1024/forwarding=1
				sysctl net/ipv4/conf/vtep1024/rp_filter=2
				sysctl net/ipv4/conf/vtep1024/promote_secondaries=1
				sysctl net/ipv4/conf/m-dcos/forwarding=1
				sysctl net/ipv4/conf/m-dcos/rp_filter=2
				sysctl net/ipv4/conf/m-dcos/promote_secondaries=1
				link set vtep1024 up
				addr add 44.128.0.1/14 dev vtep1024
				link set m-dcos up
				addr add 9.0.0.1/25 dev m-dcos
				neigh replace 44.128.0.2 lladdr 70:b3:d5:80:00:02 dev vtep1024
				fdb replace 70:b3:d5:80:00:02 dev vtep1024 dst 172.16.0.3
				route add 9.0.1.0/24 via 44.128.0.2 dev vtep1024 proto 44 metric 2
				route add blackhole 9.0.0.0/24 proto 44 metric 4294967295
				route add unreachable 9.0.0.0/8 proto 44 metric 4294967294
			`,
		},
		{
			name: "IPv6 forwarding comes after the routers were told to be heard",
			want: edit(v6, func(c *plan.Wanted) { c.Bridges, c.Peers = nil, nil }),
			have: kernel(kernelWith(edit(v6, func(c *plan.Wanted) { c.Bridges, c.Peers = nil, nil })), func(s *plan.State) {
				s.Sysctls["net/ipv6/conf/all/forwarding"] = "0"
				s.AcceptRA = []string{"eth0", "vtep1024"}
			}),
			ops: `
				sysctl net/ipv6/conf/eth0/accept_ra=2
				sysctl net/ipv6/conf/all/forwarding=1
			`,
		},
		{
			name: "IPv6 alone, over IPv6: VTEP, neighbours and routes have nothing of IPv4",
			want: edit(six.Host(0, 2), func(c *plan.Wanted) { c.Bridges = nil }),
			have: kernel(kernelWith(edit(six.Host(0, 1), func(c *plan.Wanted) { c.Bridges = nil })), func(s *plan.State) {
				s.Addrs = map[plan.AddrKey]struct{}{}
			}),
			ops: `
				addr add fd01:a::1/64 dev vtep1024
				neigh replace fd01:a::2 lladdr 72:b3:d5:00:00:02 dev vtep1024
				fdb replace 72:b3:d5:00:00:02 dev vtep1024 dst fd00:1::3
				route add fd01:b:0:0:1::/80 via fd01:a::2 dev vtep1024 proto 44 metric 2
			`,
		},
		{
			name: "a host that has got no IPv4 VTEP address yet",
			want: edit(onlyIPv4.Host(0, 2), func(c *plan.Wanted) { c.VTEP.IP = netip.Prefix{} }),
			have: kernelWith(edit(onlyIPv4.Host(0, 2), func(c *plan.Wanted) { c.VTEP.IP, c.Overlays, c.Bridges = netip.Prefix{}, nil, nil })),
			bad:  `dcos: overlay dcos has no IPv4 here: the lease has no IPv4 VTEP address; configure vtep_subnet, or a larger one`,
		},
		{
			name: "IPv4 was added, and the routes of IPv6 go by another metric",
			want: edit(onlyIPv6.Host(0, 2), func(c *plan.Wanted) {
				c.VTEP.MAC, c.Peers[0].VTEPIP6 = conf.MAC{0x72, 0xb3, 0xd5, 0, 0, 1}, netip.MustParseAddr("fd01:a::9")
			}),
			have: kernelWith(edit(onlyIPv6.Host(0, 2), func(c *plan.Wanted) {
				c.VTEP.MAC, c.VTEP.IP = conf.MAC{0x72, 0xb3, 0xd5, 0, 0, 1}, netip.Prefix{}
				c.Peers[0].VTEPIP, c.Peers[0].VTEPIP6 = netip.Addr{}, netip.MustParseAddr("fd01:a::9")
			})),
			ops: `
				addr add 44.128.0.1/14 dev vtep1024
				neigh replace 44.128.0.2 lladdr 70:b3:d5:80:00:02 dev vtep1024
				route add fd01:b:0:0:1::/80 via fd01:a::9 dev vtep1024 proto 44 metric 2
				route delete fd01:b:0:0:1::/80 via fd01:a::9 dev vtep1024 proto 44 metric 9
			`,
		},
		{name: "nothing to do", want: v4, have: kernelWith(v4)},
		{name: "nothing to do, IPv6", want: v6, have: kernelWith(v6)},
		{name: "nothing to do, IPv6 underlay", want: over6, have: kernelWith(over6)},
		{
			name: "a subnet moved to another peer",
			want: edit(v4, func(c *plan.Wanted) {
				c.Peers = []conf.Peer{c.Peers[0], c.Peers[1]}
				c.Peers[0].Subnets, c.Peers[1].Subnets = c.Peers[1].Subnets, nil
			}),
			have: kernelWith(v4),
			ops: `
				route add 9.0.2.0/24 via 44.128.0.2 dev vtep1024 proto 44 metric 2
				route delete 9.0.2.0/24 via 44.128.0.3 dev vtep1024 proto 44 metric 3
				route delete 9.0.1.0/24 via 44.128.0.2 dev vtep1024 proto 44 metric 2
			`,
		},
		{
			name: "a peer came, another went, a third has a new agent IP",
			want: edit(v4, func(c *plan.Wanted) {
				c.Peers = []conf.Peer{onlyIPv4.Peer(2), onlyIPv4.Peer(3)}
				c.Peers[0].AgentIP = netip.MustParseAddr("172.16.0.99")
			}),
			have: kernelWith(v4),
			ops: `
				neigh replace 44.128.0.4 lladdr 70:b3:d5:80:00:04 dev vtep1024
				neigh replace fd01:a::4 lladdr 70:b3:d5:80:00:04 dev vtep1024
				fdb replace 70:b3:d5:80:00:03 dev vtep1024 dst 172.16.0.99
				fdb replace 70:b3:d5:80:00:04 dev vtep1024 dst 172.16.0.5
				route add 9.0.3.0/24 via 44.128.0.4 dev vtep1024 proto 44 metric 4
				route delete 9.0.1.0/24 via 44.128.0.2 dev vtep1024 proto 44 metric 2
				neigh delete 44.128.0.2 lladdr 70:b3:d5:80:00:02 dev vtep1024
				neigh delete fd01:a::2 lladdr 70:b3:d5:80:00:02 dev vtep1024
				fdb delete 70:b3:d5:80:00:02 dev vtep1024 dst 172.16.0.3
			`,
		},
		{
			name: "routes of ours in the wrong shape",
			want: v4,
			have: kernel(kernelWith(v4), func(s *plan.State) {
				gw := netip.MustParseAddr("44.128.0.2")
				s.Routes[prefix("9.0.1.0/24")] = plan.Route{Metric: 7, Via: gw}
				s.Routes[prefix("9.0.2.0/24")] = plan.Route{Metric: 3, Kind: plan.Alien}
				s.More = []plan.RouteTo{{Dst: prefix("9.0.1.0/24"), Route: plan.Route{Metric: 2, Via: gw}}, {Dst: prefix("9.0.0.0/24"), Route: plan.Route{Metric: 5, Via: gw}}}
			}),
			ops: `
				route delete 9.0.1.0/24 via 44.128.0.2 dev vtep1024 proto 44 metric 7
				route replace 9.0.2.0/24 via 44.128.0.3 dev vtep1024 proto 44 metric 3
				route delete 9.0.0.0/24 via 44.128.0.2 dev vtep1024 proto 44 metric 5
			`,
		},
		{
			name: "a VTEP that differs takes everything on it along",
			want: edit(v4, func(c *plan.Wanted) { c.Peers, c.Bridges = c.Peers[:1], nil }),
			have: kernel(kernelWith(edit(v4, func(c *plan.Wanted) { c.Peers, c.Bridges = c.Peers[:1], nil })), func(s *plan.State) {
				change(s, "vtep1024", func(l *plan.Link) { l.MAC = conf.MAC{2} })
			}),
			ops: `
				link delete vtep1024
				link add vtep1024 mtu 1450 address 70:b3:d5:80:00:01 type vxlan id 1024 dstport 64000 local 172.16.0.2 nolearning
				sysctl net/ipv4/conf/vtep1024/forwarding=1
				sysctl net/ipv4/conf/vtep1024/rp_filter=2
				sysctl net/ipv4/conf/vtep1024/promote_secondaries=1
				sysctl net/ipv6/conf/vtep1024/accept_ra=0
				sysctl net/ipv6/conf/vtep1024/autoconf=0
				sysctl net/ipv6/conf/vtep1024/accept_redirects=0
				sysctl net/ipv6/conf/vtep1024/addr_gen_mode=1
				sysctl net/ipv6/conf/vtep1024/disable_ipv6=0
				sysctl net/ipv6/conf/vtep1024/forwarding=1
				sysctl net/ipv6/conf/vtep1024/accept_dad=0
				link set vtep1024 up
				addr add 44.128.0.1/14 dev vtep1024
				addr add fd01:a::1/64 dev vtep1024
				neigh replace 44.128.0.2 lladdr 70:b3:d5:80:00:02 dev vtep1024
				neigh replace fd01:a::2 lladdr 70:b3:d5:80:00:02 dev vtep1024
				fdb replace 70:b3:d5:80:00:02 dev vtep1024 dst 172.16.0.3
				route add 9.0.1.0/24 via 44.128.0.2 dev vtep1024 proto 44 metric 2
			`,
		},
		{
			name: "new VTEP addresses; an IPv6 address cannot have two lengths",
			want: edit(v4, func(c *plan.Wanted) { c.VTEP.IP, c.VTEP.IP6 = prefix("44.128.0.1/15"), prefix("fd01:a::1/72") }),
			have: kernelWith(v4),
			ops: `
				addr delete fd01:a::1/64 dev vtep1024
				addr add 44.128.0.1/15 dev vtep1024
				addr add fd01:a::1/72 dev vtep1024
				addr delete 44.128.0.1/14 dev vtep1024
			`,
		},
		{
			name: "underlay with another MTU",
			want: v4,
			have: kernel(kernelWith(v4), func(s *plan.State) {
				s.Links["eth0"] = plan.Link{Link: rtnl.Link{Name: "eth0", Index: 2, MTU: 9000, Flags: up}}
			}),
			ops: `
				link set vtep1024 mtu 8950
				link set m-dcos mtu 8950
				link set d-dcos mtu 8950
			`,
		},
		{
			name: "configured MTU",
			want: edit(v4, func(c *plan.Wanted) { c.VTEP.MTU = 1420; c.Bridges = nil }),
			have: kernelWith(edit(v4, func(c *plan.Wanted) { c.Bridges = nil })),
			ops:  `link set vtep1024 mtu 1420`,
		},
		{
			name: "configured MTU that does not fit",
			want: edit(v4, func(c *plan.Wanted) { c.VTEP.MTU = 9001 }),
			have: kernelWith(v4),
		},
		{
			name: "agent IP on no interface: everything stays as it is",
			want: v4,
			have: kernel(kernelWith(v4), func(s *plan.State) { s.Underlay = "" }),
			bad:  `: agent IP 172.16.0.2 is on no interface of this host`,
		},
		{
			name: "agent IP on the loopback of a routing host",
			want: v4,
			have: kernel(kernelWith(v4), func(s *plan.State) {
				s.Underlay = "lo"
			}),
		},
		{
			name: "no IPv6 in the kernel",
			want: edit(bothIP.Host(0, 2), func(c *plan.Wanted) { c.Bridges = c.Bridges[2:] }),
			have: kernel(kernelWith(edit(onlyIPv4.Host(0, 2), func(c *plan.Wanted) { c.Bridges = nil })), func(s *plan.State) {
				s.IPv6 = false
				s.Links["m-dcos6"] = plan.Link{Link: rtnl.Link{Name: "m-dcos6", Kind: "bridge", Alias: "overlay: dcos6/mesos"}}
				delete(s.Neigh, netip.MustParseAddr("fd01:a::2"))
				delete(s.Addrs, plan.AddrKey{Dev: "vtep1024", Prefix: prefix("fd01:a::1/64")})
			}),
			ops: `link delete m-dcos6`,
			bad: `dcos6: overlay dcos6 has no IPv6 here: this kernel has no IPv6; start it without ipv6.disable=1`,
		},
		{
			name: "an MTU too small for IPv6",
			want: edit(v6, func(c *plan.Wanted) { c.VTEP.MTU = 1200; c.Bridges, c.Peers = nil, nil }),
			have: kernel(kernelWith(edit(v6, func(c *plan.Wanted) { c.Bridges, c.Peers = nil, nil })), func(s *plan.State) {
				delete(s.Routes, prefix("fd01:b::/80"))
				delete(s.Routes, prefix("fd01:b::/64"))
				delete(s.Addrs, plan.AddrKey{Dev: "vtep1024", Prefix: prefix("fd01:a::1/64")})
			}),
			ops: `link set vtep1024 mtu 1200`,
			bad: `dcos6: overlay dcos6 has no IPv6 here: the MTU of the overlay is 1200 and IPv6 needs at least 1280; raise vtep_mtu or the MTU of the underlay`,
		},
		{
			name: "a lease without an IPv6 VTEP",
			want: edit(v6, func(c *plan.Wanted) { c.VTEP.IP6 = netip.Prefix{}; c.Bridges, c.Peers = nil, nil }),
			have: kernelWith(edit(v6, func(c *plan.Wanted) { c.VTEP.IP6, c.Overlays, c.Bridges, c.Peers = netip.Prefix{}, nil, nil, nil })),
			bad:  `dcos6: overlay dcos6 has no IPv6 here: the lease has no IPv6 VTEP address; configure vtep_subnet6, or a larger one`,
		},
		{
			name: "foreign routes: in the way, equal, harmless",
			want: v4,
			have: kernel(kernelWith(v4), func(s *plan.State) {
				delete(s.Routes, prefix("9.0.2.0/24"))
				s.Foreign = map[netip.Prefix]plan.ForeignRoute{
					prefix("9.0.0.0/24"): {Text: "9.0.0.0/24 dev docker7", Dev: "docker7"},
					prefix("9.0.1.0/24"): {Metric: 5000, Text: "9.0.1.0/24 via 10.0.0.1", Leads: true},
					prefix("9.0.2.0/24"): {Metric: 3, Text: "9.0.2.0/24 via 10.0.0.1", Leads: true},
				}
			}),
			bad: `dcos: route 9.0.2.0/24 via 10.0.0.1 is not ours and takes the place of the one via VTEP 44.128.0.3; remove it (ip route show 9.0.2.0/24)`,
		},
		{
			name: "the higher epoch has the subnet, whatever the order",
			want: edit(v4, func(c *plan.Wanted) {
				a, b := onlyIPv4.Peer(1), onlyIPv4.Peer(2)
				a.Epoch, b.Epoch = 9, 8
				b.Subnets = a.Subnets
				c.Peers = []conf.Peer{a, b}
			}),
			have: kernelWith(v4),
			ops:  `route delete 9.0.2.0/24 via 44.128.0.3 dev vtep1024 proto 44 metric 3`,
		},
		{
			name: "a peer claims our own subnet",
			want: edit(v4, func(c *plan.Wanted) {
				p := onlyIPv4.Peer(1)
				p.Subnets = append(p.Subnets, prefix("9.0.0.0/24"))
				c.Peers = []conf.Peer{p, c.Peers[1]}
			}),
			have: kernelWith(v4),
			bad:  `dcos: agent subnet 9.0.0.0/24 is ours, and the peer at VTEP 44.128.0.2 claims it as well`,
		},
		{
			name: "peers that cannot be: half a lease, the wrong family, ourselves",
			want: edit(v4, func(c *plan.Wanted) {
				bad, six, self := onlyIPv4.Peer(3), onlyIPv4.Peer(4), onlyIPv4.Peer(5)
				bad.AgentIP, six.AgentIP, self.AgentIP = netip.Addr{}, netip.MustParseAddr("fd00::1"), c.VTEP.Local
				c.Peers = append(append([]conf.Peer{}, c.Peers...), bad, six, self)
			}),
			have: kernelWith(v4),
			notices: `
				peer agent-3 has no agent IP
				peer agent-4 at fd00::1 cannot be reached from agent IP 172.16.0.2: one is IPv4, the other IPv6
			`,
		},
		{
			name: "no peer can be reached",
			want: edit(v4, func(c *plan.Wanted) {
				six := onlyIPv4.Peer(1)
				six.AgentIP = netip.MustParseAddr("fd00::1")
				c.Peers = []conf.Peer{six}
			}),
			have: kernel(kernelWith(v4), func(s *plan.State) {
				s.Neigh, s.FDB, s.Routes = nil, nil, map[netip.Prefix]plan.Route{
					prefix("9.0.0.0/24"): {Metric: mark.BlackholeMetric, Kind: plan.Blackhole}, prefix("9.0.0.0/8"): {Metric: mark.UnreachableMetric, Kind: plan.Unreachable},
				}
			}),
			bad: `dcos: peer agent-1 at fd00::1 cannot be reached from agent IP 172.16.0.2: one is IPv4, the other IPv6`,
		},
		{
			name: "a name that is taken, a VNI that is taken",
			want: v4,
			have: kernel(kernelWith(v4), func(s *plan.State) {
				s.Links["m-dcos"] = plan.Link{Link: rtnl.Link{Name: "m-dcos", Kind: "veth", MTU: 1450}}
				delete(s.Links, "vtep1024")
				s.Links["vx0"] = plan.Link{Link: rtnl.Link{Name: "vx0", Kind: "vxlan", MTU: 1450, VXLAN: rtnl.VXLAN{VNI: 1024, Port: 64000}}}
				s.Entries, s.Addrs = plan.MakeEntries(0), map[plan.AddrKey]struct{}{{Dev: "d-dcos", Prefix: prefix("9.0.0.129/25")}: {}}
				s.Sysctls = map[string]string{}
				for _, w := range v4.Settings(true) {
					s.Sysctls[w.Key] = w.Value
				}
			}),
			ops: `
				link add vtep1024 mtu 1450 address 70:b3:d5:80:00:01 type vxlan id 1024 dstport 64000 local 172.16.0.2 nolearning
				sysctl net/ipv4/conf/vtep1024/forwarding=1
				sysctl net/ipv4/conf/vtep1024/rp_filter=2
				sysctl net/ipv4/conf/vtep1024/promote_secondaries=1
				sysctl net/ipv6/conf/vtep1024/accept_ra=0
				sysctl net/ipv6/conf/vtep1024/autoconf=0
				sysctl net/ipv6/conf/vtep1024/accept_redirects=0
				sysctl net/ipv6/conf/vtep1024/addr_gen_mode=1
				sysctl net/ipv6/conf/vtep1024/disable_ipv6=0
				sysctl net/ipv6/conf/vtep1024/forwarding=1
				sysctl net/ipv6/conf/vtep1024/accept_dad=0
				link set vtep1024 up
				addr add 44.128.0.1/14 dev vtep1024
				addr add fd01:a::1/64 dev vtep1024
				neigh replace 44.128.0.2 lladdr 70:b3:d5:80:00:02 dev vtep1024
				neigh replace fd01:a::2 lladdr 70:b3:d5:80:00:02 dev vtep1024
				neigh replace 44.128.0.3 lladdr 70:b3:d5:80:00:03 dev vtep1024
				neigh replace fd01:a::3 lladdr 70:b3:d5:80:00:03 dev vtep1024
				fdb replace 70:b3:d5:80:00:02 dev vtep1024 dst 172.16.0.3
				fdb replace 70:b3:d5:80:00:03 dev vtep1024 dst 172.16.0.4
				route add 9.0.1.0/24 via 44.128.0.2 dev vtep1024 proto 44 metric 2
				route add 9.0.2.0/24 via 44.128.0.3 dev vtep1024 proto 44 metric 3
				route add blackhole 9.0.0.0/24 proto 44 metric 4294967295
				route add unreachable 9.0.0.0/8 proto 44 metric 4294967294
			`,
			bad: `
				: link vx0 is a VXLAN device with our VNI 1024 and UDP port 64000; remove it so that vtep1024 can be made
				dcos: link m-dcos is in the way: the bridge of overlay dcos needs that name, but it is a veth; remove or rename it
			`,
		},
		{
			name: "bridges no longer wanted: ours, in use, of others; and one we had no time to name",
			want: v4,
			have: kernel(kernelWith(v4), func(s *plan.State) {
				s.Links["m-old"] = plan.Link{Link: rtnl.Link{Name: "m-old", Kind: "bridge", Alias: "overlay: old/mesos"}}
				s.Links["d-old"] = plan.Link{Link: rtnl.Link{Name: "d-old", Kind: "bridge", Alias: "overlay: old/docker"}, Ports: 2}
				s.Links["d-other"] = plan.Link{Link: rtnl.Link{Name: "d-other", Kind: "bridge"}}
				change(s, "m-dcos", func(l *plan.Link) { l.Alias = "" })
			}),
			ops: `
				link set m-dcos alias "overlay: dcos/mesos"
				link delete m-old
			`,
			notices: `bridge d-old of overlay old is no longer wanted but has 2 ports; it is removed when the last container has gone`,
		},
		{
			name: "bridges of an overlay that was removed by force",
			want: takingDown(v4, "old"),
			have: kernel(kernelWith(v4), func(s *plan.State) {
				s.Links["d-old"] = plan.Link{Link: rtnl.Link{Name: "d-old", Kind: "bridge", Alias: "overlay: old/docker", Index: 70}, Ports: 3}
				s.Links["v1"] = plan.Link{Link: rtnl.Link{Name: "v1", Kind: "veth", Master: 70, Flags: up}}
				s.Links["v2"] = plan.Link{Link: rtnl.Link{Name: "v2", Kind: "veth", Master: 70}}
				s.Links["eth9"] = plan.Link{Link: rtnl.Link{Name: "eth9", Master: 70, Flags: up}}
				s.Links["d-older"] = plan.Link{Link: rtnl.Link{Name: "d-older", Kind: "bridge", Alias: "overlay: older/docker"}, Ports: 1}
				s.Links["d-other"] = plan.Link{Link: rtnl.Link{Name: "d-other", Kind: "bridge"}, Ports: 2}
			}),
			ops: `
				link set v1 down
				link delete d-old
			`,
			notices: `bridge d-older of overlay older is no longer wanted but has 1 ports; it is removed when the last container has gone`,
		},
		{
			name: "what another program put on a bridge of its own stays",
			want: v4,
			have: kernel(kernelWith(v4), func(s *plan.State) {
				change(s, "d-dcos", func(l *plan.Link) { l.Alias, l.MAC = "", conf.MAC{2, 0x42} })
				s.Addrs[plan.AddrKey{Dev: "d-dcos", Prefix: prefix("10.9.9.1/24")}] = struct{}{}
				s.Addrs[plan.AddrKey{Dev: "m-dcos", Prefix: prefix("10.9.9.1/24")}] = struct{}{}
			}),
			ops: `addr delete 10.9.9.1/24 dev m-dcos`,
		},
		{
			name: "no overlays, no peers: only the VTEP is left",
			want: plan.Wanted{VTEP: v4.VTEP},
			have: kernelWith(edit(v4, func(c *plan.Wanted) { c.Peers = c.Peers[:1] })),
			ops: `
				route delete unreachable 9.0.0.0/8 proto 44 metric 4294967294
				route delete blackhole 9.0.0.0/24 proto 44 metric 4294967295
				route delete 9.0.1.0/24 via 44.128.0.2 dev vtep1024 proto 44 metric 2
				neigh delete 44.128.0.2 lladdr 70:b3:d5:80:00:02 dev vtep1024
				neigh delete fd01:a::2 lladdr 70:b3:d5:80:00:02 dev vtep1024
				fdb delete 70:b3:d5:80:00:02 dev vtep1024 dst 172.16.0.3
				link delete d-dcos
				link delete m-dcos
			`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := plan.Make(tc.want, tc.have)
			var ops, bad []string
			for _, o := range p.Ops {
				ops = append(ops, o.String())
			}
			for _, p := range p.Problems {
				bad = append(bad, p.Overlay+": "+p.Err.Error())
			}
			if diff := cmp.Diff(block(tc.ops), strings.Join(ops, "\n")); diff != "" {
				t.Errorf("operations (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(block(tc.bad), strings.Join(bad, "\n")); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(block(tc.notices), strings.Join(p.Notices, "\n")); diff != "" {
				t.Errorf("notices (-want +got):\n%s", diff)
			}
		})
	}
}

// twoFamilies is a host with an agent IP of each family, and a second peer with IPv6
// alone; the link of the second one has this MTU.
func twoFamilies(mtu int) (plan.Wanted, *plan.State) {
	c := bothIP.Host(0, 3)
	c.VTEP.Second = netip.MustParseAddr("fd00:1::2")
	c.Peers[1].AgentIP, c.Peers[1].TwoFamilies = netip.MustParseAddr("fd00:1::4"), true
	have := bareKernel(c.VTEP.Local)
	have.Second = "eth1"
	have.Links["eth1"] = plan.Link{Link: rtnl.Link{Name: "eth1", Index: 3, MTU: mtu, Flags: up}}
	return c, have
}

// A VXLAN device of others is in the way of that of ours which has its family. One
// that names no address has IPv4.
func TestVXLANOfOthers(t *testing.T) {
	for _, tc := range []struct {
		what  string
		other rtnl.VXLAN
		by    string // the device that it is in the way of
	}{
		{"of no address", rtnl.VXLAN{}, "vtep1024"},
		{"with a local IPv4 address", rtnl.VXLAN{Local: netip.MustParseAddr("172.16.0.2")}, "vtep1024"},
		{"with a local IPv6 address", rtnl.VXLAN{Local: netip.MustParseAddr("fd00:1::2")}, "vtep1024-2"},
		{"with an IPv6 group", rtnl.VXLAN{Remote: netip.MustParseAddr("ff02::1"), Bound: true}, "vtep1024-2"},
	} {
		c, have := twoFamilies(1500)
		tc.other.VNI, tc.other.Port = 1024, 64000
		have.Links["vx0"] = plan.Link{Link: rtnl.Link{Name: "vx0", Kind: "vxlan", MTU: 1450, VXLAN: tc.other}}
		p := plan.Make(c, have)
		said := p.Notices
		for _, problem := range p.Problems {
			said = append(said, problem.Err.Error())
		}
		if len(said) != 1 || !strings.HasSuffix(said[0], "so that "+tc.by+" can be made") || (len(p.Problems) == 0) != (tc.by != "vtep1024") {
			t.Errorf("%s: problems %v, notices %q, want one about %s", tc.what, p.Problems, p.Notices, tc.by)
		}
	}
}

// Where the second device takes too little for IPv6, that is said; IPv4 goes by it.
func TestSecondDeviceWithoutIPv6(t *testing.T) {
	for mtu, want := range map[int]string{
		1350: "", 1349: "IPv6 of containers goes to no host that is reached from agent IP fd00:1::2: vtep1024-2 takes packets of 1279 bytes, and IPv6 needs at least 1280; raise the MTU of the link that has the address",
	} {
		c, have := twoFamilies(mtu)
		p := plan.Make(c, have)
		if got := strings.Join(p.Notices, "\n"); got != want || len(p.Problems) > 0 {
			t.Errorf("MTU %d: notices %q, problems %v, want %q", mtu, got, p.Problems, want)
		}
		for _, s := range c.Peers[1].Subnets {
			if r, there := p.Entries.Routes[s]; there != (s.Addr().Is4() || want == "") || there && r.Dev != mark.SecondVTEP {
				t.Errorf("MTU %d: route to %s: %v %v", mtu, s, there, r)
			}
		}
	}
}

// block takes the indentation off a text block.
func block(s string) string {
	var lines []string
	for line := range strings.Lines(s) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

func TestPeerMetric(t *testing.T) {
	for _, tc := range []struct {
		vtep, pool string
		want       uint32
	}{
		{"44.128.0.3", "44.128.0.0/20", 3},
		{"44.128.15.254", "44.128.0.0/20", 4094},
		{"10.255.255.254", "10.0.0.0/8", 0xfffffe},
		{"fd01:a::7", "fd01:a::/64", 7},
		{"fd01:a::1:0:3", "fd01:a::/64", 3},
		{"fd01:a::ffff", "fd01:a::ff00/120", 0xff},
		{"44.128.0.3", "", 0x800003},       // of a host whose peers have no IPv4 yet
		{"44.128.0.0", "44.128.0.0/20", 1}, // 0 would mean the default, 1024, in IPv6
	} {
		var pool netip.Prefix
		if tc.pool != "" {
			pool = prefix(tc.pool)
		}
		if got := mark.PeerMetric(netip.MustParseAddr(tc.vtep), pool); got != tc.want {
			t.Errorf("%s in %s: %d, want %d", tc.vtep, tc.pool, got, tc.want)
		}
	}
}

func TestBridgeMAC(t *testing.T) {
	for _, tc := range []struct{ addrs, want string }{
		{"9.0.1.129/25", "0a:58:09:00:01:81"},
		{"fd01:b::1/81 9.0.1.129/25", "0a:58:09:00:01:81"},
		{"fd01:b::1/81", "02:58:b2:09:18:b5"},
	} {
		var addrs []netip.Prefix
		for s := range strings.FieldsSeq(tc.addrs) {
			addrs = append(addrs, prefix(s))
		}
		if got := mark.BridgeMAC(addrs).String(); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.addrs, got, tc.want)
		}
	}
}

// TestBridgeMACOf: a bridge that has one keeps it when IPv4 is added to its overlay.
func TestBridgeMACOf(t *testing.T) {
	v4, v6 := prefix("9.0.1.129/25"), prefix("fd01:b::1/81")
	for _, tc := range []struct {
		has   string
		addrs []netip.Prefix
		want  string
	}{
		{"02:58:b2:09:18:b5", []netip.Prefix{v4, v6}, "02:58:b2:09:18:b5"},
		{"02:58:b2:09:18:b5", []netip.Prefix{v4}, "0a:58:09:00:01:81"},
		{"0a:58:09:00:01:81", []netip.Prefix{v4, v6}, "0a:58:09:00:01:81"},
		{"0a:58:09:00:01:81", []netip.Prefix{v6}, "02:58:b2:09:18:b5"},
		{"02:00:00:00:00:01", []netip.Prefix{v4, v6}, "0a:58:09:00:01:81"},
		{"00:00:00:00:00:00", []netip.Prefix{v4, v6}, "0a:58:09:00:01:81"},
	} {
		has, err := conf.ParseMAC(tc.has)
		if got := mark.BridgeMACOf(has, tc.addrs); err != nil || got.String() != tc.want {
			t.Errorf("%s with %s: %s, want %s", tc.addrs, tc.has, got, tc.want)
		}
	}
}

// takingDown is w with overlays that were removed by force.
func takingDown(w plan.Wanted, overlays ...string) plan.Wanted {
	w.TakenDown = overlays
	return w
}
