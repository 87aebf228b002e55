package agent

import (
	"io"
	"log/slog"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
)

// TestSharedBridge: where the halves share a pool, the host has one bridge with the
// gateway of the whole agent subnet, and both halves are said to have it.
func TestSharedBridge(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	n := seedNetwork()
	n.Overlays[0].Halves = conf.HalvesShared
	c := newCluster(t, n)
	h := newHost(c)
	h.start()
	h.ready()
	state := h.published("the shared pool", func(s conf.State) bool {
		o, ok := s.Overlay("dcos")
		if !ok || o.MesosBridge == nil || o.DockerBridge == nil {
			return false
		}
		return *o.MesosBridge == *o.DockerBridge && o.MesosBridge.Name == "m-dcos" && o.MesosBridge.IP == o.Subnet
	})
	o, _ := state.Overlay("dcos")
	if err := hasAddr("m-dcos", conf.GatewayPrefix(o.Subnet).String()); err != nil {
		t.Error(err)
	}
	if err := hasAddr("d-dcos", conf.GatewayPrefix(conf.Docker.Of(o.Subnet)).String()); err == nil {
		t.Error("there is a second bridge")
	}
	h.statusAt("status at the coordinator", allOK)
}

// TestKeepHalves: a coordinator that does not know of shared pools does not take one
// from under containers; another subnet is what the coordinator says.
func TestKeepHalves(t *testing.T) {
	l := &loop{log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	grant := func(name, subnet, halves string) conf.Grant {
		return conf.Grant{Overlay: conf.Overlay{Name: name, Halves: halves}, Subnet: prefix(subnet)}
	}
	before := &heldLease{Lease: conf.Lease{ClusterID: "c", Grants: []conf.Grant{
		grant("one", "9.0.1.0/24", conf.HalvesShared), grant("two", "10.0.1.0/24", ""), grant("three", "10.1.1.0/24", conf.HalvesShared),
	}}}
	now := conf.Lease{ClusterID: "c", Grants: []conf.Grant{
		grant("one", "9.0.1.0/24", ""), grant("two", "10.0.1.0/24", ""), grant("three", "10.1.2.0/24", ""), grant("four", "10.2.1.0/24", conf.HalvesShared),
	}}
	l.keepHalves(before, &now)
	var got []string
	for _, g := range now.Grants {
		got = append(got, g.Overlay.Halves)
	}
	if strings.Join(got, ",") != "shared,,,shared" {
		t.Errorf("halves %q", got)
	}
	if len(l.lease.kept) != 1 || !strings.Contains(l.lease.kept[0], "overlay one: its halves stay shared on this host") {
		t.Errorf("said %q", l.lease.kept)
	}
	l.keepHalves(before, &conf.Lease{ClusterID: "c", Grants: before.Grants})
	if l.lease.kept != nil {
		t.Errorf("still said %q", l.lease.kept)
	}
	// The other way round: leased by a coordinator that does not know of shared pools,
	// beside others that do. When these answer it is said how the host follows them.
	split := &heldLease{Lease: conf.Lease{ClusterID: "c", Grants: []conf.Grant{grant("one", "9.0.1.0/24", "")}}}
	now = conf.Lease{ClusterID: "c", Grants: []conf.Grant{grant("one", "9.0.1.0/24", conf.HalvesShared)}}
	l.keepHalves(split, &now)
	if now.Grants[0].Overlay.Shared() || len(l.lease.kept) != 1 || !strings.Contains(l.lease.kept[0], "stay split") || !strings.Contains(l.lease.kept[0], "overlayd agent teardown") {
		t.Errorf("halves %q, said %q", now.Grants[0].Overlay.Halves, l.lease.kept)
	}
	now = conf.Lease{ClusterID: "c", Grants: []conf.Grant{grant("one", "9.0.1.0/24", conf.HalvesShared)}}
	l.keepHalves(nil, &now) // after the teardown
	if !now.Grants[0].Overlay.Shared() || l.lease.kept != nil {
		t.Errorf("halves %q, said %q", now.Grants[0].Overlay.Halves, l.lease.kept)
	}
}
