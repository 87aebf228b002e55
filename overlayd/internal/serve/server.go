package serve

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// DeadConnection is how long bytes may stay unacknowledged before a connection
// counts as dead. Without it a host that vanished would be connected for a
// quarter of an hour, and could not come back with another address.
const DeadConnection = 15 * time.Second

const (
	// maxConns bounds the connections of a server, and maxConnsPerHost those from
	// one address; an agent holds two.
	maxConns        = 100_000
	maxConnsPerHost = 4096
	// reservedFiles are left for everything that is no connection.
	reservedFiles = 256
)

// Server answers on any number of listeners.
type Server struct {
	Handler http.Handler
	// TLS, where it is not nil, is spoken on TCP listeners; never on unix sockets.
	TLS *tls.Config
	Log *slog.Logger

	HeaderTimeout time.Duration // for the head of a request, and the TLS handshake
	ReadTimeout   time.Duration // for all of it; 0: the handlers see to that
	WriteTimeout  time.Duration // 0: the handlers see to that
	IdleTimeout   time.Duration
	Grace         time.Duration // for requests in progress at the end

	MaxConns, MaxConnsPerHost int // 0: what is reasonable

	// ConnContext and ConnState are those of http.Server; they may be nil.
	ConnContext func(context.Context, net.Conn) context.Context
	ConnState   func(net.Conn, http.ConnState)
}

// ListenTCP opens a port. Serve has keepalive of its own. Multipath TCP, which Go
// takes where it can, refuses TCP_USER_TIMEOUT, by which Serve finds out that a
// host has vanished.
func ListenTCP(ctx context.Context, addr string) (net.Listener, error) {
	config := net.ListenConfig{
		KeepAlive: -1,
		// Before the port is open: a connection that comes at once inherits it, too.
		// Where the kernel does not take it, Serve says so.
		Control: func(_, _ string, raw syscall.RawConn) error {
			_ = limitRaw(raw)
			return nil
		},
	}
	config.SetMultipathTCP(false)
	return config.Listen(ctx, "tcp", addr)
}

// Serve answers until ctx ends, and then returns nil after the requests in
// progress. It closes the listeners, also when it fails.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	return s.run(ctx, func(ctx context.Context, server *http.Server, group *errgroup.Group) {
		for _, l := range listeners {
			group.Go(func() error { return s.listen(server, l) })
		}
	})
}

// run makes the HTTP server, starts what answers, and ends it with ctx.
func (s *Server) run(ctx context.Context, start func(context.Context, *http.Server, *errgroup.Group)) error {
	requests, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	conns := newConns(s.MaxConns, s.MaxConnsPerHost, s.Log)
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	server := &http.Server{
		Handler:           s.Handler,
		TLSConfig:         s.TLS,
		Protocols:         &protocols,
		ReadHeaderTimeout: s.HeaderTimeout,
		ReadTimeout:       s.ReadTimeout,
		WriteTimeout:      s.WriteTimeout,
		IdleTimeout:       s.IdleTimeout,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return requests },
		ConnContext:       s.ConnContext,
		ConnState: func(c net.Conn, state http.ConnState) {
			conns.changed(c, state)
			if s.ConnState != nil {
				s.ConnState(c, state)
			}
		},
	}
	group, ctx := errgroup.WithContext(ctx)
	start(ctx, server, group)
	group.Go(func() error {
		<-ctx.Done()
		// Streams end with the context of whoever serves them; let the other
		// requests finish.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.Grace)
		defer cancel()
		err := server.Shutdown(grace)
		stop()
		if errors.Is(err, context.DeadlineExceeded) {
			err = server.Close()
		}
		return err
	})
	return group.Wait()
}

func (s *Server) listen(server *http.Server, l net.Listener) error {
	_, local := l.(*SocketListener)
	if !local {
		if err := limitSilence(l); err != nil {
			s.Log.Warn("connections keep the system's timeouts: a host that has vanished counts as connected for longer", logkey.Addr, l.Addr().String(), logkey.Err, err)
		}
	}
	var err error
	if s.TLS != nil && !local {
		err = server.ServeTLS(l, "", "")
	} else {
		err = server.Serve(l)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve on %s: %w", l.Addr(), err)
}

// limitSilence has the kernel give up TCP connections whose other end does not
// answer. Connections inherit it from the listener, which saves six system
// calls for each of them. TLS goes on top of such a listener, not below.
func limitSilence(l net.Listener) error {
	conn, ok := l.(syscall.Conn)
	if !ok {
		return fmt.Errorf("a %T is not a socket", l)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	return limitRaw(raw)
}

func limitRaw(raw syscall.RawConn) error {
	var set error
	err := raw.Control(func(fd uintptr) {
		set = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(DeadConnection.Seconds())),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 5),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(DeadConnection.Milliseconds())))
	})
	return errors.Join(err, set)
}

// conns counts connections and closes those above the limits at once, so that
// who waits for one knows, and tries another server.
type conns struct {
	max, perHost int
	log          *slog.Logger

	mu     sync.Mutex
	open   map[net.Conn]netip.Addr
	hosts  map[netip.Addr]int
	logged time.Time // when the limit was last logged
}

func newConns(limit, perHost int, log *slog.Logger) *conns {
	if limit == 0 {
		limit = maxConns
		var files unix.Rlimit
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &files) == nil && files.Cur < maxConns+reservedFiles {
			limit = max(int(files.Cur)-reservedFiles, int(files.Cur)/2)
		}
	}
	if perHost == 0 {
		perHost = min(maxConnsPerHost, max(limit/2, 1))
	}
	return &conns{max: limit, perHost: perHost, log: log, open: map[net.Conn]netip.Addr{}, hosts: map[netip.Addr]int{}}
}

// changed is the server's ConnState.
func (c *conns) changed(conn net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		if why := c.add(conn); why != "" {
			conn.Close() // the server finds out at its first read
		}
	case http.StateClosed, http.StateHijacked:
		c.remove(conn)
	}
}

// add counts a connection and says why it is one too many.
func (c *conns) add(conn net.Conn) (why string) {
	host := hostOf(conn.RemoteAddr())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open[conn] = host
	if host.IsValid() {
		c.hosts[host]++
	}
	switch {
	case len(c.open) > c.max:
		why = "the server has all the connections it may have"
	case host.IsValid() && !host.IsLoopback() && c.hosts[host] > c.perHost:
		why = "the host has all the connections that one may have"
	default:
		return ""
	}
	if time.Since(c.logged) > time.Minute {
		c.logged = time.Now()
		c.log.Warn("connection closed at once", logkey.Reason, why, logkey.Remote, conn.RemoteAddr().String(), logkey.Connections, len(c.open)-1)
	}
	return why
}

func (c *conns) remove(conn net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	host, counted := c.open[conn]
	if !counted {
		return
	}
	delete(c.open, conn)
	if c.hosts[host]--; c.hosts[host] <= 0 {
		delete(c.hosts, host)
	}
}

// hostOf is the zero address for what comes over a unix socket.
func hostOf(a net.Addr) netip.Addr {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}
