package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// holds is what a host has published of its lease: what it must keep.
func holds(t *testing.T, h *lab.Host) string {
	t.Helper()
	s, err := h.Published()
	must(t, err)
	var b strings.Builder
	for _, o := range s.Overlays {
		fmt.Fprintln(&b, o.Info.Name, o.Subnet, o.Subnet6, o.Backend.VXLAN.VTEPIP, o.Backend.VXLAN.VTEPIP6)
	}
	return b.String()
}

// TestLoss: the store is replaced by an older copy of its file, by a backup, and by
// nothing, under containers that exchange packets, with real programs and identities. A
// host that joined after the copies were made, and the others, keep what they hold, with
// higher epochs, and lose no packet; one that is new waits, and says until when. At full
// length the same happens to two coordinators on etcd.
func TestLoss(t *testing.T) {
	t.Parallel()
	for _, store := range stores() {
		t.Run(store, func(t *testing.T) {
			t.Parallel()
			loseStore(t, store == "etcd")
		})
	}
}

// losing is a cluster that loses its store.
type losing struct {
	cluster
	backup, older string
	db            string // empty: it is etcd
}

func loseStore(t *testing.T, etcd bool) {
	o := options()
	o.Secure, o.Etcd = true, etcd
	l := &losing{cluster: cluster{Seed: makeSeed(t, seedConfig(t), o)}, backup: filepath.Join(t.TempDir(), "backup"), older: filepath.Join(t.TempDir(), "older.db")}
	ctx := t.Context()
	must(t, l.Up(ctx))
	_, err := l.Overlayctl(ctx, "backup", l.backup)
	must(t, err)
	faults := []fault{{"coordinator-restored-old-backup", l.restoreBackup}, {"coordinator-empty-store", l.empty}}
	if !etcd {
		l.db = filepath.Join(l.Dir, "coordinator", "coordinator.db")
		must(t, l.Coordinator.Stop())
		copyFile(t, l.db, l.older)
		must(t, l.Coordinator.Restart(ctx))
		faults = append([]fault{{"coordinator-older-file", func(t *testing.T) { copyFile(t, l.older, l.db) }}}, faults...)
	}

	late, err := l.Host(ctx, "late", 40)
	must(t, err)
	must(t, l.StartAgent(late))
	t.Cleanup(late.Proc.Kill)
	must(t, late.WaitReady(ctx))
	l.a = place(t, l.Seed, 0, "a", "dcos", lab.Docker)
	l.b, err = late.Attach(ctx, "b", "dcos", lab.Docker)
	must(t, err)
	t.Cleanup(func() { l.b.Remove(context.Background()) })
	waitPing(t, l.a.Netns, l.b.Addr(), healTime)
	hosts := append([]*lab.Host{late}, l.Agents...)
	for i, f := range faults {
		t.Run(f.name, func(t *testing.T) { l.loses(t, f, hosts, byte(50+i)) })
	}
}

// fault is what the store is replaced by while no coordinator runs.
type fault struct {
	name    string
	replace func(*testing.T)
}

// clear removes everything from the store.
func (l *losing) clear(t *testing.T) {
	t.Helper()
	if l.db != "" {
		must(t, os.Remove(l.db))
		return
	}
	_, err := l.Coordinator.Etcdctl(t.Context(), "del", "--prefix", "/overlay/")
	must(t, err)
}

func (l *losing) restoreBackup(t *testing.T) {
	l.clear(t)
	// What reaches etcd is where the coordinator is.
	argv := append([]string{filepath.Join(l.Bin, "overlayctl"), "restore", l.backup, "--to", l.Coordinator.Store(), "--state-dir", filepath.Join(l.Dir, "coordinator")}, l.Coordinator.StoreArgs()...)
	_, err := l.Master.Run(t.Context(), argv...)
	must(t, err)
}

func (l *losing) empty(t *testing.T) {
	l.clear(t)
	limited, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out, err := l.anotherCoordinator(limited, l.Master.Node, l.Coordinator.Store(), filepath.Join(l.Dir, "coordinator"), l.Coordinator.StoreArgs()...).CombinedOutput()
	adopt := regexp.MustCompile(`--adopt ([0-9a-f]{32})`).FindStringSubmatch(string(out))
	if err == nil || adopt == nil {
		t.Fatalf("it starts on an empty store, or does not say how to go on: %v\n%s", err, out)
	}
	l.Coordinator.Args = []string{"--adopt", adopt[1]}
}

// loses has a fault happen, and sees all hosts keep what they hold.
func (l *losing) loses(t *testing.T, f fault, hosts []*lab.Host, newcomer byte) {
	ctx := t.Context()
	before, epochs := map[*lab.Host]string{}, map[*lab.Host]uint64{}
	for _, h := range hosts {
		before[h], epochs[h] = holds(t, h), epoch(t, h)
	}
	l.unbroken(t, func() {
		if l.Second != nil {
			must(t, l.Second.Stop())
		}
		must(t, l.Coordinator.Stop())
		f.replace(t)
		must(t, l.Coordinator.Restart(ctx))
		if l.Second != nil {
			must(t, l.Second.Restart(ctx))
		}
		newcomerWaits(t, l.cluster, newcomer)
		for _, h := range hosts {
			wait(t, h.Name+" to have its lease back", 60*time.Second, func() error {
				if now := epoch(t, h); now <= epochs[h] {
					return fmt.Errorf("epoch %d, before %d", now, epochs[h])
				}
				return nil
			})
			if now := holds(t, h); now != before[h] {
				t.Errorf("%s has\n%s and had\n%s", h.Name, now, before[h])
			}
		}
	})
	for i, h := range hosts {
		wait(t, h.Name+" to be ready", 20*time.Second, func() error { _, err := h.Get(ctx, "/readyz"); return err })
		extra, err := h.Attach(ctx, fmt.Sprintf("x%d", i), "dcos", lab.Mesos)
		must(t, err)
		waitPing(t, extra.Netns, l.b.Addr(), healTime)
		must(t, extra.Remove(ctx))
	}
}

// newcomerWaits starts an agent on a host that was never there, and sees it wait.
func newcomerWaits(t *testing.T, c cluster, n byte) {
	t.Helper()
	h, err := c.Host(t.Context(), fmt.Sprintf("new%d", n), n)
	must(t, err)
	must(t, c.StartAgent(h))
	defer h.Proc.Kill()
	wait(t, "the new host to wait", 20*time.Second, func() error {
		_, err := h.Get(t.Context(), "/readyz")
		if err == nil || !strings.Contains(err.Error(), "lacks leases that were granted, so until ") {
			return fmt.Errorf("readiness: %v", err)
		}
		return nil
	})
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	must(t, err)
	must(t, os.WriteFile(to, b, 0o600))
}
