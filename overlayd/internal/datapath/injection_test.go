package datapath

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// injections is how many packets each attacker sends.
const injections = 10_000

// VXLAN that no peer sent is not taken, whoever sends it: a machine on the
// underlay that knows VNI and MACs, and a container, with fresh flows and with
// one that was there before.
func TestVXLANInjection(t *testing.T) { eachFirewall(t, testVXLANInjection) }

func testVXLANInjection(t *testing.T) {
	n := onlyIPv4
	l, hosts := n.plugHosts(t, 2)
	stranger := newNS(t, "stranger")
	l.plug(stranger, "172.16.9.9/12")
	here, there := n.Host(0, 2), n.Host(1, 2)
	attacker, _ := hosts[0].container(here.Bridges[0].Name, here.Bridges[0].Addrs[0], 5)
	peer, from := hosts[0].container(here.Bridges[1].Name, here.Bridges[1].Addrs[0], 5)
	victim, addr := hosts[1].container(there.Bridges[1].Name, there.Bridges[1].Addrs[0], 5)
	peer.mustPing("", addr)

	var got net.PacketConn
	var err error
	victim.do(func() { got, err = net.ListenPacket("udp4", net.JoinHostPort(addr, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	to := got.LocalAddr().(*net.UDPAddr).AddrPort()
	packet := vxlanPacket(there.VTEP.MAC, netip.MustParseAddr(from), to, "injected")
	var senders sync.WaitGroup
	for name, ns := range map[string]*netNS{"stranger": stranger, "container": attacker} {
		for _, fresh := range []bool{true, false} {
			senders.Go(func() {
				if err := inject(ns, netip.AddrPortFrom(there.VTEP.Local, conf.VXLANPort), packet, fresh); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			})
		}
	}
	senders.Wait()
	sendUDP(t, peer, to, []byte("the end"))
	if err := got.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	delivered := 0
	for b := make([]byte, 100); ; {
		size, _, err := got.ReadFrom(b)
		if err != nil {
			t.Fatalf("what a peer sends does not arrive: %v", err)
		}
		if string(b[:size]) == "the end" {
			break
		}
		delivered++
	}
	if delivered > 0 {
		t.Errorf("%d of %d injected packets were delivered", delivered, 4*injections)
	}
	// And the packets are ones that would be delivered: without rules they are.
	for _, h := range hosts {
		h.dp.Close() // its table is flushed when it belongs to nobody
		h.sh("nft flush ruleset; for t in iptables-legacy ip6tables-legacy; do for x in raw filter nat; do $t -t $x -F; done; done")
	}
	if err := inject(stranger, netip.AddrPortFrom(there.VTEP.Local, conf.VXLANPort), packet, true); err != nil {
		t.Fatal(err)
	}
	if err := got.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if size, _, err := got.ReadFrom(b); err != nil || string(b[:size]) != "injected" {
		t.Errorf("without rules the container got %q, %v: the test shows nothing", b[:size], err)
	}
}

// A link delivers to its broadcast and multicast addresses too. The kernel takes
// VXLAN from those as from its own.
func TestVXLANToEverybody(t *testing.T) { eachFirewall(t, testVXLANToEverybody) }

func testVXLANToEverybody(t *testing.T) {
	under6 := onlyIPv4
	under6.Under6 = true
	for _, c := range []struct {
		network
		stranger string
		to       []string
	}{
		{onlyIPv4, "172.16.9.9/12", []string{"172.31.255.255", "255.255.255.255", "224.0.0.1"}},
		// The second is that of the routers of the link, of which this host is one.
		{under6, "fd00:1::9:9/64", []string{"ff02::1%eth0", "fd00:1::%eth0", "link-local"}},
	} {
		l, hosts := c.plugHosts(t, 2)
		here, there := c.Host(0, 2), c.Host(1, 2)
		stranger := newNS(t, "stranger")
		l.plug(stranger, c.stranger)
		hosts[1].sh("sysctl -qw net.ipv6.conf.eth0.forwarding=1")
		peer, from := hosts[0].container(here.Bridges[1].Name, here.Bridges[1].Addrs[0], 5)
		victim, addr := hosts[1].container(there.Bridges[1].Name, there.Bridges[1].Addrs[0], 5)
		peer.mustPing("", addr)
		got := listenUDP(t, victim, addr)
		to := got.LocalAddr().(*net.UDPAddr).AddrPort()
		for _, dst := range append([]string{there.VTEP.Local.String()}, c.to...) {
			if dst == "link-local" {
				address, _, _ := strings.Cut(strings.Fields(hosts[1].sh("ip -6 -o addr show dev eth0 scope link"))[3], "/")
				dst = address + "%eth0"
			}
			packet := vxlanPacket(there.VTEP.MAC, netip.MustParseAddr(from), to, "injected to "+dst)
			for range 20 {
				sendBroadcast(t, stranger, netip.AddrPortFrom(netip.MustParseAddr(dst), conf.VXLANPort), packet)
			}
		}
		peer.mustPing("", addr)
		sendUDP(t, peer, to, []byte("the end"))
		delivered := map[string]int{}
		for _, p := range until(t, got, "the end") {
			delivered[p]++
		}
		if len(delivered) > 0 {
			t.Errorf("of 20 each were delivered %v", delivered)
		}
	}
}

// sendBroadcast sends one packet also to addresses of everybody.
func sendBroadcast(t *testing.T, from *netNS, to netip.AddrPort, payload []byte) {
	t.Helper()
	var err error
	from.do(func() {
		var c net.Conn
		d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) {
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
				_ = unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "eth0")
			})
		}}
		if c, err = d.Dial("udp", to.String()); err == nil {
			_, _ = c.Write(payload)
			err = c.Close()
		}
	})
	if err != nil {
		t.Fatalf("send to %s: %v", to, err)
	}
}

