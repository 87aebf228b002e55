package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/fastpath"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan/plantest"
)

// A container that may send from any MAC fills no more of a bridge's table than
// its limit, and others go on being reached, also new ones.
func TestFDBIsBounded(t *testing.T) {
	n := onlyIPv4
	_, hosts := n.plugHosts(t, 1)
	h, cfg := hosts[0], n.Host(0, 1)
	bridge := cfg.Bridges[0]
	hostile, _ := h.container(bridge.Name, bridge.Addrs[0], 5)
	near, nearAddr := h.container(bridge.Name, bridge.Addrs[0], 6)
	hostile.mustPing("", nearAddr)

	hostile.do(func() {
		if err := sendFromMACs("eth0", 3*plan.MaxLearned); err != nil {
			t.Error(err)
		}
	})
	learned := strings.Count(h.sh("bridge fdb show br "+bridge.Name), "\n")
	t.Logf("%d entries after frames from %d MACs", learned, 3*plan.MaxLearned)
	if learned < plan.MaxLearned || learned > plan.MaxLearned+100 {
		t.Errorf("the bridge has %d entries, want %d and its own", learned, plan.MaxLearned)
	}
	late, lateAddr := h.container(bridge.Name, bridge.Addrs[0], 7)
	near.mustPing("", lateAddr)
	late.mustPing("", nearAddr)
	h.mustPing("", lateAddr)

	// Whoever takes the limit away is noticed.
	changes := h.dp.Changes
	var announced <-chan struct{}
	h.do(func() { announced = changes(t.Context()) })
	h.do(func() {
		conn, err := rtnl.Open()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		l, _, err := conn.LinkByName(bridge.Name)
		if err != nil {
			t.Error(err)
			return
		}
		var b rtnl.Batch
		b.SetLink("", l.Index)
		b.Nest(unix.IFLA_LINKINFO, func() {
			b.AttrString(unix.IFLA_INFO_KIND, "bridge")
			b.Nest(unix.IFLA_INFO_DATA, func() { b.Attr32(unix.IFLA_BR_FDB_MAX_LEARNED, 0) })
		})
		if refused, err := conn.Send(&b); err != nil || len(refused) > 0 {
			t.Error(err, refused)
		}
	})
	<-announced
	if r := h.mustSet(cfg, true); r.Drift.Counts["link"] != 1 {
		t.Errorf("drift %v, want the limit", r.Drift)
	}
	h.mustBeIdle(cfg)
}

// A container makes the host resolve no more addresses than it may, those of the
// host's network and those of containers that are not there, and others go on
// being reached, also new ones. The iptables of such a host have no part in it, and
// neither has the fast path, though it takes what goes to the other host.
func TestNeighboursAreBounded(t *testing.T) {
	for _, kind := range []string{"nftables", "iptables-nft", "iptables-legacy", "nftables, fast path"} {
		t.Run(kind, func(t *testing.T) {
			kind, _, fast := strings.Cut(kind, ", ")
			useFirewall(t, kind)
			n, size := bothIP, 1
			if fast {
				size = 2
			}
			_, hosts := n.plugHosts(t, size)
			h, cfg := hosts[0], n.Host(0, size)
			if off := h.dp.rules.guard.off; off != nil {
				t.Skipf("nothing bounds it on this kernel: %v", off)
			}
			var p *fastpath.Path
			if fast {
				p = h.newFast()
			}
			testNeighbours(t, h, cfg, p)
		})
	}
}

