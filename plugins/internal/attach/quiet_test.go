package attach

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// listener counts the frames that come in at a container's interface.
type listener struct{ fd int }

func newListener(t *testing.T, container namespace) listener {
	t.Helper()
	var l listener
	container.inside(t, func() (err error) {
		const all = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8
		l.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
		return err
	})
	t.Cleanup(func() { unix.Close(l.fd) })
	return l
}

// frames is what came in from other containers since the last call, by kind.
func (l listener) frames() map[string]int {
	out := map[string]int{}
	b := make([]byte, 2048)
	for {
		n, from, err := unix.Recvfrom(l.fd, b, 0)
		if err != nil {
			return out
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); !ok || ll.Pkttype == unix.PACKET_OUTGOING || n < 14 {
			continue
		}
		if bytes.Equal(b[6:9], []byte{0x70, 0xb3, 0xd5}) {
			continue // the bridge's
		}
		kind := fmt.Sprintf("ethertype %#x", binary.BigEndian.Uint16(b[12:]))
		switch binary.BigEndian.Uint16(b[12:]) {
		case unix.ETH_P_ARP:
			kind = "ARP"
		case unix.ETH_P_IPV6:
			next, at := b[14+6], 14+40
			if next == unix.IPPROTO_HOPOPTS {
				next, at = b[at], at+8+int(b[at+1])*8
			}
			kind = fmt.Sprintf("IPv6 protocol %d", next)
			if next == unix.IPPROTO_ICMPV6 && n > at {
				kind = fmt.Sprintf("ICMPv6 type %d", b[at])
			}
		}
		out[kind]++
	}
}

// TestQuietArrival: what a container sends by itself when it comes and goes is sent
// to every other one on the bridge, and a thousand of them take it in. It sends
// nothing, but for the reports of its multicast groups (143), of those with IPv6, and
// they get no further than the host.
func TestQuietArrival(t *testing.T) {
	m := newMachine(t)
	type arrival struct {
		overlay   string
		container namespace
		l         listener
	}
	all := []*arrival{{overlay: "dcos"}, {overlay: "both"}, {overlay: "dcos6"}}
	for _, a := range all {
		old := newNamespace(t)
		m.add(call{id: "old-" + a.overlay, netns: old.path, conf: m.config(a.overlay, "1.0.0")})
		a.l, a.container = newListener(t, old), newNamespace(t)
	}
	for _, a := range all {
		m.add(call{id: "new-" + a.overlay, netns: a.container.path, conf: m.config(a.overlay, "1.0.0")})
	}
	time.Sleep(3 * time.Second) // longer than the kernel waits with what it announces
	for _, a := range all {
		m.ok(call{command: "DEL", id: "new-" + a.overlay, conf: m.config(a.overlay, "1.0.0")})
	}
	for _, a := range all {
		for kind, n := range a.l.frames() {
			t.Errorf("overlay %s: a container that came and went has sent %d frames: %s", a.overlay, n, kind)
		}
	}
}
