package datapath

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

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
