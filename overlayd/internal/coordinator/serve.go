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
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			if err := limitSilence(conn); err != nil {
				c.log.Debug("connection keeps the system's timeouts", "remote", conn.RemoteAddr(), "err", err)
			}
			return ctx
		},
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

// limitSilence has the kernel give up a TCP connection whose other end does not
// answer.
func limitSilence(conn net.Conn) error {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	keepalive := tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: deadConnection, Interval: 5 * time.Second, Count: 3})
	return errors.Join(keepalive, setUserTimeout(tcp))
}

func setUserTimeout(conn syscall.Conn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadConnection.Milliseconds()))
	})
	return errors.Join(err, set)
}
