package datapath

import (
	"context"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
)

// announced damages a host and waits for the announcement, which must come
// within a second.
func (h *host) announced(damage string) {
	h.t.Helper()
	var changes <-chan struct{}
	ctx, cancel := context.WithCancel(h.t.Context())
	defer cancel()
	h.do(func() { changes = h.dp.Changes(ctx) })
	h.sh(damage)
	select {
	case <-changes:
	case <-time.After(time.Second):
		h.t.Errorf("in %s: not announced within a second: %s", h.name, damage)
	}
}

// mustComplain applies cfg and checks that the overlay, or the host if it is
// empty, says all of want, and that nothing else fails.
func (h *host) mustComplain(cfg Host, overlay string, want ...string) {
	h.t.Helper()
	for _, resync := range []bool{true, false, true} {
		r := h.set(cfg, resync)
		err := r.Overlays[overlay]
		if overlay == "" {
			err = r.Err
		} else if r.Err != nil {
			h.t.Errorf("in %s: the whole host fails: %v", h.name, r.Err)
		}
		if len(r.Overlays) > 1 || err == nil {
			h.t.Fatalf("in %s: resync %t: report %+v, want %q of overlay %q alone", h.name, resync, r, want, overlay)
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				h.t.Errorf("in %s: resync %t: %q does not say %q", h.name, resync, err, w)
			}
		}
	}
}

// An overlay whose range holds a network of the host is not set up there, so
// that the host keeps it; the others are. It is as soon as the network goes.
func TestHostNetworkInRange(t *testing.T) {
	for _, tc := range []struct {
		name, add, del, overlay string
		want                    []string
	}{
		{"interface in the first agent subnet", "ip addr add 9.0.0.12/24 dev x0", "ip addr del 9.0.0.12/24 dev x0", "dcos",
			[]string{"interface x0 has 9.0.0.12/24", "route 9.0.0.0/24 dev x0", "not set up"}},
		{"interface elsewhere in the range", "ip addr add 9.200.7.1/24 dev x0", "ip addr del 9.200.7.1/24 dev x0", "dcos", []string{"interface x0 has 9.200.7.1/24"}},
		{"address with a wider network", "ip addr add 9.0.0.12/7 dev x0", "ip addr del 9.0.0.12/7 dev x0", "dcos", []string{"interface x0 has 9.0.0.12/7"}},
		{"address on the loopback", "ip addr add 9.1.1.1/32 dev lo", "ip addr del 9.1.1.1/32 dev lo", "dcos", []string{"interface lo has 9.1.1.1/32"}},
		{"routed network", "ip route add 9.0.0.0/20 via 10.1.1.9", "ip route del 9.0.0.0/20 via 10.1.1.9", "dcos", []string{"route 9.0.0.0/20 via 10.1.1.9 dev x0"}},
		{"part of the agent subnet", "ip route add 9.0.0.64/27 dev x0", "ip route del 9.0.0.64/27 dev x0", "dcos", []string{"route 9.0.0.64/27 dev x0"}},
		{"IPv6 interface", "ip addr add fd01:b::7:1/112 dev x0 nodad", "ip addr del fd01:b::7:1/112 dev x0", "dcos6", []string{"interface x0 has fd01:b::7:1/112"}},
		{"IPv6 route", "ip -6 route add fd01:b::/80 dev x0", "ip -6 route del fd01:b::/80 dev x0", "dcos6", []string{"route fd01:b::/80 dev x0"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLAN(t)
			h := newHost(t, "h")
			l.plug(h.netNS, "172.16.0.2/12")
			h.sh("ip link add x0 type veth peer name x1; ip link set x0 up; ip link set x1 up; ip addr add 10.1.1.1/24 dev x0")
			cfg := bothIP.Host(0, 3)
			h.sh(tc.add)
			before := h.sh("ip addr show x0; ip route show dev x0; ip -6 route show dev x0; ip addr show lo")
			h.mustComplain(cfg, tc.overlay, tc.want...)
			if r := h.set(cfg, false); !slices.Equal(r.Refused, []string{tc.overlay}) {
				t.Errorf("refused are %v, want %s", r.Refused, tc.overlay)
			}
			if after := h.sh("ip addr show x0; ip route show dev x0; ip -6 route show dev x0; ip addr show lo"); after != before {
				t.Errorf("the host's network was\n%s\nand is\n%s", before, after)
			}
			h.mustNotHave("ip -o link", tc.overlay+":")
			for _, o := range cfg.Overlays {
				if o.Name != tc.overlay {
					h.mustHave("ip -o link", "m-"+o.Name+":")
					continue
				}
				of := strings.SplitN(o.Subnets[0].String(), ":", 3)[0]
				h.mustNotHave("ip route show proto 44; ip -6 route show proto 44", strings.TrimSuffix(of, ".0.0.0/8")+map[bool]string{true: ".", false: ":b"}[o.Subnets[0].Addr().Is4()])
			}
			h.announced(tc.del)
			h.mustSet(cfg, true)
			h.mustHave("ip -o link", "m-"+tc.overlay+":")
			h.mustBeIdle(cfg)

			// Where containers are attached, the overlay stays and says so.
			gateway := cfg.Bridges[0].Addrs[0]
			if tc.overlay == "dcos6" {
				gateway = cfg.Bridges[2].Addrs[0]
			}
			c, _ := h.container("m-"+tc.overlay, gateway, 5)
			h.sh(tc.add)
			h.mustComplain(cfg, tc.overlay, "containers are attached")
			if r := h.set(cfg, true); len(r.Refused) > 0 {
				t.Errorf("refused are %v although containers are attached", r.Refused)
			}
			c.mustPing("", gateway.Addr().String())
			h.sh(tc.del)
			h.mustSet(cfg, true)
			h.mustBeIdle(cfg)
		})
	}
}

