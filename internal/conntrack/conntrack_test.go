package conntrack

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inNamespace runs the test in a network namespace of its own, whose thread ends with it.
func inNamespace(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for ever: the thread is of no use to others any more
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("make a network namespace: %v", err)
			return
		}
		test(t)
	}()
	<-done
}

// Connections of both families are found in one walk and removed, and no others.
func TestRemove(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		script := "ip link set lo up; ip address add 10.0.0.1/32 dev lo; ip address add 10.0.0.2/32 dev lo; " +
			"ip address add fd00::1/128 dev lo nodad; ip address add fd00::2/128 dev lo nodad; " +
			"nft 'add table inet f; add chain inet f c { type filter hook output priority 0; }; add rule inet f c ct state new accept'"
		if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
			return
		}
		tracked := func() (have []string) {
			t.Helper()
			if _, err := Remove(func(f *Flow) bool {
				if f.Protocol == unix.IPPROTO_UDP {
					have = append(have, f.Dst.String())
				}
				return false
			}); err != nil {
				t.Error(err)
			}
			slices.Sort(have)
			return have
		}
		for _, to := range []string{"10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"} {
			c, err := net.Dial("udp", netip.AddrPortFrom(netip.MustParseAddr(to), 9).String())
			if err != nil {
				t.Error(err)
				return
			}
			// The kernel takes and drops what is sent to an IPv6 address of its own in the
			// moment in which it is new.
			for deadline := time.Now().Add(10 * time.Second); !slices.Contains(tracked(), to) && time.Now().Before(deadline); {
				_, _ = c.Write([]byte("x")) // the answer to the one before may be an error
			}
			c.Close()
		}
		check := func(what string, want ...string) {
			t.Helper()
			if have := tracked(); !slices.Equal(have, want) {
				t.Errorf("%s: connections to %v, want %v", what, have, want)
			}
		}
		check("at first", "10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2")
		if err := Forget([]netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::2")}); err != nil {
			t.Error(err)
		}
		check("one of each family forgotten", "10.0.0.2", "fd00::1")
		if err := Forget(nil); err != nil {
			t.Error(err)
		}
		n, err := Remove(func(f *Flow) bool { return f.Protocol == unix.IPPROTO_UDP })
		if n != 2 || err != nil {
			t.Errorf("removed %d, %v; want 2", n, err)
		}
		check("all removed")
	})
}
