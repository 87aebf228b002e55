package agent

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath"
)

var compareNetip = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }

// testLease is the lease of the agent "own": 9.0.1.0/24 of dcos and
// fd01:b:0:0:1::/80 of dcos6.
func testLease() conf.Lease {
	return conf.Lease{
		ClusterID: "c1", AgentID: "own", AgentIP: addr("172.17.0.4"), Epoch: 10, TermSeconds: 86400,
		Bridges: []conf.Half{conf.Mesos, conf.Docker},
		VTEP:    conf.VTEP{IP: prefix("44.128.0.2/20"), IP6: prefix("fd01:a::2/64"), MAC: conf.MAC{0x70, 0xb3, 0xd5, 0x80, 0, 2}},
		Grants: []conf.Grant{
			{Overlay: conf.Overlay{Name: "dcos", Subnet: prefix("9.0.0.0/8"), Prefix: 24}, Subnet: prefix("9.0.1.0/24")},
			{Overlay: conf.Overlay{Name: "dcos6", Subnet6: prefix("fd01:b::/64"), Prefix6: 80, Isolation: conf.IsolationOf(true)}, Subnet6: prefix("fd01:b:0:0:1::/80")},
		},
	}
}

// testPeer is the nth peer, with everything a peer has.
func testPeer(id string, n byte, epoch uint64, subnets ...string) conf.Peer {
	p := conf.Peer{
		AgentID: id, AgentIP: netip.AddrFrom4([4]byte{172, 17, 0, n}), Epoch: epoch,
		VTEPIP: netip.AddrFrom4([4]byte{44, 128, 0, n}), VTEPMAC: conf.MAC{0x70, 0xb3, 0xd5, 0x80, 0, n},
	}
	for _, s := range subnets {
		p.Subnets = append(p.Subnets, prefix(s))
	}
	return p
}

func peerMap(ps ...conf.Peer) map[string]conf.Peer {
	m := map[string]conf.Peer{}
	for _, p := range ps {
		m[p.AgentID] = p
	}
	return m
}

func TestDesired(t *testing.T) {
	l := testLease()
	l.Grants = append(l.Grants, conf.Grant{Overlay: conf.Overlay{Name: "full", Subnet: prefix("10.0.0.0/24"), Prefix: 26}, Error: "exhausted"})
	got := desired(l, addr("172.17.0.9"))
	want := datapath.Host{
		VTEP: datapath.VTEP{
			Local: addr("172.17.0.9"), MAC: l.VTEP.MAC, IP: prefix("44.128.0.2/20"), IP6: prefix("fd01:a::2/64"),
		},
		Bridges: []datapath.Bridge{
			{Name: "m-dcos", Overlay: "dcos", Addrs: []netip.Prefix{prefix("9.0.1.1/25")}},
			{Name: "d-dcos", Overlay: "dcos", Addrs: []netip.Prefix{prefix("9.0.1.129/25")}},
			{Name: "m-dcos6", Overlay: "dcos6", Addrs: []netip.Prefix{prefix("fd01:b::1:0:0:1/81")}},
			{Name: "d-dcos6", Overlay: "dcos6", Addrs: []netip.Prefix{prefix("fd01:b::1:8000:0:1/81")}},
		},
		Overlays: []datapath.Overlay{
			{Name: "dcos", Subnets: []netip.Prefix{prefix("9.0.0.0/8")}, Agent: []netip.Prefix{prefix("9.0.1.0/24")}},
			{Name: "dcos6", Subnets: []netip.Prefix{prefix("fd01:b::/64")}, Agent: []netip.Prefix{prefix("fd01:b:0:0:1::/80")}, Isolation: conf.IsolationOf(true)},
			{Name: "full", Subnets: []netip.Prefix{prefix("10.0.0.0/24")}},
		},
	}
	if diff := cmp.Diff(want, got, compareNetip, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("desired (-want +got):\n%s", diff)
	}
}

func TestDesiredWithoutBridges(t *testing.T) {
	l := testLease()
	l.Bridges = nil
	got := desired(l, l.AgentIP)
	if len(got.Bridges) != 0 {
		t.Errorf("bridges %v, want none", got.Bridges)
	}
	if len(got.Overlays) != 2 || len(got.Overlays[0].Agent) != 1 {
		t.Errorf("overlays %v: the host must forward for its agent subnets all the same", got.Overlays)
	}
}

