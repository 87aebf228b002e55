// Package datapath turns the wanted end state of a host's overlay into kernel
// objects: VTEP, bridges, addresses, routes, neighbours, FDB entries, sysctls
// and firewall rules.
//
// The caller states what should be (Config); the package reads what is, plans
// the difference (pure) and applies it. The same path serves first start, one
// more peer, a flushed firewall and an upgrade. Everything of ours can be told
// by its name, its route protocol or its chain, and nothing else is touched.
package datapath

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

// Config is the wanted end state of one host. The zero value of an address
// means that the family is not there.
type Config struct {
	VTEP     VTEP
	Bridges  []Bridge
	Overlays []Overlay
	Peers    []conf.Peer // every agent but this one
	// Partial: there may be more peers than Peers has. What the kernel has for
	// those stays.
	Partial bool
}

// VTEP is the host's VXLAN device.
type VTEP struct {
	Local netip.Addr   // agent IP: source of the outer packets
	MAC   conf.MAC     //
	IP    netip.Prefix // with the length of its pool
	IP6   netip.Prefix //
	MTU   int          // 0: MTU of the underlay route less the encapsulation
}

// Bridge is one half of one agent subnet.
type Bridge struct {
	Name    string         // m-<overlay> or d-<overlay>
	Overlay string         //
	Addrs   []netip.Prefix // gateway address of each family, with the half's length
}

// Overlay is one overlay network as the firewall and the local routes see it.
type Overlay struct {
	Name      string
	Subnets   []netip.Prefix // the whole overlay, one per family
	Agent     []netip.Prefix // this host's agent subnets, one per family
	Isolation conf.Isolation // from whom its containers are kept apart
	Allow     []string       // overlays whose containers may reach this one all the same
}

// Report says what could not be had. The datapath goes on past every failure,
// so that one overlay that cannot be configured does not stop the others.
type Report struct {
	MTU      int              // of VTEP, bridges and container interfaces
	Overlays map[string]error // by name; absent: fine
	Err      error            // what concerns the whole host
	Changed  int              // kernel objects added, changed or removed
}

// Datapath programs one network namespace: that of the thread which called New.
// Set and Changes have to be called in the same one; in a daemon that stays in
// the namespace it was started in, this is so. It is safe for concurrent use.
type Datapath struct {
	log   *slog.Logger
	index index
	port  uint32 // which notifications name as the origin of our own changes

	mu    sync.Mutex // guards what follows
	conn  *rtnl.Conn
	rules rules
	last  *applied // nil: nothing is known, the next Set reads the kernel

	tooLarge int      // configured MTU that was warned of
	disputed bool     // claims of peers that were warned of
	noticed  []string // what else was warned of
}

// applied is what the last Set left behind. It is only kept when everything
// went well, so that whatever failed is tried again from what the kernel says.
type applied struct {
	cfg       Config               // as it was asked for, without the peers
	supported Config               // what this host can have of it
	peers     map[string]conf.Peer // by agent id
	indexes   map[string]int       // of the links by name
	foreign   map[netip.Prefix]foreignRoute
	problems  []problem // that remain until cfg or the kernel changes
	noticed   bool      // there is something to look at that only a whole plan finds
	contrary  bool      // some of the problems are with peers
	spared    bool      // the kernel has more of ours than was asked for
	mtu       int
}

// New opens what is needed to talk to the kernel. It changes nothing.
func New(log *slog.Logger) (*Datapath, error) {
	c, err := rtnl.Open()
	if err != nil {
		return nil, err
	}
	port, err := c.Port()
	if err != nil {
		c.Close()
		return nil, err
	}
	return &Datapath{
		log: log, conn: c, port: port,
	}, nil
}

// Close closes the sockets. What was programmed stays and goes on forwarding.
func (d *Datapath) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules.close()
	return d.conn.Close()
}

// Set makes the kernel what cfg says. With resync it reads the kernel first;
// without, it trusts what was last applied and sends only the difference. Where
// more than peers changed, or the last Set failed in any part, it reads the
// kernel in either case. cfg must not be changed afterwards.
func (d *Datapath) Set(ctx context.Context, cfg Config, resync bool) Report {
	d.mu.Lock()
	defer d.mu.Unlock()
	if l := d.last; l != nil && sameHost(l.cfg, cfg) {
		old, now := l.difference(cfg.Peers)
		if r, ok := d.update(ctx, cfg, old, now, resync); ok {
			return r
		}
	}
	r, err := d.setAll(ctx, cfg)
	if errors.Is(err, rtnl.ErrOverrun) {
		// The kernel knows what it did; ask it.
		again, _ := d.setAll(ctx, cfg)
		again.Changed += r.Changed
		return again
	}
	return r
}

// Update is Set for a caller who knows which peers changed since the last Set
// or Update: those in set are new or another, those with the ids in gone are no
// more. It costs what changed; with resync it reads the kernel, but keeps
// nothing of what it reads. cfg is what Set would be called with, its peers are
// not looked at. When ok is false it is not so simple, and Set has to be called.
func (d *Datapath) Update(ctx context.Context, cfg Config, set []conf.Peer, gone []string, resync bool) (r Report, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.last
	if l == nil || !sameHost(l.cfg, cfg) {
		return Report{}, false
	}
	old, now := l.changes(set, gone)
	return d.update(ctx, cfg, old, now, resync)
}

