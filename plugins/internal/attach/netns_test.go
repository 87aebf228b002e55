package attach

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	vns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/netns"
)

// needRoot skips where the kernel cannot be used.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

// namespace is a network namespace of a test.
type namespace struct {
	path string
	*netlink.Handle
}

var namespaces atomic.Int32

// newNamespace makes a network namespace with a name, and removes it with the
// test.
func newNamespace(t testing.TB) namespace {
	t.Helper()
	needRoot(t)
	// "ip netns" finds it there, which is a help when a test fails.
	const dir = "/run/netns"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, fmt.Sprintf("ovl-%d-%d", os.Getpid(), namespaces.Add(1)))
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, "")
	}()
	if err := <-done; err != nil {
		t.Fatalf("make a network namespace: %v", err)
	}
	ns := namespace{path: path}
	t.Cleanup(ns.remove)
	h, err := vns.GetFromPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if ns.Handle, err = netlink.NewHandleAt(h); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ns.Handle.Close)
	return ns
}

// remove takes the name away; the namespace goes when nothing uses it.
func (n namespace) remove() {
	_ = unix.Unmount(n.path, unix.MNT_DETACH)
	_ = os.Remove(n.path)
}

// inside runs f on a thread in the namespace. Programs that f starts are in it.
func (n namespace) inside(t testing.TB, f func() error) {
	t.Helper()
	ns, err := netns.Open(n.path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := ns.Inside(f); err != nil {
		t.Fatal(err)
	}
}

// up brings up links by name.
func (n namespace) up(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		l, err := n.LinkByName(name)
		if err == nil {
			err = n.LinkSetUp(l)
		}
		if err != nil {
			t.Fatalf("set %s up: %v", name, err)
		}
	}
}

// addBridge makes a bridge as the agent does.
func (n namespace) addBridge(t testing.TB, name string, mtu int, gateways ...netip.Prefix) netlink.Link {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, mtu
	attrs.HardwareAddr = []byte{0x70, 0xb3, 0xd5, 0x80, 0, byte(len(name))}
	br := &netlink.Bridge{LinkAttrs: attrs}
	if err := n.LinkAdd(br); err != nil {
		t.Fatalf("add bridge %s: %v", name, err)
	}
	n.up(t, name)
	for _, g := range gateways {
		a := &netlink.Addr{IPNet: ipNet(g), Flags: unix.IFA_F_NODAD}
		if err := n.AddrAdd(br, a); err != nil {
			t.Fatalf("add address %s to %s: %v", g, name, err)
		}
	}
	return br
}

// links lists the links of the namespace but for lo.
func (n namespace) links(t testing.TB) []string {
	t.Helper()
	all, err := n.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range all {
		if l.Attrs().Name != "lo" {
			out = append(out, l.Attrs().Name)
		}
	}
	return out
}