// testNeighbours: with the fast path p, unless it is nil, at all containers.
func testNeighbours(t *testing.T, h *host, cfg Host, p *fastpath.Path) {
	plug := func(b Bridge, k int) (*netNS, string) {
		c, addr := h.container(b.Name, b.Addrs[0], k)
		return c, addr
	}
	if p != nil {
		plug = func(b Bridge, k int) (*netNS, string) {
			half, _ := mark.HalfOf(b.Name)
			c, port := h.attach(half, b.Overlay, b.Addrs[0], k)
			h.sh(fmt.Sprintf("ip link set %s group %d", port, mark.FastPathGroup))
			h.applyFast(p, cfg)
			return c, plantest.Nth(b.Addrs[0].Masked(), b.Addrs[0].Addr().BitLen(), k).Addr().String()
		}
	}
	other := cfg.Bridges[3].Addrs[0]
	for _, c := range []struct {
		what   string
		from   Bridge
		device string
		to     netip.Prefix
	}{
		{"addresses of the host's network", cfg.Bridges[0], "eth0", netip.MustParsePrefix("172.20.0.0/16")},
		{"containers of the other half", cfg.Bridges[2], cfg.Bridges[3].Name, other.Masked()},
	} {
		gateway := c.from.Addrs[0]
		hostile, _ := plug(c.from, 5)
		near, nearAddr := plug(c.from, 6)
		hostile.mustPing("", nearAddr)
		const scanned = 600
		began := time.Now()
		hostile.do(func() {
			if err := scan(c.to, scanned); err != nil {
				t.Error(err)
			}
		})
		resolved := strings.Count(h.sh("ip neigh show dev "+c.device), "\n")
		most := 200 + 100*(1+int(time.Since(began).Seconds())) + 10
		t.Logf("%s: %d of %d became entries", c.what, resolved, scanned)
		if resolved < 150 || resolved > most {
			t.Errorf("%s: %d of %d became entries, want at most %d", c.what, resolved, scanned, most)
		}
		bridge := cfg.Bridges[1] // the other half, by the host, in the same family
		if gateway.Addr().Is6() {
			bridge = cfg.Bridges[3]
		}
		late, lateAddr := plug(bridge, 7)
		near.mustPing("", lateAddr)
		late.mustPing("", nearAddr)
		if p != nil {
			sendsFast(t, p, c.from.Overlay, hostile, cfg.Peers[0].Subnets)
		}
	}
	// What the kernel has put into the sets is no reason to make the rules anew.
	h.mustBeIdle(cfg)
}

// sendsFast checks that what a container sends to another host takes the fast path;
// the first packet may not, as long as the host does not know where the other is.
func sendsFast(t *testing.T, p *fastpath.Path, overlay string, c *netNS, subnets []netip.Prefix) {
	t.Helper()
	c.eventually(func() bool {
		c.do(func() {
			for _, s := range subnets {
				if err := scan(s, 1); err != nil && !errors.Is(err, unix.ENETUNREACH) { // it has one family
					t.Error(err)
				}
			}
		})
		traffic, err := p.Traffic()
		if err != nil {
			t.Fatal(err)
		}
		return traffic[overlay].Out.Packets > 0
	}, "the fast path takes nothing of overlay %s", overlay)
}

