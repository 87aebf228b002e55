// Command floor is the least a program can do to attach a container: raw
// netlink, no addresses to look after, no configuration, no result. The
// benchmark holds the CNI programs against it.
//
//	floor add NETNS HOSTIF IFNAME BRIDGE ADDR/LEN GATEWAY
//	floor del HOSTIF
package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

func main() {
	var err error
	switch {
	case len(os.Args) == 8 && os.Args[1] == "add":
		err = add(os.Args[2], os.Args[3], os.Args[4], os.Args[5], os.Args[6], os.Args[7])
	case len(os.Args) == 3 && os.Args[1] == "del":
		err = del(os.Args[2])
	default:
		err = fmt.Errorf("usage: floor add NETNS HOSTIF IFNAME BRIDGE ADDR/LEN GATEWAY | floor del HOSTIF")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// peerIndex is the container interface's index, so that nothing has to be read
// back. The kernel heeds it only if the host end gives its own.
const peerIndex = 2

func add(netns, hostIf, ifName, bridge, cidr, gateway string) error {
	p, err := netip.ParsePrefix(cidr)
	if err != nil {
		return err
	}
	gw, err := netip.ParseAddr(gateway)
	if err != nil {
		return err
	}
	br, err := net.InterfaceByName(bridge)
	if err != nil {
		return err
	}
	ns, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	host, err := dial()
	if err != nil {
		return err
	}

	peer := ifinfo(peerIndex, 0, 0)
	peer = attr(peer, unix.IFLA_IFNAME, str(ifName))
	peer = attr(peer, unix.IFLA_NET_NS_FD, u32(uint32(ns)))
	data := attr(nil, 1 /* VETH_INFO_PEER */, peer)
	info := attr(nil, unix.IFLA_INFO_KIND, str("veth"))
	info = attr(info, unix.IFLA_INFO_DATA, data)
	// An index nobody else has: our process id is unique while we run.
	link := ifinfo(int32(1<<24+os.Getpid()), unix.IFF_UP, unix.IFF_UP)
	link = attr(link, unix.IFLA_IFNAME, str(hostIf))
	link = attr(link, unix.IFLA_MASTER, u32(uint32(br.Index)))
	link = attr(link, unix.IFLA_LINKINFO, info)
	if err := send(host, msg(1, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, link)); err != nil {
		return fmt.Errorf("create the veth: %w", err)
	}

	runtime.LockOSThread()
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		return err
	}
	inside, err := dial()
	if err != nil {
		return err
	}
	a := p.Addr().AsSlice()
	addr := []byte{unix.AF_INET, byte(p.Bits()), 0, 0}
	addr = append(addr, u32(peerIndex)...)
	addr = attr(addr, unix.IFA_LOCAL, a)
	addr = attr(addr, unix.IFA_ADDRESS, a)
	route := []byte{unix.AF_INET, 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0}
	route = attr(route, unix.RTA_GATEWAY, gw.AsSlice())
	route = attr(route, unix.RTA_OIF, u32(peerIndex))
	return send(inside,
		msg(1, unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, addr),
		msg(2, unix.RTM_NEWLINK, 0, ifinfo(peerIndex, unix.IFF_UP, unix.IFF_UP)),
		msg(3, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, route))
}

func del(hostIf string) error {
	fd, err := dial()
	if err != nil {
		return err
	}
	return send(fd, msg(1, unix.RTM_DELLINK, 0, attr(ifinfo(0, 0, 0), unix.IFLA_IFNAME, str(hostIf))))
}

func dial() (int, error) {
	return unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
}

// send sends all messages at once and reads one answer for each.
func send(fd int, msgs ...[]byte) error {
	var buf []byte
	for _, m := range msgs {
		buf = append(buf, m...)
	}
	if err := unix.Sendto(fd, buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	in := make([]byte, 16<<10)
	for left := len(msgs); left > 0; {
		n, _, err := unix.Recvfrom(fd, in, 0)
		if err != nil {
			return err
		}
		for b := in[:n]; len(b) >= unix.SizeofNlMsghdr; left-- {
			if errno := int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:])); errno != 0 {
				return unix.Errno(-errno)
			}
			b = b[min(int(binary.NativeEndian.Uint32(b)+3)&^3, len(b)):]
		}
	}
	return nil
}

func msg(seq uint32, typ, flags uint16, body []byte) []byte {
	b := u32(uint32(unix.SizeofNlMsghdr + len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags|unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	b = append(b, u32(seq)...)
	b = append(b, 0, 0, 0, 0)
	return append(b, body...)
}

func ifinfo(index int32, flags, change uint32) []byte {
	b := append([]byte{unix.AF_UNSPEC, 0, 0, 0}, u32(uint32(index))...)
	return append(append(b, u32(flags)...), u32(change)...)
}

func attr(b []byte, typ uint16, data []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func u32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
func str(s string) []byte { return append([]byte(s), 0) }
