package serve

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
)

// MaxSocketPath is what fits into a socket address, in bytes.
const MaxSocketPath = 107

// Socket is a unix socket at a path.
type Socket struct {
	Path  string // at most MaxSocketPath bytes
	Perm  fs.FileMode
	Group int           // that owns it beside its user; 0: as it comes
	Look  time.Duration // between two looks at whether it is still there
}

// SocketListener is a Socket that is listened on. Closing it removes the socket,
// unless something else is there by now.
type SocketListener struct {
	*net.UnixListener
	socket Socket
	made   fs.FileInfo
}

// Close may be called more than once.
func (l *SocketListener) Close() error {
	if now, err := os.Lstat(l.socket.Path); err == nil && os.SameFile(now, l.made) {
		os.Remove(l.socket.Path) // at worst the next one replaces it
	}
	return l.UnixListener.Close()
}

// Listen makes the socket, in place of one that nobody serves on.
func (s Socket) Listen(ctx context.Context) (*SocketListener, error) {
	fi, err := os.Lstat(s.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("listen: %w", err)
	case fi.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("listen: %s is not a socket; move it away", s.Path)
	default:
		if c, err := new(net.Dialer).DialContext(ctx, "unix", s.Path); err == nil {
			c.Close()
			return nil, fmt.Errorf("listen: somebody serves on %s already; does a second daemon run on this host?", s.Path)
		}
		if err := os.Remove(s.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("listen: replace the old socket: %w", err)
		}
	}
	return s.bind(ctx)
}

// bind makes the socket under another name first: nobody finds it before it has
// its owner and its permissions.
func (s Socket) bind(ctx context.Context) (*SocketListener, error) {
	dir, err := os.Open(filepath.Dir(s.Path))
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	defer dir.Close()
	hidden := fmt.Sprintf(".%s.%d", filepath.Base(s.Path), os.Getpid())
	temporary := filepath.Join(filepath.Dir(s.Path), hidden)
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen: %w", err)
	}
	addr := temporary
	if len(addr) > MaxSocketPath {
		addr = fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), hidden)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", addr)
	if err != nil {
		return nil, err
	}
	unix := l.(*net.UnixListener)
	unix.SetUnlinkOnClose(false)
	made, err := s.publish(temporary)
	if err != nil {
		unix.Close()
		os.Remove(temporary)
		return nil, fmt.Errorf("listen: %w", err)
	}
	return &SocketListener{UnixListener: unix, socket: s, made: made}, nil
}

// publish gives a socket its owner, permissions and name.
func (s Socket) publish(temporary string) (fs.FileInfo, error) {
	if err := os.Chmod(temporary, s.Perm); err != nil {
		return nil, err
	}
	if s.Group != 0 {
		if err := os.Chown(temporary, -1, s.Group); err != nil {
			return nil, err
		}
	}
	made, err := os.Lstat(temporary)
	if err != nil {
		return nil, err
	}
	return made, os.Rename(temporary, s.Path)
}

// Removed waits until the socket is no longer at its path, or, with false, until
// ctx is done.
func (l *SocketListener) Removed(ctx context.Context) bool {
	tick := time.NewTicker(l.socket.Look)
	defer tick.Stop()
	for {
		if now, err := os.Lstat(l.socket.Path); errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(l.made, now) {
			return ctx.Err() == nil
		}
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
}

// ServeSocket is Serve on a socket beside other listeners. When somebody removes
// the socket it is made anew; its directory may have to come back first.
func (s *Server) ServeSocket(ctx context.Context, l *SocketListener, others ...net.Listener) error {
	return s.run(ctx, func(ctx context.Context, server *http.Server, group *errgroup.Group) {
		for _, other := range others {
			group.Go(func() error { return s.listen(server, other) })
		}
		group.Go(func() error { return s.keep(ctx, server, l) })
	})
}

func (s *Server) keep(ctx context.Context, server *http.Server, l *SocketListener) error {
	for {
		served, stop := context.WithCancel(ctx)
		removed := make(chan bool, 1)
		go func() {
			gone := l.Removed(served)
			if gone {
				l.Close()
			}
			removed <- gone
		}()
		err := s.listen(server, l)
		stop()
		if gone := <-removed; err == nil || !gone {
			return err
		}
		if l = l.socket.again(ctx); l == nil {
			return nil
		}
	}
}

// again tries until it has a socket, or returns nil when ctx is done.
func (s Socket) again(ctx context.Context) *SocketListener {
	tick := time.NewTicker(s.Look)
	defer tick.Stop()
	for {
		if l, err := s.Listen(ctx); err == nil {
			return l
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
