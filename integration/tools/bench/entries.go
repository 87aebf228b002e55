package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/integration/lab"
)

// routeProtocol is the protocol number of the agent's routes.
const routeProtocol = 44

// entryWatch sees every entry the kernel makes in a namespace. It reads no more
// of a notification than it needs: it runs on the same cores as what it watches.
type entryWatch struct {
	fd      int
	buf     []byte
	pending []byte
}

func watchEntries(n *lab.Netns) (*entryWatch, error) {
	w := &entryWatch{buf: make([]byte, 256<<10)}
	err := ns.WithNetNSPath(n.Path, func(ns.NetNS) (err error) {
		if w.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
			return err
		}
		return unix.Bind(w.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK,
			Groups: 1<<(unix.RTNLGRP_NEIGH-1) | 1<<(unix.RTNLGRP_IPV4_ROUTE-1)})
	})
	return w, err
}

func (w *entryWatch) close() { unix.Close(w.fd) }

// until counts routes of the agent to other hosts until there are n. It returns
// when the first permanent neighbour and the last route appeared.
func (w *entryWatch) until(ctx context.Context, n int) (first, last time.Time, err error) {
	for seen := 0; seen < n; {
		if ctx.Err() != nil {
			return first, last, fmt.Errorf("%d of %d routes have appeared: %w", seen, n, context.Cause(ctx))
		}
		if len(w.pending) == 0 {
			size, _, err := unix.Recvfrom(w.fd, w.buf, 0)
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return first, last, fmt.Errorf("after %d of %d routes: %w", seen, n, err)
			}
			w.pending = w.buf[:size]
		}
		for len(w.pending) >= unix.SizeofNlMsghdr && seen < n {
			m := w.pending
			size := int(binary.NativeEndian.Uint32(m))
			typ, body := binary.NativeEndian.Uint16(m[4:]), m[unix.SizeofNlMsghdr:size]
			w.pending = m[min((size+3)&^3, len(m)):]
			switch {
			// A bridge makes permanent entries, too, of no type.
			case typ == unix.RTM_NEWNEIGH && first.IsZero() && body[11] == unix.RTN_UNICAST && binary.NativeEndian.Uint16(body[8:])&unix.NUD_PERMANENT != 0:
				first = time.Now()
			case typ == unix.RTM_NEWROUTE && body[5] == routeProtocol && body[7] == unix.RTN_UNICAST:
				last = time.Now()
				seen++
			}
		}
	}
	return first, last, nil
}

// drain forgets what has come so far.
func (w *entryWatch) drain() {
	w.pending = nil
	for {
		if _, _, err := unix.Recvfrom(w.fd, w.buf, unix.MSG_DONTWAIT); err != nil {
			return
		}
	}
}

// oneByOne programs peers the customary way: the netlink library, a socket for
// every call, no metric. It returns the time for n neighbours, FDB entries and
// routes.
func oneByOne(space *lab.Netns, n int) (time.Duration, error) {
	var took time.Duration
	err := ns.WithNetNSPath(space.Path, func(ns.NetNS) error {
		link := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "flannel.1", MTU: 1450}, VxlanId: 1, Port: 8472}
		if err := netlink.LinkAdd(link); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		own := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(44, 255, 255, 254), Mask: net.CIDRMask(8, 32)}}
		if err := netlink.AddrAdd(link, own); err != nil {
			return err
		}
		start := time.Now()
		for i := range n {
			hi, lo := byte(i>>8), byte(i)
			vtep, mac := net.IPv4(44, 0, hi, lo), net.HardwareAddr{2, 0, 0, 0, hi, lo}
			if i == 0 {
				vtep = net.IPv4(44, 1, 0, 0)
			}
			neigh := &netlink.Neigh{LinkIndex: link.Index, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST, IP: vtep, HardwareAddr: mac}
			if err := netlink.NeighSet(neigh); err != nil {
				return fmt.Errorf("neighbour %d: %w", i, err)
			}
			fdb := &netlink.Neigh{LinkIndex: link.Index, State: netlink.NUD_PERMANENT, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF,
				IP: net.IPv4(172, 20, hi, lo), HardwareAddr: mac}
			if err := netlink.NeighSet(fdb); err != nil {
				return fmt.Errorf("fdb entry %d: %w", i, err)
			}
			route := &netlink.Route{LinkIndex: link.Index, Scope: netlink.SCOPE_UNIVERSE, Gw: vtep, Flags: int(netlink.FLAG_ONLINK),
				Dst: &net.IPNet{IP: net.IPv4(9, hi, lo, 0), Mask: net.CIDRMask(24, 32)}}
			if err := netlink.RouteReplace(route); err != nil {
				return fmt.Errorf("route %d: %w", i, err)
			}
		}
		took = time.Since(start)
		return netlink.LinkDel(link)
	})
	return took, err
}
