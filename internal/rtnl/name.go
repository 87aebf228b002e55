package rtnl

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Has reports whether the name is taken, as the name of an interface or as
// another name (altname) of one. It asks by binding the socket, to which a
// netlink socket pays no heed, because that only looks: for a netlink request
// the kernel waits until all others have made their changes, and for an ioctl
// with a name that is not there it first runs modprobe, twice.
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

// Find looks an interface up by name: three ioctls on the socket, which cost a
// tenth of reading the link. ok is false where none has this name; an altname
// does not count. It is for one that should be there; see Has for others.
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
	// The kernel found it by any of its names.
	if err := ioctl(unix.SIOCGIFNAME); errors.Is(err, unix.ENODEV) {
		return i, false, nil
	} else if err != nil {
		return i, false, fmt.Errorf("read the name of interface %s: %w", name, err)
	}
	if req.Name() != name {
		return i, false, nil
	}
	if err := ioctl(unix.SIOCGIFFLAGS); err != nil {
		return i, false, fmt.Errorf("read flags of interface %s: %w", name, err)
	}
	i.Up = req.Uint16()&unix.IFF_UP != 0
	return i, true, nil
}
