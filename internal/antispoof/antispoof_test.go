package antispoof

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

func linkLocalOf(m conf.MAC) netip.Addr { return mark.LinkLocal(m) }

// host is a namespace with a bridge and two containers.
type host struct {
	t         *testing.T
	ns        ns.NetNS
	container ns.NetNS
	taps      []int // packet sockets of the bridge and of the neighbour
	send      int   // packet socket of the container
	marks     uint32
}

var count atomic.Int32

func newNS(t *testing.T) (ns.NetNS, string) {
	t.Helper()
	name := fmt.Sprintf("ova-%d-%d", os.Getpid(), count.Add(1))
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		t.Fatalf("make a network namespace (as root): %v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	n, err := ns.GetNS("/run/netns/" + name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n, name
}

const ownDevice = "vm0123456789ab"

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t}
	var own, neighbor string
	h.ns, _ = newNS(t)
	h.container, own = newNS(t)
	other, neighbor := newNS(t)
	h.sh(fmt.Sprintf(`ip link add br0 address %s type bridge mcast_snooping 0; ip link set br0 up; ip addr add 9.0.1.1/24 dev br0; ip addr add fd01::1/64 dev br0 nodad
		ip link add %s type veth peer name eth0 address %s netns %s; ip link set %s master br0 up
		ip link add vm00 type veth peer name eth0 address %s netns %s; ip link set vm00 master br0 up`,
		gatewayMAC, ownDevice, ownMAC, own, ownDevice, neighborMAC, neighbor))
	// br_netfilter would drop what is wrong in an IP header, and the frames have no
	// checksums.
	h.sh("for f in iptables ip6tables arptables; do [ ! -e /proc/sys/net/bridge/bridge-nf-call-$f ] || sysctl -qw net.bridge.bridge-nf-call-$f=0; done")
	for _, n := range []ns.NetNS{h.container, other} {
		// No frames of the kernel's own.
		inside(t, n, "sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1; ip link set eth0 up")
	}
	h.taps = []int{h.socket(h.ns, "br0"), h.socket(other, "eth0")}
	h.send = h.socket(h.container, "eth0")
	h.waitForwarding()
	return h
}

func inside(t *testing.T, n ns.NetNS, script string) (out string) {
	t.Helper()
	err := n.Do(func(ns.NetNS) error {
		b, err := exec.Command("sh", "-ec", script).CombinedOutput()
		out = string(b)
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

func (h *host) sh(script string) string { h.t.Helper(); return inside(h.t, h.ns, script) }

func (h *host) do(f func() error) {
	h.t.Helper()
	if err := h.ns.Do(func(ns.NetNS) error { return f() }); err != nil {
		h.t.Fatal(err)
	}
}

// socket opens a packet socket on a device.
func (h *host) socket(n ns.NetNS, dev string) (fd int) {
	h.t.Helper()
	const all = unix.ETH_P_ALL << 8
	err := n.Do(func(ns.NetNS) (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all); err != nil {
			return err
		}
		ifr, err := unix.NewIfreq(dev)
		if err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
			return err
		}
		tv := unix.Timeval{Sec: 5}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: int(ifr.Uint32())})
	})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// passes sends a frame, and after it one that is allowed, and reports whether
// the first one arrived before the second, at any tap.
func (h *host) passes(data []byte) bool {
	h.t.Helper()
	h.marks++
	text := fmt.Sprintf("sentinel %d", h.marks)
	end := ip(broadcast, ownMAC, own4, neighbor4, unix.IPPROTO_UDP, udp(9, 9, text))
	for _, f := range [][]byte{data, end} {
		if _, err := unix.Write(h.send, f); err != nil {
			h.t.Fatal(err)
		}
	}
	arrived := false
	buf := make([]byte, 2048)
	for _, tap := range h.taps {
		for {
			n, _, err := unix.Recvfrom(tap, buf, 0)
			if err != nil {
				h.t.Fatalf("wait for %q: %v", text, err)
			}
			if bytes.HasSuffix(buf[:n], []byte(text)) {
				break
			}
			// A packet socket gets a frame without its VLAN tag.
			untagged := append(bytes.Clone(data[:12]), data[16:]...)
			arrived = arrived || bytes.HasPrefix(buf[:n], data) || bytes.HasPrefix(buf[:n], untagged)
		}
	}
	return arrived
}

// waitForwarding waits until the bridge lets frames through.
func (h *host) waitForwarding() {
	h.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for strings.Count(h.sh("bridge link show"), "state forwarding") < 2 {
		if time.Now().After(deadline) {
			h.t.Fatal("the bridge does not forward")
		}
	}
}

func ownPort() Port {
	return Port{Device: ownDevice, MAC: ownMAC, Addrs: []netip.Addr{own4, second4, own6}}
}

