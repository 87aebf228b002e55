package datapath

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan/plantest"
)

// attach makes a container as a CNI program does, with a host end that has our
// name and alias.
func (h *host) attach(half conf.Half, overlay string, gateway netip.Prefix, k int) (c *netNS, port string) {
	h.t.Helper()
	c = newNS(h.t, "c")
	addr := netip.PrefixFrom(plantest.Nth(gateway.Masked(), gateway.Addr().BitLen(), k).Addr(), gateway.Bits())
	att := conf.Attachment{Network: overlay, ContainerID: fmt.Sprint("c", k), IfName: "eth0"}
	port = mark.HostEnd(half, att.Key())
	alias := mark.NewAlias(overlay, half, att, []netip.Addr{addr.Addr()}, 0)
	h.sh(fmt.Sprintf("ip link add %s type veth peer name eth0 netns %s; ip link set %s alias %q; ip link set %s master %s up; bridge link set dev %s hairpin on",
		port, c.name, port, alias, port, half.Bridge(overlay), port))
	c.sh(fmt.Sprintf("ip link set eth0 up; ip addr add %s dev eth0 nodad; ip route add default via %s", addr, gateway.Addr()))
	return c, port
}

// Containers stay attached whatever is done to the bridge or to their host end:
// it is announced within a second, and repaired from the links' own marks, also
// by an agent that was not there when it happened.
func TestPortsAreRepaired(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 1)
	h, cfg := hosts[0], bothIP.Host(0, 1)
	c, port := h.attach(conf.Docker, "dcos", cfg.Bridges[1].Addrs[0], 5)
	gateway := cfg.Bridges[1].Addrs[0].Addr().String()
	c.mustPing("", gateway)
	h.mustBeIdle(cfg)
	const otherBridge = "bridge made by somebody else in its place"
	for _, tc := range []struct{ name, damage string }{
		{"bridge deleted", "ip link del d-dcos"},
		{"bridge down", "ip link set d-dcos down"},
		{"bridge with another mac", "ip link set d-dcos address 02:00:00:00:00:07"},
		{"port taken out", "ip link set " + port + " nomaster"},
		{"port in a foreign bridge", "ip link add br9 type bridge; ip link set " + port + " master br9"},
		{"port in the other half's bridge", "ip link set " + port + " master m-dcos"},
		{"port down", "ip link set " + port + " down"},
		{"port taken out and down", "ip link set " + port + " nomaster; ip link set " + port + " down"},
		{"port disabled", "bridge link set dev " + port + " state 0"},
		{"port that learns nothing", "ip link set " + port + " type bridge_slave learning off flood off"},
		{"port isolated", "bridge link set dev " + port + " isolated on"},
		{otherBridge, "ip link del d-dcos; ip link add d-dcos type bridge"},
	} {
		for _, restarted := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, agent restarted %t", tc.name, restarted), func(t *testing.T) {
				h, c := h.in(t), *c
				c.t = t
				if restarted {
					h.sh(tc.damage)
					h.dp = h.newDatapath()
				} else {
					h.announced(tc.damage)
				}
				if r := h.mustSet(cfg, true); r.Changed == 0 {
					t.Error("nothing was changed")
				}
				h.mustBeIdle(cfg)
				if tc.name == otherBridge {
					c.sh("ip neigh flush dev eth0") // its MAC is not ours to set
				}
				c.mustPing("", gateway)
				h.mustHave("bridge -d link show dev "+port, "master d-dcos", "state forwarding")
				h.mustHave("bridge -d link show dev "+port, "hairpin on", "learning on", "flood on", "isolated off")
				h.sh("ip link del br9 2>/dev/null || true")
			})
		}
	}
}

// A CNI program of before the source checks attaches a container anew under the name
// that another one had checked: the next look lets it send.
func TestNoLongerChecked(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 1)
	h, cfg := hosts[0], bothIP.Host(0, 1)
	c, port := h.attach(conf.Docker, "dcos", cfg.Bridges[1].Addrs[0], 5)
	gateway := cfg.Bridges[1].Addrs[0].Addr().String()
	c.mustPing("", gateway)
	h.sh(fmt.Sprintf("nft add element bridge overlay ports '{ %q }'", port))
	c.mustNotPing("", gateway)
	if r := h.mustSet(cfg, true); r.Drift.Counts[driftSourceCheck] != 0 {
		t.Errorf("that is taken for drift: %v", r.Drift)
	}
	c.mustPing("", gateway)
	h.mustBeIdle(cfg)
}

// A container that goes is no damage: nothing is announced for it, so that a
// busy host does not look at everything for each. Ports of others are theirs.
func TestPortsThatGo(t *testing.T) {
	_, hosts := onlyIPv4.plugHosts(t, 1)
	h, cfg := hosts[0], onlyIPv4.Host(0, 1)
	h.mustBeIdle(cfg)
	var changes <-chan struct{}
	h.do(func() { changes = h.dp.Changes(t.Context()) })
	for k := range 3 {
		_, port := h.attach(conf.Mesos, "dcos", cfg.Bridges[0].Addrs[0], 5+k)
		// By one process: what lies between is announced where it lasts.
		h.sh("printf 'link set %s down\nlink set %s nomaster\nlink del %s\n' " + port + " " + port + " " + port + " | ip -batch -")
	}
	h.sh("ip link add x0 type veth peer name x1; printf 'link set x0 master m-dcos\nlink set x0 nomaster\n' | ip -batch -")
	// What comes after is announced, and was nothing before.
	select {
	case <-changes:
		t.Error("containers that went were announced")
	default:
	}
	h.mustBeIdle(cfg)
	if out := h.sh("ip -o link show x0"); strings.Contains(out, "master") {
		t.Errorf("somebody else's port was put into a bridge: %s", out)
	}
}
