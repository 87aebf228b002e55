package datapath

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
)

// Three hosts, every gateway reaches every other: IPv4, IPv6, both, and on an
// IPv6 underlay. The cluster with only IPv6 overlays needs FDB entries that do
// not come from an IPv4 overlay.
func TestTraffic(t *testing.T) {
	for _, tc := range []struct {
		name   string
		n      network
		under6 bool
		mtu    int
	}{
		{"ipv4", onlyIPv4, false, 1450},
		{"ipv6", onlyIPv6, false, 1450},
		{"both", bothIP, false, 1450},
		{"both over ipv6", bothIP, true, 1430},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := tc.n
			n.under6 = tc.under6
			_, hosts := n.plugHosts(t, 3)
			for i, h := range hosts {
				cfg := n.config(i, 3)
				if r := h.mustSet(cfg, true); r.Changed != 0 || r.MTU != tc.mtu {
					t.Errorf("host %d: second Set changed %d objects, MTU %d, want 0 and %d", i, r.Changed, r.MTU, tc.mtu)
				}
				for j := range hosts {
					for o := range n.overlays {
						if i != j {
							h.mustPing(n.gateway(o, i, conf.Mesos), n.gateway(o, j, conf.Docker))
							h.mustPing(n.gateway(o, i, conf.Docker), n.gateway(o, j, conf.Mesos))
						}
					}
				}
			}
		})
	}
}

func TestSecondSetChangesNothing(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 1)
	cfg := bothIP.config(0, 500)
	if r := hosts[0].mustSet(cfg, false); r.Changed != 499*5 {
		t.Errorf("500 peers changed %d objects, want 5 for each peer", r.Changed)
	}
	hosts[0].mustBeIdle(cfg)
	if r := hosts[0].mustSet(cfg, false); r.Changed != 0 {
		t.Errorf("Set without resync changed %d objects", r.Changed)
	}
	// Another process that starts anew finds everything in place.
	hosts[0].dp = hosts[0].newDatapath()
	if r := hosts[0].mustSet(cfg, false); r.Changed != 0 {
		t.Errorf("first Set of a new process changed %d objects", r.Changed)
	}
}

// Whatever is damaged by hand is put back, and announced where the kernel says
// so.
func TestRepair(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 2)
	h, cfg := hosts[0], bothIP.config(0, 2)
	gateway := cfg.Bridges[0].Addrs[0].String()
	for _, tc := range []struct {
		name, damage string
		silent       bool
	}{
		{"vtep deleted", "ip link del vtep1024", false},
		{"vtep down", "ip link set vtep1024 down", false},
		{"vtep mtu", "ip link set vtep1024 mtu 1300", false},
		{"vtep mtu below ipv6", "ip link set vtep1024 mtu 1200", false},
		{"vtep replaced by another kind", "ip link del vtep1024; ip link add vtep1024 type bridge", false},
		{"vtep with another mac", "ip link set vtep1024 address 02:00:00:00:00:01", false},
		{"vtep address removed", "ip addr del " + cfg.VTEP.IP.String() + " dev vtep1024", false},
		{"vtep ipv6 address removed", "ip addr del " + cfg.VTEP.IP6.String() + " dev vtep1024", false},
		{"stray vtep address", "ip addr add 44.131.255.9/14 dev vtep1024", false},
		{"bridge deleted", "ip link del m-dcos", false},
		{"bridge down", "ip link set d-dcos6 down", false},
		{"bridge mtu", "ip link set m-dcos mtu 1000", false},
		{"bridge renamed", "ip link set m-dcos down; ip link set m-dcos name lost", false},
		{"gateway removed", "ip addr del " + gateway + " dev m-dcos", false},
		{"stray gateway", "ip addr add 9.7.7.1/25 dev m-dcos", false},
		{"connected route removed", "ip route del 9.0.0.0/25 dev m-dcos", false},
		{"connected ipv6 route removed", "ip route del " + cfg.Bridges[2].Addrs[0].Masked().String() + " dev m-dcos6", false},
		{"routes flushed", "ip route flush proto 44", false},
		{"ipv6 routes flushed", "ip -6 route flush proto 44", false},
		{"everything on the vtep flushed", "ip route flush dev vtep1024; ip -6 route flush dev vtep1024", false},
		{"stray route", "ip route add 9.9.9.0/24 dev vtep1024 proto 44", false},
		{"blackhole removed", "ip route del blackhole 9.0.0.0/24 metric 4294967295", false},
		{"neighbours flushed", "ip neigh flush dev vtep1024 nud permanent", false},
		{"neighbour changed", "ip neigh replace 44.128.0.2 lladdr 02:00:00:00:00:02 dev vtep1024 nud permanent", false},
		{"stray neighbour", "ip neigh add 44.128.0.9 lladdr 02:00:00:00:00:02 dev vtep1024 nud permanent", false},
		{"fdb removed", "bridge fdb del 70:b3:d5:80:00:02 dev vtep1024", false},
		{"fdb changed", "bridge fdb replace 70:b3:d5:80:00:02 dev vtep1024 dst 172.16.0.77", false},
		{"stray fdb entry", "bridge fdb add 02:00:00:00:00:03 dev vtep1024 dst 172.16.0.78", false},
		{"default fdb entry", "bridge fdb append 00:00:00:00:00:00 dev vtep1024 dst 172.16.0.78", false},
		{"forwarding off", "sysctl -qw net.ipv4.ip_forward=0", true},
		{"ipv6 forwarding off", "sysctl -qw net.ipv6.conf.all.forwarding=0", true},
		{"rp_filter", "sysctl -qw net.ipv4.conf.vtep1024.rp_filter=1", true},
		{"filter flushed", "iptables -F; ip6tables -F", true},
		{"nat flushed", "iptables -t nat -F; ip6tables -t nat -F", true},
		{"rule in front", "iptables -I FORWARD -j DROP", true},
		{"chain changed", "iptables -D OVERLAY-FORWARD 1", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h, other := h.in(t), hosts[1].in(t)
			var changes <-chan struct{}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			h.do(func() { changes = h.dp.Changes(ctx) })
			h.sh(tc.damage)
			if !tc.silent {
				select {
				case <-changes:
				case <-time.After(10 * time.Second):
					t.Error("not announced")
				}
			}
			r := h.mustSet(cfg, true)
			if r.Changed == 0 {
				t.Errorf("nothing was changed")
			}
			h.mustBeIdle(cfg)
			for o := range bothIP.overlays {
				h.mustPing(bothIP.gateway(o, 0, conf.Mesos), bothIP.gateway(o, 1, conf.Docker))
				other.mustPing(bothIP.gateway(o, 1, conf.Mesos), bothIP.gateway(o, 0, conf.Docker))
			}
		})
	}
}

var _ = fmt.Sprint
var _ netip.Addr
var _ = slices.Sort[[]int]
