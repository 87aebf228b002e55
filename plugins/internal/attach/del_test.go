package attach

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// TestDel: however a runtime calls it, everything is gone and it succeeds.
func TestDel(t *testing.T) {
	tests := []struct {
		name    string
		arrange func(m *machine, container namespace, c *call)
		times   int
	}{
		{"plain", func(*machine, namespace, *call) {}, 1},
		{"ten times", func(*machine, namespace, *call) {}, 10},
		{"without CNI_NETNS", func(_ *machine, _ namespace, c *call) { c.netns = "" }, 2},
		{"namespace gone", func(_ *machine, container namespace, _ *call) { container.remove() }, 2},
		{"namespace path is a plain file", func(m *machine, container namespace, c *call) {
			c.netns = filepath.Join(m.run, "stale")
			if err := os.WriteFile(c.netns, nil, 0o600); err != nil {
				m.t.Fatal(err)
			}
		}, 1},
		{"nothing published", func(m *machine, _ namespace, _ *call) { os.Remove(filepath.Join(m.run, conf.StateFile)) }, 1},
		{"lease lost", func(m *machine, _ namespace, _ *call) {
			m.state.Lease.Lost = "granted to another host"
			m.publish()
		}, 1},
		{"bridge gone", func(m *machine, _ namespace, _ *call) { m.deleteLink("d-dcos") }, 1},
		{"interface gone", func(m *machine, container namespace, _ *call) {
			l, err := container.LinkByName("eth0")
			if err == nil {
				err = container.LinkDel(l)
			}
			if err != nil {
				m.t.Fatal(err)
			}
		}, 1},
		{"prevResult of nonsense", func(_ *machine, _ namespace, c *call) { c.conf["prevResult"] = []int{1, 2} }, 1},
		{"the network is now another overlay's", func(_ *machine, _ namespace, c *call) { c.conf["overlay"] = "both" }, 1},
		{"the network is now of the other type", func(_ *machine, _ namespace, c *call) { c.plugin = "m-overlay" }, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			container := newNamespace(t)
			c := call{netns: container.path, conf: m.config("dcos", "1.0.0")}
			m.add(c)
			c.command = "DEL"
			tt.arrange(m, container, &c)
			for range tt.times {
				if out := m.ok(c); out != "" {
					t.Errorf("DEL printed %q", out)
				}
			}
			m.wantNothing()
		})
	}
}

func TestDelOfNothing(t *testing.T) {
	m := newMachine(t)
	m.ok(call{command: "DEL", id: "never", conf: m.config("dcos", "1.0.0")})
	m.ok(call{command: "DEL", id: "never", conf: m.config("none-such", "1.0.0")})
	if _, err := os.Stat(filepath.Join(m.run, conf.IPAMDir)); err == nil {
		t.Error("DEL made an address store")
	}
}

// TestDelInRecycledNamespace: the path given belongs to another container now.
func TestDelInRecycledNamespace(t *testing.T) {
	m := newMachine(t)
	old, recycled := newNamespace(t), newNamespace(t)
	m.add(call{id: "old", netns: old.path, conf: m.config("dcos", "1.0.0")})
	other := m.add(call{id: "new", netns: recycled.path, conf: m.config("dcos", "1.0.0")})
	m.ok(call{command: "DEL", id: "old", netns: recycled.path, conf: m.config("dcos", "1.0.0")})
	ping(t, recycled, addrOf(other.IPs[0].Gateway))
	if f := m.left(); len(f.links) != 1 || len(f.records) != 1 || f.records[0].ContainerID != "new" {
		t.Errorf("left: %+v", f)
	}
}

func TestDelLeavesLinksOfOthers(t *testing.T) {
	m := newMachine(t)
	name := mark.HostEnd(conf.Docker, conf.Attachment{Network: "dcos", ContainerID: "c1", IfName: "eth0"}.Key())
	m.stranger(name)
	m.ok(call{command: "DEL", conf: m.config("dcos", "1.0.0")})
	if !slices.Contains(m.host.links(t), name) {
		t.Errorf("%s, which is not ours, was removed", name)
	}
}

// TestDelOfLongNames: the alias cannot hold the names, and the store was lost
// and rebuilt from it.
func TestDelOfLongNames(t *testing.T) {
	m := newMachine(t)
	container := newNamespace(t)
	c := call{id: strings.Repeat("c", 1024), netns: container.path, conf: m.config("both", "1.0.0", "name", strings.Repeat("n", 255), "overlay", "both")}
	r := m.add(c)
	if err := os.RemoveAll(filepath.Join(m.run, conf.IPAMDir)); err != nil {
		t.Fatal(err)
	}
	other := m.add(call{id: "other", netns: newNamespace(t).path, conf: m.config("both", "1.0.0")})
	if slices.Equal(addrsOf(r), addrsOf(other)) {
		t.Fatalf("two containers have %v", addrsOf(r))
	}
	if n := len(m.records("both")); n != 2 {
		t.Fatalf("%d records, want 2", n)
	}
	c.command = "DEL"
	m.ok(c)
	if f := m.left(); len(f.links) != 1 || len(f.records) != 1 || f.records[0].ContainerID != "other" {
		t.Errorf("left: %+v", f)
	}
}

