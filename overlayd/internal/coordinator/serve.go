package coordinator

import (
	"context"
	"net"
	"time"

	"overlayd.internal/overlay/overlayd/internal/serve"
)

// shutdownTimeout is how long Serve waits for requests in progress.
const shutdownTimeout = 5 * time.Second

// SocketFile is the socket in the state directory on which root of this host is
// operator.
const SocketFile = "coordinator.sock"

// Serve answers on the listener until ctx ends, and then returns nil after the
// requests in progress. It closes the listener. TLS is spoken where there are
// identities.
func (c *Coordinator) Serve(ctx context.Context, l net.Listener) error {
	s := c.server(ctx)
	if c.identity != nil {
		s.TLS, s.ConnContext, s.ConnState = c.identity.ServerConfig(), c.identity.ConnContext, c.identity.ConnState
	}
	return s.Serve(ctx, l)
}

// ServeLocal is Serve on the socket in the state directory.
func (c *Coordinator) ServeLocal(ctx context.Context, l *serve.SocketListener) error {
	s := c.server(ctx)
	s.ConnContext = localConn
	return s.ServeSocket(ctx, l)
}

func (c *Coordinator) server(ctx context.Context) *serve.Server {
	return &serve.Server{
		Handler:       c.handler(ctx.Done()),
		Log:           c.log,
		HeaderTimeout: 10 * time.Second,
		IdleTimeout:   2 * time.Minute,
		Grace:         shutdownTimeout,
	}
}

// Alive returns when requests could be worked on.
func (c *Coordinator) Alive() {
	c.mu.Lock()
	defer c.mu.Unlock()
}
