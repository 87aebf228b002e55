// Package fastpath takes the traffic between containers of two hosts past
// bridge, netfilter and the kernel's vxlan device: BPF programs at the host end
// of every container's interface write the VXLAN header themselves, programs on
// the underlay devices strip it (bpf/fastpath.c). The frames on the wire are the
// same, so hosts with and without it mix.
//
// The programs take only what needs no decision: unfragmented packets between
// two containers of one overlay, from the address and MAC the sender was given,
// to an agent subnet of a peer or to a container behind another bridge of this
// host. Everything else goes the customary way, and so does everything when a map
// has no entry. The customary way therefore has to
// be there; this package makes none of it.
//
// The filters hold the programs and the programs hold their maps, so traffic
// goes on without this process. A new process starts with maps of its own and
// replaces the filters one by one; nothing is pinned and nothing is read back.
package fastpath

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/rtnl"
)

// Wanted is what the programs have to know of a host. The zero value takes
// nothing.
type Wanted struct {
	Local    netip.Addr // agent IP: source of the outer packets
	VTEPMAC  conf.MAC
	Overlays []Overlay
	Peers    []conf.Peer // every agent but this one
	// Send and Take: peers on a link are sent to without VXLAN where they take it,
	// and may send so.
	Send, Take bool
	// Withdrawn are subnets that are another host's now. What containers have of them
	// leads nowhere.
	Withdrawn []netip.Prefix
}

// Overlay is one overlay whose traffic may be taken.
type Overlay struct {
	Name    string
	Subnets []netip.Prefix // the whole overlay, one per family
}

// Path is the fast path of one network namespace, that of the thread which
// called New. It is safe for concurrent use.
type Path struct {
	log   *slog.Logger
	links *rtnl.Subscription
	objs  programsObjects

	mu         sync.Mutex // guards what follows
	closed     bool
	conn       *rtnl.Conn
	generation uint32 // of what the maps have
	wanted     Wanted // as last applied, without the peers
	peers      peerTable
	overlays   slots
	attached   map[int]attachment // by index of the host end
	owners     map[netip.Addr]int // index of the host end that an address leads to
	bridges    map[int]conf.MAC   // by index
	uplinks    map[int]string     // where enter_host runs, by index
}

// New loads the programs. It fails where the kernel does not have what they
// need (5.15 is enough) or the process may not load them. Such kernels do not
// count maps as locked memory, so no limit has to be raised, which not every
// process may. Nothing is attached before Apply.
func New(log *slog.Logger) (_ *Path, err error) {
	p := &Path{
		log: log, overlays: slots{}, attached: map[int]attachment{}, owners: map[netip.Addr]int{},
		bridges: map[int]conf.MAC{}, uplinks: map[int]string{},
	}
	if err := loadProgramsObjects(&p.objs, nil); err != nil {
		return nil, fmt.Errorf("load the programs of the fast path: %w", err)
	}
	p.peers = newPeerTable(p.objs.Peers4, p.objs.Peers6, p.objs.Senders)
	if p.conn, err = rtnl.Open(); err != nil {
		return nil, errors.Join(err, p.objs.Close())
	}
	if p.links, err = rtnl.Subscribe(unix.NETLINK_ROUTE, []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_TC}, nil); err != nil {
		return nil, errors.Join(fmt.Errorf("subscribe to the links: %w", err), p.conn.Close(), p.objs.Close())
	}
	return p, nil
}

// Close forgets the programs and ends Watch. Those that are attached go on taking
// traffic; Remove detaches them.
func (p *Path) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	return errors.Join(p.links.Close(), p.conn.Close(), p.objs.Close())
}

// Apply makes the programs take what w allows. With resync, or when more than
// peers changed, it also attaches them to whatever is there: underlay devices
// and container interfaces. The error says what goes the customary way because
// of it; everything else is done all the same.
func (p *Path) Apply(_ context.Context, w Wanted, resync bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	if resync || !sameHost(p.wanted, w) {
		// What went is not to be delivered to while all the peers are walked.
		errs = append(errs, p.applyHost(w), p.applyOverlays(w.Overlays), p.renew())
		resync = true
	}
	p.peers.send = w.Send
	errs = append(errs, p.peers.set(w.Peers, w.Local), p.renew())
	p.wanted = w
	p.wanted.Peers = nil // the table has them
	if resync {
		errs = append(errs, p.applyUplinks(), p.applyLinks())
	}
	return errors.Join(errs...)
}

