package coordinator

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/transfer"
)

// A store that was lost, or put back as it was before, does not have all leases that
// were granted. It is found out by their epochs: an agent shows a lease, or this
// coordinator remembers one, that is higher than any that the store can have given.
// Then the epoch base is raised above all of them, and for a while everybody who
// shows a lease gets back what is in it, and nobody gets anything that is free: it may
// be in a lease that nobody has shown yet.
//
// Every record and every lease has a claim on its blocks, the epoch at which they
// were granted. Where two want one block, the higher claim has it.

// DefaultAdoptFor is how long nothing fresh is granted after leases were lost.
const DefaultAdoptFor = 10 * time.Minute

// Adopt is how a coordinator goes on after its store was lost.
type Adopt struct {
	Cluster string        // id of the cluster that an empty store becomes; empty: a new one
	For     time.Duration // how long nothing fresh is granted; 0: DefaultAdoptFor
	Witness Witness       // nil: none
}

// Witness remembers, outside of the store, which epochs were in it.
type Witness interface {
	Highest(cluster string) uint64
	Note(cluster string, epoch uint64)
}

func (a Adopt) withDefaults() Adopt {
	if a.For == 0 {
		a.For = DefaultAdoptFor
	}
	return a
}

// writtenHalf reports whether a store was not written to the end when it was copied or
// restored: there the cluster comes last, and where a coordinator begins it comes with
// the network, before any agent. Whoever made a new cluster of one would lock out the
// agents of the old, and grant what they hold.
func writtenHalf(kvs []store.KV) bool {
	of := func(kv store.KV) bool { return kv.Key == keyCluster }
	begun := func(kv store.KV) bool { return kv.Key == keyNetwork || strings.HasPrefix(kv.Key, prefixAgent) }
	return !slices.ContainsFunc(kvs, of) && slices.ContainsFunc(kvs, begun)
}

// begin is what is to be stored about the cluster at a start, where that is not what
// the view has.
func (c *Coordinator) begin(v *view) (cluster transfer.Cluster, changed bool) {
	cluster = v.cluster
	if cluster.ID == "" && c.adopt.Cluster != "" {
		cluster.ID = c.adopt.Cluster
		c.log.Warn("the store is empty and becomes that of a cluster whose leases are adopted", "cluster", cluster.ID, "for", c.adopt.For)
		return c.lost(cluster, v.rev, c.witnessed(cluster.ID)), true
	}
	if cluster.ID == "" {
		id := make([]byte, 16)
		rand.Read(id) // never fails
		cluster.ID = hex.EncodeToString(id)
		return cluster, true
	}
	if seen := c.witnessed(cluster.ID); seen > cluster.EpochBase+v.rev {
		c.log.Error("the store was put back as it was before; leases that were granted since are adopted", "epoch", cluster.EpochBase+v.rev, "had", seen, "for", c.adopt.For)
		return c.lost(cluster, v.rev, seen), true
	}
	return cluster, false
}

func (c *Coordinator) witnessed(cluster string) uint64 {
	if c.adopt.Witness == nil {
		return 0
	}
	return c.adopt.Witness.Highest(cluster)
}

// noteEpoch has the witness know what the store can have given by now.
func (c *Coordinator) noteEpoch() {
	c.mu.Lock()
	cluster, epoch := c.view.cluster.ID, c.view.cluster.EpochBase+c.view.rev
	c.mu.Unlock()
	c.adopt.Witness.Note(cluster, epoch)
}

// noteEpochs does so whenever the store has changed, until ctx ends. Nobody waits for
// the witness, which may be on a slow disk: it may be behind the store.
func (c *Coordinator) noteEpochs(ctx context.Context) {
	if c.adopt.Witness == nil {
		return
	}
	for {
		c.noteEpoch()
		select {
		case <-c.advanced:
		case <-ctx.Done():
			c.noteEpoch()
			return
		}
	}
}

// lost is the cluster after it was found out that its store lacks leases with
// epochs up to some.
func (c *Coordinator) lost(cluster transfer.Cluster, rev, epoch uint64) transfer.Cluster {
	cluster = cluster.Raised(rev, epoch, time.Now())
	cluster.Adopting = c.clock()
	cluster.Lost = cluster.Adopting
	return cluster
}

