// Package echo sends ICMP echo requests that must not be fragmented and says who
// answered: whether packets of a size arrive, which no table of the kernel tells.
package echo

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Request is one echo request.
type Request struct {
	To   netip.Addr
	From netip.Addr // source address; zero: the kernel's choice
	Size int        // of the whole packet, IP header included; 0: a small one
}

// Silence is the result of a request that was not answered.
const Silence = time.Duration(-1)

const (
	icmpHeader = 8
	small      = 64
)

// Send sends all requests at once from the network namespace of the calling
// thread and waits for the answers, at most for the given time. It returns the
// round trip of each, or Silence. It needs root.
func Send(ctx context.Context, wait time.Duration, requests []Request) ([]time.Duration, error) {
	e := &exchange{id: uint16(rand.Uint32()), results: make([]time.Duration, len(requests)), sent: make([]time.Time, len(requests))}
	defer e.close()
	for i, r := range requests {
		e.results[i] = Silence
		if err := e.send(i, r); err != nil {
			return nil, fmt.Errorf("echo request to %s: %w", r.To, err)
		}
	}
	return e.results, e.receive(ctx, time.Now().Add(wait))
}

type exchange struct {
	id       uint16
	v4, v6   int // sockets; 0: not open
	results  []time.Duration
	sent     []time.Time
	answered int
}

func (e *exchange) close() {
	for _, fd := range []int{e.v4, e.v6} {
		if fd > 0 {
			unix.Close(fd)
		}
	}
}

func (e *exchange) socket(ipv6 bool) (int, error) {
	at, family, proto := &e.v4, unix.AF_INET, unix.IPPROTO_ICMP
	level, option := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	if ipv6 {
		at, family, proto = &e.v6, unix.AF_INET6, unix.IPPROTO_ICMPV6
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	if *at > 0 {
		return *at, nil
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return 0, err
	}
	*at = fd
	// PROBE sets DF and does not trust what the kernel remembers of the path.
	return fd, unix.SetsockoptInt(fd, level, option, unix.IP_PMTUDISC_PROBE)
}

// send sends one request. That there is no way to the address, or none for a
// packet of this size, is silence.
func (e *exchange) send(i int, r Request) error {
	ipv6 := r.To.Is6()
	fd, err := e.socket(ipv6)
	if err != nil {
		return err
	}
	header, kind := 20, byte(8)
	if ipv6 {
		header, kind = 40, 128
	}
	packet := make([]byte, max(r.Size, small)-header)
	packet[0] = kind
	binary.BigEndian.PutUint16(packet[4:], e.id)
	binary.BigEndian.PutUint16(packet[6:], uint16(i))
	var to unix.Sockaddr
	var control []byte
	if ipv6 { // the kernel fills in the checksum
		to = &unix.SockaddrInet6{Addr: r.To.As16()}
		if r.From.IsValid() {
			control = unix.PktInfo6(&unix.Inet6Pktinfo{Addr: r.From.As16()})
		}
	} else {
		binary.BigEndian.PutUint16(packet[2:], checksum(packet))
		to = &unix.SockaddrInet4{Addr: r.To.As4()}
		if r.From.IsValid() {
			control = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: r.From.As4()})
		}
	}
	e.sent[i] = time.Now()
	err = unix.Sendmsg(fd, packet, control, to, 0)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) { // a firewall's answer; a source that is not ours
		return nil
	}
	for _, silent := range []error{unix.EMSGSIZE, unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENETDOWN, unix.EAGAIN, unix.ENOBUFS, unix.EACCES} {
		if errors.Is(err, silent) {
			return nil
		}
	}
	return err
}

// receive reads answers until all are there or the time is over.
func (e *exchange) receive(ctx context.Context, until time.Time) error {
	buf := make([]byte, 1<<16)
	for e.answered < len(e.results) && ctx.Err() == nil {
		left := time.Until(until)
		if left <= 0 {
			return nil
		}
		var fds []unix.PollFd
		for _, fd := range []int{e.v4, e.v6} {
			if fd > 0 {
				fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
			}
		}
		n, err := unix.Poll(fds, int(min(left, 100*time.Millisecond)/time.Millisecond)+1)
		if errors.Is(err, unix.EINTR) || n == 0 {
			continue
		}
		if err != nil {
			return err
		}
		for _, p := range fds {
			for {
				n, _, err := unix.Recvfrom(int(p.Fd), buf, unix.MSG_DONTWAIT)
				if err != nil {
					break // EAGAIN, or an ICMP error that the timeout stands for
				}
				e.answer(buf[:n], int(p.Fd) == e.v4)
			}
		}
	}
	return context.Cause(ctx)
}

func (e *exchange) answer(b []byte, ipv4 bool) {
	kind := byte(129)
	if ipv4 {
		if len(b) < 20 || len(b) < int(b[0]&15)*4 {
			return
		}
		b, kind = b[int(b[0]&15)*4:], 0
	}
	if len(b) < icmpHeader || b[0] != kind || binary.BigEndian.Uint16(b[4:]) != e.id {
		return
	}
	if i := int(binary.BigEndian.Uint16(b[6:])); i < len(e.results) && e.results[i] == Silence {
		e.results[i] = time.Since(e.sent[i])
		e.answered++
	}
}

// checksum is that of the Internet, RFC 1071, of an even or odd number of bytes.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