// A VTEP pool that holds a network of the host would cut it off as well.
func TestHostNetworkInVTEPPool(t *testing.T) {
	l := newLAN(t)
	h := newHost(t, "h")
	l.plug(h.netNS, "172.16.0.2/12", "44.128.7.1/24")
	cfg := onlyIPv4.Host(0, 2)
	h.mustComplain(cfg, "", "the VTEP pool 44.128.0.0/14 holds a network of this host: interface eth0 has 44.128.7.1/24")
	h.mustNotHave("ip -o link", "vtep1024")
	h.mustNotHave("ip route", "proto 44")
	h.sh("ip addr del 44.128.7.1/24 dev eth0")
	h.mustSet(cfg, true)
	h.mustBeIdle(cfg)
}

// The addresses that another main plugin gives to containers out of our halves
// are no networks of the host.
func TestOtherMainPlugins(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 1)
	h, cfg := hosts[0], bothIP.Host(0, 1)
	h.sh(`ip link add cni0 type bridge; ip link set cni0 up; ip addr add 9.0.0.129/25 dev cni0
		ip link add p0 type veth peer name p1; ip link set p0 up; ip addr add 9.0.0.1/32 dev p0; ip route add 9.0.0.7/32 dev p0`)
	h.mustSet(cfg, true)
	h.mustBeIdle(cfg)
}

