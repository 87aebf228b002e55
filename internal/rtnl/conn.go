// Package rtnl is the one connection of ours to the kernel's netlink: sockets,
// batches of messages, dumps that are repeated when the kernel's tables changed
// meanwhile, notifications, and how links, addresses, routes and neighbours are
// written and read. CNI programs and agent share it; no other package opens a
// netlink socket.
//
// A CNI program lives for a few milliseconds, and a host that joins sixteen
// thousand peers sends some fifty thousand messages. Neither can afford a round
// trip, a look-up or an allocation per message, which is what the calls of a
// netlink library cost (docs/adr/0010-one-netlink-connection.md).
package rtnl

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/netns"
)

// receiveTimeout bounds the wait for an answer. The kernel handles messages
// inside the send, so that a missing answer is a kernel fault, not slowness.
const receiveTimeout = 10 * time.Second

// How many messages are given to the kernel at once: each time it lets those run
// who read what it tells of. A socket whose receive buffer could not be enlarged
// holds 256 refusals; more are lost. The other has room for 10,000.
const (
	fewMessages  = 200
	manyMessages = 1000
)

// receiveBuffer has room for the refusal of every message of a batch and for
// bursts of notifications, in bytes.
const receiveBuffer = 8 << 20

var (
	// ErrOverrun means that the kernel had more to answer than the socket holds,
	// so that it is not known what was done.
	ErrOverrun = errors.New("netlink answers were lost")
	// errInterrupted means that what was being listed changed meanwhile.
	errInterrupted = errors.New("the kernel's tables changed while they were read")
)

// Conn is a netlink socket in one network namespace. It is not safe for
// concurrent use.
type Conn struct {
	fd  int
	max int // messages given to the kernel at once
	seq uint32
	buf []byte // of the last answer
}

// Open opens a route socket in the namespace of the calling thread.
func Open() (*Conn, error) { return OpenFamily(unix.NETLINK_ROUTE) }

// OpenFamily opens a socket of another netlink family, such as NETLINK_NETFILTER.
func OpenFamily(family int) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, family)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	c := &Conn{fd: fd, max: fewMessages}
	tv := unix.NsecToTimeval(int64(receiveTimeout))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		c.Close()
		return nil, fmt.Errorf("set up a netlink socket: %w", err)
	}
	if growReceiveBuffer(fd) {
		c.max = manyMessages
	}
	// Refinements, each of which an old kernel may lack: answers without a copy
	// of the request, answers with a sentence, and dumps that heed a filter.
	for _, opt := range [...]int{unix.NETLINK_CAP_ACK, unix.NETLINK_EXT_ACK, unix.NETLINK_GET_STRICT_CHK} {
		_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, opt, 1)
	}
	return c, nil
}

// growReceiveBuffer reports whether the buffer is as large as it should be.
func growReceiveBuffer(fd int) bool {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) == nil {
		return true
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	return false
}

// MaxSend is the number of messages given to the kernel at once.
func (c *Conn) MaxSend() int { return c.max }

// OpenIn opens a route socket in the namespace. A socket stays in the namespace
// it was made in, so that it can be used from any thread afterwards.
func OpenIn(n netns.NS) (*Conn, error) {
	var c *Conn
	err := n.Inside(func() (err error) {
		c, err = Open()
		return err
	})
	return c, err
}

// Close closes the socket. It may be called again.
func (c *Conn) Close() error {
	if c.fd < 0 {
		return nil // by now the number may be another's
	}
	fd := c.fd
	c.fd = -1
	return unix.Close(fd)
}

// Port is the number which notifications name as the origin of a change. The
// socket gets one when it is asked for or with its first message.
func (c *Conn) Port() (uint32, error) {
	name, err := unix.Getsockname(c.fd)
	if err != nil {
		return 0, fmt.Errorf("address of a netlink socket: %w", err)
	}
	addr, ok := name.(*unix.SockaddrNetlink)
	if !ok {
		return 0, fmt.Errorf("address of a netlink socket: it is a %T", name)
	}
	if addr.Pid != 0 {
		return addr.Pid, nil
	}
	if err := unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, fmt.Errorf("bind a netlink socket: %w", err)
	}
	return c.Port()
}

// Send delivers the messages of a batch in order and returns, by position, what
// the kernel refused; a message that is not in the map was obeyed. The kernel
// goes on after one that it refused. An error says that answers are missing, so
// that it is not known what became of the messages after the last answer.
func (c *Conn) Send(b *Batch) (refused map[int]error, err error) {
	refused, _, err = c.send(b)
	return refused, err
}

// Each is Send for those who want one outcome a message: nil, the kernel's
// refusal (an *Error), or that the kernel did not answer.
func (c *Conn) Each(b *Batch) []error {
	refused, answered, err := c.send(b)
	out := make([]error, b.Len())
	for i := range out {
		switch {
		case i < answered || refused[i] != nil:
			out[i] = refused[i]
		default:
			out[i] = fmt.Errorf("%s: %w", b.steps[i], err)
		}
	}
	return out
}

// send answers also with the number of messages whose outcome is certain.
func (c *Conn) send(b *Batch) (refused map[int]error, answered int, err error) {
	to := 0
	for from := 0; from < b.Len(); from = to {
		to = c.part(b, from)
		if err := c.sendPart(b, from, to, &refused); err != nil {
			return refused, from, err
		}
	}
	return refused, b.Len(), nil
}

