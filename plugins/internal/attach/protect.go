package attach

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

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

// removeChecked removes a host end, and forgets what it may send from as soon as
// nothing can be sent from it any more. The kernel has taken the link away long
// before it says so: it waits 15 ms until nobody uses it. The elements, with which
// it has to wait likewise, go meanwhile.
func removeChecked(c *rtnl.Conn, l rtnl.Link, port antispoof.Port, t turn) error {
	look, err := rtnl.Open() // c is busy until the end
	if err != nil {
		return err
	}
	defer look.Close()
	answer := make(chan error, 1)
	go func() { answer <- deleteLink(c, l.Name, l.Index) }()
	var removal error
	answered := false
	for pause := firstPause; !answered; pause = min(2*pause, longestPause) {
		there, err := look.Has(l.Name)
		if err == nil && !there {
			break
		}
		_ = unix.Nanosleep(&unix.Timespec{Nsec: int64(pause)}, nil)
		select {
		case removal = <-answer:
			answered = true
		default:
		}
	}
	if removal != nil {
		return removal
	}
	t.begin()
	done, err := antispoof.ReleaseOpen(port)
	if !answered {
		removal = <-answer
	}
	t.end()
	done()
	return errors.Join(supported(err), removal)
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
