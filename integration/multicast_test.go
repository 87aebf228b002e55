package integration

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"overlayd.internal/overlay/integration/lab"
)

// listen joins a group on the container's eth0.
func listen(t *testing.T, c *lab.Container, group netip.AddrPort) (conn *net.UDPConn) {
	t.Helper()
	must(t, ns.WithNetNSPath(c.Path, func(ns.NetNS) error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		conn, err = net.ListenMulticastUDP("udp", eth0, net.UDPAddrFromAddrPort(group))
		return err
	}))
	t.Cleanup(func() { conn.Close() })
	return conn
}

// send sends a datagram to a group from the container's own address.
func send(t *testing.T, c *lab.Container, group netip.AddrPort, text string) {
	t.Helper()
	must(t, ns.WithNetNSPath(c.Path, func(ns.NetNS) error {
		conn, err := net.DialUDP("udp", &net.UDPAddr{IP: c.Addr().AsSlice()}, net.UDPAddrFromAddrPort(group))
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write([]byte(text))
		return err
	}))
}

// TestMulticast: containers on one bridge hear each other's multicast, that of
// neighbour discovery with it, also where somebody makes a bridge ask who listens
// to what: it is not to act on the answers, of which it does not get all.
func TestMulticast(t *testing.T) {
	s := newSeed(t, seedConfig(t))
	must(t, s.Up(t.Context()))
	for _, tt := range []struct{ overlay, group string }{{"dcos", "239.1.2.3"}, {"dcos6", "ff05::1234"}, {"dcos6", "ff02::4321%eth0"}} {
		for _, querier := range []int{0, 1} {
			t.Run(fmt.Sprintf("%s querier %d", tt.group, querier), func(t *testing.T) {
				script(t, s.Agents[0], fmt.Sprintf("ip link set m-%s type bridge mcast_querier %d mcast_query_response_interval 10 mcast_startup_query_interval 10", tt.overlay, querier))
				id := fmt.Sprint("mc", time.Now().UnixNano())
				from, to := place(t, s, 0, id+"a", tt.overlay, lab.Mesos), place(t, s, 0, id+"b", tt.overlay, lab.Mesos)
				group := netip.AddrPortFrom(netip.MustParseAddr(tt.group), 5000)
				conn := listen(t, to, group)
				must(t, lab.Wait(t.Context(), "a datagram to "+tt.group, 10*time.Second, func() error {
					send(t, from, group, "hello")
					buf := make([]byte, 16)
					must(t, conn.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
					n, _, err := conn.ReadFromUDPAddrPort(buf)
					if err == nil && string(buf[:n]) != "hello" {
						err = fmt.Errorf("got %q", buf[:n])
					}
					return err
				}))
				waitPing(t, from.Netns, to.Addr(), 5*time.Second)
				waitPing(t, to.Netns, from.Addr(), 5*time.Second)
			})
		}
	}
}
