// Package rtnl sends rtnetlink messages in batches: one system call for any
// number of messages, one answer read back for each. A CNI program lives for a
// few milliseconds, so it can afford neither a round trip nor a look-up per
// message, which is what the calls of a netlink library cost.
package rtnl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/netns"
)

// receiveTimeout bounds the wait for an answer. The kernel handles messages
// inside the send, so that a missing answer is a kernel fault, not slowness.
const receiveTimeout = 5 // seconds

// Conn is a netlink socket in one network namespace. It is not safe for
// concurrent use.
type Conn struct {
	fd  int
	seq uint32
	buf []byte // of the last answer
}

// Open opens a socket in the namespace of the calling thread.
func Open() (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	c := &Conn{fd: fd}
	// Both options only make errors readable; kernels without them still work.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	tv := unix.Timeval{Sec: receiveTimeout}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		c.Close()
		return nil, fmt.Errorf("set up a netlink socket: %w", err)
	}
	return c, nil
}

// OpenIn opens a socket in the namespace. A socket stays in the namespace it was
// made in, so that it can be used from any thread afterwards.
func OpenIn(n netns.NS) (*Conn, error) {
	var c *Conn
	err := n.Inside(func() (err error) {
		c, err = Open()
		return err
	})
	return c, err
}

// Close closes the socket.
func (c *Conn) Close() { unix.Close(c.fd) }

// Message is one request. Step says in words what it does ("add address
// 9.0.1.5/25"); it prefixes the error.
type Message struct {
	Step string
	*nl.NetlinkRequest
}

// New starts a message that wants an acknowledgement.
func New(step string, typ, flags int, header nl.NetlinkRequestData) Message {
	m := Message{Step: step, NetlinkRequest: nl.NewNetlinkRequest(typ, flags|unix.NLM_F_ACK)}
	m.AddData(header)
	return m
}

// Attr appends an attribute.
func (m Message) Attr(typ int, data []byte) { m.AddData(nl.NewRtAttr(typ, data)) }

// Error is the kernel's refusal of one message. errors.Is finds the errno.
type Error struct {
	Step  string
	Errno unix.Errno
	Text  string // the kernel's own explanation, may be empty
}

func (e *Error) Error() string {
	if e.Text == "" {
		return fmt.Sprintf("%s: %s", e.Step, e.Errno.Error())
	}
	return fmt.Sprintf("%s: %s (%s)", e.Step, e.Errno.Error(), e.Text)
}

// Unwrap makes errors.Is(err, unix.EEXIST) work.
func (e *Error) Unwrap() error { return e.Errno }

// Send sends all messages in one system call and returns what became of each,
// in their order. The kernel goes on after one that it refused.
func (c *Conn) Send(msgs ...Message) []error {
	out := make([]error, len(msgs))
	var buf []byte
	first := c.seq + 1
	for _, m := range msgs {
		c.seq++
		m.Seq = c.seq
		buf = append(buf, m.Serialize()...)
	}
	fail := func(pending []bool, err error) []error {
		for i, m := range msgs {
			if pending == nil || pending[i] {
				out[i] = fmt.Errorf("%s: %w", m.Step, err)
			}
		}
		return out
	}
	if err := c.send(buf); err != nil {
		return fail(nil, err)
	}
	pending := make([]bool, len(msgs))
	for i := range pending {
		pending[i] = true
	}
	for left := len(msgs); left > 0; {
		answers, err := c.receive()
		if err != nil {
			return fail(pending, err)
		}
		for _, a := range answers {
			i := int(a.Header.Seq - first)
			if a.Header.Type != unix.NLMSG_ERROR || i < 0 || i >= len(msgs) || !pending[i] {
				continue // a late answer to something older
			}
			pending[i] = false
			left--
			out[i] = refusal(msgs[i].Step, a)
		}
	}
	return out
}

// Get sends one request for one object and returns the payload of the answer.
func (c *Conn) Get(m Message) ([]byte, error) {
	c.seq++
	m.Seq = c.seq
	m.Flags &^= unix.NLM_F_ACK
	if err := c.send(m.Serialize()); err != nil {
		return nil, fmt.Errorf("%s: %w", m.Step, err)
	}
	for {
		answers, err := c.receive()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", m.Step, err)
		}
		for _, a := range answers {
			switch {
			case a.Header.Seq != m.Seq:
			case a.Header.Type == unix.NLMSG_ERROR:
				if err := refusal(m.Step, a); err != nil {
					return nil, err
				}
			default:
				return bytes.Clone(a.Data), nil
			}
		}
	}
}

