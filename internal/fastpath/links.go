package fastpath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// attachment is a container interface that has the fast path.
type attachment struct {
	name    string
	overlay uint32
	addrs   []netip.Addr
	mac     conf.MAC
	gateway conf.MAC
}

func (a attachment) equal(b attachment) bool {
	return a.name == b.name && a.overlay == b.overlay && a.mac == b.mac && a.gateway == b.gateway && slices.Equal(a.addrs, b.addrs)
}

// Watch attaches container interfaces as they come, until ctx is done or the path
// is closed.
func (p *Path) Watch(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { p.links.Close() })()
	buf := make([]byte, 64<<10)
	for {
		err := p.links.Read(buf, p.linkMessage)
		switch {
		case errors.Is(err, rtnl.ErrOverrun):
			if err := p.Links(); err != nil {
				p.log.Warn("cannot attach the fast path", "error", err)
			}
		case errors.Is(err, os.ErrClosed):
			return nil
		case err != nil:
			return fmt.Errorf("read the kernel's notifications of links: %w", err)
		}
	}
}

// linkMessage takes one notification of the kernel.
func (p *Path) linkMessage(m rtnl.Message) {
	l, isLink := rtnl.ParseLink(m)
	index, isQdisc := rtnl.RootQdisc(m)
	if !isLink && !isQdisc {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	var err error
	switch {
	case isQdisc:
		err = p.lookAt(index)
	case m.Type == unix.RTM_DELLINK:
		delete(p.bridges, l.Index)
		delete(p.uplinks, l.Index)
		err = p.forget(l.Index)
	case l.Kind == "bridge":
		err = p.bridgeChanged(l)
	default:
		err = p.link(l)
	}
	if err != nil {
		p.log.Warn("cannot attach the fast path", "link", l.Name, "error", err)
	}
}

// lookAt is link for an index.
func (p *Path) lookAt(index int) error {
	l, ok, err := p.conn.LinkByIndex(index)
	if err != nil || !ok {
		return err
	}
	return p.link(l)
}

// bridgeChanged notes the MAC of a bridge, which containers send to.
func (p *Path) bridgeChanged(l rtnl.Link) error {
	old, known := p.bridges[l.Index]
	p.bridges[l.Index] = l.MAC
	if !known || old == l.MAC {
		return nil
	}
	return p.applyLinks()
}

// applyLinks brings the programs to the interfaces that are there.
func (p *Path) applyLinks() error {
	links, err := p.conn.Links()
	if err != nil {
		return err
	}
	there := make(map[int]bool, len(links))
	clear(p.bridges)
	for _, l := range links {
		there[l.Index] = true
		if l.Kind == "bridge" {
			p.bridges[l.Index] = l.MAC
		}
	}
	var errs []error
	for index := range p.attached {
		if !there[index] {
			errs = append(errs, p.forget(index))
		}
	}
	for _, l := range links {
		errs = append(errs, p.link(l))
	}
	return errors.Join(errs...)
}

// link attaches an interface that may have the fast path, and takes it from one
// that may not any more.
func (p *Path) link(l rtnl.Link) error {
	if l.Kind != "veth" {
		return nil
	}
	now, ok := p.eligible(l)
	was, has := p.attached[l.Index]
	switch {
	case !ok && has:
		_, err := detach(p.conn, l.Index, atHostEnd)
		return errors.Join(p.forget(l.Index), err)
	case !ok || has && was.equal(now):
		return nil
	}
	peer, ok, err := p.conn.PeerOf(l)
	if err != nil || !ok {
		return err // on its way out, or the next look finds it
	}
	now.mac = peer.MAC
	if has {
		if err := p.forget(l.Index); err != nil {
			return err
		}
	}
	return p.take(l.Index, now)
}

// eligible says whether an interface may have the fast path, and what it is; its
// MAC is the one it had before.
func (p *Path) eligible(l rtnl.Link) (attachment, bool) {
	alias, ours := mark.IsHostEnd(l.Name, l.Alias)
	if !ours || l.Group != mark.FastPathGroup || shaped(l) {
		return attachment{}, false
	}
	slot, known := p.overlays[alias.Overlay]
	gateway, bridged := p.bridges[l.Master]
	if !known || !bridged || !onePerFamily(alias.Addrs) || slices.ContainsFunc(alias.Addrs, p.withdrawn) {
		return attachment{}, false
	}
	return attachment{name: l.Name, overlay: slot, addrs: alias.Addrs, gateway: gateway, mac: p.attached[l.Index].mac}, true
}

// shaped reports whether somebody (the CNI plugin bandwidth) makes what is sent by a
// virtual device wait, to a container at its interface. What the programs take does
// not come by there.
func shaped(l rtnl.Link) bool { return !slices.Contains([]string{"", "noop", "noqueue"}, l.Qdisc) }

// withdrawn reports whether an address is of a subnet that is another host's now.
func (p *Path) withdrawn(a netip.Addr) bool {
	return slices.ContainsFunc(p.wanted.Withdrawn, func(s netip.Prefix) bool { return s.Contains(a) })
}

// onePerFamily: the maps hold one address of each. Packets from a second one
// would look spoofed.
func onePerFamily(addrs []netip.Addr) bool {
	n4 := 0
	for _, a := range addrs {
		if a.Is4() {
			n4++
		}
	}
	return n4 <= 1 && len(addrs)-n4 <= 1
}

// take puts an attachment into the maps and then attaches its program.
func (p *Path) take(index int, a attachment) error {
	e := programsAttachment{Overlay: a.overlay, Ifindex: uint32(index), Mac: a.mac, Gateway: a.gateway}
	for _, addr := range a.addrs {
		if addr.Is4() {
			e.Addr4 = words(addr)[0]
		} else {
			e.Addr6 = words(addr)
		}
	}
	p.attached[index] = a
	err := p.objs.Links.Put(uint32(index), e)
	for _, addr := range a.addrs {
		p.owners[addr] = index
		if addr.Is4() {
			err = errors.Join(err, p.objs.Containers4.Put(words(addr)[0], e))
		} else {
			err = errors.Join(err, p.objs.Containers6.Put(words(addr), e))
		}
	}
	err = errors.Join(err, p.renew())
	if err == nil {
		err = p.attach(index, leaveFilter, p.objs.LeaveContainer.FD())
	}
	if err != nil {
		// It has gone already, or goes the customary way.
		return errors.Join(gone(err), p.forget(index))
	}
	p.log.Debug("fast path attached", "link", a.name)
	return nil
}

// forget takes an attachment out of the maps. An address that meanwhile leads to
// another one keeps its entry.
func (p *Path) forget(index int) error {
	a, ok := p.attached[index]
	if !ok {
		return nil
	}
	delete(p.attached, index)
	errs := []error{p.objs.Links.Delete(uint32(index))}
	for _, addr := range a.addrs {
		if p.owners[addr] != index {
			continue
		}
		delete(p.owners, addr)
		if addr.Is4() {
			errs = append(errs, p.objs.Containers4.Delete(words(addr)[0]))
		} else {
			errs = append(errs, p.objs.Containers6.Delete(words(addr)))
		}
	}
	errs = append(slices.DeleteFunc(errs, isMissing), p.renew())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("take %s out of the fast path: %w", a.name, err)
	}
	return nil
}