// update puts the peers in now into the place of those in old and, with resync,
// looks at the kernel. ok is false when the kernel has to be read and planned
// for as a whole.
func (d *Datapath) update(ctx context.Context, cfg Config, old, now []conf.Peer, resync bool) (r Report, ok bool) {
	if !resync {
		return d.setPeers(ctx, old, now)
	}
	if len(old)+len(now) > 0 {
		if r, ok = d.setPeers(ctx, old, now); !ok || d.last == nil {
			return Report{}, false
		}
	}
	checked, ok := d.check(ctx, cfg)
	checked.Changed += r.Changed
	return checked, ok
}

// setAll reads the kernel, plans and applies. The error, which is in the report
// as well, says that it had to stop on the way.
func (d *Datapath) setAll(ctx context.Context, cfg Config) (Report, error) {
	d.last = nil
	have, err := d.read(cfg, nil)
	if err != nil {
		return newReport(nil, 0, 0, err), err
	}
	p := plan(cfg, have)
	return d.carryOut(ctx, cfg, &p, have, byID(cfg.Peers))
}

// carryOut makes what is planned and remembers it. The error is as in setAll.
func (d *Datapath) carryOut(ctx context.Context, cfg Config, p *planned, have *state, peers map[string]conf.Peer) (Report, error) {
	d.warn(p, cfg.VTEP.MTU)

	// The firewall comes first, so that isolation is there before traffic is.
	var failed []problem
	changed, err := d.rules.set(ctx, p.cfg, underlay(peers, p.cfg, have.fdb), have.ipv6)
	if err != nil {
		failed = append(failed, problem{"", err})
	}
	a := d.applier()
	for name, l := range have.links {
		a.index[name] = l.index
	}
	d.index.expect(p, have)
	err = a.apply(ctx, p.ops)
	d.index.expectLinks(p, have, a.index)

	changed += a.changed
	failed = append(failed, a.failed...)
	if changed > 0 {
		d.log.Info("datapath changed", "objects", changed, "peers", len(peers), "mtu", p.mtu)
	}
	if err == nil && len(failed) == 0 && !p.disputed && peers != nil {
		l := &applied{
			cfg: cfg, supported: p.cfg, mtu: p.mtu, problems: p.problems, noticed: len(p.notices) > 0, contrary: len(p.wanted.problems) > 0, spared: p.spared,
			foreign: have.foreign, peers: peers, indexes: a.index,
		}
		l.cfg.Peers, l.supported.Peers = nil, nil
		l.supported.Partial = false // whoever is said to be gone later is gone for certain
		d.last = l
	}
	return newReport(append(p.problems, failed...), p.mtu, changed, err), err
}

// byID is nil when two have one id: there is no telling them apart.
func byID(peers []conf.Peer) map[string]conf.Peer {
	m := make(map[string]conf.Peer, len(peers))
	for _, p := range peers {
		m[p.AgentID] = p
	}
	if len(m) < len(peers) {
		return nil
	}
	return m
}

// warn logs what works, but not as it was meant; once, until it changes.
func (d *Datapath) warn(p *planned, configured int) {
	if !p.lowered {
		configured = 0
	}
	if configured != d.tooLarge && configured != 0 {
		d.log.Warn("the configured MTU does not fit into the underlay", "configured", configured, "used", p.mtu)
	}
	if p.disputed && !d.disputed {
		d.log.Warn("two peers claim the same subnet or VTEP; the newer lease is obeyed")
	}
	d.tooLarge, d.disputed = configured, p.disputed

	notices := p.notices
	if n := len(notices) - maxTold; n > 0 {
		notices = append(notices[:maxTold:maxTold], fmt.Sprintf("and %d more", n))
	}
	for _, n := range notices {
		if !slices.Contains(d.noticed, n) {
			d.log.Warn("not as it should be; the rest works", "what", n)
		}
	}
	for _, n := range d.noticed {
		if !slices.Contains(notices, n) {
			d.log.Info("no longer so", "what", n)
		}
	}
	d.noticed = notices
}

// Peers is how many other hosts are forwarded to.
func (d *Datapath) Peers() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.index.fdb)
}

