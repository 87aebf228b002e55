package coordinator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// deadConnection is how long bytes may stay unacknowledged before a connection
// counts as dead. Without it a host that vanished would be connected for a
// quarter of an hour, and could not come back with another address.
const deadConnection = 15 * time.Second

// shutdownTimeout is how long Serve waits for requests in progress.
const shutdownTimeout = 5 * time.Second

// Serve answers on the listener until ctx ends, and then returns nil after the
// requests in progress. It closes the listener.
func (c *Coordinator) Serve(ctx context.Context, l net.Listener) error {
	requests, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	s := &http.Server{
		Handler:           c.handler(ctx.Done()),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(c.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return requests },
	}
	if err := limitSilence(l); err != nil {
		c.log.Warn("connections keep the system's timeouts: a host that has vanished counts as connected for longer", "err", err)
	}
	failed := make(chan error, 1)
	go func() { failed <- s.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	// The streams end with ctx; let the other requests finish.
	grace, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	err := s.Shutdown(grace)
	stop()
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.Close()
	}
	<-failed
	return err
}

// limitSilence has the kernel give up TCP connections whose other end does not
// answer. Connections inherit it from the listener, which saves six system
// calls for each of them.
func limitSilence(l net.Listener) error {
	conn, ok := l.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(deadConnection.Seconds())),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 5),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadConnection.Milliseconds())))
	})
	return errors.Join(err, set)
}
