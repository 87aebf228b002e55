// Package kernel carries plans of package plan into the kernel of the network
// namespace it was opened in, reads what the kernel has, and watches it.
package kernel

import "overlayd.internal/overlay/internal/rtnl"

// Kernel is the kernel of one network namespace. Read and Apply are for one
// goroutine at a time; Expected may be used beside them.
type Kernel struct {
	conn *rtnl.Conn
	port uint32 // which notifications name as the origin of our own changes

	Expected Expected
}

// Open opens a socket in the namespace of the calling thread. It changes
// nothing.
func Open() (*Kernel, error) {
	c, err := rtnl.Open()
	if err != nil {
		return nil, err
	}
	port, err := c.Port()
	if err != nil {
		c.Close()
		return nil, err
	}
	return &Kernel{conn: c, port: port}, nil
}

// Close closes the socket.
func (k *Kernel) Close() error { return k.conn.Close() }