// Not one frame that claims something of another gets through, and all of one's
// own do.
func TestSpoof(t *testing.T) {
	h := newHost(t)
	var table Table
	h.do(func() error { _, err := table.Set(nil); return err })
	// A device that nobody asked to have checked sends what it likes, so that the
	// frames are ones that would arrive.
	for _, f := range append(spoofed(), rightful()...) {
		if !h.passes(f.data) {
			t.Errorf("unchecked, this does not arrive: %s", f.name)
		}
	}
	h.do(func() error { return Protect(ownPort()) })
	frames := spoofed()
	if len(frames) < 28 {
		t.Fatalf("only %d kinds of frames", len(frames))
	}
	for _, f := range frames {
		if h.passes(f.data) {
			t.Errorf("gets through: %s", f.name)
		}
	}
	for _, f := range rightful() {
		if !h.passes(f.data) {
			t.Errorf("is dropped: %s", f.name)
		}
	}
	h.do(func() error { return Release(ownPort()) })
	if !h.passes(frames[0].data) {
		t.Error("released, the device is still checked")
	}
	t.Logf("%d kinds of spoofed frames dropped, %d of rightful ones passed", len(frames), len(rightful()))
}

// The table is made by whoever finds it missing, and what somebody takes out of
// it is restored.
func TestTable(t *testing.T) {
	h := newHost(t)
	bad := spoofed()[0].data
	h.do(func() error { return Protect(ownPort()) }) // no agent ever ran
	if h.passes(bad) {
		t.Error("without an agent nothing is checked")
	}
	var table Table
	set := func(ports ...Port) (changed int) {
		t.Helper()
		h.do(func() (err error) { changed, err = table.Set(ports); return err })
		return changed
	}
	set(ownPort())
	if n := set(ownPort()); n != 0 {
		t.Errorf("what is there was changed in %d places", n)
	}
	for _, damage := range []string{
		"nft flush ruleset", "nft delete table bridge overlay", "nft flush table bridge overlay", "nft flush set bridge overlay ports",
		"nft flush set bridge overlay sources4", "nft insert rule bridge overlay SOURCES accept", "nft flush chain bridge overlay prerouting",
	} {
		h.sh(damage)
		if set(ownPort()) == 0 {
			t.Errorf("%s: nothing was repaired", damage)
		}
		if h.passes(bad) || !h.passes(rightful()[0].data) {
			t.Errorf("%s: is not repaired", damage)
		}
		if n := set(ownPort()); n != 0 {
			t.Errorf("%s: repaired, %d more changes", damage, n)
		}
	}
	// An element without a device stays for a while: its device may be about to be
	// made.
	other := Port{Device: "vd0123456789ab", MAC: neighborMAC, Addrs: []netip.Addr{neighbor4}}
	h.do(func() error { return Protect(other) })
	set(ownPort())
	if !strings.Contains(h.sh("nft list table bridge overlay"), other.Device) {
		t.Error("the element of a device to come was removed")
	}
	for e := range table.stray {
		table.stray[e] = table.stray[e].Add(-grace)
	}
	set(ownPort())
	if strings.Contains(h.sh("nft list table bridge overlay"), other.Device) {
		t.Error("the element of a device that is gone stays")
	}
	h.do(func() error { return Protect(other) })
	h.do(func() error { return ReleaseDevice(other.Device) })
	h.do(func() error { return ReleaseDevice(other.Device) })
	h.do(func() error { return Release(other) })
	if got := h.sh("nft list table bridge overlay"); strings.Contains(got, other.Device) || !strings.Contains(got, ownDevice) {
		t.Errorf("after ReleaseDevice:\n%s", got)
	}
	h.do(func() error { _, err := table.Remove(); return err })
	if got := h.sh("nft list tables"); got != "" {
		t.Errorf("Remove left %s", got)
	}
}

// Many devices are as quick to set up as few; all of them are checked.
func TestManyPorts(t *testing.T) {
	h := newHost(t)
	var table Table
	ports := []Port{ownPort()}
	for i := range 5000 {
		m := conf.MAC{0x0a, 0x58, 8, byte(i >> 16), byte(i >> 8), byte(i)}
		ports = append(ports, Port{Device: fmt.Sprintf("vm%012x", i), MAC: m, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{8, 0, byte(i >> 8), byte(i)})}})
	}
	h.do(func() error { _, err := table.Set(ports); return err })
	var n int
	h.do(func() (err error) { n, err = table.Set(ports); return err })
	if n != 0 {
		t.Errorf("a second Set changed %d", n)
	}
	if h.passes(spoofed()[0].data) || !h.passes(rightful()[0].data) {
		t.Error("is not checked as it should be")
	}
}
