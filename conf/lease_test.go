package conf_test

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"overlayd.internal/overlay/conf"
)

// lease is what agent number i (from 0) gets from the documented configuration.
func lease(i byte, agentIP string, bridges ...conf.Half) conf.Lease {
	n := documented()
	vtep := netip.AddrFrom4([4]byte{44, 128, 0, i + 1})
	vtep6 := netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x01, 3: 0x0a, 15: i + 1})
	return conf.Lease{
		ClusterID: "c", AgentID: agentIP, AgentIP: netip.MustParseAddr(agentIP), Epoch: uint64(i) + 1, TermSeconds: 90, Bridges: bridges,
		VTEP: conf.VTEP{IP: netip.PrefixFrom(vtep, 20), IP6: netip.PrefixFrom(vtep6, 64), MAC: conf.VTEPMAC(n.OUI(), vtep)},
		Grants: []conf.Grant{
			{Overlay: n.Overlays[0], Subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{9, 0, i, 0}), 24)},
			{Overlay: n.Overlays[1], Subnet6: netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x01, 3: 0x0b, 9: i}), 80)},
		},
	}
}

// TestMasterState compares the rendering of three leases with the document
// DC/OS prints, byte for byte.
func TestMasterState(t *testing.T) {
	status := map[string]conf.OverlayStatus{"dcos": {Status: conf.StatusOK}, "dcos6": {Status: conf.StatusOK}}
	state := conf.MasterState{Network: documented()}
	for _, l := range []conf.Lease{
		lease(0, "172.17.0.2"),
		lease(1, "172.17.0.4", conf.Mesos, conf.Docker),
		lease(2, "172.17.0.3", conf.Mesos, conf.Docker),
	} {
		state.Agents = append(state.Agents, conf.MasterAgent{IP: l.AgentIP, Overlays: l.AgentOverlays(status)})
	}
	got, err := json.MarshalIndent(state, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/seed-state.json")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(bytes.TrimSpace(want)), string(got)); diff != "" {
		t.Errorf("state (-documented +rendered):\n%s", diff)
	}
}