// Whatever takes the traffic to a peer is named with a command that shows it, as
// long as it is there.
func TestTrafficTaken(t *testing.T) {
	for _, tc := range []struct {
		name, add, del, overlay string
		want                    []string
	}{
		{"more specific route", "ip route add 9.0.1.128/25 via 10.1.1.9", "ip route del 9.0.1.128/25", "dcos",
			[]string{"route 9.0.1.128/25 via 10.1.1.9 dev x0", "peer subnet 9.0.1.0/24", "ip route show 9.0.1.128/25"}},
		{"more specific blackhole", "ip route add blackhole 9.0.2.7/32", "ip route del blackhole 9.0.2.7/32", "dcos", []string{"route 9.0.2.7/32", "peer subnet 9.0.2.0/24"}},
		{"more specific IPv6 route", "ip -6 route add fd01:b:0:0:1::7/128 dev x0", "ip -6 route del fd01:b:0:0:1::7/128 dev x0", "dcos6",
			[]string{"route fd01:b::1:0:0:7/128 dev x0", "ip -6 route show fd01:b::1:0:0:7/128"}},
		{"the same prefix, a better metric", "ip route add 9.0.1.0/24 via 10.1.1.9 metric 1", "ip route del 9.0.1.0/24 via 10.1.1.9 metric 1", "dcos",
			[]string{"route 9.0.1.0/24 via 10.1.1.9 dev x0", "takes the place", "ip route show 9.0.1.0/24"}},
		{"rule for destinations", "ip route add default via 10.1.1.9 table 100; ip rule add to 9.0.0.0/8 lookup 100", "ip rule del to 9.0.0.0/8 lookup 100", "dcos",
			[]string{"peer subnet 9.0.1.0/24", "table 100", "ip rule show", "ip route get 9.0.1.2"}},
		{"rule for what containers send", "ip route add default via 10.1.1.9 table 100; ip rule add from 9.0.0.0/25 lookup 100", "ip rule del from 9.0.0.0/25 lookup 100", "dcos",
			[]string{"table 100", "from 9.0.0.2 iif m-dcos"}},
		{"rule for several next hops", "ip route add default table 100 nexthop via 10.1.1.9 nexthop via 10.1.1.8; ip rule add to 9.0.0.0/8 lookup 100", "ip rule del to 9.0.0.0/8 lookup 100", "dcos",
			[]string{"peer subnet 9.0.1.0/24", "table 100", "ip route get 9.0.1.2"}},
		{"rule that refuses", "ip rule add to 9.0.1.0/24 prohibit", "ip rule del to 9.0.1.0/24 prohibit", "dcos", []string{"peer subnet 9.0.1.0/24 are refused"}},
		{"IPv6 rule", "ip -6 route add default dev x0 table 100; ip -6 rule add to fd01:b::/64 lookup 100", "ip -6 rule del to fd01:b::/64 lookup 100", "dcos6", []string{"table 100"}},
		{"underlay does not forward", "sysctl -qw net.ipv4.conf.eth0.forwarding=0", "sysctl -qw net.ipv4.conf.eth0.forwarding=1", "",
			[]string{"interface eth0 does not forward", "sysctl -w net.ipv4.conf.eth0.forwarding=1"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, hosts := bothIP.plugHosts(t, 1)
			h, cfg := hosts[0], bothIP.Host(0, 3)
			h.sh("ip link add x0 type veth peer name x1; ip link set x0 up; ip link set x1 up; ip addr add 10.1.1.1/24 dev x0; ip addr add fd77::1/64 dev x0 nodad")
			h.mustSet(cfg, true)
			h.announced(tc.add)
			h.mustComplain(cfg, tc.overlay, tc.want...)
			h.announced(tc.del)
			h.mustSet(cfg, true)
			h.mustBeIdle(cfg)
		})
	}
}

// A rule of others that leaves overlay traffic alone is no problem.
func TestHarmlessRules(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 1)
	h, cfg := hosts[0], bothIP.Host(0, 400)
	h.sh("ip route add default via 172.16.0.9 table 100; ip rule add from 172.16.0.2 lookup 100; ip rule add to 192.0.2.0/24 prohibit; ip -6 rule add to fd99::/64 lookup 100")
	h.mustSet(cfg, true)
	h.mustBeIdle(cfg)
}

