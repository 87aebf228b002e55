package coordinator_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
)

const (
	sixOverlay = `{"name": "six", "subnet6": "fd01:b::/64", "prefix6": 80}`
	sixBoth    = `{"name": "six", "subnet": "9.0.0.0/8", "prefix": 24, "subnet6": "fd01:b::/64", "prefix6": 80}`
)

// sixOnly is a configuration without vtep_subnet, or with one.
func sixOnly(vtep, overlay string) string {
	if vtep != "" {
		vtep = fmt.Sprintf(`"vtep_subnet": %q, `, vtep)
	}
	return `{` + vtep + `"vtep_subnet6": "fd01:a::/64", "vtep_mac_oui": "70:B3:D5:00:00:00", "overlays": [` + overlay + `]}`
}

// six is the registration of one of many agents with IPv6 addresses.
func six(i int) api.RegisterRequest {
	return request(fmt.Sprintf("agent-%d", i), fmt.Sprintf("fd00::%x", i+1), conf.Mesos, conf.Docker)
}

func (n *node) applied(t testing.TB, network string) api.NetworkPlan {
	t.Helper()
	plan, err := n.client.OverlaysApply(t.Context(), api.ConfigRequest{Config: network})
	if err != nil {
		t.Fatal(err)
	}
	return plan
}

// vtep is a VTEP in a line.
func vtep(v conf.VTEP) string { return fmt.Sprintf("%s %s %s", v.IP, v.IP6, v.MAC) }

// toldMACs checks that peers are told of the VTEPs that the leases have.
func toldMACs(t *testing.T, n *node, leases ...conf.Lease) {
	t.Helper()
	e := n.watch(t, leases[0].AgentID, 0).next(t)
	told := map[string]string{}
	for _, p := range e.Put {
		told[p.AgentID] = fmt.Sprintf("%s %s %s", p.VTEPIP, p.VTEPIP6, p.VTEPMAC)
	}
	if len(told) != len(leases) {
		t.Errorf("told of %v, want %d peers", told, len(leases))
	}
	for _, l := range leases {
		if want := fmt.Sprintf("%s %s %s", l.VTEP.IP.Addr(), l.VTEP.IP6.Addr(), l.VTEP.MAC); told[l.AgentID] != want {
			t.Errorf("peers of %s are told of VTEP %s, want %s", l.AgentID, told[l.AgentID], want)
		}
	}
}

// TestIPv6Alone: without vtep_subnet agents have an IPv6 VTEP address, of which their
// MAC is made, and nothing of IPv4 is stored.
func TestIPv6Alone(t *testing.T) {
	s := newStore(t)
	n := start(t, s, sixOnly("", sixOverlay))
	first, second := n.register(t, six(0)), n.register(t, six(1))
	for lease, want := range map[*conf.Lease]string{
		&first:  "invalid Prefix fd01:a::1/64 72:b3:d5:00:00:01",
		&second: "invalid Prefix fd01:a::2/64 72:b3:d5:00:00:02",
	} {
		if got := vtep(lease.VTEP); got != want {
			t.Errorf("VTEP %s, want %s", got, want)
		}
	}
	toldMACs(t, n, first, second)
	if keys := stored(t, s); slices.ContainsFunc(keys, func(k string) bool { return strings.HasPrefix(k, "vtep/") }) || !slices.Contains(keys, "vtep6/fd01:a::1") {
		t.Errorf("stored are %v", keys)
	}
	state, err := json.Marshal(n.State())
	if err != nil {
		t.Fatal(err)
	}
	// Who reads DC/OS's document finds its keys.
	for _, want := range []string{`"vtep_ip":"","vtep_ip6":"fd01:a::1/64","vtep_mac":"72:b3:d5:00:00:01"`, `"vtep_subnet":"","vtep_subnet6":"fd01:a::/64"`} {
		if !strings.Contains(string(state), want) {
			t.Errorf("the state does not have %s:\n%s", want, state)
		}
	}
	n.stop()
	n = start(t, s, sixOnly("", sixOverlay))
	sameLease(t, "after a restart of the coordinator", first, n.register(t, six(0)))
	if _, err := n.Delete(t.Context(), []string{six(0).AgentID}); err != nil {
		t.Fatal(err)
	}
	if got := n.register(t, six(2)); vtep(got.VTEP) != vtep(first.VTEP) {
		t.Errorf("VTEP %s, want that of the agent which was deleted, %s", vtep(got.VTEP), vtep(first.VTEP))
	}
}

