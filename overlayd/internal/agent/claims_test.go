package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"overlayd.internal/overlay/conf"
)

// Whatever comes, changes and goes, who keeps count of the changes has what a
// decision about all peers from scratch has, and so has who asks for everything.
func TestClaimsAgreeWithResolve(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		own, ip := drawLease(t), drawAddr(t, "own ip")
		c := newClaims()
		c.setOwn(own, ip)
		peers := map[string]conf.Peer{}
		have := map[string]conf.Peer{}
		t.Repeat(map[string]func(*rapid.T){
			"put": func(t *rapid.T) {
				p := drawPeer(t)
				peers[p.AgentID] = p
				c.put(p)
			},
			"remove": func(t *rapid.T) {
				id := drawID(t)
				delete(peers, id)
				c.remove(id)
			},
			"epoch": func(t *rapid.T) {
				p, ok := peers[drawID(t)]
				if !ok {
					t.Skip("no such peer")
				}
				p.Epoch = drawEpoch(t)
				peers[p.AgentID] = p
				c.put(p)
			},
			"own": func(t *rapid.T) {
				own, ip = drawLease(t), drawAddr(t, "own ip")
				c.setOwn(own, ip)
			},
			"own ip": func(t *rapid.T) {
				ip = drawAddr(t, "own ip")
				c.setOwn(own, ip)
			},
			"own vtep": func(t *rapid.T) {
				own.VTEP = drawLease(t).VTEP
				c.setOwn(own, ip)
			},
			"own epoch": func(t *rapid.T) {
				own.Epoch = drawEpoch(t)
				c.setOwn(own, ip)
			},
			"own subnet": func(t *rapid.T) {
				own.Grants = slices.Clone(own.Grants)
				own.Grants[0].Subnet = drawOwnSubnet(t)
				c.setOwn(own, ip)
			},
			"all": func(t *rapid.T) {
				have = peerMap(c.all()...)
			},
			"changes": func(t *rapid.T) {
				set, gone := c.changes()
				for _, p := range set {
					have[p.AgentID] = p
				}
				for _, id := range gone {
					delete(have, id)
				}
				for _, id := range gone {
					if _, both := peerMap(set...)[id]; both {
						t.Fatalf("agent %s is both there and gone", id)
					}
				}
				resolved, _, lost := resolve(own, own.Peer().Subnets, ip, peers)
				if diff := cmp.Diff(byID(resolved), byID(values(have))); diff != "" {
					t.Fatalf("from scratch (-), by changes (+):\n%s", diff)
				}
				if c.lost != lost {
					t.Fatalf("lost %q, want %q", c.lost, lost)
				}
			},
			"": func(t *rapid.T) {
				if len(c.peers) != len(peers) {
					t.Fatalf("%d peers, want %d", len(c.peers), len(peers))
				}
			},
		})
	})
}

func values(m map[string]conf.Peer) (ps []conf.Peer) {
	for _, p := range m {
		ps = append(ps, p)
	}
	return ps
}

// byID is what counts of peers, in no order.
func byID(ps []conf.Peer) map[string]string {
	out := map[string]string{}
	for _, p := range ps {
		if p.Subnets == nil {
			p.Subnets = []netip.Prefix{}
		}
		out[p.AgentID] = fmt.Sprintf("%+v", p)
	}
	return out
}

// The draws are from so little that peers are in each other's way now and then.

func drawID(t *rapid.T) string {
	return rapid.SampledFrom([]string{"a", "b", "c", "d", "e"}).Draw(t, "id")
}

func drawEpoch(t *rapid.T) uint64 { return rapid.Uint64Range(8, 12).Draw(t, "epoch") }

func drawAddr(t *rapid.T, what string) netip.Addr {
	return netip.AddrFrom4([4]byte{172, 17, 0, rapid.ByteRange(1, 25).Draw(t, what)})
}

// drawAddr6 may be none.
func drawAddr6(t *rapid.T, what string) netip.Addr {
	n := rapid.ByteRange(0, 25).Draw(t, what)
	if n == 0 {
		return netip.Addr{}
	}
	return netip.AddrFrom16([16]byte{0xfd, 1, 15: n})
}

func drawMAC(t *rapid.T) conf.MAC { return conf.MAC{2, 5: rapid.ByteRange(1, 25).Draw(t, "mac")} }

func drawSubnets(t *rapid.T) []netip.Prefix {
	return rapid.SliceOfN(rapid.SampledFrom([]netip.Prefix{
		prefix("9.0.1.0/24"), prefix("9.0.2.0/24"), prefix("9.0.3.0/24"), prefix("9.0.2.0/25"), prefix("9.0.2.128/25"),
		prefix("fd01:b:0:0:1::/80"), prefix("fd01:b:0:0:2::/80"), prefix("fd01:b:0:0:2:8000::/81"),
	}), 0, 3).Draw(t, "subnets")
}

func drawPeer(t *rapid.T) conf.Peer {
	p := conf.Peer{
		AgentID: drawID(t), AgentIP: drawAddr(t, "ip"), Epoch: drawEpoch(t),
		VTEPIP: drawAddr(t, "vtep"), VTEPIP6: drawAddr6(t, "vtep6"), VTEPMAC: drawMAC(t),
		Subnets: drawSubnets(t),
	}
	if p.VTEPIP6.IsValid() && rapid.Bool().Draw(t, "only IPv6") {
		p.VTEPIP = netip.Addr{}
	}
	if rapid.Bool().Draw(t, "two families") {
		p.SecondIP = drawAddr(t, "second ip")
	}
	return p
}

func drawLease(t *rapid.T) conf.Lease {
	l := testLease()
	l.Epoch = drawEpoch(t)
	l.VTEP = conf.VTEP{IP: netip.PrefixFrom(drawAddr(t, "own vtep"), 20), MAC: drawMAC(t)}
	if ip6 := drawAddr6(t, "own vtep6"); ip6.IsValid() {
		l.VTEP.IP6 = netip.PrefixFrom(ip6, 64)
	}
	if rapid.Bool().Draw(t, "own two families") {
		l.SecondIP = drawAddr(t, "own second ip")
	}
	l.Grants[0].Subnet = drawOwnSubnet(t)
	return l
}

func drawOwnSubnet(t *rapid.T) netip.Prefix {
	return rapid.SampledFrom([]netip.Prefix{prefix("9.0.1.0/24"), prefix("9.0.2.0/24")}).Draw(t, "own subnet")
}
