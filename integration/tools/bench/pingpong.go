package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pongPort  = 7000
	pingPongs = 10000
)

// pingPong returns the one-way time of a datagram in microseconds, both ends on
// one CPU: anything else measures the scheduler.
func pingPong(ctx context.Context, p pair) (float64, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	out, err := p.client.Run(ctx, "taskset", "-c", "0", self, "-ping", netip.AddrPortFrom(p.to, pongPort).String())
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(out), 64)
}

// Both ends block in the kernel. Go's own sockets wait by epoll, and its scheduler
// between the two system calls would be a third of what is measured.

// pong answers datagrams until it is killed.
func pong(addr string) error {
	at, err := netip.ParseAddrPort(addr)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make a socket: %w", err)
	}
	if err := unix.Bind(fd, socketAddress(at)); err != nil {
		return fmt.Errorf("bind to %s: %w", at, err)
	}
	buf := make([]byte, 2048)
	for {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		switch err {
		case nil:
		case unix.EINTR:
			continue
		default:
			return fmt.Errorf("receive: %w", err)
		}
		if err := unix.Sendto(fd, buf[:n], 0, from); err != nil {
			return fmt.Errorf("answer: %w", err)
		}
	}
}

// ping prints the median one-way time: a mean would be that of whoever else got
// the processor for a while.
func ping(addr string) error {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make a socket: %w", err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		return fmt.Errorf("set the time to wait: %w", err)
	}
	if err := unix.Connect(fd, socketAddress(to)); err != nil {
		return fmt.Errorf("connect to %s: %w", to, err)
	}
	buf := make([]byte, 64)
	took := make([]float64, pingPongs)
	for i := range took {
		begin := time.Now()
		if _, err := unix.Write(fd, buf); err != nil {
			return fmt.Errorf("send: %w", err)
		}
		if _, err := unix.Read(fd, buf); err != nil {
			return fmt.Errorf("wait for the answer: %w", err)
		}
		took[i] = float64(time.Since(begin).Nanoseconds()) / 1000
	}
	slices.Sort(took)
	fmt.Println(quantile(took, 0.5) / 2)
	return nil
}

// socketAddress is an address of either family for a socket of IPv6.
func socketAddress(a netip.AddrPort) *unix.SockaddrInet6 {
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}
