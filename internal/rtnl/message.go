package rtnl

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Message is one received message. Data is what follows nlmsghdr; it is only
// valid inside the function that gets the message.
type Message struct {
	Type, Flags uint16
	Seq         uint32
	Data        []byte
}

func eachMessage(b []byte, fn func(Message)) error {
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(native.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return errors.New("receive from the kernel: truncated message")
		}
		fn(Message{native.Uint16(b[4:]), native.Uint16(b[6:]), native.Uint32(b[8:]), b[unix.SizeofNlMsghdr:size]})
		b = b[min(len(b), (size+3)&^3):]
	}
	return nil
}

// EachAttr calls fn for every attribute in b; flags in the type are taken off.
func EachAttr(b []byte, fn func(typ uint16, value []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		size := int(native.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return
		}
		fn(native.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:size])
		b = b[min(len(b), (size+3)&^3):]
	}
}

// Error is the kernel's refusal of one message. errors.Is finds the errno.
type Error struct {
	Step  string // what was refused; empty where the caller says so
	Errno unix.Errno
	Text  string // the kernel's own explanation, may be empty
}

func (e *Error) Error() string {
	text := e.Errno.Error()
	if e.Step != "" {
		text = e.Step + ": " + text
	}
	if e.Text != "" {
		text += " (" + e.Text + ")"
	}
	return text
}

// Unwrap makes errors.Is(err, unix.EEXIST) work.
func (e *Error) Unwrap() error { return e.Errno }

// refusal is the outcome in an NLMSG_ERROR or NLMSG_DONE; nil for success.
func (m Message) refusal(step string) error {
	if len(m.Data) < 4 {
		if m.Type == unix.NLMSG_ERROR {
			return fmt.Errorf("%s: short answer from the kernel", step)
		}
		return nil
	}
	code := int32(native.Uint32(m.Data))
	if code >= 0 {
		return nil
	}
	e := &Error{Step: step, Errno: unix.Errno(-code)}
	if m.Type != unix.NLMSG_ERROR || m.Flags&unix.NLM_F_ACK_TLVS == 0 || len(m.Data) < 4+unix.SizeofNlMsghdr {
		return e
	}
	// With NETLINK_CAP_ACK only the header of the refused message is repeated.
	skip := 4 + unix.SizeofNlMsghdr
	if m.Flags&unix.NLM_F_CAPPED == 0 {
		skip = 4 + int(native.Uint32(m.Data[4:])+3)&^3
	}
	if skip > len(m.Data) {
		return e
	}
	EachAttr(m.Data[skip:], func(typ uint16, v []byte) {
		if typ == unix.NLMSGERR_ATTR_MSG {
			e.Text = unix.ByteSliceToString(v)
		}
	})
	return e
}