// alwaysRoom is what every socket can send at once, in bytes.
const alwaysRoom = 32 << 10

// part is where what is sent at once ends, which begins with a message: the kernel
// refuses more than the send buffer of the socket holds, of which the host decides
// the size.
func (c *Conn) part(b *Batch, from int) (to int) {
	to = min(from+c.max, b.Len())
	size := func() int { return b.endOf(to-1) - b.starts[from] }
	if size() <= alwaysRoom {
		return to
	}
	room, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		room = alwaysRoom
	}
	const overhead = 32 // what the kernel takes off
	for to-from > 1 && size() > room-overhead {
		to = from + (to-from)/2
	}
	return to
}

// sendPart sends messages from up to to. The kernel reports every error, so only
// the last one asks for an answer.
func (c *Conn) sendPart(b *Batch, from, to int, refused *map[int]error) error {
	first := c.seq + 1
	for i := from; i < to; i++ {
		c.seq++
		b.seal(i, c.seq, i == to-1)
	}
	if err := c.write(b.buf[b.starts[from]:b.endOf(to-1)]); err != nil {
		return err
	}
	for done := false; !done; {
		err := c.receive(func(m Message) {
			i := from + int(m.Seq-first)
			if m.Type != unix.NLMSG_ERROR || i < from || i >= to {
				return // an answer to something that timed out earlier
			}
			done = done || i == to-1
			if err := m.refusal(b.steps[i]); err != nil {
				if *refused == nil {
					*refused = map[int]error{}
				}
				(*refused)[i] = err
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Get sends one request for one object and hands its answer to fn.
func (c *Conn) Get(r Request, fn func(Message)) error {
	seq, err := c.ask(r, 0)
	if err != nil {
		return err
	}
	for done := false; !done; {
		var refused error
		err := c.receive(func(m Message) {
			if m.Seq != seq || done {
				return
			}
			done = true
			if m.Type == unix.NLMSG_ERROR {
				refused = m.refusal(r.Step)
				return
			}
			fn(m)
		})
		if err != nil {
			return fmt.Errorf("%s: %w", r.Step, err)
		}
		if refused != nil {
			return refused
		}
	}
	return nil
}

// Request asks for one object or for a dump. Step says in words what for, and
// prefixes the error.
type Request struct {
	Step   string
	Type   uint16
	Header []byte
	Attrs  func(*Batch) // may be nil
}

// dumpTries is how often a dump is begun that the kernel says was interrupted.
const dumpTries = 10

// Dump asks for a listing and calls fn for every message of it. When the
// kernel's tables changed meanwhile, something may be missing: then again is
// called, to drop what fn has gathered, and the dump begins anew.
func (c *Conn) Dump(r Request, fn func(Message), again func()) (err error) {
	for range dumpTries {
		if err = c.dump(r, fn); !errors.Is(err, errInterrupted) {
			return err
		}
		again()
	}
	return err
}

func (c *Conn) dump(r Request, fn func(Message)) error {
	seq, err := c.ask(r, unix.NLM_F_DUMP)
	if err != nil {
		return err
	}
	var failed error
	for done := false; !done; {
		err := c.receive(func(m Message) {
			if m.Seq != seq {
				return
			}
			if m.Flags&unix.NLM_F_DUMP_INTR != 0 {
				failed = fmt.Errorf("%s: %w", r.Step, errInterrupted)
			}
			switch m.Type {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				done = true
				if err := m.refusal(r.Step); err != nil {
					failed = err
				}
			default:
				fn(m)
			}
		})
		if err != nil {
			return fmt.Errorf("%s: %w", r.Step, err)
		}
	}
	return failed
}

// List is Dump for those who want everything that parse makes of it. parse must
// not keep the message's data.
func List[T any](c *Conn, r Request, parse func(Message) (T, bool)) ([]T, error) {
	var out []T
	err := c.Dump(r, func(m Message) {
		if x, ok := parse(m); ok {
			out = append(out, x)
		}
	}, func() { out = nil })
	return out, err
}

// ask sends a request.
func (c *Conn) ask(r Request, flags uint16) (seq uint32, err error) {
	var b Batch
	b.Begin(r.Step, r.Type, flags, r.Header)
	if r.Attrs != nil {
		r.Attrs(&b)
	}
	c.seq++
	b.seal(0, c.seq, false)
	if err := c.write(b.buf); err != nil {
		return 0, fmt.Errorf("%s: %w", r.Step, err)
	}
	return c.seq, nil
}

func (c *Conn) write(b []byte) error {
	for {
		err := unix.Send(c.fd, b, 0) // a netlink socket that is not connected talks to the kernel
		if err == nil {
			return nil
		}
		if err != unix.EINTR {
			return fmt.Errorf("send to the kernel: %w", err)
		}
	}
}

// receive reads one datagram and calls fn for each of its messages.
func (c *Conn) receive(fn func(Message)) error {
	if c.buf == nil {
		c.buf = make([]byte, 64<<10)
	}
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		switch err {
		case nil:
			return eachMessage(c.buf[:n], fn)
		case unix.EINTR:
		case unix.ENOBUFS:
			return ErrOverrun
		case unix.EAGAIN:
			return fmt.Errorf("the kernel did not answer within %s", receiveTimeout)
		default:
			return fmt.Errorf("receive from the kernel: %w", err)
		}
	}
}
