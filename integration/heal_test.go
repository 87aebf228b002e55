package integration

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// healTime is how long a host may be broken by what somebody did by hand.
const healTime = 10 * time.Second

// TestHeal: what somebody deletes by hand on a host comes back.
func TestHeal(t *testing.T) {
	s := upSeed(t, seedConfig(t))
	ctx := t.Context()
	h := s.Agents[0]
	must(t, s.PlaceAll(ctx))
	pairs, err := s.Pairs()
	must(t, err)

	peer, err := s.Agents[1].Published()
	must(t, err)
	for _, c := range []struct{ name, script string }{
		{"VTEP", "ip link delete vtep1024"},
		{"VTEP down", "ip link set vtep1024 down"},
		{"VTEP addresses", "ip address flush dev vtep1024"},
		{"routes", "ip route delete " + peer.Overlays[0].Subnet.String() + " && ip -6 route delete " + peer.Overlays[1].Subnet6.String()},
		{"neighbours", "ip neigh flush dev vtep1024 nud permanent && ip -6 neigh flush dev vtep1024 nud permanent"},
		{"forwarding entries", "bridge fdb show dev vtep1024 | while read mac rest; do bridge fdb delete $mac dev vtep1024 self; done"},
		{"bridge addresses", "ip address flush dev m-dcos && ip -6 address flush dev d-dcos6 scope global"},
		{"bridge down", "ip link set d-dcos down"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := h.Run(ctx, "sh", "-c", c.script)
			must(t, err)
			waitPairs(t, crossing(pairs, h), healTime)
		})
	}

	t.Run("bridge", func(t *testing.T) {
		_, err := h.Run(ctx, "ip", "link", "delete", "m-dcos")
		must(t, err)
		wait(t, "the bridge to be back", healTime, func() error {
			_, err := h.Run(ctx, "ip", "link", "show", "dev", "m-dcos", "up")
			return err
		})
		c := place(t, s, 0, "after", "dcos", lab.Mesos)
		for _, other := range s.Containers {
			if other.Host != h && other.Overlay == "dcos" {
				waitPing(t, c.Netns, other.Addr(), healTime)
			}
		}
	})
}

// TestHealRules: rules and sysctls are repaired as fast as links and routes.
func TestHealRules(t *testing.T) {
	t.Parallel()
	s := upSeed(t, seedConfig(t))
	ctx := t.Context()
	h := s.Agents[0]
	must(t, s.PlaceAll(ctx))
	pairs, err := s.Pairs()
	must(t, err)
	_, err = h.Run(ctx, "sh", "-c", `
for t in iptables ip6tables; do $t -w -t nat -F; $t -w -F; $t -w -P FORWARD DROP; done
sysctl -q -w net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0`)
	must(t, err)
	waitPairs(t, crossing(pairs, h), healTime)
	// Everything of nftables, with the check of what containers send.
	checked := func() error {
		_, err := h.Run(ctx, "sh", "-c", `nft list set bridge overlay ports | grep -q elements && iptables -C FORWARD -j OVERLAY-FORWARD`)
		return err
	}
	must(t, checked())
	_, err = h.Run(ctx, "nft", "flush", "ruleset")
	must(t, err)
	wait(t, "the rules to be back", healTime, checked)
	waitPairs(t, crossing(pairs, h), healTime)
}

// waitPairs waits until all pairs talk.
func waitPairs(t *testing.T, pairs []lab.Pair, timeout time.Duration) {
	t.Helper()
	start := time.Now()
	wait(t, "all pairs to talk again", timeout, func() error {
		var failed []string
		for _, r := range lab.CheckPairs(t.Context(), pairs) {
			if r.Err != nil {
				failed = append(failed, r.String())
			}
		}
		if len(failed) > 0 {
			return fmt.Errorf("%d pairs do not: %s", len(failed), failed[0])
		}
		return nil
	})
	t.Logf("healed within %v", time.Since(start).Round(10*time.Millisecond))
}

// crossing are the pairs that the host h has a part in, one of each kind and
// family.
func crossing(pairs []lab.Pair, h *lab.Host) []lab.Pair {
	seen := map[string]bool{}
	var out []lab.Pair
	for _, p := range pairs {
		ours := strings.HasPrefix(p.From.NS.Name, h.Name)
		key := fmt.Sprint(p.Kind, ours, p.To.Addr.Is4())
		if !seen[key] && (ours || strings.HasPrefix(p.To.NS.Name, h.Name)) {
			seen[key] = true
			out = append(out, p)
		}
	}
	return out
}

