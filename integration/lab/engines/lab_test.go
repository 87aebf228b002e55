//go:build engines

package engines

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// newLab makes a lab that goes with the test, and shows the logs of its hosts
// if that failed.
func newLab(t *testing.T) (context.Context, *Lab) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	t.Cleanup(cancel)
	l, err := New(ctx, "../../../bin/tools/engines")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, h := range l.hosts {
				t.Log(h.Logs(20))
			}
		}
		if err := l.Close(); err != nil {
			t.Errorf("close the lab: %v", err)
		}
	})
	return ctx, l
}

func addHost(t *testing.T, ctx context.Context, l *Lab, name string) *Host {
	t.Helper()
	h, err := l.AddHost(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestHosts(t *testing.T) {
	// What somebody attached on this machine is none of the hosts' business.
	cached := filepath.Join("/var/lib/cni/results", fmt.Sprintf("overlay-lab-test-%d", os.Getpid()))
	if err := errors.Join(os.MkdirAll(filepath.Dir(cached), 0o755), os.WriteFile(cached, []byte("{}"), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(cached) })
	ctx, l := newLab(t)
	h1, h2 := addHost(t, ctx, l, "h1"), addHost(t, ctx, l, "h2")

	sees := func(h *Host, want string, args ...string) {
		t.Helper()
		if got, err := h.Exec(ctx, args...); err != nil || got != want {
			t.Fatalf("%s on %s: %q, %v; want %q", args, h.Name, got, err, want)
		}
	}
	sees(h1, "h1", "hostname")
	sees(h1, "tini", "cat", "/proc/1/comm")
	sees(h1, "", "sh", "-c", "find /var/lib/cni -mindepth 1 2>/dev/null; true")
	sees(h1, "lo\neth0", "sh", "-c", "for i in $(ls -U /sys/class/net | sort -r); do echo $i; done")
	for _, to := range []string{h2.IP.String(), h2.IP6.String(), Outside4.String(), Outside6.String()} {
		if _, err := h1.Exec(ctx, "busybox", "timeout", "5", "ping", "-c1", "-W2", to); err != nil {
			t.Error(err)
		}
	}

	// A file of one host is not on another, and what is in /etc survives a reboot while /run does not.
	for _, f := range []string{"/etc/cni/net.d/x.conf", "/run/x"} {
		if err := h1.Write(f, "one"); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(h2.File(f)); err == nil {
			t.Errorf("%s of h1 is on h2", f)
		}
		if _, err := os.Stat(f); err == nil {
			t.Errorf("%s of h1 is on this machine", f)
		}
	}
	d, err := h1.Start("sleep", "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	boot, _ := h1.Exec(ctx, "cat", "/proc/sys/kernel/random/boot_id")
	if err := h1.Crash(); err != nil {
		t.Fatal(err)
	}
	if !d.Ended() {
		t.Error("a daemon survived the crash of its host")
	}
	if _, err := h1.Exec(ctx, "true"); err == nil || !strings.Contains(err.Error(), "down") {
		t.Errorf("executed on a host that is down: %v", err)
	}
	if err := h1.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	sees(h1, "one", "cat", "/etc/cni/net.d/x.conf")
	if _, err := h1.Exec(ctx, "cat", "/run/x"); err == nil {
		t.Error("/run survived a reboot")
	}
	if again, err := h1.Exec(ctx, "cat", "/proc/sys/kernel/random/boot_id"); err != nil || again == boot || len(again) != 36 {
		t.Errorf("boot id %q after %q, %v", again, boot, err)
	}
	if _, err := h1.Exec(ctx, "busybox", "timeout", "5", "ping", "-c1", h2.IP.String()); err != nil {
		t.Error(err)
	}

	if err := h1.Unplug(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := h2.Exec(ctx, "busybox", "timeout", "2", "ping", "-c1", h1.IP.String()); err == nil {
		t.Error("an unplugged host answers")
	}
}
