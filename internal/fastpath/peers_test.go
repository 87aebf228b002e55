package fastpath

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
)

// manyPeers have one agent subnet of each family.
func manyPeers(n int) []conf.Peer {
	out := make([]conf.Peer, n)
	for i := range out {
		a, b := byte(i>>8), byte(i)
		out[i] = conf.Peer{
			AgentID: fmt.Sprint("agent", i), AgentIP: netip.AddrFrom4([4]byte{172, 20, a, b}), VTEPMAC: conf.MAC{2, 0, 0, 1, a, b},
			Subnets: []netip.Prefix{
				netip.PrefixFrom(netip.AddrFrom4([4]byte{9, a, b, 0}), 24),
				netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 8: 1, 9: a, 10: b}), 88),
			},
		}
	}
	return out
}

// 16,000 peers are put at once, and one more costs a fraction of it; the maps
// have what was asked for, and nothing when it is taken back.
func TestManyPeers(t *testing.T) {
	var objs programsObjects
	if err := loadProgramsObjects(&objs, nil); err != nil {
		t.Fatal(err)
	}
	defer objs.Close()
	table := newPeerTable(objs.Peers4, objs.Peers6, objs.Senders)
	local := netip.MustParseAddr("172.30.0.1")
	set := func(peers []conf.Peer) time.Duration {
		t.Helper()
		start := time.Now()
		if err := table.set(peers, local); err != nil {
			t.Fatal(err)
		}
		return time.Since(start)
	}
	peers := manyPeers(16001)
	t.Logf("16,000 peers: %v", set(peers[:16000]))
	start := time.Now()
	if err := table.change(peers[16000:], nil, local); err != nil {
		t.Fatal(err)
	}
	t.Logf("one more: %v", time.Since(start))
	start = time.Now()
	if err := table.change(nil, []string{peers[0].AgentID}, local); err != nil {
		t.Fatal(err)
	}
	t.Logf("one less: %v", time.Since(start))
	var e programsPeer
	if err := objs.Peers4.Lookup(programsPrefix4{Bits: 32, Addr: words(netip.MustParseAddr("9.62.128.77"))[0]}, &e); err != nil || e.Addr != words(peers[16000].AgentIP) {
		t.Errorf("the last peer's subnet leads to %v, %v", e.Addr, err)
	}
	if err := objs.Peers4.Lookup(programsPrefix4{Bits: 32, Addr: words(netip.MustParseAddr("9.0.0.77"))[0]}, &e); !isMissing(err) {
		t.Errorf("the subnet of a peer that has gone: %v", err)
	}
	t.Logf("none: %v", set(nil))
	var key programsPrefix4
	if err := objs.Peers4.NextKey(nil, &key); !isMissing(err) {
		t.Errorf("an entry is left: %v, %v", key, err)
	}
	var sender [4]uint32
	if err := objs.Senders.NextKey(nil, &sender); !isMissing(err) {
		t.Errorf("a sender is left: %v, %v", sender, err)
	}
}