// listenUDP opens a port of a container.
func listenUDP(t *testing.T, in *netNS, addr string) (got net.PacketConn) {
	t.Helper()
	var err error
	in.do(func() { got, err = net.ListenPacket("udp", net.JoinHostPort(addr, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { got.Close() })
	return got
}

// until reads what arrives before the last packet, which has to.
func until(t *testing.T, got net.PacketConn, last string) (before []string) {
	t.Helper()
	if err := got.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for b := make([]byte, 100); ; {
		size, _, err := got.ReadFrom(b)
		if err != nil {
			t.Fatalf("what a peer sends does not arrive: %v (before it: %q)", err, before)
		}
		if string(b[:size]) == last {
			return before
		}
		before = append(before, string(b[:size]))
	}
}

// inject sends packets from one socket, or a new one for every hundred, so that
// connection tracking has one flow or many.
func inject(from *netNS, to netip.AddrPort, packet []byte, fresh bool) (err error) {
	from.do(func() {
		var c net.Conn
		for i := range injections {
			if c == nil || fresh && i%100 == 0 {
				if c != nil {
					c.Close()
				}
				if c, err = net.Dial("udp", to.String()); err != nil {
					return
				}
			}
			// A full queue or an answer of ICMP is no reason to stop.
			_, _ = c.Write(packet)
		}
		c.Close()
	})
	return err
}

// A container that prepares a flow: the port of a host is open to it as to
// anybody, then it sends VXLAN there from the same port.
func TestVXLANFromPreparedFlow(t *testing.T) {
	eachFirewall(t, func(t *testing.T) {
		n := onlyIPv4
		_, hosts := n.plugHosts(t, 2)
		here, there := n.Host(0, 2), n.Host(1, 2)
		attacker, source := hosts[0].container(here.Bridges[0].Name, here.Bridges[0].Addrs[0], 5)
		// The host lets the flow through and answers it before its rules are there.
		hosts[0].dp.Close()
		hosts[0].sh("nft flush ruleset; for x in raw filter nat; do iptables-legacy -t $x -F; done")
		sendUDPFrom(t, attacker, netip.AddrPortFrom(netip.MustParseAddr(source), 5555), netip.AddrPortFrom(there.VTEP.Local, conf.VXLANPort), []byte("prepared"))
		hosts[0].dp = hosts[0].newDatapath()
		hosts[0].mustSet(here, true)
		victim, addr := hosts[1].container(there.Bridges[1].Name, there.Bridges[1].Addrs[0], 5)
		var got net.PacketConn
		var err error
		victim.do(func() { got, err = net.ListenPacket("udp4", net.JoinHostPort(addr, "0")) })
		if err != nil {
			t.Fatal(err)
		}
		defer got.Close()
		to := got.LocalAddr().(*net.UDPAddr).AddrPort()
		packet := vxlanPacket(there.VTEP.MAC, netip.MustParseAddr(here.Bridges[1].Addrs[0].Addr().String()).Next(), to, "injected")
		for range 100 {
			sendUDPFrom(t, attacker, netip.AddrPortFrom(netip.MustParseAddr(source), 5555), netip.AddrPortFrom(there.VTEP.Local, conf.VXLANPort), packet)
		}
		hosts[1].sh("true")
		sendUDP(t, hosts[1].netNS, to, []byte("the end"))
		if err := got.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		if size, _, err := got.ReadFrom(b); err != nil || string(b[:size]) != "the end" {
			t.Errorf("the container got %q, %v", b[:size], err)
		}
		if out := hosts[0].sh("iptables-save -c; nft list ruleset"); !strings.Contains(out, "OVERLAY-ENCAP") {
			t.Error("the chain that should have stopped it is not there")
		}
	})
}

func sendUDPFrom(t *testing.T, from *netNS, local, to netip.AddrPort, payload []byte) {
	t.Helper()
	var err error
	from.do(func() {
		var c net.Conn
		if c, err = (&net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(local)}).Dial("udp4", to.String()); err == nil {
			_, _ = c.Write(payload)
			err = c.Close()
		}
	})
	if err != nil {
		t.Fatal(fmt.Errorf("send from %s: %w", local, err))
	}
}
