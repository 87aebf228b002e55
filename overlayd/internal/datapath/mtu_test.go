package datapath

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/internal/mark"
)

// mtus are those of the underlay interfaces of three hosts.
var mtus = [3]int{1500, 9000, 1400}

// mixed are hosts of these MTUs on one link, each of which knows the others'.
type mixed struct {
	n     network
	hosts []*host
}

func newMixed(t *testing.T, n network) *mixed {
	l, m := newLAN(t), &mixed{n: n}
	for i, mtu := range mtus {
		h := newHost(t, fmt.Sprint("h", i))
		l.plug(h.netNS, n.AgentIP(i).String()+"/12")
		l.sh(fmt.Sprintf("ip link set p%d mtu 9000; ip link set br0 mtu 9000", i+1))
		h.sh(fmt.Sprintf("ip link set eth0 mtu %d", mtu))
		m.hosts = append(m.hosts, h)
	}
	for i, h := range m.hosts {
		if r := h.mustSet(m.wanted(i), true); r.MTU != mtus[i]-50 {
			t.Fatalf("the MTU of host %d is %d", i, r.MTU)
		}
		h.mustBeIdle(m.wanted(i))
	}
	return m
}

func (m *mixed) wanted(i int) Host {
	c := m.n.Host(i, len(mtus))
	for p := range c.Peers {
		for j := range mtus {
			if c.Peers[p].AgentIP == m.n.AgentIP(j) {
				c.Peers[p].MTU = mtus[j] - 50
			}
		}
	}
	return c
}

// A host with a smaller MTU than others is sent no more than it takes: who sends
// more is told, nothing disappears.
func TestMixedMTU(t *testing.T) { eachRouting(t, bothIP, testMixedMTU) }

func testMixedMTU(t *testing.T, n network) {
	m := newMixed(t, n)
	for o, header := range []int{28, 48} {
		var containers []*netNS
		var addrs []string
		for i, h := range m.hosts {
			b := n.Host(i, len(mtus)).Bridges[2*o]
			c, addr := h.container(b.Name, b.Addrs[0], 5)
			c.sh(fmt.Sprintf("ip link set eth0 mtu %d", mtus[i]-50))
			for _, p := range h.lines("ip -br link show master " + b.Name) {
				h.sh(fmt.Sprintf("ip link set %s mtu %d", strings.Split(p, "@")[0], mtus[i]-50))
			}
			containers, addrs = append(containers, c), append(addrs, addr)
		}
		for i, from := range containers {
			for j, to := range containers {
				if i == j {
					continue
				}
				from.mustPing("", addrs[j])
				least := min(mtus[i], mtus[j]) - 50
				if !from.pingsWhole(addrs[j], least-header) {
					t.Errorf("from host %d to %d: no packet of %d bytes arrives", i, j, least)
				}
				if least < mtus[i]-50 {
					// So much that no interface of the other host takes it.
					size := min(least+90, mtus[i]-50)
					out, _ := from.try(fmt.Sprintf("ping -n -c 2 -i 0.2 -W 1 -M do -s %d %s", size-header, addrs[j]))
					if !strings.Contains(out, fmt.Sprintf("mtu=%d", least)) && !strings.Contains(out, fmt.Sprintf("mtu = %d", least)) {
						t.Errorf("from host %d to %d: who sends %d bytes is not told that %d is the most:\n%s", i, j, size, least, out)
					}
					from.try("ip route flush cache; ip -6 route flush cache")
				}
				if err := transfer(t, from, to, addrs[j]); err != nil {
					t.Errorf("from host %d to %d: %v", i, j, err)
				}
			}
		}
	}
}

// pingsWhole reports whether a packet of this payload arrives and comes back in
// one piece.
func (h *netNS) pingsWhole(dst string, payload int) bool {
	h.t.Helper()
	_, err := h.try(fmt.Sprintf("ping -n -q -c 3 -i 0.1 -W 1 -M do -s %d %s", payload, dst))
	return err == nil
}

// transfer sends a megabyte there and back over TCP.
func transfer(t *testing.T, from, to *netNS, addr string) error {
	t.Helper()
	var ln net.Listener
	var err error
	to.do(func() { ln, err = net.Listen("tcp", net.JoinHostPort(addr, "0")) })
	if err != nil {
		return err
	}
	defer ln.Close()
	go func() {
		if c, err := ln.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			c.Close()
		}
	}()
	var c net.Conn
	from.do(func() { c, err = net.DialTimeout("tcp", ln.Addr().String(), 5*time.Second) })
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	const size = 1 << 20
	go func() {
		_, _ = c.Write(make([]byte, size))
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	if n, err := io.Copy(io.Discard, c); err != nil || n != size {
		return fmt.Errorf("%d of %d bytes came back: %w", n, size, err)
	}
	return nil
}

// The first peer of a host joins behind a route with an MTU of its own.
func TestFirstPeerBehindNarrowRoute(t *testing.T) {
	n := onlyIPv4
	_, hosts := n.plugHosts(t, 1)
	h := hosts[0]
	h.sh("ip route add " + n.AgentIP(1).String() + " dev eth0 mtu 1300")
	h.mustSet(n.Host(0, 1), true)
	h.mustSet(n.Host(0, 2), false)
	h.mustHave("ip route show proto 44", n.AgentSubnet(n.Overlays[0], 1).String(), "mtu 1250")
	h.mustBeIdle(n.Host(0, 2))
}

// The MTU of a route of the underlay, of a peer and of the own interface are
// followed when they change.
func TestMTUFollowed(t *testing.T) {
	m := newMixed(t, onlyIPv4)
	h := m.hosts[1]
	route := func(want string) {
		t.Helper()
		h.mustSet(m.wanted(1), true)
		h.mustBeIdle(m.wanted(1))
		h.mustHave("ip route show proto 44", m.n.AgentSubnet(m.n.Overlays[0], 0).String(), want)
	}
	route("mtu 1450")
	peer := m.n.AgentIP(0).String()
	h.announced("ip route add " + peer + " dev eth0 mtu 1300")
	route("mtu 1250")
	h.announced("ip route change " + peer + " dev eth0 mtu 1200")
	route("mtu 1150")
	// A peer that joins behind it.
	c := m.wanted(1)
	all := c.Peers
	c.Peers = all[1:]
	h.mustSet(c, false)
	c.Peers = all
	h.mustSet(c, false)
	route("mtu 1150")
	h.announced("ip route del " + peer)
	route("mtu 1450")
	// The peer's own.
	c = m.wanted(1)
	for i := range c.Peers {
		if c.Peers[i].AgentIP.String() == peer {
			c.Peers[i].MTU = 1000
		}
	}
	h.mustSet(c, false)
	h.mustHave("ip route show proto 44", m.n.AgentSubnet(m.n.Overlays[0], 0).String(), "mtu 1000")
	h.mustBeIdle(c)
	// This host's.
	h.announced("ip link set eth0 mtu 1500")
	h.mustSet(m.wanted(1), true)
	h.mustBeIdle(m.wanted(1))
	h.mustNotHave("ip route show proto 44", m.n.AgentSubnet(m.n.Overlays[0], 0).String(), "mtu")
	h.mustHave("ip route show proto 44", m.n.AgentSubnet(m.n.Overlays[0], 2).String(), "mtu 1350")
	if mark.RouteProtocol != 44 {
		t.Fatal("the test looks at the routes of others")
	}
}