// Dump sends a request for all objects of a kind and returns their payloads.
func (c *Conn) Dump(m Message) ([][]byte, error) {
	c.seq++
	m.Seq = c.seq
	m.Flags = unix.NLM_F_REQUEST | unix.NLM_F_DUMP
	if err := c.send(m.Serialize()); err != nil {
		return nil, fmt.Errorf("%s: %w", m.Step, err)
	}
	var out [][]byte
	for {
		answers, err := c.receive()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", m.Step, err)
		}
		for _, a := range answers {
			switch {
			case a.Header.Seq != m.Seq:
			case a.Header.Type == unix.NLMSG_DONE:
				return out, nil
			case a.Header.Type == unix.NLMSG_ERROR:
				return nil, refusal(m.Step, a)
			default:
				out = append(out, bytes.Clone(a.Data))
			}
		}
	}
}

func (c *Conn) send(buf []byte) error {
	for {
		err := unix.Sendto(c.fd, buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// receive reads answers, which hold until the next call.
func (c *Conn) receive() ([]syscall.NetlinkMessage, error) {
	if c.buf == nil {
		c.buf = make([]byte, 32<<10)
	}
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return syscall.ParseNetlinkMessage(c.buf[:n])
	}
}

// refusal reads an NLMSG_ERROR: nil for an acknowledgement.
func refusal(step string, a syscall.NetlinkMessage) error {
	if len(a.Data) < 4 {
		return fmt.Errorf("%s: short answer from the kernel", step)
	}
	errno := -int32(binary.NativeEndian.Uint32(a.Data))
	if errno == 0 {
		return nil
	}
	e := &Error{Step: step, Errno: unix.Errno(errno)}
	if a.Header.Flags&unix.NLM_F_ACK_TLVS == 0 {
		return e
	}
	// With NETLINK_CAP_ACK only the header of the refused message is repeated.
	skip := 4 + unix.SizeofNlMsghdr
	if a.Header.Flags&unix.NLM_F_CAPPED == 0 && len(a.Data) >= skip {
		skip = 4 + int(binary.NativeEndian.Uint32(a.Data[4:]))
	}
	if skip > len(a.Data) {
		return e
	}
	EachAttr(a.Data[skip:], func(typ uint16, data []byte) {
		if typ == nl.NLMSGERR_ATTR_MSG {
			e.Text = unix.ByteSliceToString(data)
		}
	})
	return e
}

// EachAttr calls f for every attribute in b.
func EachAttr(b []byte, f func(typ uint16, data []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&nl.NLA_TYPE_MASK, b[unix.SizeofRtAttr:n])
		b = b[min((n+3)&^3, len(b)):]
	}
}

// Has reports whether there is an interface of that name. It asks by binding the
// socket, to which a netlink socket pays no heed, because that only looks: for a
// netlink request the kernel waits until all others have made their changes, and
// for an ioctl with a name that is not there it first runs modprobe, twice.
func (c *Conn) Has(name string) (bool, error) {
	err := unix.BindToDevice(c.fd, name)
	if errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	if err == nil {
		err = unix.BindToDevice(c.fd, "")
	}
	if err != nil {
		return false, fmt.Errorf("look for interface %s: %w", name, err)
	}
	return true, nil
}

// Interface is what the interface ioctls say about one device.
type Interface struct {
	Index int
	Up    bool
}

// Find looks an interface up by name: two ioctls on the socket, which cost a
// tenth of reading the link. ok is false where there is none. It is for one that
// should be there; see Has for others.
func (c *Conn) Find(name string) (i Interface, ok bool, err error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return i, false, fmt.Errorf("interface %q: %w", name, err)
	}
	ioctl := func(op uintptr) error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c.fd), op, uintptr(unsafe.Pointer(req)))
		if errno != 0 {
			return errno
		}
		return nil
	}
	if err := ioctl(unix.SIOCGIFINDEX); errors.Is(err, unix.ENODEV) {
		return i, false, nil
	} else if err != nil {
		return i, false, fmt.Errorf("look up interface %s: %w", name, err)
	}
	i.Index = int(req.Uint32())
	if err := ioctl(unix.SIOCGIFFLAGS); err != nil {
		return i, false, fmt.Errorf("read flags of interface %s: %w", name, err)
	}
	i.Up = req.Uint16()&unix.IFF_UP != 0
	return i, true, nil
}
