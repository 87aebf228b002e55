package coordinator

import (
	"context"
	"net"
	"time"

	"overlayd.internal/overlay/overlayd/internal/serve"
)

// shutdownTimeout is how long Serve waits for requests in progress.
const shutdownTimeout = 5 * time.Second

// Serve answers on the listener until ctx ends, and then returns nil after the
// requests in progress. It closes the listener.
func (c *Coordinator) Serve(ctx context.Context, l net.Listener) error {
	s := serve.Server{
		Handler:       c.handler(ctx.Done()),
		Log:           c.log,
		HeaderTimeout: 10 * time.Second,
		IdleTimeout:   2 * time.Minute,
		Grace:         shutdownTimeout,
	}
	return s.Serve(ctx, l)
}
