package attach

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/antispoof"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// goingGroup is the link group in which links are put to be removed together.
const goingGroup = 0x6f766c31

// removeHost removes the host end of an attachment if it is there; the container's end
// goes with it. It returns what its alias said when nothing can be sent from either any
// more, and what it may send from is forgotten. The kernel has not freed them by then:
// it waits 15 ms until nobody uses them, in which the caller may do what he has to;
// answered returns when that is over. A link of that name that is not ours is left
// alone.
func removeHost(c *rtnl.Conn, name string, t turn) (_ mark.Alias, answered func() error, _ error) {
	nothing := func() error { return nil }
	if there, err := c.Has(name); err != nil || !there {
		return mark.Alias{}, nothing, err
	}
	l, ok, err := c.LinkByName(name)
	if err != nil || !ok || !isHostEnd(l, name) {
		return mark.Alias{}, nothing, err
	}
	alias, _ := mark.ParseAlias(l.Alias)
	gone, err := removeLink(c, l, t)
	port, checked := portOf(l.Name, alias)
	if err != nil || !checked {
		return alias, gone, err
	}
	crash("gone")
	t.begin()
	done, err := antispoof.ReleaseOpen(port)
	all := func() error {
		defer done()
		defer t.end()
		return gone()
	}
	if err := supported(err); err != nil {
		return alias, nil, errors.Join(err, all())
	}
	return alias, all, nil
}

// removeLink removes a link and returns when its name has gone, which is when the
// kernel has stopped both ends. answered waits for its answer.
//
// Of many who have to remove a link at the same time one does it for those who wait for
// him: the kernel waits several times in a removal until all processors have noticed,
// and keeps all others from links meanwhile, but no longer for many (ADR 0071).
func removeLink(c *rtnl.Conn, l rtnl.Link, t turn) (answered func() error, _ error) {
	together := false
	if !t.try(removing, unix.F_WRLCK) {
		gone, err := awaitRemoval(c, l, t)
		if gone || err != nil {
			return func() error { return nil }, err
		}
		together = true
	}
	defer t.try(removing, unix.F_UNLCK)
	busy, err := rtnl.Open() // until the kernel answers
	if err != nil {
		return nil, err
	}
	answer := make(chan error, 1)
	go func() {
		defer busy.Close()
		answer <- deleteLink(busy, l.Name, l.Index, together)
	}()
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		if there, err := c.Has(l.Name); err == nil && !there {
			return func() error { return <-answer }, nil
		}
		_ = unix.Nanosleep(&unix.Timespec{Nsec: int64(pause)}, nil)
		select {
		case err := <-answer:
			return func() error { return nil }, err
		default:
		}
	}
}

// awaitRemoval puts a link with those that the next one removes, and waits until that
// is done or until it is our turn to do it.
func awaitRemoval(c *rtnl.Conn, l rtnl.Link, t turn) (gone bool, _ error) {
	var b rtnl.Batch
	setGroup(&b, l.Name, l.Index, goingGroup)
	if err := c.Each(&b)[0]; err != nil {
		return true, removed(err)
	}
	until := time.Now().Add(turnLimit)
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		if there, err := c.Has(l.Name); err == nil && !there {
			return true, nil
		}
		if t.try(removing, unix.F_WRLCK) || time.Now().After(until) {
			return false, nil
		}
		_ = unix.Nanosleep(&unix.Timespec{Nsec: int64(pause)}, nil)
	}
}

// deleteLink removes a link, and with it the other end of a pair; before it, if
// together, all that wait to be removed, of which it may be one.
func deleteLink(c *rtnl.Conn, name string, index int, together bool) error {
	var b rtnl.Batch
	if together {
		deleteGroup(&b, goingGroup)
	}
	b.DeleteLink("delete interface "+name, index)
	errs := c.Each(&b)
	return removed(errs[len(errs)-1])
}