// A container that goes on sending to addresses that nobody has keeps no more of
// them being resolved than in the beginning, which takes longer than the kernel
// asks for one: hence the 6 s. It does not use up what a container beside it may
// do meanwhile.
func TestNeighboursStayBounded(t *testing.T) {
	useFirewall(t, "nftables")
	n := onlyIPv4
	_, hosts := n.plugHosts(t, 1)
	h, cfg := hosts[0], n.Host(0, 1)
	if off := h.dp.rules.guard.off; off != nil {
		t.Skipf("nothing bounds it on this kernel: %v", off)
	}
	bridge := cfg.Bridges[0]
	hostile, _ := h.container(bridge.Name, bridge.Addrs[0], 5)
	near, _ := h.container(bridge.Name, bridge.Addrs[0], 6)
	stop := make(chan struct{})
	var flood sync.WaitGroup
	flood.Go(func() {
		hostile.do(func() {
			for tick := time.Tick(20 * time.Millisecond); ; <-tick {
				select {
				case <-stop:
					return
				default:
				}
				if err := scan(netip.MustParsePrefix("172.20.0.0/16"), 2000); err != nil {
					t.Error(err)
					return
				}
			}
		})
	})
	// At every look the other one has sent to one more address.
	most, looks, reached := 0, 0, map[string]bool{}
	tick := time.Tick(100 * time.Millisecond)
	for began := time.Now(); time.Since(began) < 6*time.Second; <-tick {
		looks++
		near.do(func() {
			if err := scan(netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 30, byte(looks), 0}), 24), 1); err != nil {
				t.Error(err)
			}
		})
		resolving := 0
		for line := range strings.Lines(h.sh("ip neigh show dev eth0 nud incomplete nud failed")) {
			addr, state, _ := strings.Cut(strings.TrimSpace(line), " ")
			if strings.HasPrefix(addr, "172.30.") {
				reached[addr] = true
			} else if strings.Contains(state, "INCOMPLETE") {
				resolving++
			}
		}
		most = max(most, resolving)
	}
	close(stop)
	flood.Wait()
	t.Logf("at most %d were being resolved; %d of %d of the other container", most, len(reached), looks)
	if most < 200 || most > 640 {
		t.Errorf("%d addresses were being resolved at once, want at most 500 and what is late", most)
	}
	if len(reached) < looks*3/4 {
		t.Errorf("%d of %d addresses of the other container were resolved", len(reached), looks)
	}
}

// What goes to other hosts is not counted: there are as many entries for them as
// peers.
func TestOtherHostsAreNotCounted(t *testing.T) {
	useFirewall(t, "nftables")
	n := onlyIPv4
	_, hosts := n.plugHosts(t, 2)
	h, cfg := hosts[0], n.Host(0, 2)
	if off := h.dp.rules.guard.off; off != nil {
		t.Skipf("nothing is counted on this kernel: %v", off)
	}
	bridge := cfg.Bridges[0]
	c, _ := h.container(bridge.Name, bridge.Addrs[0], 5)
	send := func(to netip.Prefix) {
		c.do(func() {
			if err := scan(to, 1); err != nil {
				t.Error(err)
			}
		})
	}
	c.mustPing("", bridge.Addrs[0].Addr().String()) // before that nothing is sent at all
	send(n.Host(1, 2).Bridges[0].Addrs[0].Masked())
	h.mustNotHave("nft list set inet guard-overlay hops4", "expires")
	// It stays for three seconds, which a busy machine may take to ask for it.
	counted := ""
	h.eventually(func() bool {
		send(netip.MustParsePrefix("172.20.0.0/16"))
		counted = h.sh("nft list set inet guard-overlay hops4")
		return strings.Contains(counted, "172.20.0.101")
	}, "172.20.0.101 is not counted")
	if !strings.Contains(counted, "expires") {
		t.Errorf("it stays:\n%s", counted)
	}
}

// scan sends a packet to each of so many addresses.
func scan(to netip.Prefix, count int) error {
	c, err := net.ListenPacket("udp", ":0")
	if err != nil {
		return err
	}
	defer c.Close()
	addr := to.Addr()
	for range 100 { // beyond those that there are
		addr = addr.Next()
	}
	for range count {
		addr = addr.Next()
		if _, err := c.WriteTo([]byte("anybody?"), &net.UDPAddr{IP: addr.AsSlice(), Port: 9}); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
	}
	return nil
}

// sendFromMACs sends one frame from each of so many MACs.
func sendFromMACs(dev string, count int) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(dev)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
		return err
	}
	to := &unix.SockaddrLinklayer{Ifindex: int(ifr.Uint32())}
	frame := make([]byte, 60)
	copy(frame, []byte{0x02, 0, 0, 0, 0, 1, 0x06}) // to nobody, from a local MAC
	frame[12], frame[13] = 0x88, 0xb5              // an EtherType for experiments
	for i := range count {
		binary.BigEndian.PutUint32(frame[8:12], uint32(i))
		if err := unix.Sendto(fd, frame, 0, to); err != nil && err != unix.ENOBUFS {
			return err
		}
	}
	return nil
}