// setPeers is Set for the case that only peers changed since the last one. ok
// is false when it is not so simple; then the kernel has to be read.
func (d *Datapath) setPeers(ctx context.Context, old, now []conf.Peer) (r Report, ok bool) {
	l := d.last
	if l.spared || l.contrary {
		return Report{}, false // one of these may be what was spared, or end a problem
	}
	c := l.supported
	c.Peers = old
	had := expandPeers(c)
	c.Peers = now
	want := expandPeers(c)
	if had.disputed || want.disputed || had.odd() || want.odd() || d.taken(had.entries, want.entries) {
		return Report{}, false
	}

	p := planned{cfg: l.supported, wanted: want}
	p.planEntries(had.entries, nil, nil)
	d.index.update(had.entries, want.entries)
	a := d.applier()
	a.index = l.indexes
	if err := d.rules.change(ctx, old, now); err != nil {
		a.failed = append(a.failed, problem{"", err})
	}
	err := a.apply(ctx, p.ops)
	if a.changed > 0 {
		d.log.Debug("peers changed", "objects", a.changed)
	}
	if errors.Is(err, rtnl.ErrOverrun) {
		d.last = nil // ask the kernel what it did
		return Report{}, false
	}
	if err != nil || len(a.failed) > 0 {
		d.last = nil
	}
	for _, p := range old {
		delete(l.peers, p.AgentID)
	}
	for _, p := range now {
		l.peers[p.AgentID] = p
	}
	return newReport(append(slices.Clip(l.problems), a.failed...), l.mtu, a.changed, err), true
}

// sameHost says whether two configurations differ in peers at most.
func sameHost(a, b Config) bool {
	return a.VTEP == b.VTEP &&
		slices.EqualFunc(a.Bridges, b.Bridges, func(a, b Bridge) bool {
			return a.Name == b.Name && a.Overlay == b.Overlay && slices.Equal(a.Addrs, b.Addrs)
		}) &&
		slices.EqualFunc(a.Overlays, b.Overlays, func(a, b Overlay) bool {
			return a.Name == b.Name && a.Isolation.Mode() == b.Isolation.Mode() && slices.Equal(a.Allow, b.Allow) && slices.Equal(a.Subnets, b.Subnets) && slices.Equal(a.Agent, b.Agent)
		})
}

// difference lists the peers that changed as they were and as they are wanted.
func (l *applied) difference(peers []conf.Peer) (old, now []conf.Peer) {
	known := 0
	for i := range peers {
		was, ok := l.peers[peers[i].AgentID]
		if ok {
			known++
		}
		if ok && samePeer(&was, &peers[i]) {
			continue
		}
		if ok {
			old = append(old, was)
		}
		now = append(now, peers[i])
	}
	if known == len(l.peers) {
		return old, now
	}
	wanted := make(map[string]struct{}, len(peers))
	for i := range peers {
		wanted[peers[i].AgentID] = struct{}{}
	}
	for id, was := range l.peers {
		if _, ok := wanted[id]; !ok {
			old = append(old, was)
		}
	}
	return old, now
}

// changes is difference for somebody who knows where to look.
func (l *applied) changes(set []conf.Peer, gone []string) (old, now []conf.Peer) {
	for i := range set {
		was, ok := l.peers[set[i].AgentID]
		if ok && samePeer(&was, &set[i]) {
			continue
		}
		if ok {
			old = append(old, was)
		}
		now = append(now, set[i])
	}
	for _, id := range gone {
		if was, ok := l.peers[id]; ok {
			old = append(old, was)
		}
	}
	return old, now
}

// samePeer compares what the kernel is told. The epoch is not: it grows with
// every renewal of interest to others, and matters only in a dispute.
func samePeer(a, b *conf.Peer) bool {
	return a.AgentIP == b.AgentIP && a.VTEPIP == b.VTEPIP && a.VTEPIP6 == b.VTEPIP6 && a.VTEPMAC == b.VTEPMAC &&
		slices.Equal(a.Subnets, b.Subnets)
}

// taken says whether something wanted belongs already to a peer that did not
// change, to this host, or to somebody else.
func (d *Datapath) taken(had, want entries) bool {
	for dst := range want.routes {
		if _, foreign := d.last.foreign[dst]; foreign {
			return true
		}
	}
	return takenIn(d.index.neigh, had.neigh, want.neigh) || takenIn(d.index.fdb, had.fdb, want.fdb) ||
		takenIn(d.index.routes, had.routes, want.routes)
}

func takenIn[K, V comparable](all, had, want map[K]V) bool {
	for k := range want {
		_, there := all[k]
		_, changes := had[k]
		if there && !changes {
			return true
		}
	}
	return false
}

func (d *Datapath) applier() *applier {
	return &applier{
		conn: d.conn, index: map[string]int{}, dead: map[string]bool{},
		lookup: func(name string) (int, error) {
			l, ok, err := d.conn.LinkByName(name)
			if err == nil && !ok {
				err = unix.ENODEV
			}
			return l.Index, err
		},
	}
}

// maxTold is how many failures of one overlay are told in full. Thousands of
// peers tend to fail for one reason.
const maxTold = 8

func newReport(problems []problem, mtu, changed int, err error) Report {
	r := Report{MTU: mtu, Changed: changed}
	by := map[string][]error{}
	for _, p := range problems {
		by[p.overlay] = append(by[p.overlay], p.err)
	}
	for overlay, errs := range by {
		if n := len(errs) - maxTold; n > 0 {
			errs = append(errs[:maxTold:maxTold], fmt.Errorf("and %d more", n))
		}
		joined := errors.Join(errs...)
		if overlay == "" {
			err = errors.Join(joined, err)
			continue
		}
		if r.Overlays == nil {
			r.Overlays = map[string]error{}
		}
		r.Overlays[overlay] = joined
	}
	r.Err = err
	return r
}