// TestIPv4Added: vtep_subnet and IPv4 come to a cluster that had none. Nobody's MAC
// changes, nobody gets one that another has, and vtep_subnet stays from then on.
func TestIPv4Added(t *testing.T) {
	n := start(t, newStore(t), sixOnly("", sixOverlay))
	before := []conf.Lease{n.register(t, six(0)), n.register(t, six(1))}
	_, err := n.client.OverlaysApply(t.Context(), api.ConfigRequest{Config: sixOnly("", sixBoth)})
	refused(t, err, http.StatusUnprocessableEntity)
	var bad *api.Error
	if errors.As(err, &bad); !strings.Contains(fmt.Sprint(bad.Problems), "vtep_subnet: missing, but an overlay has subnet") {
		t.Errorf("problems %q", bad.Problems)
	}
	// The last three bytes of these addresses are those of the IPv6 ones.
	plan := n.applied(t, sixOnly("44.0.0.0/20", sixBoth))
	if got := changes(plan); got != "vtep_subnet (none) -> 44.0.0.0/20\nsix subnet (none) -> 9.0.0.0/8" {
		t.Errorf("changes:\n%s", got)
	}
	macs, leases := map[conf.MAC]bool{}, []conf.Lease{}
	for i, want := range []string{
		"44.0.0.1/20 fd01:a::1/64 72:b3:d5:00:00:01",
		"44.0.0.2/20 fd01:a::2/64 72:b3:d5:00:00:02",
		"44.0.0.3/20 fd01:a::3/64 70:b3:d5:00:00:03",
	} {
		lease := n.register(t, six(i))
		if got := vtep(lease.VTEP); got != want {
			t.Errorf("VTEP %s, want %s", got, want)
		}
		if i < len(before) && lease.VTEP.MAC != before[i].VTEP.MAC || macs[lease.VTEP.MAC] {
			t.Errorf("MAC %s", lease.VTEP.MAC)
		}
		macs[lease.VTEP.MAC] = true
		leases = append(leases, lease)
		if got, want := granted(lease), fmt.Sprintf("six 9.0.%d.0/24 fd01:b:0:0:%x::/80", i, i); strings.ReplaceAll(got, "fd01:b::/80", "fd01:b:0:0:0::/80") != want {
			t.Errorf("granted %s, want %s", got, want)
		}
	}
	toldMACs(t, n, leases...)
	n.applied(t, sixOnly("44.0.0.0/20", sixOverlay)) // the family goes again
	_, err = n.client.OverlaysApply(t.Context(), api.ConfigRequest{Config: sixOnly("", sixOverlay)})
	refused(t, err, http.StatusConflict, "vtep_subnet 44.0.0.0/20 cannot be taken away", "on 3 hosts")
}

// TestIPv4AddedTooSmall: who was there goes on with IPv6 where vtep_subnet has no room
// for it; who is new is refused.
func TestIPv4AddedTooSmall(t *testing.T) {
	n := start(t, newStore(t), sixOnly("", sixOverlay))
	for i := range 3 {
		n.register(t, six(i))
	}
	n.applied(t, sixOnly("44.128.0.0/30", sixBoth))
	for i, want := range []string{"44.128.0.1/30", "44.128.0.2/30", "invalid Prefix"} {
		lease := n.register(t, six(i))
		if got := lease.VTEP.IP.String(); got != want || !lease.VTEP.IP6.IsValid() {
			t.Errorf("VTEP %s, want %s", vtep(lease.VTEP), want)
		}
	}
	_, err := n.client.Register(t.Context(), six(3))
	refused(t, err, http.StatusInsufficientStorage, "all 2 of vtep_subnet 44.128.0.0/30 are leased")
}

