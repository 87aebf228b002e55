package kernel

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// silentPause is the time between two looks at what the kernel does not
// announce: most sysctls, and some rules.
const silentPause = 6 * time.Second

// Rules is what a watcher has to know of the firewall.
type Rules struct {
	Concerns func(rtnl.Message) bool // a notification of nftables tells of rules of ours
	// Unchecked are the devices of which a notification says that what they send is
	// no longer checked: those of containers that go, or that somebody freed.
	Unchecked func(rtnl.Message) []string
	Altered   func() bool // asked now and then: what is not announced is not as it should be
	// News announces what the caller found elsewhere.
	News <-chan struct{}
}

// Watch announces that somebody else changed or removed something of ours: link,
// port, address, route, neighbour or FDB entry, sysctl, or what rules says
// concerns it, or something of theirs that packets of ours depend on: the MTU or
// address of the underlay, rules, routes and addresses inside overlays.
// Announcements are coalesced and never lost, if sometimes needless. The channel
// is closed when ctx ends.
func (k *Kernel) Watch(ctx context.Context, log *slog.Logger, rules Rules) <-chan struct{} {
	w := &watcher{out: make(chan struct{}, 1), expected: &k.Expected, log: log}
	w.ports = ports{announce: w.announce, waiting: map[int]time.Time{}, missing: map[string]time.Time{}}
	var err error
	if w.ports.conn, err = rtnl.Open(); err != nil {
		log.Error("cannot look at ports of bridges; changes by others are repaired at the next look", "err", err)
	}
	var watching sync.WaitGroup
	for _, s := range []struct {
		family   int
		groups   []uint
		filter   rtnl.Filter
		concerns func(rtnl.Message) bool
	}{
		{unix.NETLINK_ROUTE, routeGroups, rtnl.WithoutOwn(k.port), w.concerns},
		{unix.NETLINK_NETFILTER, []uint{unix.NFNLGRP_NFTABLES}, nil, func(m rtnl.Message) bool {
			w.ports.lookFor(rules.Unchecked(m), w.expected)
			return rules.Concerns(m)
		}},
	} {
		f, err := rtnl.Subscribe(s.family, s.groups, s.filter)
		if err != nil {
			log.Error("cannot subscribe to kernel notifications; changes by others are repaired at the next look", "family", s.family, "err", err)
			continue
		}
		stop := context.AfterFunc(ctx, func() { f.Close() })
		watching.Go(func() {
			defer stop()
			w.read(f, s.concerns)
			if ctx.Err() == nil {
				log.Error("kernel notifications ended; changes by others are repaired at the next look", "family", s.family)
			}
		})
	}
	watching.Go(func() { w.poll(ctx, rules) })
	go func() {
		watching.Wait()
		<-ctx.Done()
		w.ports.close()
		close(w.out)
	}()
	return w.out
}

var routeGroups = []uint{
	unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF,
	unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_NEXTHOP,
}

type watcher struct {
	out      chan struct{}
	expected *Expected
	ports    ports
	log      *slog.Logger
}

func (w *watcher) announce() {
	select {
	case w.out <- struct{}{}:
	default: // one is waiting already
	}
}

// read reads notifications until f is closed, and announces those that concern
// us.
func (w *watcher) read(f *rtnl.Subscription, concerns func(rtnl.Message) bool) {
	buf := make([]byte, 64<<10)
	for {
		matters := false
		err := f.Read(buf, func(m rtnl.Message) { matters = matters || concerns(m) })
		if err != nil && !errors.Is(err, rtnl.ErrOverrun) {
			return
		}
		if matters || err != nil { // of those that were lost one may have been ours
			w.announce()
		}
	}
}

// concerns reports whether a notification tells of something that is not as it
// should be.
func (w *watcher) concerns(m rtnl.Message) bool {
	x := w.expected
	x.mu.RLock()
	defer x.mu.RUnlock()
	switch m.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if index := x.suspectPort(m); index != 0 {
			w.ports.look(index, x)
		}
		return x.link(m)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return x.addr(m)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return x.route(m)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		return x.neighbour(m)
	case unix.RTM_NEWNETCONF:
		return x.netconf(m)
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return len(x.links) > 0
	case unix.RTM_DELNEXTHOP: // takes routes along without a word
		return len(x.links) > 0
	}
	return false
}

// poll looks now and then at what nobody announces. A sysctl's value that was
// announced is not announced again: it may be one that cannot be set.
func (w *watcher) poll(ctx context.Context, rules Rules) {
	tick := time.NewTicker(silentPause)
	defer tick.Stop()
	announced := map[string]string{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-rules.News:
			w.announce()
			continue
		case <-tick.C:
		}
		now := map[string]string{}
		for key, value := range w.expected.wrongSysctls() {
			now[key] = value
			if was, ok := announced[key]; !ok || was != value {
				w.announce()
			}
		}
		announced = now
		if rules.Altered() {
			w.announce()
		}
	}
}

// portPause is how long a port of a bridge may be other than it should: a
// container that goes takes its port down and out of the bridge before the link
// is removed.
const portPause = 200 * time.Millisecond

// ports looks at links of containers that were said to be other than they
// should, each a moment after it was said: where containers go all the time,
// one of them is just going.
type ports struct {
	announce func()

	mu      sync.Mutex
	conn    *rtnl.Conn // nil: none could be opened, or closed
	ticking bool
	waiting map[int]time.Time    // by index: when to look whether the port is as it should be
	missing map[string]time.Time // by name: when to look whether the link is still there
}

// lookFor has links looked for after a moment.
func (p *ports) lookFor(names []string, x *Expected) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn == nil {
		return
	}
	for _, name := range names {
		if _, ok := p.missing[name]; !ok {
			p.missing[name] = time.Now().Add(2 * portPause)
		}
	}
	p.tick(x)
}

// look has a link looked at after a moment.
func (p *ports) look(index int, x *Expected) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn == nil {
		return
	}
	if _, ok := p.waiting[index]; !ok {
		p.waiting[index] = time.Now().Add(portPause)
	}
	p.tick(x)
}

// tick has lookAtAll called while something waits.
func (p *ports) tick(x *Expected) {
	if p.ticking || len(p.waiting)+len(p.missing) == 0 {
		return
	}
	p.ticking = true
	time.AfterFunc(portPause/2, func() { p.lookAtAll(x) })
}

// lookAtAll looks at those whose moment is over.
func (p *ports) lookAtAll(x *Expected) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ticking = false
	if p.conn == nil {
		return
	}
	now := time.Now()
	for index, due := range p.waiting {
		if now.Before(due) {
			continue
		}
		delete(p.waiting, index)
		if l, ok, err := p.conn.LinkByIndex(index); err != nil || ok && x.wrongPort(l) {
			p.announce()
		}
	}
	for name, due := range p.missing {
		if now.Before(due) {
			continue
		}
		delete(p.missing, name)
		l, ok, err := p.conn.LinkByName(name)
		if _, ours := mark.IsHostEnd(l.Name, l.Alias); err != nil || ok && ours {
			p.announce()
		}
	}
	p.tick(x)
}

func (p *ports) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn != nil {
		p.conn.Close()
		p.conn = nil
	}
}