// clusterChangedLocked takes in another epoch base: all leases have other epochs, and
// every agent hears of them.
func (c *Coordinator) clusterChangedLocked() {
	select {
	case c.adopting <- struct{}{}:
	default:
	}
	if c.partial && c.view.cluster.Adopting == 0 {
		c.retell = true // who has not shown a lease by now is none
		c.tellSoon()
	}
	c.partial = c.view.cluster.Adopting != 0
	base := c.view.cluster.EpochBase
	if c.epochBase.Swap(base) == base {
		return
	}
	for id := range c.view.agents {
		if p := c.presence[id]; p != nil {
			p.told = 0
		}
		c.agentChangedLocked(id)
	}
}

// adoptingLocked is how long nothing fresh is granted from now on; 0: it is.
func (c *Coordinator) adoptingLocked() time.Duration {
	since := c.view.cluster.Adopting
	if since == 0 {
		return 0
	}
	since = max(since, c.view.cluster.Clock)
	return max(0, c.adopt.For-time.Duration(c.clock()-since)*time.Second)
}

// endAdoptions writes down that an adoption is over when it is.
func (c *Coordinator) endAdoptions(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-c.adopting:
		case <-ctx.Done():
			return
		}
		c.mu.Lock()
		cluster, mod, left := c.view.cluster, c.view.clusterMod, c.adoptingLocked()
		c.mu.Unlock()
		switch {
		case cluster.Adopting == 0:
		case left > 0:
			timer.Reset(left)
		default:
			cluster.Adopting = 0
			err := c.commit(ctx, store.Txn{
				If:   []store.Cond{{Key: keyCluster, Mod: mod}},
				Then: []store.Op{{Key: keyCluster, Value: encode(cluster)}},
			})
			if err == nil {
				c.log.Info("the time for adoptions is over; hosts that are new get leases again")
			} else if !errors.Is(err, store.ErrConflict) {
				timer.Reset(time.Second)
			}
		}
	}
}

// claimOf is the epoch at which an agent was granted what it holds.
func (v *view) claimOf(a *agent) uint64 {
	if a.Adopted != 0 {
		return a.Adopted
	}
	return v.cluster.Epoch(a.mod)
}

// claimKept is record.Adopted of a record that is written anew without a fresh block.
// What was granted before a loss keeps its claim: an agent that moves is not to have
// more right to a block than who was granted it since, and has not come back yet.
func (v *view) claimKept(was *agent, next *record) uint64 {
	if claim := v.claimOf(was); next.Adopted == 0 && claim <= v.cluster.EpochBase {
		return claim
	}
	return next.Adopted
}

// adoptableLocked reports whether a lease that an agent shows says more about what it
// holds than its record: it is from before a loss, and the record is not, or older.
func (c *Coordinator) adoptableLocked(old *agent, shown *shownLease) bool {
	return shown != nil && shown.Epoch <= c.view.cluster.EpochBase &&
		(old == nil || shown.claim > c.view.claimOf(old) || shown.Epoch > c.view.cluster.Epoch(old.mod))
}

// rival is who has something of a lease that is shown with less right: an agent, or a
// reservation.
type rival struct {
	agent    *agent
	reserved *reservation
}

// each calls fn for every block of a lease: the overlay it is of, empty for the VTEP,
// and the key it is stored under.
func each(l *conf.Lease, fn func(overlay, key string, block netip.Prefix)) {
	eachFirst(l, fn)
	for _, g := range l.Grants {
		for _, b := range g.Blocks {
			for _, s := range b.Prefixes() {
				fn(g.Overlay.Name, keySubnet(g.Overlay.Name, s), s)
			}
		}
	}
}

// eachFirst is each without the further blocks of the overlays.
func eachFirst(l *conf.Lease, fn func(overlay, key string, block netip.Prefix)) {
	if a := l.VTEP.IP.Addr(); a.IsValid() {
		fn("", keyVTEP(a), netip.PrefixFrom(a, a.BitLen()))
	}
	if a := l.VTEP.IP6.Addr(); a.IsValid() {
		fn("", keyVTEP6(a), netip.PrefixFrom(a, a.BitLen()))
	}
	for _, g := range l.Grants {
		for _, s := range []netip.Prefix{g.Subnet, g.Subnet6} {
			if s.IsValid() {
				fn(g.Overlay.Name, keySubnet(g.Overlay.Name, s), s)
			}
		}
	}
}

// owns reports whether a record owns a key.
func (r *record) owns(key string) bool {
	for _, k := range r.resources() {
		if k == key {
			return true
		}
	}
	return false
}