// Nothing is done to a link that has a name of ours only as another one
// (altname), or whose kind is not ours.
func TestStrangersWithOurNames(t *testing.T) {
	for _, tc := range []struct {
		name, link, overlay, want, fix, look string
	}{
		{"altname of a bridge", "ip link property add dev eth0 altname d-dcos", "dcos",
			"link eth0 has the other name (altname) d-dcos, which the bridge of overlay dcos needs; remove it (ip link property del dev eth0 altname d-dcos)",
			"ip link property del dev eth0 altname d-dcos", "eth0"},
		{"altname of the VTEP", "ip link property add dev eth0 altname vtep1024", "",
			"link eth0 has the other name (altname) vtep1024", "ip link property del dev eth0 altname vtep1024", "eth0"},
		{"VTEP's name on another kind", "ip link add vtep1024 type bridge; ip link set vtep1024 up; ip addr add 10.5.5.1/24 dev vtep1024; ip neigh add 10.5.5.9 lladdr 02:00:00:00:00:09 dev vtep1024 nud permanent", "",
			"link vtep1024 is in the way", "ip link del vtep1024", "vtep1024"},
		{"bridge's name on another kind", "ip link add d-dcos type veth peer name other; ip link set d-dcos mtu 1400", "dcos",
			"link d-dcos is in the way", "ip link del d-dcos", "d-dcos"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLAN(t)
			h := newHost(t, "h")
			l.plug(h.netNS, "172.16.0.2/12")
			h.sh("ip link set eth0 alias uplink; " + tc.link)
			look := strings.ReplaceAll("ip link show X; ip -4 addr show X; ip neigh show dev X nud permanent", "X", tc.look)
			before := h.sh(look)
			cfg := onlyIPv4.Host(0, 3)
			h.mustComplain(cfg, tc.overlay, tc.want)
			if after := h.sh(look); after != before {
				t.Errorf("the link was\n%s\nand is\n%s", before, after)
			}
			h.sh(tc.fix)
			h.mustSet(cfg, true)
			h.mustBeIdle(cfg)
			h.mustHave("ip link show eth0", "mtu 1500")
			h.mustHave("ip link show eth0", "alias uplink")
		})
	}
}

// Packets to addresses that no lease covers do not leave the host, and their
// sender is told.
func TestUnleasedAddresses(t *testing.T) {
	n := bothIP
	l, hosts := n.plugHosts(t, 2)
	h, cfg := hosts[0], n.Host(0, 2)
	// A way out for everything else, as every host has it.
	l.sh("ip addr add 172.16.99.1/12 dev br0; ip addr add fd00:9::1/64 dev br0 nodad")
	h.sh("ip addr add fd00:9::2/64 dev eth0 nodad; ip route add default via 172.16.99.1; ip -6 route add default via fd00:9::1")
	for i, tc := range []struct{ bridge, unleased, gone string }{
		{"m-dcos", "9.9.9.9", n.gateway(0, 1, conf.Mesos)},
		{"m-dcos6", "fd01:b:0:0:9999::9", n.gateway(1, 1, conf.Mesos)},
	} {
		c, _ := h.container(tc.bridge, cfg.Bridges[2*i].Addrs[0], 5)
		c.mustPing("", cfg.Bridges[2*i].Addrs[0].Addr().String())
		h.mustSet(cfg, true)
		c.mustPing("", tc.gone)
		c.mustBeRefused(tc.unleased)
		h.mustBeRefusedHere(tc.unleased)
		alone := cfg
		alone.Peers = nil
		h.mustSet(alone, false)
		c.mustBeRefused(tc.gone)
		h.mustBeIdle(alone)
	}
	// Nothing of it is left where the overlay goes.
	h.mustSet(Host{VTEP: cfg.VTEP}, true)
	h.mustNotHave("ip route; ip -6 route", "proto 44")
}

