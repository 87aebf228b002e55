package rtnl

import (
	"encoding/binary"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// Subscription receives the kernel's notifications of some multicast groups.
type Subscription struct{ file *os.File }

// Filter is a classic BPF program that says which messages a socket receives.
type Filter []unix.SockFilter

// Subscribe opens a socket for the groups of a netlink family in the namespace
// of the calling thread. A filter saves reading messages; where the kernel does
// not take it, all are read.
func Subscribe(family int, groups []uint, filter Filter) (*Subscription, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, family)
	if err != nil {
		return nil, err
	}
	var mask uint32
	for _, g := range groups {
		mask |= 1 << (g - 1)
	}
	growReceiveBuffer(fd)
	if len(filter) > 0 {
		_ = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: mask}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &Subscription{os.NewFile(uintptr(fd), "netlink")}, nil
}

// Close ends the subscription, and a Read that waits.
func (s *Subscription) Close() error { return s.file.Close() }

// Read waits for notifications and calls fn for each. ErrOverrun says that some
// were lost or cannot be read; the subscription goes on. Any other error ends
// it. buf is memory for the messages.
func (s *Subscription) Read(buf []byte, fn func(Message)) error {
	n, err := s.file.Read(buf)
	switch {
	case errors.Is(err, unix.ENOBUFS):
		return ErrOverrun
	case err != nil:
		return err
	}
	if eachMessage(buf[:n], fn) != nil {
		return ErrOverrun
	}
	return nil
}

// WithoutOwn is a filter that drops the notifications of routes and neighbours
// made through the socket with this port: thousands when a host joins, which
// would have to be read only to be found right. Others are let through, whoever
// caused them, because one change may have several effects; so are FDB entries,
// of which VXLAN does not say who made them.
func WithoutOwn(port uint32) Filter {
	const load, jumpIfEqual, answer = unix.BPF_LD | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	// Filters load numbers in network order, netlink has them in the machine's.
	swap32 := func(n uint32) uint32 { return binary.BigEndian.Uint32(native.AppendUint32(nil, n)) }
	swap16 := func(n uint16) uint32 { return uint32(binary.BigEndian.Uint16(native.AppendUint16(nil, n))) }
	return Filter{
		{Code: load | unix.BPF_W, K: 12}, // nlmsg_pid
		{Code: jumpIfEqual, K: swap32(port), Jf: 4},
		{Code: load | unix.BPF_H, K: 4}, // nlmsg_type
		{Code: jumpIfEqual, K: swap16(unix.RTM_NEWROUTE), Jt: 1},
		{Code: jumpIfEqual, K: swap16(unix.RTM_NEWNEIGH), Jf: 1},
		{Code: answer, K: 0},
		{Code: answer, K: 1<<32 - 1},
	}
}