func TestResolve(t *testing.T) {
	type peers = []conf.Peer
	for _, tc := range []struct {
		name string
		in   peers
		want map[string][]string // subnets by id of the peers that are left
		gone []string            // subnets of ours that are another's
		lost string
	}{
		{
			name: "no conflict, in the order of ids",
			in:   peers{testPeer("c", 5, 1, "9.0.3.0/24"), testPeer("b", 3, 2, "9.0.2.0/24")},
			want: map[string][]string{"b": {"9.0.2.0/24"}, "c": {"9.0.3.0/24"}},
		}, {
			name: "one subnet, two claims: the higher epoch has it, the other keeps its other one",
			in:   peers{testPeer("b", 3, 5, "9.0.2.0/24", "10.0.2.0/24"), testPeer("c", 5, 6, "9.0.2.0/24")},
			want: map[string][]string{"b": {"10.0.2.0/24"}, "c": {"9.0.2.0/24"}},
		}, {
			name: "one agent IP, two agents: the newer lease has it",
			in:   peers{testPeer("old", 3, 5, "9.0.2.0/24"), withIP(testPeer("new", 5, 6, "9.0.3.0/24"), "172.17.0.3")},
			want: map[string][]string{"new": {"9.0.3.0/24"}},
		}, {
			name: "our agent IP",
			in:   peers{withIP(testPeer("old", 3, 50, "9.0.2.0/24"), "172.17.0.4")},
			want: map[string][]string{},
		}, {
			name: "our VTEP address",
			in:   peers{testPeer("twin", 2, 50, "9.0.2.0/24")},
			want: map[string][]string{},
		}, {
			name: "our subnet, claimed by an older lease",
			in:   peers{testPeer("b", 3, 9, "9.0.1.0/24", "10.0.2.0/24")},
			want: map[string][]string{"b": {"10.0.2.0/24"}},
		}, {
			name: "our subnet, granted to another since",
			in:   peers{testPeer("b", 3, 11, "9.0.1.0/24")},
			want: map[string][]string{"b": {"9.0.1.0/24"}},
			gone: []string{"9.0.1.0/24"},
			lost: "subnet 9.0.1.0/24 is leased to agent b (172.17.0.3) since; its epoch is 11, ours 10",
		}, {
			name: "part of our subnet, granted to another since",
			in:   peers{testPeer("b", 3, 11, "fd01:b:0:0:1:8000::/81")},
			want: map[string][]string{"b": {"fd01:b::1:8000:0:0/81"}},
			gone: []string{"fd01:b:0:0:1::/80"},
			lost: "subnet fd01:b::1:8000:0:0/81 is leased to agent b (172.17.0.3) since; its epoch is 11, ours 10",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := testLease()
			resolved, elsewhere, lost := resolve(l, l.Peer().Subnets, l.AgentIP, peerMap(tc.in...))
			var gone []string
			for s := range elsewhere {
				gone = append(gone, s.String())
			}
			if !slices.Equal(gone, tc.gone) {
				t.Errorf("elsewhere: %v, want %v", gone, tc.gone)
			}
			got := map[string][]string{}
			var last string
			for _, p := range resolved {
				if p.AgentID < last {
					t.Errorf("%s after %s", p.AgentID, last)
				}
				last = p.AgentID
				got[p.AgentID] = []string{}
				for _, s := range p.Subnets {
					got[p.AgentID] = append(got[p.AgentID], s.String())
				}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("peers (-want +got):\n%s", diff)
			}
			if lost != tc.lost {
				t.Errorf("lost %q, want %q", lost, tc.lost)
			}
		})
	}
}

// resolve must not write into the peers it was given.
func TestResolveLeavesPeersAlone(t *testing.T) {
	l := testLease()
	peers := peerMap(testPeer("b", 3, 5, "9.0.1.0/24", "10.0.2.0/24"))
	resolve(l, l.Peer().Subnets, l.AgentIP, peers)
	if got := peers["b"].Subnets; len(got) != 2 || got[0] != prefix("9.0.1.0/24") {
		t.Errorf("subnets are %v now", got)
	}
}

func withIP(p conf.Peer, ip string) conf.Peer {
	p.AgentIP = addr(ip)
	return p
}

func TestCheckLease(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*conf.Lease)
		want   string // part of the error; empty: fine
	}{
		{"fine", func(*conf.Lease) {}, ""},
		{"of another agent", func(l *conf.Lease) { l.AgentID = "x" }, `agent "x"`},
		{"no term", func(l *conf.Lease) { l.TermSeconds = 0 }, "term"},
		{"no VTEP", func(l *conf.Lease) { l.VTEP.IP, l.VTEP.IP6 = netip.Prefix{}, netip.Prefix{} }, "VTEP address"},
		{"IPv6 VTEP only", func(l *conf.Lease) { l.VTEP.IP = netip.Prefix{} }, ""},
		{"VTEP families swapped", func(l *conf.Lease) { l.VTEP.IP, l.VTEP.IP6 = l.VTEP.IP6, l.VTEP.IP }, "wrong places"},
		{"multicast MAC", func(l *conf.Lease) { l.VTEP.MAC[0] = 1 }, "MAC"},
		{"no MAC", func(l *conf.Lease) { l.VTEP.MAC = conf.MAC{} }, "MAC"},
		{"no agent IP", func(l *conf.Lease) { l.AgentIP = netip.Addr{} }, "agent IP"},
		{"name that is a path", func(l *conf.Lease) { l.Grants[0].Overlay.Name = "../x" }, "../x"},
		{"host bits", func(l *conf.Lease) { l.Grants[0].Subnet = prefix("9.0.1.1/24") }, "9.0.1.1/24"},
		{"too small to halve", func(l *conf.Lease) { l.Grants[0].Subnet = prefix("9.0.1.0/30") }, "9.0.1.0/30"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := testLease()
			tc.change(&l)
			err := checkLease(l, "own")
			if tc.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}
