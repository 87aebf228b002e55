package agent

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// routesOfPeers is what ip prints of our routes to other hosts.
func routesOfPeers(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("ip", "route", "show", "proto", "44").CombinedOutput()
	must(t, err)
	return string(out)
}

// takesPlain reports whether the rules take packets of peers without VXLAN.
func takesPlain(t *testing.T) bool {
	t.Helper()
	out, err := exec.Command("sh", "-c", "nft list ruleset; iptables-save").CombinedOutput()
	must(t, err)
	if !strings.Contains(string(out), "OVERLAY-RAW") {
		t.Fatalf("there are no rules:\n%s", out)
	}
	return strings.Contains(string(out), "direct4")
}

// A host that is told to send direct does so to peers that take it, the cluster
// learns of it, and one that is told otherwise sends VXLAN at once and goes on
// listening until its peers know.
func TestRouting(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	client := c.client()
	const listens = 700 * time.Millisecond
	subnets := map[string]netip.Prefix{}
	takes := func(id, ip string, direct bool) {
		t.Helper()
		l, err := client.Register(t.Context(), api.RegisterRequest{AgentID: id, AgentIP: netip.MustParseAddr(ip), Version: "test", Underlay: conf.Underlay{Direct: direct}})
		must(t, err)
		subnets[id] = l.Grants[0].Subnet
	}
	takes("takes", "172.17.0.77", true)
	takes("not", "172.17.0.78", false)
	takes("far", "10.9.9.9", true)
	h := newHost(c)
	h.opts.Routing = conf.RoutingDirect
	h.opts.Firewall = "nftables"
	h.tune = func(t *timing) { t.direct = listens }
	via := func(id, want string) {
		t.Helper()
		eventually(t, id+" gets its packets "+want, func() error {
			for line := range strings.Lines(routesOfPeers(t)) {
				if strings.HasPrefix(line, subnets[id].String()+" ") && strings.Contains(line, want) {
					return nil
				}
			}
			return fmt.Errorf("routes:\n%s", routesOfPeers(t))
		})
	}
	direct := func(want bool) {
		t.Helper()
		eventually(t, "the cluster knows", func() error {
			agents, err := client.Agents(t.Context())
			for _, a := range agents {
				if a.AgentID == h.id() && a.Direct != want {
					err = fmt.Errorf("agent %s: direct %v", a.AgentID, a.Direct)
				}
			}
			return err
		})
	}
	h.start()
	h.ready()
	via("takes", "via 172.17.0.77 dev u0")
	via("not", "dev vtep1024")
	via("far", "dev vtep1024")
	direct(true)
	if !takesPlain(t) {
		t.Error("nothing is taken without VXLAN")
	}
	if got := h.document().Datapath.Routing; got != conf.RoutingDirect {
		t.Errorf("published is routing %q", got)
	}
	takes("takes", "172.17.0.77", false)
	via("takes", "dev vtep1024")
	takes("takes", "172.17.0.77", true)
	via("takes", "via 172.17.0.77 dev u0")

	// While the coordinator is away nobody can be told, so it listens.
	h.stop()
	c.stop()
	h.opts.Routing = conf.RoutingVXLAN
	h.start()
	h.ready()
	via("takes", "dev vtep1024")
	for until := time.Now().Add(2 * listens); time.Now().Before(until); {
		if !takesPlain(t) {
			t.Fatal("it no longer listens, though nobody was told")
		}
	}
	c.start()
	direct(false)
	eventually(t, "it no longer listens", func() error {
		if takesPlain(t) {
			return fmt.Errorf("the set is still there")
		}
		return nil
	})
	via("takes", "dev vtep1024")
}

// The cluster knows what a host takes, also when that changes, and the host has
// what others take in its routes.
func TestHostMTU(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	client := c.client()
	l, err := client.Register(t.Context(), api.RegisterRequest{AgentID: "small", AgentIP: netip.MustParseAddr("172.17.0.77"), Version: "test", Underlay: conf.Underlay{MTU: 1300}})
	must(t, err)
	_, err = client.Register(t.Context(), api.RegisterRequest{AgentID: "wrong", AgentIP: netip.MustParseAddr("172.17.0.78"), Version: "test", Underlay: conf.Underlay{MTU: 100}})
	if err == nil || !strings.Contains(err.Error(), "mtu 100") {
		t.Errorf("an MTU of 100 is accepted: %v", err)
	}
	h := newHost(c)
	h.start()
	h.ready()
	known := func(want int) {
		t.Helper()
		eventually(t, "the cluster knows the MTU", func() error {
			agents, err := client.Agents(t.Context())
			for _, a := range agents {
				if a.AgentID == h.id() && a.MTU != want {
					err = fmt.Errorf("agent %s has MTU %d, want %d", a.AgentID, a.MTU, want)
				}
			}
			return err
		})
	}
	route := func(want string) {
		t.Helper()
		eventually(t, "the route has "+want, func() error {
			for line := range strings.Lines(routesOfPeers(t)) {
				if strings.HasPrefix(line, l.Grants[0].Subnet.String()+" ") && strings.Contains(line+" ", want) {
					return nil
				}
			}
			return fmt.Errorf("routes:\n%s", routesOfPeers(t))
		})
	}
	known(1450)
	route("mtu 1300 ")
	out, err := exec.Command("ip", "link", "set", "u0", "mtu", "1400").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	known(1350)
	_, err = client.Register(t.Context(), api.RegisterRequest{AgentID: "small", AgentIP: netip.MustParseAddr("172.17.0.77"), Version: "test", Underlay: conf.Underlay{MTU: 1200}})
	must(t, err)
	route("mtu 1200 ")
}
