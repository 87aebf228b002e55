package datapath

import (
	"testing"

	"overlayd.internal/overlay/conf"
)

// A look at a kernel that has what it should is enough, and keeps being so when
// devices had to be repaired; whatever is wrong with an entry is for Set.
func TestUpdateResync(t *testing.T) {
	_, hosts := bothIP.plugHosts(t, 1)
	h, cfg := hosts[0], bothIP.Host(0, 41)
	h.mustSet(cfg, true)
	update := func(set []conf.Peer, gone ...string) (r Report, ok bool) {
		h.do(func() { r, ok = h.dp.update(t.Context(), cfg, set, gone, true) })
		return r, ok
	}
	if r, ok := update(nil); !ok || r.Changed != 0 || r.Err != nil || r.MTU != 1450 {
		t.Errorf("nothing to do: ok %t, %+v", ok, r)
	}
	all := cfg.Peers
	cfg.Peers = all[:20]
	var gone []string
	for _, p := range all[20:] {
		gone = append(gone, p.AgentID)
	}
	if r, ok := update(nil, gone...); !ok || r.Changed != 5*20 {
		t.Errorf("half of the peers gone: ok %t, %+v", ok, r)
	}
	cfg.Peers = all
	if r, ok := update(all[20:]); !ok || r.Changed != 5*20 {
		t.Errorf("all of them again: ok %t, %+v", ok, r)
	}

	for _, tc := range []struct{ name, damage string }{
		{"bridge without address", "ip addr flush dev m-dcos scope global"},
		{"MTU", "ip link set d-dcos mtu 1400"},
		{"firewall", "iptables -F FORWARD"},
		{"route of somebody else inside an overlay", "ip route add 9.77.0.0/24 dev eth0"},
	} {
		h.sh(tc.damage)
		if _, ok := update(nil); !ok {
			t.Errorf("%s: entries were to be planned anew", tc.name)
		}
		h.mustBeIdle(cfg)
	}
	for _, tc := range []struct{ name, damage string }{
		{"route missing", "ip route del 9.0.7.0/24"},
		{"IPv6 route missing", "ip -6 route del fd01:b::2:0:0:0/80"},
		{"route too many", "ip route add 9.88.0.0/24 dev vtep1024 proto 44"},
		{"one missing, one too many", "ip route del 9.0.7.0/24; ip route add 9.88.0.0/24 dev vtep1024 proto 44"},
		{"second route to one subnet", "ip route append 9.0.7.0/24 dev vtep1024 proto 44 metric 4711"},
		{"same route for another type of service", "ip route del 9.0.8.0/24; ip route add 9.0.7.0/24 tos 8 via 44.128.0.8 dev vtep1024 onlink proto 44 metric 8"},
		{"neighbour changed", "ip neigh replace 44.128.0.2 lladdr 02:00:00:00:00:02 dev vtep1024 nud permanent"},
		{"IPv6 neighbour missing", "ip neigh del fd01:a::3 dev vtep1024"},
		{"fdb changed", "bridge fdb replace 70:b3:d5:80:00:02 dev vtep1024 dst 172.16.0.77"},
		{"second destination", "bridge fdb append 00:00:00:00:00:00 dev vtep1024 dst 172.16.0.77"},
		{"somebody else's route in place of ours", "ip route add 9.0.7.0/24 dev eth0 metric 1"},
		{"VTEP gone", "ip link del vtep1024"},
	} {
		h.sh(tc.damage)
		if r, ok := update(nil); ok {
			t.Errorf("%s: not found: %+v", tc.name, r)
		}
		h.set(cfg, true)
		h.sh("ip route del 9.0.7.0/24 dev eth0 metric 1 2>/dev/null || true")
		h.mustSet(cfg, true)
		h.mustBeIdle(cfg)
	}
}
