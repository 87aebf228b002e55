package systemd

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// manager is what systemd is for a unit: a datagram socket.
func manager(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", path)
	return c
}

func next(t *testing.T, c *net.UnixConn) string {
	t.Helper()
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

func TestBeat(t *testing.T) {
	c := manager(t)
	s := New(slog.New(slog.DiscardHandler))
	s.Beat()
	s.Beat()
	for i, want := range []string{"READY=1", "WATCHDOG=1", "WATCHDOG=1"} {
		if got := next(t, c); got != want {
			t.Errorf("message %d: %q, want %q", i, got, want)
		}
	}
}

// TestWatchHangs: what hangs is not said to be alive.
func TestWatchHangs(t *testing.T) {
	c := manager(t)
	t.Setenv("WATCHDOG_USEC", strconv.Itoa(20_000))
	ctx, cancel := context.WithCancel(t.Context())
	called, hang, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	calls := 0
	go func() {
		done <- New(slog.New(slog.DiscardHandler)).Watch(ctx, func() {
			if calls++; calls == 2 {
				close(called)
				<-hang
			}
		})
	}()
	for i, want := range []string{"READY=1", "WATCHDOG=1", "WATCHDOG=1"} {
		if got := next(t, c); got != want {
			t.Errorf("message %d: %q, want %q", i, got, want)
		}
	}
	<-called
	if err := c.SetDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 100)); err == nil {
		t.Errorf("%d bytes came while it hung", n)
	}
	cancel()
	close(hang)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestNoManager: outside systemd nothing happens.
func TestNoManager(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	s := New(slog.New(slog.DiscardHandler))
	s.Beat()
	if err := s.Watch(t.Context(), func() { t.Error("asked without a watchdog") }); err != nil {
		t.Error(err)
	}
}
