package attach

import (
	"net/netip"

	"overlayd.internal/overlay/internal/antispoof"
	"overlayd.internal/overlay/internal/mark"
)

// protect keeps the container from sending what is not its own, and says so in
// the alias, from which the agent restores it. It comes before there is an
// interface, so that not one frame gets through. A kernel that cannot do it
// does not keep containers from being attached.
func (a *attaching) protect(p pair, alias *mark.Alias, addrs []netip.Addr) error {
	err := antispoof.Protect(antispoof.Port{Device: p.host, MAC: p.mac, Addrs: addrs})
	if antispoof.Unsupported(err) {
		a.warn(a.call, "the container may send from any address: %v", err)
		return nil
	}
	if err != nil {
		return err
	}
	a.undo.push(func() error { return antispoof.ReleaseDevice(p.host) })
	alias.MAC = p.mac
	return nil
}

// supported drops the error of a kernel that has nothing to forget.
func supported(err error) error {
	if antispoof.Unsupported(err) {
		return nil
	}
	return err
}

func portOf(device string, a mark.Alias) (p antispoof.Port, checked bool) {
	return antispoof.Port{Device: device, MAC: a.MAC, Addrs: a.Addrs}, a.MAC != (antispoof.Port{}).MAC
}