// TestIPv6TakenAway: vtep_subnet6 stays as long as a host has an address of it alone. In
// a store of before that was so, a host for which vtep_subnet has no room is refused: a
// lease without any VTEP address is none.
func TestIPv6TakenAway(t *testing.T) {
	const small, roomy = `"vtep_subnet": "44.128.0.0/30", `, `"vtep_subnet": "44.128.0.0/20", `
	without := func(vtep string) string {
		return `{` + vtep + `"vtep_mac_oui": "70:B3:D5:00:00:00", "overlays": [{"name": "four", "subnet": "9.0.0.0/8", "prefix": 24}]}`
	}
	s := newStore(t)
	n := start(t, s, sixOnly("", sixOverlay))
	was := n.register(t, six(0))
	for i := 1; i < 3; i++ {
		n.register(t, six(i))
	}
	_, err := n.client.OverlaysApply(t.Context(), api.ConfigRequest{Config: without(small)})
	refused(t, err, http.StatusConflict, "vtep_subnet6 fd01:a::/64 cannot be taken away", "agent agent-0, agent agent-1, agent agent-2;", "take it away when all have registered since")
	n.applied(t, sixOnly("44.128.0.0/30", sixBoth))
	for i := range 3 {
		n.register(t, six(i))
	}
	_, err = n.client.OverlaysApply(t.Context(), api.ConfigRequest{Config: without(small)})
	refused(t, err, http.StatusConflict, "without any: agent agent-2;")

	n.stop()
	if _, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: "network", Value: []byte(without(small))}}}); err != nil {
		t.Fatal(err)
	}
	n = start(t, s, without(small))
	if got := n.register(t, six(0)); got.VTEP.IP.String() != "44.128.0.1/30" || got.VTEP.IP6.IsValid() || got.VTEP.MAC != was.VTEP.MAC {
		t.Errorf("VTEP %s", vtep(got.VTEP))
	}
	_, err = n.client.Register(t.Context(), six(2))
	refused(t, err, http.StatusInsufficientStorage, "all 2 of vtep_subnet 44.128.0.0/30 are leased")
	n.applied(t, without(roomy))
	if got := n.register(t, six(2)); got.VTEP.IP.String() != "44.128.0.3/20" || got.VTEP.MAC != (conf.MAC{0x72, 0xb3, 0xd5, 0, 0, 3}) {
		t.Errorf("VTEP %s", vtep(got.VTEP))
	}
	toldMACs(t, n, n.register(t, six(2)), n.register(t, six(0)), n.register(t, six(1)))

	// Where all have an IPv4 address it may go.
	n = start(t, newStore(t), sixOnly("", sixOverlay))
	n.register(t, six(0))
	n.applied(t, sixOnly("44.128.0.0/20", sixBoth))
	n.register(t, six(0))
	n.applied(t, strings.Replace(without(roomy), "four", "six", 1))
	if got := n.register(t, six(0)); vtep(got.VTEP) != "44.128.0.1/20 invalid Prefix 72:b3:d5:00:00:01" {
		t.Errorf("VTEP %s", vtep(got.VTEP))
	}
}

// TestIPv6AloneAdopted: leases are shown to an empty store. The MAC that was made of
// an IPv6 address stays, also of a host that has got an IPv4 address since.
func TestIPv6AloneAdopted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, both := range []bool{false, true} {
			s := newStore(t)
			b := bubbleOf(t, coordinator.Options{Store: s}, sixOnly("", sixOverlay))
			lease := b.register("agent-0", "fd00::1")
			network := sixOnly("", sixOverlay)
			if both {
				b.stop()
				network = sixOnly("44.128.0.0/20", sixBoth)
				b = bubbleOf(t, coordinator.Options{Store: s}, network)
				lease = b.register("agent-0", "fd00::1")
			}
			b.stop()
			b = bubbleOf(t, coordinator.Options{Store: newStore(t), Adopt: coordinator.Adopt{Cluster: b.ClusterID()}}, network)
			b.waits(request("new", "fd00::9"), "shows none")
			got := b.show(lease)
			kept(t, lease, got)
			if got.VTEP != lease.VTEP || lease.VTEP.MAC != (conf.MAC{0x72, 0xb3, 0xd5, 0, 0, 1}) || lease.VTEP.IP.IsValid() != both {
				t.Errorf("VTEP %s, before %s", vtep(got.VTEP), vtep(lease.VTEP))
			}
			time.Sleep(11 * time.Minute)
			claims(t, []conf.Lease{b.show(got), b.register("new", "fd00::9")})
			b.stop()
		}
	})
}

// TestIPv6AloneImported: what a cluster without IPv4 says of itself can be taken over
// by another, like that of DC/OS.
func TestIPv6AloneImported(t *testing.T) {
	n := start(t, newStore(t), sixOnly("", sixOverlay))
	was := []conf.Lease{n.register(t, six(0)), n.register(t, six(1))}
	state, err := json.Marshal(n.State())
	if err != nil {
		t.Fatal(err)
	}
	to := start(t, newStore(t), sixOnly("", sixOverlay))
	if got := to.imported(t, state); len(got.Reserved) != 2 || got.Reserved[0].VTEP6 != netip.MustParseAddr("fd01:a::1") {
		t.Errorf("reserved %+v", got.Reserved)
	}
	if got := to.imported(t, state); len(got.Before) != 2 {
		t.Errorf("once more: %+v", got)
	}
	for _, i := range []int{1, 0} {
		if got := to.register(t, six(i)); vtep(got.VTEP) != vtep(was[i].VTEP) || granted(got) != granted(was[i]) {
			t.Errorf("VTEP %s and %s, had %s and %s", vtep(got.VTEP), granted(got), vtep(was[i].VTEP), granted(was[i]))
		}
	}
	both := start(t, newStore(t), sixOnly("44.128.0.0/20", sixBoth))
	_, err = both.client.ImportState(t.Context(), state, true)
	refused(t, err, http.StatusUnprocessableEntity, "vtep_ip: missing, but vtep_subnet is configured here")
}
