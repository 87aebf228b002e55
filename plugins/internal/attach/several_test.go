package attach

import (
	"net"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// defaultOf is the interface that the kernel sends to the world through.
func defaultOf(t *testing.T, container namespace, family int) string {
	t.Helper()
	routes, err := container.RouteList(nil, family)
	if err != nil {
		t.Fatal(err)
	}
	best, metric := "", int(^uint(0)>>1)
	for _, r := range routes {
		if r.Dst != nil && !r.Dst.IP.IsUnspecified() || r.Priority >= metric {
			continue
		}
		l, err := container.LinkByIndex(r.LinkIndex)
		if err != nil {
			t.Fatal(err)
		}
		best, metric = l.Attrs().Name, r.Priority
	}
	return best
}

// TestDefaultRouteIsEth0s: whichever of two interfaces is attached first, or both
// at the same time, the default route is eth0's, and eth1's when that has gone.
func TestDefaultRouteIsEth0s(t *testing.T) {
	m := newMachine(t)
	families := map[string]int{"IPv4": unix.AF_INET, "IPv6": unix.AF_INET6}
	eth0 := call{command: "ADD", ifName: "eth0", conf: m.config("both", "1.0.0")}
	eth1 := call{command: "ADD", ifName: "eth1", conf: m.config("both", "1.0.0", "name", "second", "overlay", "both")}
	other := call{command: "ADD", ifName: "net7", conf: m.config("dcos", "1.0.0")}
	orders := map[string]func(a, b, c call){
		"eth0 first": func(a, b, c call) { m.ok(a); m.ok(b); m.ok(c) },
		"eth0 last":  func(a, b, c call) { m.ok(c); m.ok(b); m.ok(a) },
		"at once": func(a, b, c call) {
			var all sync.WaitGroup
			for _, c := range []call{a, b, c} {
				all.Go(func() {
					if out := m.exec(c); out.status != 0 {
						t.Errorf("ADD %s: %s", c.ifName, out.stdout)
					}
				})
			}
			all.Wait()
		},
	}
	rounds := map[string]int{"eth0 first": 1, "eth0 last": 1, "at once": 60}
	for name, attach := range orders {
		wrong := 0
		for range rounds[name] {
			container := newNamespace(t)
			a, b, c := eth0, eth1, other
			a.netns, b.netns, c.netns = container.path, container.path, container.path
			attach(a, b, c)
			for _, family := range families {
				if defaultOf(t, container, family) != "eth0" {
					wrong++
				}
			}
			m.ok(call{command: "DEL", ifName: "eth0", conf: a.conf})
			for name, family := range families {
				if got := defaultOf(t, container, family); got != "eth1" {
					t.Errorf("%s: without eth0 the default route is %q's", name, got)
				}
			}
			// And eth0's again when that comes back.
			m.ok(a)
			for name, family := range families {
				if got := defaultOf(t, container, family); got != "eth0" {
					t.Errorf("%s: with eth0 again the default route is %q's", name, got)
				}
			}
			for _, c := range []call{a, b, c} {
				c.command = "DEL"
				m.ok(c)
			}
		}
		if wrong > 0 {
			t.Errorf("%s: %d of %d default routes were not eth0's", name, wrong, 2*rounds[name])
		}
	}
}

// TestOverlayRouteOfSecondInterface: what is for its own overlay goes through the
// second interface.
func TestOverlayRouteOfSecondInterface(t *testing.T) {
	m := newMachine(t)
	container := newNamespace(t)
	m.ok(call{command: "ADD", netns: container.path, ifName: "eth1", conf: m.config("both", "1.0.0")})
	m.ok(call{command: "ADD", netns: container.path, ifName: "eth0", conf: m.config("dcos", "1.0.0")})
	for to, want := range map[string]string{"9.1.7.7": "eth1", "fd01:c::7": "eth1", "9.0.7.7": "eth0", "8.8.8.8": "eth0", "2001::1": "eth1"} {
		routes, err := container.RouteGet(net.ParseIP(to))
		if err != nil || len(routes) == 0 {
			t.Fatalf("route to %s: %v", to, err)
		}
		var l netlink.Link
		if l, err = container.LinkByIndex(routes[0].LinkIndex); err != nil || l.Attrs().Name != want {
			t.Errorf("to %s: through %v, want %s (%v)", to, l.Attrs().Name, want, err)
		}
	}
}
