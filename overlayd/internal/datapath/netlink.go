package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Messages are encoded by hand into one buffer: sixteen thousand peers make
// some fifty thousand of them, and building each from allocated parts, as
// package netlink does, takes longer than the kernel does to obey.

var native = binary.NativeEndian

// messages is a run of netlink messages to be sent together.
type messages struct {
	buf    []byte
	starts []int // where each message begins
}

func (m *messages) reset() { m.buf, m.starts = m.buf[:0], m.starts[:0] }

func (m *messages) len() int { return len(m.starts) }

// begin starts a message; header is the fixed part that follows nlmsghdr.
func (m *messages) begin(typ, flags uint16, header []byte) {
	m.starts = append(m.starts, len(m.buf))
	m.buf = native.AppendUint32(m.buf, 0) // length, filled in by end
	m.buf = native.AppendUint16(m.buf, typ)
	m.buf = native.AppendUint16(m.buf, flags|unix.NLM_F_REQUEST)
	m.buf = native.AppendUint32(m.buf, 0) // sequence number, filled in by send
	m.buf = native.AppendUint32(m.buf, 0)
	m.buf = append(m.buf, header...)
}

func (m *messages) end() {
	start := m.starts[len(m.starts)-1]
	native.PutUint32(m.buf[start:], uint32(len(m.buf)-start))
}

// attr adds an attribute, padded to four bytes.
func (m *messages) attr(typ uint16, value ...byte) {
	m.buf = native.AppendUint16(m.buf, uint16(unix.SizeofRtAttr+len(value)))
	m.buf = native.AppendUint16(m.buf, typ)
	m.buf = append(m.buf, value...)
	for len(m.buf)%unix.RTA_ALIGNTO != 0 {
		m.buf = append(m.buf, 0)
	}
}

func (m *messages) attr32(typ uint16, value uint32) {
	var b [4]byte
	native.PutUint32(b[:], value)
	m.attr(typ, b[:]...)
}

// attrAddr adds an address without allocating.
func (m *messages) attrAddr(typ uint16, ip netip.Addr) {
	if ip.Is4() {
		b := ip.As4()
		m.attr(typ, b[:]...)
		return
	}
	b := ip.As16()
	m.attr(typ, b[:]...)
}

func (m *messages) attrString(typ uint16, value string) { m.attr(typ, append([]byte(value), 0)...) }

// nest wraps the attributes that fill adds into one.
func (m *messages) nest(typ uint16, fill func()) {
	start := len(m.buf)
	m.attr(typ)
	fill()
	native.PutUint16(m.buf[start:], uint16(len(m.buf)-start))
}

// errOverrun means that the kernel had more to answer than the socket holds, so
// it is not known what was done.
var errOverrun = errors.New("netlink answers were lost")

// errInterrupted means that what was being listed changed meanwhile.
var errInterrupted = errors.New("the kernel's tables changed while they were read")

// conn is a netlink socket in the network namespace of the thread that dialled.
// It is not safe for concurrent use.
type conn struct {
	fd   int
	port uint32 // which notifications name as the origin of a change
	seq  uint32
	buf  []byte
}

const receiveBuffer = 8 << 20 // bytes; room for the refusal of every message of a batch

func dial() (*conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind a netlink socket: %w", err)
	}
	port, err := portOf(fd)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("address of a netlink socket: %w", err)
	}
	growReceiveBuffer(fd)
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10})
	// Refinements, each of which an old kernel may lack: answers without a copy
	// of the request, answers with a sentence, and listings that heed a filter.
	for _, opt := range []int{unix.NETLINK_CAP_ACK, unix.NETLINK_EXT_ACK, unix.NETLINK_GET_STRICT_CHK} {
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, opt, 1)
	}
	return &conn{fd: fd, port: port, buf: make([]byte, 64<<10)}, nil
}

// portOf is the number the kernel gave to a bound socket.
func portOf(fd int) (uint32, error) {
	name, err := unix.Getsockname(fd)
	if err != nil {
		return 0, err
	}
	addr, ok := name.(*unix.SockaddrNetlink)
	if !ok {
		return 0, fmt.Errorf("not a netlink socket but %T", name)
	}
	return addr.Pid, nil
}

func growReceiveBuffer(fd int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
}

// close may be called again, by when the number may be another's.
func (c *conn) close() error {
	if c.fd < 0 {
		return nil
	}
	fd := c.fd
	c.fd = -1
	return unix.Close(fd)
}