// Update is Apply for a caller who knows which peers changed: those in set are
// new or another, those with the ids in gone are no more. It costs what changed.
func (p *Path) Update(set []conf.Peer, gone []string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return errors.Join(p.peers.change(set, gone, p.wanted.Local), p.renew())
}

// renew makes the programs forget what they found in the maps before. It follows
// every change of them.
func (p *Path) renew() error {
	p.generation++
	if p.generation == 0 { // nothing was found
		p.generation = 1
	}
	if err := p.objs.Generations.Put(uint32(0), p.generation); err != nil {
		return fmt.Errorf("tell the fast path that its maps changed: %w", err)
	}
	return nil
}

// Links attaches the programs to whatever is there now.
func (p *Path) Links() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	return errors.Join(p.applyUplinks(), p.applyLinks())
}

// sameHost says whether two differ in peers at most.
func sameHost(a, b Wanted) bool {
	return a.Local == b.Local && a.VTEPMAC == b.VTEPMAC && a.Send == b.Send && a.Take == b.Take && slices.Equal(a.Withdrawn, b.Withdrawn) && slices.EqualFunc(a.Overlays, b.Overlays, func(a, b Overlay) bool {
		return a.Name == b.Name && slices.Equal(a.Subnets, b.Subnets)
	})
}

func (p *Path) applyHost(w Wanted) error {
	low, high := localPorts()
	h := programsHost{
		Local: words(w.Local), VtepMac: w.VTEPMAC,
		PortLow: low, PortSpan: high - low, Ttl: defaultTTL,
	}
	switch {
	case w.Local.Is4():
		h.Family = unix.AF_INET
	case w.Local.Is6():
		h.Family = unix.AF_INET6
	}
	if w.Take {
		uplink, err := p.uplink(w.Local)
		if err != nil {
			return err
		}
		h.Uplink, h.Direct = uint32(uplink), 1
	}
	if err := p.objs.Hosts.Put(uint32(0), h); err != nil {
		return fmt.Errorf("tell the fast path its host: %w", err)
	}
	return nil
}

// maxOverlays is MAX_OVERLAYS of bpf/maps.h.
const maxOverlays = 1024

// slots are the places of overlays in the maps, by name. A place is used again
// only after the process has ended: attachments refer to it.
type slots map[string]uint32

func (p *Path) applyOverlays(overlays []Overlay) error {
	var errs []error
	for name, slot := range p.overlays {
		gone := !slices.ContainsFunc(overlays, func(o Overlay) bool { return o.Name == name })
		if gone {
			errs = append(errs, p.objs.Overlays.Put(slot, programsOverlay{}))
		}
	}
	for _, o := range overlays {
		slot, ok := p.overlays[o.Name]
		if !ok {
			if slot = uint32(len(p.overlays)); slot >= maxOverlays {
				errs = append(errs, fmt.Errorf("overlay %s: the fast path has places for %d overlays", o.Name, maxOverlays))
				continue
			}
			p.overlays[o.Name] = slot
		}
		errs = append(errs, p.objs.Overlays.Put(slot, encodeOverlay(o)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("tell the fast path its overlays: %w", err)
	}
	return nil
}

// Traffic is what attachments that have the fast path sent and got in one overlay
// since the programs were loaded. Packets are those on the wire, bytes those of the
// inner frames.
type Traffic struct {
	Out, In Count // to and from other hosts
	// PassedOut and PassedIn went to a peer and came from one, but not by the fast
	// path.
	PassedOut, PassedIn Count
	Near                Count // from one container of this host to another
}

// Count is packets and bytes.
type Count struct{ Packets, Bytes uint64 }

// Traffic reads the counters by overlay.
func (p *Path) Traffic() (map[string]Traffic, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make(map[string]Traffic, len(p.overlays))
	for name, slot := range p.overlays {
		var cpus []programsTraffic
		if err := p.objs.Counters.Lookup(slot, &cpus); err != nil {
			return nil, fmt.Errorf("read the counters of overlay %s: %w", name, err)
		}
		var t Traffic
		for _, c := range cpus {
			t.Out.add(c.OutPackets, c.OutBytes)
			t.In.add(c.InPackets, c.InBytes)
			t.PassedOut.add(c.PassedOutPackets, c.PassedOutBytes)
			t.PassedIn.add(c.PassedInPackets, c.PassedInBytes)
			t.Near.add(c.NearPackets, c.NearBytes)
		}
		out[name] = t
	}
	return out, nil
}

func (c *Count) add(packets, bytes uint64) {
	c.Packets += packets
	c.Bytes += bytes
}

// Attached is how many container interfaces have the fast path.
func (p *Path) Attached() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.attached)
}
