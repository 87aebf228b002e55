package attach

import (
	"net/netip"

	"overlayd.internal/overlay/internal/antispoof"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
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

// unprotect forgets what a host end that is about to be removed may send from.
// The link is set down first, so that nothing is sent meanwhile. done ends the
// conversation with nftables. It is called when the link has been removed: the
// kernel waits until nobody uses the elements any more, 10 ms, which have passed
// by then.
func unprotect(c *rtnl.Conn, l rtnl.Link, alias mark.Alias) (done func(), err error) {
	port, checked := portOf(l.Name, alias)
	if !checked {
		return func() {}, nil
	}
	var b rtnl.Batch
	b.LinkDown("set interface "+l.Name+" down", l.Index)
	if err := removed(c.Each(&b)[0]); err != nil {
		return nil, err
	}
	done, err = antispoof.ReleaseOpen(port)
	return done, supported(err)
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
