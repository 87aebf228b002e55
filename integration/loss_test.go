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
// higher epochs, and lose no packet; one that is new waits, and says until when.
func TestLoss(t *testing.T) {
	t.Parallel()
	c := cluster{Seed: upSeed(t, seedConfig(t))}
	ctx := t.Context()
	db := filepath.Join(c.Dir, "coordinator", "coordinator.db")
	backup, older := filepath.Join(t.TempDir(), "backup"), filepath.Join(t.TempDir(), "older.db")
	_, err := c.Overlayctl(ctx, "backup", backup)
	must(t, err)
	must(t, c.Coordinator.Stop())
	copyFile(t, db, older)
	must(t, c.Coordinator.Restart(ctx))

	late, err := c.Host(ctx, "late", 40)
	must(t, err)
	must(t, c.StartAgent(late))
	t.Cleanup(late.Proc.Kill)
	must(t, late.WaitReady(ctx))
	c.a = place(t, c.Seed, 0, "a", "dcos", lab.Docker)
	c.b, err = late.Attach(ctx, "b", "dcos", lab.Docker)
	must(t, err)
	t.Cleanup(func() { c.b.Remove(context.Background()) })
	waitPing(t, c.a.Netns, c.b.Addr(), healTime)
	hosts := append([]*lab.Host{late}, c.Agents...)

	for i, f := range []struct {
		name    string
		replace func(*testing.T)
	}{
		{"coordinator-older-file", func(t *testing.T) { copyFile(t, older, db) }},
		{"coordinator-restored-old-backup", func(t *testing.T) {
			must(t, os.Remove(db))
			_, err := c.Overlayctl(ctx, "restore", backup, "--to", "bbolt:"+db)
			must(t, err)
		}},
		{"coordinator-empty-store", func(t *testing.T) {
			must(t, os.Remove(db))
			limited, cancel := context.WithTimeout(ctx, 20*time.Second)
			defer cancel()
			out, err := c.anotherCoordinator(limited, c.Master.Node, "bbolt:"+db, filepath.Join(c.Dir, "coordinator")).CombinedOutput()
			adopt := regexp.MustCompile(`--adopt ([0-9a-f]{32})`).FindStringSubmatch(string(out))
			if err == nil || adopt == nil {
				t.Fatalf("it starts on an empty store, or does not say how to go on: %v\n%s", err, out)
			}
			c.Coordinator.Args = []string{"--adopt", adopt[1]}
		}},
	} {
		t.Run(f.name, func(t *testing.T) {
			before, epochs := map[*lab.Host]string{}, map[*lab.Host]uint64{}
			for _, h := range hosts {
				before[h], epochs[h] = holds(t, h), epoch(t, h)
			}
			c.unbroken(t, func() {
				must(t, c.Coordinator.Stop())
				f.replace(t)
				must(t, c.Coordinator.Restart(ctx))
				newcomerWaits(t, c, byte(50+i))
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
				waitPing(t, extra.Netns, c.b.Addr(), healTime)
				must(t, extra.Remove(ctx))
			}
		})
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