// mustBeRefused checks that a packet is answered with "unreachable".
func (h *netNS) mustBeRefused(dst string) {
	h.t.Helper()
	out, err := h.try("ping -n -c 2 -W 2 " + dst)
	if err == nil || !strings.Contains(out, "nreachable") && !strings.Contains(out, "No route") {
		h.t.Errorf("in %s: ping %s: %v\n%s", h.name, dst, err, out)
	}
}

func (h *netNS) mustBeRefusedHere(dst string) {
	h.t.Helper()
	if out, err := h.try("ip route get " + dst); err == nil {
		h.t.Errorf("in %s: there is a route to %s: %s", h.name, dst, out)
	}
}

// Who has the UDP port of VXLAN is named.
func TestVXLANPortTaken(t *testing.T) {
	l := newLAN(t)
	h := newHost(t, "h")
	l.plug(h.netNS, "172.16.0.2/12")
	var taken net.PacketConn
	var err error
	h.do(func() { taken, err = net.ListenPacket("udp", ":64000") })
	if err != nil {
		t.Fatal(err)
	}
	cfg := onlyIPv4.Host(0, 2)
	h.mustComplain(cfg, "", "UDP port 64000 is taken by ", "process "+strconv.Itoa(os.Getpid()))
	taken.Close()
	h.mustSet(cfg, false)
	h.mustBeIdle(cfg)
}

// A bridge that somebody else made is not changed, but must not keep containers
// waiting without a word.
func TestSpanningTreeOfOthers(t *testing.T) {
	_, hosts := onlyIPv4.plugHosts(t, 1)
	h, cfg := hosts[0], onlyIPv4.Host(0, 1)
	h.sh("ip link del d-dcos; ip link add d-dcos type bridge stp_state 1; ip addr add 9.0.0.129/25 dev d-dcos")
	h.mustComplain(cfg, "dcos", "bridge d-dcos has the spanning tree protocol on", "ip link set d-dcos type bridge stp_state 0")
	h.sh("ip link set d-dcos type bridge stp_state 0 mcast_querier 1")
	h.mustComplain(cfg, "dcos", "bridge d-dcos sends multicast only to those who report to it", "ip link set d-dcos type bridge mcast_querier 0")
	h.sh("ip link set d-dcos type bridge mcast_querier 0")
	h.mustSet(cfg, true)
	h.mustBeIdle(cfg)
}

// Where routes of others lead outside of the overlays is reported, the largest
// ranges first, and stays so in rounds that only look at peers.
func TestRoutesElsewhere(t *testing.T) {
	l := newLAN(t)
	h := newHost(t, "h")
	l.plug(h.netNS, "172.16.0.2/12")
	h.sh("ip link add x0 type veth peer name x1; ip link set x0 up; ip link set x1 up; ip addr add 10.1.1.1/24 dev x0")
	cfg := bothIP.Host(0, 3)
	h.sh("ip route add 198.51.100.0/24 via 10.1.1.9; ip route add 198.18.0.0/15 dev x0; ip route add blackhole 203.0.113.0/24; ip -6 route add 2001:db8::/48 dev x0; ip route add default via 10.1.1.9")
	var want string
	for _, resync := range []bool{true, false, true} {
		var got []string
		for _, p := range h.set(cfg, resync).Routes {
			got = append(got, p.String())
		}
		text := strings.Join(got, " ")
		if want == "" {
			want = text
		}
		if text != want {
			t.Errorf("resync %t: %s, before %s", resync, text, want)
		}
	}
	for _, p := range []string{"198.51.100.0/24", "198.18.0.0/15", "2001:db8::/48"} {
		if !strings.Contains(want, p) {
			t.Errorf("%s is not among %s", p, want)
		}
	}
	if !strings.HasPrefix(want, "172.16.0.0/12 198.18.0.0/15 ") || strings.Contains(want, "/0") || strings.Contains(want, "203.0.113") || strings.Contains(want, " 9.0.") || strings.Contains(want, "44.128") {
		t.Errorf("routes %s", want)
	}
}