// TestDelOfLongNamesWithoutLink: as before, and the link has gone too, with a DEL that
// was killed while somebody else removed it.
func TestDelOfLongNamesWithoutLink(t *testing.T) {
	m := newMachine(t)
	for name, network := range map[string]string{"network that fits": "both", "network that does not": strings.Repeat("n", 255)} {
		t.Run(name, func(t *testing.T) {
			c := call{id: strings.Repeat("c", 1024), netns: newNamespace(t).path, conf: m.config("both", "1.0.0", "name", network, "overlay", "both")}
			m.add(c)
			if err := os.RemoveAll(filepath.Join(m.run, conf.IPAMDir)); err != nil {
				t.Fatal(err)
			}
			other := call{id: "other", netns: newNamespace(t).path, conf: m.config("both", "1.0.0")}
			m.add(other)
			m.deleteLink(mark.HostEnd(conf.Docker, conf.Attachment{Network: network, ContainerID: c.id, IfName: "eth0"}.Key()))
			if n := len(m.records("both")); n != 2 {
				t.Fatalf("%d records, want 2", n)
			}
			c.command, other.command = "DEL", "DEL"
			m.ok(c)
			if f := m.left(); len(f.links) != 1 || len(f.records) != 1 || f.records[0].ContainerID != "other" {
				t.Errorf("left: %+v", f)
			}
			m.ok(other)
			m.wantNothing()
		})
	}
}

// TestAddAgainstDel: both of one attachment at the same time. Whoever wins, an
// interface has its address and nobody else's.
func TestAddAgainstDel(t *testing.T) {
	m := newMachine(t)
	for range 10 {
		container := newNamespace(t)
		c := call{netns: container.path, conf: m.config("both", "1.0.0")}
		var wg sync.WaitGroup
		for _, command := range []string{"ADD", "DEL", "ADD", "DEL"} {
			wg.Go(func() {
				c := c
				c.command = command
				m.exec(c)
			})
		}
		wg.Wait()
		f := m.left()
		if len(f.links) != len(f.records) {
			t.Fatalf("links %v, records %v", f.links, f.records)
		}
		c.command = "DEL"
		m.ok(c)
		m.wantNothing(container)
	}
}

// TestLock: one attachment at a time, others at will.
func TestLock(t *testing.T) {
	dir := t.TempDir()
	a := conf.Attachment{Network: "n", ContainerID: "c", IfName: "eth0"}.Key()
	b := conf.Attachment{Network: "n", ContainerID: "d", IfName: "eth0"}.Key()
	unlockA, err := lock(t.Context(), dir, a)
	if err != nil {
		t.Fatal(err)
	}
	unlockB, err := lock(t.Context(), dir, b)
	if err != nil {
		t.Fatalf("another attachment: %v", err)
	}
	unlockB()
	got := make(chan func())
	go func() {
		unlock, err := lock(t.Context(), dir, a)
		if err != nil {
			t.Error(err)
			unlock = func() {}
		}
		got <- unlock
	}()
	select {
	case <-got:
		t.Fatal("two hold the lock")
	case <-time.After(20 * time.Millisecond):
	}
	unlockA()
	(<-got)()
	if unlock, err := lock(t.Context(), filepath.Join(dir, "gone"), a); err != nil {
		t.Errorf("directory that is not there: %v", err)
	} else {
		unlock()
	}
}

// TestEarlyReuse: an address that did not cool loses its connections.
func TestEarlyReuse(t *testing.T) {
	m := newMachine(t)
	a, b := newNamespace(t), newNamespace(t)
	m.add(call{id: "a", netns: a.path, conf: m.config("tiny", "1.0.0")})
	m.ok(call{command: "DEL", id: "a", conf: m.config("tiny", "1.0.0")})
	address := netip.MustParseAddr("9.2.0.6")
	m.track(address, netip.MustParseAddr("9.2.0.99"))
	m.track(netip.MustParseAddr("9.2.0.98"), netip.MustParseAddr("9.2.0.99"))
	m.add(call{id: "b", netns: b.path, conf: m.config("tiny", "1.0.0")})
	if n := m.tracked(address); n != 0 {
		t.Errorf("%d connections of %s are left", n, address)
	}
	if n := m.tracked(netip.MustParseAddr("9.2.0.98")); n != 1 {
		t.Errorf("%d connections of another address are left, want 1", n)
	}
}