// TestForeignRulesStay: what is not ours on a host is left alone, also when the
// agent repairs or ends.
func TestForeignRulesStay(t *testing.T) {
	t.Parallel()
	s := newSeed(t, seedConfig(t))
	ctx := t.Context()
	h := s.Agents[0]
	must(t, h.Configure(ctx,
		"link add name other0 up type bridge",
		"address add 192.0.2.1/24 dev other0",
		"route add 198.51.100.0/24 via 192.0.2.2",
		"neighbour add 192.0.2.9 lladdr 02:00:00:00:00:09 dev other0 nud permanent"))
	rules := [][]string{
		{"-t", "filter", "-A", "FORWARD", "-s", "192.0.2.0/24", "-j", "ACCEPT"},
		{"-t", "nat", "-A", "POSTROUTING", "-s", "192.0.2.0/24", "-j", "MASQUERADE"},
	}
	for _, r := range rules {
		_, err := h.Run(ctx, append([]string{"iptables", "-w"}, r...)...)
		must(t, err)
	}
	must(t, s.Up(ctx))
	_, err := h.Run(ctx, "ip", "link", "delete", "vtep1024")
	must(t, err)
	must(t, s.WaitMesh(ctx))
	must(t, h.Proc.Stop())

	for what, argv := range map[string][]string{
		"198.51.100.0/24 via 192.0.2.2": {"ip", "route"},
		"192.0.2.1/24":                  {"ip", "address", "show", "dev", "other0"},
		"02:00:00:00:00:09":             {"ip", "neigh", "show", "dev", "other0"},
	} {
		out, err := h.Run(ctx, argv...)
		must(t, err)
		if !strings.Contains(out, what) {
			t.Errorf("%q is gone; %v prints:\n%s", what, argv, out)
		}
	}
	for _, r := range rules {
		r[2] = "-C"
		if _, err := h.Run(ctx, append([]string{"iptables", "-w"}, r...)...); err != nil {
			t.Errorf("rule is gone: %v", err)
		}
	}
}

// TestForwardPolicyDrop: hosts whose policy is to forward nothing.
func TestForwardPolicyDrop(t *testing.T) {
	t.Parallel()
	s := newSeed(t, seedConfig(t))
	ctx := t.Context()
	for _, h := range s.Hosts() {
		for _, ipt := range []string{"iptables", "ip6tables"} {
			_, err := h.Run(ctx, ipt, "-w", "-P", "FORWARD", "DROP")
			must(t, err)
		}
	}
	must(t, s.Up(ctx))
	must(t, s.PlaceAll(ctx))
	checkTraffic(t, s)
}

// TestDualStack: one overlay with both families; every container has an address
// of each.
func TestDualStack(t *testing.T) {
	t.Parallel()
	s := upSeed(t, `
dcos_overlay_network:
  vtep_subnet: 44.128.0.0/20
  vtep_subnet6: fd01:a::/64
  vtep_mac_oui: 70:B3:D5:00:00:00
  overlays:
    - {name: both, subnet: 9.0.0.0/8, prefix: 24, subnet6: "fd01:b::/64", prefix6: 80}
`)
	placeEverywhere(t, s, "both")
	for _, c := range s.Containers {
		if len(c.Addrs) != 2 || !c.Addrs[0].Addr().Is4() || !c.Addrs[1].Addr().Is6() {
			t.Errorf("%s has %v, want an IPv4 and an IPv6 address", c.Short, c.Addrs)
		}
	}
	checkTraffic(t, s)
	for _, c := range s.Containers {
		slices.Reverse(c.Addrs) // pairs take the first
	}
	checkTraffic(t, s)
}

// placeEverywhere attaches a container to each half of the overlays on both
// agents.
func placeEverywhere(t *testing.T, s *lab.Seed, overlays ...string) {
	t.Helper()
	for _, overlay := range overlays {
		for agent := range s.Agents {
			for _, half := range []string{lab.Mesos, lab.Docker} {
				place(t, s, agent, overlay+"-"+half, overlay, half)
			}
		}
	}
}

// TestIPv6Underlay: hosts that know each other by IPv6 addresses only.
func TestIPv6Underlay(t *testing.T) {
	for _, datapath := range []string{"kernel", "ebpf"} {
		t.Run(datapath, func(t *testing.T) {
			t.Parallel()
			onIPv6Underlay(t, datapath)
		})
	}
}

func onIPv6Underlay(t *testing.T, datapath string) {
	s := newSeed(t, seedConfig(t))
	ctx := t.Context()
	// One host without the fast path: what it gets from the other has no checksum
	// outside.
	s.Agents[0].Datapath, s.Agents[1].Datapath = datapath, "kernel"
	for _, n := range []*lab.Node{s.Master.Node, s.Agents[0].Node, s.Agents[1].Node, s.Outside} {
		must(t, n.DropIPv4(ctx))
	}
	must(t, s.Up(ctx))
	must(t, s.PlaceAll(ctx))
	checkTraffic(t, s)
}
