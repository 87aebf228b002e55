package fastpath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/antispoof"
	"overlayd.internal/overlay/internal/mark"
)

// frame is one that a container sends to one of the other host.
type frame struct {
	name string
	data []byte
}

// datagram is a UDP datagram in an Ethernet frame; without a checksum, which only
// the receiver would look at.
func datagram(dst, src conf.MAC, from, to netip.Addr, port uint16, hops byte, text string) []byte {
	body := binary.BigEndian.AppendUint16(nil, 4444)
	body = binary.BigEndian.AppendUint16(body, port)
	body = binary.BigEndian.AppendUint16(body, uint16(8+len(text)))
	body = append(append(body, 0, 0), text...)
	b := append(append([]byte{}, dst[:]...), src[:]...)
	if from.Is4() {
		b = append(b, 0x08, 0x00, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(20+len(body)))
		b = append(b, 0, 1, 0, 0, hops, unix.IPPROTO_UDP, 0, 0)
	} else {
		b = append(b, 0x86, 0xdd, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
		b = append(b, unix.IPPROTO_UDP, hops)
	}
	b = append(append(b, from.AsSlice()...), to.AsSlice()...)
	if from.Is4() {
		sum := uint32(0)
		for i := 14; i < 34; i += 2 {
			sum += uint32(b[i])<<8 | uint32(b[i+1])
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(b[24:], ^uint16(sum))
	}
	return append(b, body...)
}

// spoofedFrames are frames of a container to another one that claim something of
// somebody else, in both families.
func spoofedFrames(a, b *container, gateway conf.MAC) (out []frame) {
	for _, family := range []struct {
		to     netip.Addr
		own    netip.Addr
		others map[string]string
	}{
		{b.v4, a.v4, map[string]string{
			"the gateway": "9.200.1.1", "a neighbour": "9.200.1.99", "a container of the other host": "9.200.2.77", "the receiver": b.v4.String(),
			"a host that is not there": "9.200.77.5", "another overlay": "9.201.1.2", "the own host": "172.30.0.1", "the other host": "172.30.0.2",
			"a VTEP": "45.0.0.2", "outside": "192.0.2.9", "nobody": "0.0.0.0", "everybody": "255.255.255.255", "the loopback": "127.0.0.1", "a group": "224.0.0.9",
		}},
		{b.v6, a.v6, map[string]string{
			"the gateway": "fd09:200:0:1::1", "a neighbour": "fd09:200:0:1::99", "a container of the other host": "fd09:200:0:2::77", "the receiver": b.v6.String(),
			"a host that is not there": "fd09:200:0:77::5", "another overlay": "fd09:201::2", "the own host": "fd00:30::1", "the other host": "fd00:30::2",
			"a VTEP": "fd45::2", "outside": "2001:db8::9", "nobody": "::", "the loopback": "::1", "a group": "ff05::9",
			"the other family": "::ffff:9.200.1.2", "its link": mark.LinkLocal(conf.MAC{2, 0, 0, 0, 9, 9}).String(),
		}},
	} {
		for who, source := range family.others {
			out = append(out, frame{"source of " + who + " to " + family.to.String(), datagram(gateway, a.mac, netip.MustParseAddr(source), family.to, 4000, 64, "")})
		}
		for who, m := range map[string]conf.MAC{"the gateway": gateway, "a neighbour": {2, 0, 0, 0, 0x63, 1}, "nobody": {}} {
			out = append(out, frame{"source MAC of " + who + " to " + family.to.String(), datagram(gateway, m, family.own, family.to, 4000, 64, "")})
		}
		tagged := datagram(gateway, a.mac, netip.MustParseAddr(family.others["a neighbour"]), family.to, 4000, 64, "")
		out = append(out, frame{"a neighbour in a VLAN to " + family.to.String(), append(append(bytes.Clone(tagged[:12]), 0x81, 0, 0, 1), tagged[12:]...)})
	}
	return out
}

// Not one frame that claims what is somebody else's gets to another host, with and
// without the fast path, in VXLAN and without; what is the container's own does.
func TestSpoofMatrix(t *testing.T) {
	for _, fast := range []bool{false, true} {
		for _, direct := range []bool{false, true} {
			for _, six := range []bool{false, true} {
				t.Run(fmt.Sprintf("fast=%v,direct=%v,underlay6=%v", fast, direct, six), func(t *testing.T) { testSpoofMatrix(t, fast, direct, six) })
			}
		}
	}
}

func testSpoofMatrix(t *testing.T, fast, direct, six bool) {
	r := newRig(t, six)
	h := r.hosts[0]
	// One without an IPv6 address, which nobody else's packets are for that.
	only4 := h.attach("o", 9, mark.FastPathGroup)
	alias := mark.NewAlias(overlayName, conf.Mesos, conf.Attachment{Network: overlayName, ContainerID: "o", IfName: "eth0"}, []netip.Addr{only4.v4}, time.Second)
	h.run("ip", "link", "set", only4.link, "alias", alias.String())
	only4.v6 = netip.Addr{}
	var paths [2]*Path
	for i, h := range r.hosts {
		if direct {
			h.direct()
		}
		switch {
		case fast && direct:
			paths[i] = h.fastDirect()
		case fast:
			paths[i] = h.fast()
		}
	}
	a, b := h.container, r.hosts[1].container
	for _, c := range []*container{a, only4} {
		addrs := []netip.Addr{c.v4}
		if c.v6.IsValid() {
			addrs = append(addrs, c.v6)
		}
		if err := h.ns.Inside(func() error {
			return antispoof.Protect(antispoof.Port{Device: c.link, MAC: c.mac, Addrs: addrs})
		}); err != nil {
			t.Fatal(err)
		}
	}
	for _, to := range []netip.Addr{b.v4, b.v6} {
		wait(t, func() error { return exchange(a.space, b.space, to) })
	}
	gateway := conf.MAC{2, 0, 0, 0, 1, 1}
	got, wire, senders := b.tap("eth0"), h.tap("eth0"), map[*container]int{a: a.tap("eth0"), only4: only4.tap("eth0")}
	// arrived sends a frame and reports whether it came to the other container, or
	// to the wire.
	sent := 0
	arrived := func(from *container, f frame, should bool) bool {
		t.Helper()
		sent++
		text := fmt.Sprintf("frame %d of %s", sent, t.Name())
		data := withText(f.data, text)
		if _, err := unix.Write(senders[from], data); err != nil {
			t.Fatal(err)
		}
		// Behind it one that arrives, so that nothing has to be waited for.
		end := text + ", the end"
		last := datagram(gateway, a.mac, a.v4, b.v4, 4000, 64, end)
		if _, err := unix.Write(senders[a], last); err != nil {
			t.Fatal(err)
		}
		over, seen := 0, false
		for deadline := time.Now().Add(5 * time.Second); over < 2 || should && !seen; {
			for _, g := range append(frames(t, got), frames(t, wire)...) {
				if bytes.Contains(g, []byte(end)) {
					over++
				}
				seen = seen || bytes.Contains(g, []byte(text)) && !bytes.Contains(g, []byte(end))
			}
			if time.Now().After(deadline) {
				if over < 2 {
					t.Fatalf("what comes behind %s does not arrive", f.name)
				}
				return seen
			}
		}
		return seen
	}
	for _, to := range []netip.Addr{b.v4, b.v6} {
		own := a.v4
		if to.Is6() {
			own = a.v6
		}
		if !arrived(a, frame{"its own", datagram(gateway, a.mac, own, to, 4000, 64, "")}, true) {
			t.Errorf("its own to %s does not arrive", to)
		}
	}
	spoofs := spoofedFrames(a, b, gateway)
	if len(spoofs) < 28 {
		t.Fatalf("only %d kinds of frames", len(spoofs))
	}
	for _, f := range spoofs {
		if arrived(a, f, false) {
			t.Errorf("gets through: %s", f.name)
		}
	}
	for _, f := range spoofedFrames(only4, b, gateway) {
		if strings.Contains(f.name, b.v6.String()) && arrived(only4, f, false) {
			t.Errorf("of a container without IPv6, gets through: %s", f.name)
		}
	}
	if fast {
		if n := traffic(t, paths[0]).Out.Packets; n < uint64(sent) {
			t.Errorf("only %d packets took the fast path: the test shows nothing of it", n)
		}
	}
}

// withText puts a text behind a datagram, and its length into the headers.
func withText(data []byte, text string) []byte {
	b := append(bytes.Clone(data), text...)
	at, n := 14, uint16(len(text))
	if b[12] == 0x81 {
		at += 4
	}
	grow := func(i int) { binary.BigEndian.PutUint16(b[i:], binary.BigEndian.Uint16(b[i:])+n) }
	if b[at]>>4 == 4 {
		grow(at + 2)
		grow(at + 24)
		binary.BigEndian.PutUint16(b[at+10:], 0)
		sum := uint32(0)
		for i := at; i < at+20; i += 2 {
			sum += uint32(b[i])<<8 | uint32(b[i+1])
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(b[at+10:], ^uint16(sum))
	} else {
		grow(at + 4)
		grow(at + 44)
	}
	return b
}