func TestAgentOverlaysWithoutBridgeOrStatus(t *testing.T) {
	l := lease(1, "172.17.0.4", conf.Docker)
	l.Grants[1].Subnet6 = netip.Prefix{}
	l.Grants[1].Error = "overlay dcos6: all 65536 agent subnets of fd01:b::/64 are leased"
	l.VTEP.IP6, l.VTEP.MTU = netip.Prefix{}, 1400
	failed := conf.OverlayStatus{Status: conf.StatusFailed, Error: l.Grants[1].Error}

	got, err := json.Marshal(l.AgentOverlays(map[string]conf.OverlayStatus{"dcos6": failed, "other": {Status: conf.StatusOK}}))
	if err != nil {
		t.Fatal(err)
	}
	const backend = `"backend":{"vxlan":{"vni":1024,"vtep_ip":"44.128.0.2/20","vtep_mac":"70:b3:d5:80:00:02","vtep_mtu":1400,"vtep_name":"vtep1024"}}`
	const want = `[{` + backend + `,"docker_bridge":{"ip":"9.0.1.128/25","name":"d-dcos"},` +
		`"info":{"name":"dcos","prefix":24,"subnet":"9.0.0.0/8"},"subnet":"9.0.1.0/24"},` +
		`{` + backend + `,"info":{"name":"dcos6","prefix6":80,"subnet6":"fd01:b::/64"},` +
		`"state":{"error":"overlay dcos6: all 65536 agent subnets of fd01:b::/64 are leased","status":"STATUS_FAILED"}}]`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestAgentOverlayBridge(t *testing.T) {
	state := conf.State{Overlays: lease(1, "172.17.0.4", conf.Mesos, conf.Docker).AgentOverlays(nil)}
	o, ok := state.Overlay("dcos")
	if !ok || o.Bridge(conf.Mesos).Name != "m-dcos" || o.Bridge(conf.Docker).Name != "d-dcos" || o.State != nil {
		t.Errorf("overlay dcos = %+v, %v", o, ok)
	}
	if _, ok := state.Overlay("x"); ok {
		t.Error("Overlay(x) found something")
	}
	none := lease(0, "172.17.0.2").AgentOverlays(nil)[0]
	if none.Bridge(conf.Mesos) != nil || none.Bridge(conf.Docker) != nil {
		t.Errorf("a host without bridges has %+v", none)
	}
}

func TestLeaseAsPeer(t *testing.T) {
	prefix := netip.MustParsePrefix
	l := lease(1, "172.17.0.4")
	l.Grants = append(l.Grants, conf.Grant{Overlay: conf.Overlay{Name: "full"}, Error: "exhausted"})
	want := conf.Peer{
		AgentID: "172.17.0.4", AgentIP: netip.MustParseAddr("172.17.0.4"), Epoch: 2,
		VTEPIP: netip.MustParseAddr("44.128.0.2"), VTEPIP6: netip.MustParseAddr("fd01:a::2"),
		VTEPMAC: conf.MAC{0x70, 0xb3, 0xd5, 0x80, 0, 2},
		Subnets: []netip.Prefix{prefix("9.0.1.0/24"), prefix("fd01:b:0:0:1::/80")},
	}
	if diff := cmp.Diff(want, l.Peer(), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	l.VTEP.IP6 = netip.Prefix{}
	if l.Peer().VTEPIP6.IsValid() {
		t.Error("a peer without IPv6 has an IPv6 VTEP address")
	}
	if l.Term() != 90*time.Second {
		t.Errorf("Term() = %v", l.Term())
	}
}

// TestLeaseRoundTrip: what the store and the agent's cache keep is what was
// granted.
func TestLeaseRoundTrip(t *testing.T) {
	want := lease(3, "172.17.0.9", conf.Docker)
	encoded, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got conf.Lease
	if err := json.Unmarshal(encoded, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// The VTEP address of a peer is one that both hosts have the family of.
func TestVTEPOf(t *testing.T) {
	four, six := netip.MustParsePrefix("44.128.0.2/20"), netip.MustParsePrefix("fd01:a::2/64")
	theirs, theirs6, none := netip.MustParseAddr("44.128.0.3"), netip.MustParseAddr("fd01:a::3"), netip.Addr{}
	for _, tt := range []struct {
		own  conf.VXLAN
		peer conf.Peer
		want netip.Addr
	}{
		{conf.VXLAN{VTEPIP: four, VTEPIP6: six}, conf.Peer{VTEPIP: theirs, VTEPIP6: theirs6}, theirs},
		{conf.VXLAN{VTEPIP: four, VTEPIP6: six}, conf.Peer{VTEPIP6: theirs6}, theirs6},
		{conf.VXLAN{VTEPIP6: six}, conf.Peer{VTEPIP: theirs, VTEPIP6: theirs6}, theirs6},
		{conf.VXLAN{VTEPIP: four}, conf.Peer{VTEPIP: theirs, VTEPIP6: theirs6}, theirs},
		{conf.VXLAN{VTEPIP6: six}, conf.Peer{VTEPIP: theirs}, none},
		{conf.VXLAN{VTEPIP: four}, conf.Peer{VTEPIP6: theirs6}, none},
	} {
		s := conf.State{Overlays: []conf.AgentOverlay{{Backend: conf.Backend{VXLAN: tt.own}}}}
		if got := s.VTEPOf(&tt.peer); got != tt.want {
			t.Errorf("VTEP %v of %v seen from %v, want %v", got, tt.peer.VTEPs(), tt.own, tt.want)
		}
	}
	if got := new(conf.State).VTEPOf(&conf.Peer{VTEPIP6: theirs6}); got != theirs6 {
		t.Errorf("without overlays: %v", got)
	}
}
