// Package antispoof keeps containers from sending what is not theirs: another
// source MAC or address, ARP and neighbour discovery for others, router
// advertisements, redirects, and answers of DHCP servers.
//
// It is one table of nftables in family bridge: fixed rules, and sets of what
// each host end may send from. A CNI program puts in the elements of its own
// attachment before there is an interface, in one message to the kernel; the
// agent makes the table and restores what is lost. The CNI programs link it, so
// it brings no library.
package antispoof

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// Port is what one host end may send from.
type Port struct {
	Device string
	MAC    conf.MAC
	Addrs  []netip.Addr // of the container; its link-local address follows from MAC
}

// The sets. portsSet has the devices that are checked at all; the others have a
// device, a MAC and an address of each family.
const (
	portsSet    = "ports"
	sources4Set = mark.SourcesSet + "4"
	sources6Set = mark.SourcesSet + "6"
)

// element is one element of one set.
type element struct{ set, key string }

// device is the first field of all keys.
func (e element) device() string {
	return unix.ByteSliceToString([]byte(e.key[:min(len(e.key), unix.IFNAMSIZ)]))
}

// elements are those of a port. Those of IPv6 have the unspecified address too:
// who looks whether his address is taken has none yet.
func (p Port) elements() []element {
	device := make([]byte, unix.IFNAMSIZ)
	copy(device, p.Device)
	out := []element{{portsSet, string(device)}}
	// Each field fills whole words of 32 bits.
	source := append(append(device, p.MAC[:]...), 0, 0)
	add := func(set string, a netip.Addr) {
		out = append(out, element{set, string(source) + string(a.AsSlice())})
	}
	add(sources6Set, mark.LinkLocal(p.MAC))
	add(sources6Set, netip.IPv6Unspecified())
	for _, a := range p.Addrs {
		if a.Is4() {
			add(sources4Set, a)
		} else {
			add(sources6Set, a)
		}
	}
	return out
}

// Protect lets a port send from its own addresses and from nothing else. It is
// called before the port exists. Where the table has gone it is made.
func Protect(p Port) error {
	c, err := open()
	if err != nil {
		return err
	}
	defer c.Close()
	var b rtnl.Batch
	for _, e := range p.elements() {
		addElement(&b, e)
	}
	err = c.Transaction(&b)
	if errors.Is(err, unix.ENOENT) {
		b.Reset()
		makeTable(&b)
		for _, e := range p.elements() {
			addElement(&b, e)
		}
		err = c.Transaction(&b)
	}
	if err != nil {
		return fmt.Errorf("let %s send from its own addresses only: %w", p.Device, err)
	}
	return nil
}

// Release forgets ports. One that is not there is no error.
func Release(ports ...Port) error {
	done, err := ReleaseOpen(ports...)
	done()
	return err
}

// ReleaseOpen is Release for a caller who has other work to do before he ends the
// conversation with the kernel: done waits until the kernel is through with the
// elements, also with those that others have removed, which may take it 10 ms. It
// keeps everybody else from changing rules and from removing interfaces meanwhile.
func ReleaseOpen(ports ...Port) (done func(), err error) {
	done = func() {}
	if len(ports) == 0 {
		return done, nil
	}
	c, err := open()
	if err != nil {
		return done, err
	}
	done = func() { c.Close() }
	var b rtnl.Batch
	for _, p := range ports {
		for _, e := range p.elements() {
			// The kernel refuses to remove what is not there.
			addElement(&b, e)
			deleteElement(&b, e)
		}
	}
	if err := c.Transaction(&b); err != nil && !errors.Is(err, unix.ENOENT) {
		return done, fmt.Errorf("forget what %s may send from: %w", ports[0].Device, err)
	}
	return done, nil
}

// ReleaseDevice is Release for devices of which nothing else is known. It reads
// all elements.
func ReleaseDevice(devices ...string) error {
	if len(devices) == 0 {
		return nil
	}
	c, err := open()
	if err != nil {
		return err
	}
	defer c.Close()
	all, err := elements(c)
	if err != nil {
		return err
	}
	gone := map[string]bool{}
	for _, d := range devices {
		gone[d] = true
	}
	var b rtnl.Batch
	for e := range all {
		if gone[e.device()] {
			addElement(&b, e)
			deleteElement(&b, e)
		}
		if b.Len() >= 2*portsPerMessage {
			if err := c.Transaction(&b); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("forget what %s and others may send from: %w", devices[0], err)
			}
			b.Reset()
		}
	}
	if err := c.Transaction(&b); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("forget what %s may send from: %w", devices[0], err)
	}
	return nil
}

// Unsupported reports whether an error says that the kernel cannot check what a
// bridge's ports send.
func Unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT)
}

func open() (*rtnl.Conn, error) {
	c, err := rtnl.OpenFamily(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket for nftables: %w", err)
	}
	return c, nil
}

// begin starts a message to nftables.
func begin(b *rtnl.Batch, step string, typ, flags uint16) {
	b.Begin(step, unix.NFNL_SUBSYS_NFTABLES<<8|typ, flags, []byte{unix.NFPROTO_BRIDGE, unix.NFNETLINK_V0, 0, 0})
}

func addElement(b *rtnl.Batch, e element) {
	begin(b, "add an element to set "+e.set, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE)
	encodeElement(b, e)
}

func deleteElement(b *rtnl.Batch, e element) {
	begin(b, "remove an element from set "+e.set, unix.NFT_MSG_DELSETELEM, 0)
	encodeElement(b, e)
}

func encodeElement(b *rtnl.Batch, e element) {
	b.AttrString(unix.NFTA_SET_ELEM_LIST_TABLE, mark.NFTable)
	b.AttrString(unix.NFTA_SET_ELEM_LIST_SET, e.set)
	b.Nest(unix.NLA_F_NESTED|unix.NFTA_SET_ELEM_LIST_ELEMENTS, func() {
		b.Nest(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, func() {
			b.Nest(unix.NLA_F_NESTED|unix.NFTA_SET_ELEM_KEY, func() { b.Attr(unix.NFTA_DATA_VALUE, []byte(e.key)...) })
		})
	})
}

// number adds a number as nftables reads it, in network order.
func number(b *rtnl.Batch, typ uint16, n uint32) {
	b.Attr(typ, binary.BigEndian.AppendUint32(nil, n)...)
}