// send delivers all messages in one go and returns, by position, what the
// kernel refused; a message that is not in the map was obeyed. The kernel
// reports every error, so only the last message asks for an answer.
func (c *conn) send(m *messages) (map[int]error, error) {
	n := m.len()
	if n == 0 {
		return nil, nil
	}
	first := c.seq + 1
	for i, at := range m.starts {
		c.seq++
		native.PutUint32(m.buf[at+8:], c.seq)
		if i == n-1 {
			native.PutUint16(m.buf[at+6:], native.Uint16(m.buf[at+6:])|unix.NLM_F_ACK)
		}
	}
	if err := c.write(m.buf); err != nil {
		return nil, err
	}
	var refused map[int]error
	for done := false; !done; {
		err := c.receive(func(h nlmsg) {
			i := int(h.seq - first)
			if h.typ != unix.NLMSG_ERROR || i < 0 || i >= n {
				return // an answer to something that timed out earlier
			}
			done = done || i == n-1
			if err := h.err(); err != nil {
				if refused == nil {
					refused = map[int]error{}
				}
				refused[i] = err
			}
		})
		if err != nil {
			return refused, err
		}
	}
	return refused, nil
}

// dump asks for a listing and calls fn for every message of it.
func (c *conn) dump(typ uint16, header []byte, attrs func(*messages), fn func(nlmsg)) error {
	var m messages
	m.begin(typ, unix.NLM_F_DUMP, header)
	if attrs != nil {
		attrs(&m)
	}
	m.end()
	c.seq++
	native.PutUint32(m.buf[8:], c.seq)
	if err := c.write(m.buf); err != nil {
		return err
	}
	var failed error
	for done := false; !done; {
		err := c.receive(func(h nlmsg) {
			if h.seq != c.seq {
				return
			}
			if h.flags&unix.NLM_F_DUMP_INTR != 0 {
				failed = errInterrupted
			}
			switch h.typ {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				done = true
				if err := h.err(); err != nil {
					failed = err
				}
			default:
				fn(h)
			}
		})
		if err != nil {
			return err
		}
	}
	return failed
}

func (c *conn) write(b []byte) error {
	for {
		err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err == nil {
			return nil
		}
		if err != unix.EINTR {
			return fmt.Errorf("send to the kernel: %w", err)
		}
	}
}

// receive reads one datagram and calls fn for each of its messages.
func (c *conn) receive(fn func(nlmsg)) error {
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		switch err {
		case nil:
			return eachMessage(c.buf[:n], fn)
		case unix.EINTR:
		case unix.ENOBUFS:
			return errOverrun
		case unix.EAGAIN:
			return errors.New("the kernel did not answer within 10 s")
		default:
			return fmt.Errorf("receive from the kernel: %w", err)
		}
	}
}

// nlmsg is one received message. data is what follows nlmsghdr, valid until the
// next receive.
type nlmsg struct {
	typ, flags uint16
	seq        uint32
	data       []byte
}

func eachMessage(b []byte, fn func(nlmsg)) error {
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(native.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return errors.New("receive from the kernel: truncated message")
		}
		fn(nlmsg{native.Uint16(b[4:]), native.Uint16(b[6:]), native.Uint32(b[8:]), b[unix.SizeofNlMsghdr:size]})
		b = b[min(len(b), (size+3)&^3):]
	}
	return nil
}

// err is the outcome in an NLMSG_ERROR or NLMSG_DONE, with the kernel's own
// sentence where there is one.
func (h nlmsg) err() error {
	if len(h.data) < 4 {
		return nil
	}
	code := int32(native.Uint32(h.data))
	if code >= 0 {
		return nil
	}
	err := error(unix.Errno(-code))
	if h.typ == unix.NLMSG_ERROR && h.flags&nlmFAckTLVs != 0 && h.flags&nlmFCapped != 0 && len(h.data) > 4+unix.SizeofNlMsghdr {
		eachAttr(h.data[4+unix.SizeofNlMsghdr:], func(typ uint16, v []byte) {
			if typ == nlmsgerrAttrMsg && len(v) > 1 {
				err = fmt.Errorf("%w (%s)", err, v[:len(v)-1])
			}
		})
	}
	return err
}

// From linux/netlink.h.
const (
	nlmFCapped      = 0x100
	nlmFAckTLVs     = 0x200
	nlmsgerrAttrMsg = 1
)

// eachAttr calls fn for every attribute in b; flags in the type are taken off.
func eachAttr(b []byte, fn func(typ uint16, value []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		size := int(native.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return
		}
		fn(native.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:size])
		b = b[min(len(b), (size+3)&^3):]
	}
}

func port(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }
