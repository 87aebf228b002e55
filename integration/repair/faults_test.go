package repair

import (
	"slices"
	"strings"
	"time"
)

// fault is one thing that somebody does to a host.
type fault struct {
	name   string
	damage string
	// parts are what the damage shows in; the others are compared when these are
	// as they were. Empty: the rules.
	parts string
	// check says that a damage which adds something is repaired, though that stays.
	check string
	// named is what the status of the host says where the fault is somebody else's
	// object, which stays until undo.
	named, undo string
	only        string        // firewalls it is about, separated by blanks; empty: all
	within      time.Duration // 0: at once, the kernel announces it
	quick       bool          // part of the short run, too
}

// The limits: what the kernel announces, and what nobody announces. The first
// is a second, and twice as long again for a busy machine.
const (
	atOnce = 3 * time.Second
	silent = 10 * time.Second
)

func (f fault) limit() time.Duration {
	if f.within == 0 {
		return atOnce
	}
	return f.within
}

func (f fault) isFor(firewall string) bool {
	return f.only == "" || slices.Contains(strings.Fields(f.only), firewall)
}

// faults are all there are, each a row of docs/repair.md.
var faults = []fault{
	// Links.
	{name: "VTEP deleted", damage: "ip link del vtep1024", parts: "links addresses routes neighbours fdb sysctls", quick: true},
	{name: "VTEP set down", damage: "ip link set vtep1024 down", parts: "links addresses routes neighbours fdb"},
	{name: "VTEP with another MAC (udev's MACAddressPolicy)", damage: "ip link set vtep1024 address 02:00:00:00:00:01", parts: "links addresses routes neighbours fdb sysctls"},
	{name: "VTEP with another MTU", damage: "ip link set vtep1024 mtu 1300", parts: "links"},
	{name: "VTEP learns", damage: "ip link set vtep1024 type vxlan learning", parts: "links"},
	{name: "VTEP put into a bridge", damage: "ip link add br9 type bridge; ip link set vtep1024 master br9", undo: "ip link del br9", parts: "links"},
	{name: "bridge deleted", damage: "ip link del d-dcos", parts: "links addresses routes ports sysctls", quick: true},
	{name: "bridge set down", damage: "ip link set d-dcos down", parts: "links addresses routes"},
	{name: "bridge with another MAC", damage: "ip link set d-dcos address 02:00:00:00:00:07", parts: "links"},
	{name: "bridge with another MTU", damage: "ip link set d-dcos mtu 1000", parts: "links"},
	// The agent removes the old one itself when it looks again after its ports went over.
	{name: "bridge renamed", damage: "ip link set d-dcos down; ip link set d-dcos name lost", undo: "ip link del lost 2>/dev/null || true", parts: "links addresses routes ports sysctls"},
	{name: "bridge with the spanning tree protocol", damage: "ip link set d-dcos type bridge stp_state 1", parts: "links"},
	// Ports.
	{name: "container's port taken out of its bridge (systemd-networkd)", damage: "ip link set $PORT nomaster", parts: "ports", quick: true},
	{name: "container's port set down", damage: "ip link set $PORT down", parts: "ports"},
	{name: "container's port in a foreign bridge", damage: "ip link add br9 type bridge; ip link set $PORT master br9", undo: "ip link del br9", parts: "ports"},
	{name: "container's port isolated, learning and flooding off", damage: "bridge link set dev $PORT isolated on learning off flood off mcast_flood off bcast_flood off", parts: "ports"},
	{name: "container's port disabled in its bridge", damage: "bridge link set dev $PORT state 0", parts: "ports"},
	// Addresses.
	{name: "gateway address removed", damage: "ip addr del $GWNET dev d-dcos", parts: "addresses routes"},
	{name: "IPv6 gateway address removed", damage: "ip addr del $GW6NET dev d-dcos6", parts: "addresses routes"},
	{name: "VTEP address removed", damage: "ip addr del $VTEP dev vtep1024", parts: "addresses routes"},
	{name: "stray address on a bridge", damage: "ip addr add 9.77.7.1/25 dev d-dcos", parts: "addresses routes"},
	// Routes.
	{name: "routes flushed", damage: "ip route flush proto 44; ip -6 route flush proto 44", parts: "routes", quick: true},
	{name: "route of a peer replaced", damage: "ip route del $PEER; ip route add $PEER via 44.128.0.77 dev vtep1024 onlink proto 44 metric 1", parts: "routes"},
	{name: "local route of the gateway removed", damage: "ip route del local $GW dev d-dcos table local", parts: "routes"},
	{name: "local route of the IPv6 gateway removed", damage: "ip -6 route del local $GW6 dev d-dcos6 table local", parts: "addresses routes"},
	{name: "connected route removed", damage: "ip route del $NET dev d-dcos", parts: "routes"},
	{name: "connected IPv6 route removed", damage: "ip -6 route del $NET6 dev d-dcos6", parts: "routes"},
	{name: "blackhole of the own subnet removed", damage: "ip route del blackhole $OWN metric 4294967295", parts: "routes"},
	{name: "range of the overlay made reachable", damage: "ip route del unreachable 9.0.0.0/8 metric 4294967294", parts: "routes"},
	{name: "stray route of ours", damage: "ip route add 9.9.9.0/24 dev vtep1024 proto 44", parts: "routes"},
	{name: "routes flushed among more notifications than are kept (netlink-ENOBUFS)", damage: `flood() { seq 3000 | sed "s|.*|route $1 blackhole 198.18.0.1/32 metric &|" | ip -batch -; }
kill -STOP $AGENT; flood add; ip route flush proto 44; ip -6 route flush proto 44; flood del; kill -CONT $AGENT`, parts: "routes"},
	// Neighbours and forwarding entries.
	{name: "neighbours flushed", damage: "ip neigh flush dev vtep1024 nud permanent; ip -6 neigh flush dev vtep1024 nud permanent", parts: "neighbours"},
	{name: "neighbour changed", damage: "ip neigh replace $PEERVTEP lladdr 02:00:00:00:00:02 dev vtep1024 nud permanent", parts: "neighbours"},
	{name: "forwarding entries flushed", damage: "bridge fdb show dev vtep1024 | while read mac rest; do bridge fdb del $mac dev vtep1024 self; done", parts: "fdb"},
	{name: "forwarding entry changed", damage: "bridge fdb replace $PEERMAC dev vtep1024 dst 172.17.0.77 self", parts: "fdb"},
	{name: "stray forwarding entry for everything", damage: "bridge fdb append 00:00:00:00:00:00 dev vtep1024 dst 172.17.0.77", parts: "fdb"},
	// Sysctls.
	{name: "ip_forward 0", damage: "sysctl -qw net.ipv4.ip_forward=0", parts: "sysctls", quick: true},
	{name: "IPv6 forwarding 0", damage: "sysctl -qw net.ipv6.conf.all.forwarding=0", parts: "sysctls"},
	{name: "forwarding of a bridge 0", damage: "sysctl -qw net.ipv4.conf.d-dcos.forwarding=0", parts: "sysctls"},
	{name: "rp_filter of the VTEP strict", damage: "sysctl -qw net.ipv4.conf.vtep1024.rp_filter=1", parts: "sysctls"},
	{name: "router advertisements accepted by a bridge", damage: "sysctl -qw net.ipv6.conf.d-dcos6.accept_ra=1", parts: "sysctls", within: silent, quick: true},
	{name: "IPv6 of a bridge disabled", damage: "sysctl -qw net.ipv6.conf.d-dcos6.disable_ipv6=1", parts: "sysctls addresses routes", within: silent},
	// Rules.
	{name: "nft flush ruleset", damage: "nft flush ruleset", only: "nftables iptables-nft", quick: true},
	{name: "nft flush ruleset, source checks", damage: "nft flush ruleset", only: "iptables-legacy"},
	{name: "iptables -F of every table", damage: "for t in iptables ip6tables; do for x in raw filter nat; do $t -w -t $x -F; done; done", only: "iptables-nft", quick: true},
	{name: "iptables -F of every table, legacy flavour", damage: "for t in iptables ip6tables; do for x in raw filter nat; do $t -w -t $x -F; done; done", only: "iptables-legacy", within: silent, quick: true},
	{name: "iptables -F and FORWARD DROP", damage: "iptables -w -F; iptables -w -P FORWARD DROP", undo: "iptables -w -P FORWARD ACCEPT", only: "iptables-nft"},
	{name: "iptables -I OVERLAY-FORWARD 1 -j DROP", damage: "iptables -w -I OVERLAY-FORWARD 1 -j DROP", only: "iptables-nft", quick: true},
	{name: "iptables -I OVERLAY-FORWARD 1 -j DROP, legacy flavour", damage: "iptables -w -I OVERLAY-FORWARD 1 -j DROP", only: "iptables-legacy", within: silent},
	{name: "nft insert rule ... OVERLAY-FORWARD drop", damage: "nft insert rule inet overlay OVERLAY-FORWARD drop", only: "nftables", quick: true},
	{name: "iptables -I FORWARD -j DROP", damage: "iptables -w -I FORWARD -j DROP", undo: "iptables -w -D FORWARD -j DROP", check: `iptables -w -S FORWARD | sed -n 2p | grep -q OVERLAY-FORWARD`, only: "iptables-nft"},
	{name: "jump removed", damage: "iptables -w -D FORWARD -j OVERLAY-FORWARD", only: "iptables-nft"},
	{name: "set of peers emptied", damage: "nft flush set inet overlay peers4", only: "nftables"},
	{name: "ipset flush", damage: "ipset flush", only: "iptables-nft iptables-legacy", within: silent, quick: true},
	{name: "source checks removed", damage: "nft delete table bridge overlay"},
	{name: "source checks emptied", damage: "nft flush set bridge overlay ports", quick: true},

	// What is somebody else's stays, and is named.
	{name: "foreign rule (ip rule) takes overlay traffic", damage: "ip rule add to $PEER blackhole pref 100", undo: "ip rule del pref 100", named: "because of a rule that is not ours (ip rule show)", quick: true},
	{name: "foreign route at a lower metric", damage: "ip route add $PEER dev lo metric 1", undo: "ip route del $PEER dev lo metric 1", named: "is not ours and takes the place of the one via VTEP"},
	{name: "more specific foreign route", damage: "ip route add ${PEER%.*}.5/32 dev lo", undo: "ip route del ${PEER%.*}.5/32 dev lo", named: "takes traffic of peer subnet"},
	{name: "forwarding of the underlay's interface 0", damage: "sysctl -qw net.ipv4.conf.eth0.forwarding=0", undo: "sysctl -qw net.ipv4.conf.eth0.forwarding=1", named: "does not forward, so containers get no answers from outside"},
	{name: "foreign bridge of the name", damage: "ip link set d-dcos down; ip link set d-dcos name lost; ip link add d-dcos type dummy 2>/dev/null || ip link add d-dcos type veth peer name d9", undo: "ip link del d-dcos; ip link del lost", named: "link d-dcos is in the way"},
	{name: "another VXLAN device with VNI and port", damage: "ip link del vtep1024; ip link add vx9 type vxlan id 1024 dstport 64000", undo: "ip link del vx9", named: "is a VXLAN device with our VNI 1024 and UDP port 64000"},
	{name: "network of the host inside an overlay", damage: "ip link add eth9 type veth peer name lan9; ip link set eth9 up; ip addr add 9.200.0.1/24 dev eth9", undo: "ip link del eth9", named: "holds a network of this host"},
}