// holder is the agent that owns a key. It looks at all agents, which is worth it:
// two leases of the same block are rare.
func (v *view) holder(key string) *agent {
	for _, a := range v.agents {
		if a.owns(key) {
			return a
		}
	}
	return nil
}

// adoptLocked gives the agent what is in the lease that it shows, instead of what its
// record says, where nobody else has it.
func (c *Coordinator) adoptLocked(p *plan, shown *shownLease) {
	if !c.adoptableLocked(p.old, shown) {
		if shown != nil && p.old == nil && c.adoptingLocked() > 0 {
			eachFirst(shown.Lease, func(overlay, key string, block netip.Prefix) { c.elsewhereLocked(p, overlay, key, block) })
		}
		return
	}
	p.next.Adopted = shown.claim
	eachFirst(shown.Lease, func(overlay, key string, block netip.Prefix) {
		switch {
		case p.next.owns(key):
		case p.size() >= maxBlocks:
			p.more, p.next.Adopted = true, shown.claim-1 // the rest when that is written
		case c.claimLocked(p, overlay, key, block):
			p.next = p.next.instead(p, overlay, block)
		}
	})
	p.next.MAC6 = p.next.VTEP6.IsValid() && p.next.VTEP6 == shown.VTEP.IP6.Addr() && shown.VTEP.MAC == conf.VTEPMAC(p.network.oui, p.next.VTEP6)
	for _, g := range shown.Grants {
		c.adoptFurtherLocked(p, shown.claim, g)
	}
}

// claimLocked takes a block out of its pool for the plan, if it can be had.
func (c *Coordinator) claimLocked(p *plan, overlay, key string, block netip.Prefix) bool {
	r, _, err := c.view.pools.resource(key)
	if err != nil || r.pool == nil {
		return false // no longer configured
	}
	if err := r.pool.Reserve(block); err != nil {
		c.elsewhereLocked(p, overlay, key, block)
		return false
	}
	c.view.claims[key] = &claim{pool: r.pool, block: block}
	p.claimed = append(p.claimed, key)
	return true
}

// instead is the record with a block in the place of the one it has; that one is
// given back.
func (r record) instead(p *plan, overlay string, block netip.Prefix) record {
	drop := func(valid bool, key string) {
		if valid {
			p.dropped = append(p.dropped, key)
		}
	}
	h, is4 := r.held(overlay), block.Addr().Is4()
	switch {
	case overlay == "" && is4:
		drop(r.VTEP.IsValid(), keyVTEP(r.VTEP))
		r.VTEP = block.Addr()
	case overlay == "":
		drop(r.VTEP6.IsValid(), keyVTEP6(r.VTEP6))
		r.VTEP6 = block.Addr()
	case is4:
		drop(h.Subnet.IsValid(), keySubnet(overlay, h.Subnet))
		h.Subnet = block
		return r.with(h)
	default:
		drop(h.Subnet6.IsValid(), keySubnet(overlay, h.Subnet6))
		h.Subnet6 = block
		return r.with(h)
	}
	return r
}

// elsewhereLocked notes who has what the agent would have got back of an overlay;
// empty: of the VTEP.
func (c *Coordinator) elsewhereLocked(p *plan, overlay, key string, block netip.Prefix) {
	h := c.view.holder(key)
	if h == nil {
		return
	}
	if p.gone == nil {
		p.gone = map[string]string{}
	}
	p.gone[overlay] = fmt.Sprintf("%s was granted to agent %s (%s) since", block, h.id, h.IP)
}

// waits says why the agent has no subnet of an overlay while leases are adopted.
func (p *plan) waits(overlay string, left time.Duration) string {
	text := fmt.Sprintf("overlay %s: ", overlay)
	if why := p.gone[overlay]; why != "" {
		text += why + "; "
	}
	return text + "the coordinator's store lacks leases that were granted, so until " + until(left) +
		" only those who show one get it back; this host gets a subnet then"
}

// newcomer refuses an agent that gets no VTEP address while leases are adopted.
func (p *plan) newcomer(left time.Duration) error {
	why := p.gone[""]
	if why == "" {
		why = "this host shows none"
	}
	return &api.Error{Code: http.StatusServiceUnavailable, Kind: api.KindAdopting, Message: "the coordinator's store lacks leases that were granted, so until " +
		until(left) + " only hosts that show one get it back, and " + why + "; it gets a lease then, without anybody doing something"}
}

// until names a time to people.
func until(left time.Duration) string {
	return time.Now().Add(left).UTC().Format("15:04:05") + " UTC"
}
