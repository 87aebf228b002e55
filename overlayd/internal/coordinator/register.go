package coordinator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/allocate"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/crashpoint"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// register gives an agent its lease, or renews it. The same agent id gets the
// same VTEP and agent subnets for ever; a renewal that changes nothing writes
// nothing. It answers with the lease in JSON, when that is durable. A refusal is an
// *api.Error and has taken nothing.
//
// Most of a storm is spent below this function, on goroutines of a connection each whose
// stacks have to grow for it: so what is large goes by pointer, and what is rare, and
// has much on its stack, is a function of its own.
func (c *Coordinator) register(ctx context.Context, req *api.RegisterRequest) ([]byte, error) {
	req.Came = time.Now()
	if err := c.validateRegister(req); err != nil {
		return nil, err
	}
	shown := shownBy(req)
	for attempt, lost := 0, 0; attempt < maxAttempts; {
		if again, err := c.makeWay(ctx, req.AgentIP, shown); err != nil {
			return nil, fmt.Errorf("register agent %s: %w", req.AgentID, err)
		} else if again {
			attempt++
			continue
		}
		p, err := c.planUnlessLingering(ctx, req, passedAt(lost))
		if isExhausted(err) && c.reclaim(ctx, "") {
			continue
		} else if err != nil {
			return nil, err
		}
		p.crash("planned")
		if err = c.carryOut(ctx, p); err == nil {
			p.crash("committed")
		}
		a, ok := c.finish(p, req, err == nil)
		switch {
		case err == nil && ok:
			if p.old == nil || p.old.mod != a.mod {
				c.logGrant(a)
			}
			if p.more || c.reclaimFor(ctx, p.missing) {
				lost = 0 // nobody was faster
				continue
			}
			return c.answerLease(p, req, a), nil
		case err != nil && !errors.Is(err, store.ErrConflict):
			return nil, fmt.Errorf("register agent %s: %w", req.AgentID, err)
		}
		if err := c.catchUp(ctx, p.txn, p.viewRev, attempt); err != nil {
			return nil, fmt.Errorf("register agent %s: %w", req.AgentID, err)
		}
		attempt++
		if len(p.claimed) > 0 {
			lost++
		}
	}
	return nil, refuse(http.StatusServiceUnavailable,
		"register agent %s: the store changed %d times in between; try again", req.AgentID, maxAttempts)
}

// plan is one attempt at a registration.
type plan struct {
	viewRev  uint64 // of the view it was made from
	network  *network
	old      *agent // nil: the agent is new
	next     record
	passed   int          // blocks to leave free below those that are taken; see passedAt
	claimed  []string     // keys of the blocks that were taken for it
	dropped  []string     // keys of those that it holds in place of others no longer
	freed    []string     // keys of those that it gives back
	reserved *reservation // what waited for its IP, and is its own now; nil: nothing
	second   string       // why the second agent IP is not taken; empty: it is, or there is none
	missing  map[string]string
	gone     map[string]string // by overlay, whose subnet it would have got back
	more     bool              // there are subnets to take in a further transaction
	claim    uint64            // on what is granted, when it is; see claimOf
	txn      store.Txn
}

// crash is where tests kill a coordinator that grants or takes back.
func (p *plan) crash(step string) {
	if len(p.claimed) > 0 {
		crashpoint.At("grant-" + step)
	}
	if len(p.freed) > 0 {
		crashpoint.At("return-" + step)
	}
}

// maxBlocks is how many blocks one transaction takes, or gives back. It leaves
// room in store.MaxOps for what else there is to write.
const maxBlocks = 80

// misses notes why the agent does not get an overlay.
func (p *plan) misses(overlay, why string) {
	if p.missing == nil {
		p.missing = map[string]string{}
	}
	p.missing[overlay] = why
}

// size is how many blocks the transaction takes and drops.
func (p *plan) size() int { return len(p.claimed) + len(p.dropped) + p.reserved.size() }

// plan decides what the agent gets and takes it out of the pools.
func (c *Coordinator) plan(req *api.RegisterRequest, passed int) (*plan, error) {
	shown := shownBy(req)
	c.mu.Lock()
	defer c.mu.Unlock()
	// The network may have another range than when the request was validated.
	if err := c.view.network.checkAgentIP(req); err != nil {
		return nil, err
	}
	if err := c.checkLiveLocked(req); err != nil {
		return nil, err
	}
	p := &plan{viewRev: c.view.rev, network: c.view.network, old: c.view.agents[req.AgentID], passed: passed}
	if p.old != nil {
		p.next = p.old.record
	}
	p.next.IP, p.next.Bridges, p.next.Superseded, p.next.Underlay = req.AgentIP, req.Bridges, "", req.Underlay
	if req.SecondIP.IsValid() {
		if p.second = c.refusedSecondLocked(req); p.second != "" {
			p.next.Underlay = req.Underlay.OneFamily()
		}
	}
	c.takeReservedLocked(p, shown)
	c.adoptLocked(p, shown)
	if err := c.takeVTEPLocked(p); err != nil {
		c.view.settle(p.claimed)
		return nil, err
	}
	if req.Return != nil {
		c.takeBackLocked(p, req.Return)
	}
	for i := range p.network.Overlays {
		o := &p.network.Overlays[i]
		if p.size() >= maxBlocks {
			p.more = true
			break
		}
		if withheld(req, o) {
			continue
		}
		c.takeSubnetsLocked(p, o)
		switch want := req.Want[o.Name]; {
		case want <= 1:
		case len(p.dropped) == 0:
			c.takeFurtherLocked(p, o, want)
		default:
			p.more = true // when that is written
		}
	}
	c.composeLocked(p, req)
	pres := c.presenceLocked(req.AgentID)
	pres.registering++
	pres.seen = time.Now()
	c.noteRenewalLocked(req.AgentID)
	return p, nil
}

// takeLocked claims a block for the plan.
func (c *Coordinator) takeLocked(p *plan, pool *allocate.Pool, key func(netip.Prefix) string) (netip.Prefix, bool) {
	block, k, ok := c.view.take(pool, p.passed, key)
	if ok {
		p.claimed = append(p.claimed, k)
		p.next.Adopted = 0
	}
	return block, ok
}

// takeVTEPLocked gives the agent the VTEP addresses that it has not got.
// Without them a new agent gets nothing; one that was there before vtep_subnet or
// vtep_subnet6 was configured keeps its lease as it is.
func (c *Coordinator) takeVTEPLocked(p *plan) error {
	left, pools := c.adoptingLocked(), c.view.pools
	if left > 0 && !p.next.hasVTEP(p.network) {
		return p.newcomer(left)
	}
	if left == 0 {
		if err := c.takeVTEPOfLocked(p, pools.vtep, &p.next.VTEP, keyVTEP, "vtep_subnet", p.network.VTEPSubnet); err != nil {
			return err
		}
		if err := c.takeVTEPOfLocked(p, pools.vtep6, &p.next.VTEP6, keyVTEP6, "vtep_subnet6", p.network.VTEPPool6()); err != nil {
			return err
		}
	}
	p.next.MAC6 = p.next.VTEP6.IsValid() && (p.next.MAC6 || !p.next.VTEP.IsValid())
	return nil
}

// takeVTEPOfLocked gives the agent the address of one family, where it has none and
// there are some.
func (c *Coordinator) takeVTEPOfLocked(p *plan, pool *allocate.Pool, addr *netip.Addr, key func(netip.Addr) string, name string, subnet netip.Prefix) error {
	if pool == nil || addr.IsValid() {
		return nil
	}
	block, ok := c.takeLocked(p, pool, func(b netip.Prefix) string { return key(b.Addr()) })
	if !ok && (p.old == nil || !p.next.hasVTEP(p.network)) {
		return vtepExhausted(name, subnet, pool)
	} else if !ok {
		c.log.Warn("no free VTEP address; the agent keeps its lease without one", "pool", subnet)
	}
	*addr = block.Addr()
	return nil
}

// takeSubnetsLocked gives the agent what it lacks of an overlay: both families
// or nothing.
func (c *Coordinator) takeSubnetsLocked(p *plan, o *conf.Overlay) {
	h := p.next.held(o.Name)
	v4, v6 := lacks(o, h)
	if !v4 && !v6 {
		return
	}
	if left := c.adoptingLocked(); left > 0 {
		p.misses(o.Name, p.waits(o.Name, left))
		return
	}
	pools, before := c.view.pools.overlays[o.Name], len(p.claimed)
	key := func(b netip.Prefix) string { return keySubnet(o.Name, b) }
	fail := func(pool *allocate.Pool, bits int, subnet netip.Prefix) {
		c.view.settle(p.claimed[before:])
		p.claimed = p.claimed[:before]
		p.misses(o.Name, exhausted(o.Name, pool, bits, subnet))
	}
	ok := true
	if v4 {
		if h.Subnet, ok = c.takeLocked(p, pools.v4, key); !ok {
			fail(pools.v4, o.Prefix, o.Subnet)
			return
		}
	}
	if v6 {
		if h.Subnet6, ok = c.takeLocked(p, pools.v6, key); !ok {
			fail(pools.v6, o.Prefix6, o.Subnet6)
			return
		}
	}
	p.next = p.next.with(h)
}

// composeLocked makes the transaction. It is left empty when nothing changes.
func (c *Coordinator) composeLocked(p *plan, req *api.RegisterRequest) {
	id := req.AgentID
	var mod uint64
	if p.old != nil {
		mod = p.old.mod
	}
	if p.old == nil { // beside the blocks: record, address, reservation, network, status
		p.txn.If, p.txn.Then = make([]store.Cond, 0, len(p.claimed)+6), make([]store.Op, 0, len(p.claimed)+6)
	}
	// Nobody grants from a configuration that another coordinator has replaced.
	p.txn.If = append(p.txn.If, store.Cond{Key: keyAgent(id), Mod: mod}, store.Cond{Key: keyNetwork, Mod: p.network.mod})
	put := func(key string, value []byte) { p.txn.Then = append(p.txn.Then, store.Op{Key: key, Value: value}) }

	if p.old == nil || p.changes() {
		if p.old != nil && len(p.claimed) == 0 {
			p.next.Adopted = c.view.claimKept(p.old, &p.next)
		}
		value := encode(&p.next)
		put(keyAgent(id), value)
		c.view.drafts[keyAgent(id)] = draft{value, &p.next}
	}
	c.redeemLocked(p, id)
	for _, key := range p.claimed {
		p.txn.If = append(p.txn.If, store.Cond{Key: key})
		put(key, []byte(id))
	}
	for _, key := range append(p.dropped, p.freed...) { // the agent's record says that they are its own
		p.txn.Then = append(p.txn.Then, store.Op{Key: key, Delete: true})
	}
	if s := c.view.seen[id]; c.expiredLocked(id) {
		// It is back. Whoever is about to reclaim its lease depends on this key.
		p.txn.If = append(p.txn.If, store.Cond{Key: keySeen(id), Mod: s.mod})
		p.txn.Then = append(p.txn.Then, store.Op{Key: keySeen(id), Delete: true})
	}
	c.takeIPsLocked(p, id)
	was := c.view.statuses[id]
	withholds := p.network.withholds(req)
	if st := was.decode(); st.Version != req.Version || st.Withheld != withholds || req.Instance != "" && st.Instance != req.Instance {
		st.Version, st.Withheld = req.Version, withholds
		if req.Instance != "" {
			st.Instance = req.Instance
		}
		p.txn.If = append(p.txn.If, store.Cond{Key: keyStatus(id), Mod: was.mod})
		value := encode(&st)
		put(keyStatus(id), value)
		c.view.drafts[keyStatus(id)] = draft{value: value}
	}
}

// changes reports whether the agent's record becomes another.
func (p *plan) changes() bool { return !reflect.DeepEqual(&p.old.record, &p.next) }

// carryOut makes the plan durable and waits until the view has it.
func (c *Coordinator) carryOut(ctx context.Context, p *plan) error {
	switch {
	case len(p.txn.Then) > 0:
		return c.commit(ctx, p.txn)
	case !c.shared:
		return nil // the view has everything that was answered
	}
	// Another coordinator may have changed the agent, and the view not know it yet.
	_, err := c.store.Commit(ctx, p.txn)
	return err
}

// commit runs a transaction whose first write proves, when it is read back,
// that the transaction was written, and waits until the view has it.
func (c *Coordinator) commit(ctx context.Context, txn store.Txn) error {
	rev, err := c.store.Commit(ctx, txn)
	if errors.Is(err, store.ErrUnknown) {
		c.log.Warn("outcome of a transaction is unknown, reading it back", "key", txn.Then[0].Key, "err", err)
		rev, err = c.readBack(ctx, txn)
	}
	c.noteWrite(err)
	if err != nil {
		return err
	}
	return c.await(ctx, rev)
}

// noteWrite remembers whether the store takes writes. A conflict does not say, nor
// does who did not wait.
func (c *Coordinator) noteWrite(err error) {
	if errors.Is(err, store.ErrConflict) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failed = err
}

func (c *Coordinator) writeFailed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failed != nil
}

// readyLocked says why leases cannot be granted, or nil.
func (c *Coordinator) readyLocked() error {
	err := c.store.Ready(context.Background())
	switch {
	case !c.running:
		return errors.New("the store is not being followed")
	case err != nil:
		return err
	case c.failed != nil:
		return fmt.Errorf("nothing new can be leased, for the last write to the store failed: %w", c.failed)
	}
	return nil
}

// readBack finds out whether a transaction was written, by its first write.
// Where that does not prove it the answer is ErrConflict: a new attempt, made
// from a view that knows more, finds out.
func (c *Coordinator) readBack(ctx context.Context, txn store.Txn) (uint64, error) {
	first := txn.Then[0]
	kv, err := c.read(ctx, first.Key)
	if err != nil {
		return 0, err
	}
	if !first.Delete && kv.Mod != 0 && bytes.Equal(kv.Value, first.Value) {
		return kv.Mod, nil
	}
	return 0, store.ErrConflict
}

// read returns one key; a zero Mod means that it does not exist.
func (c *Coordinator) read(ctx context.Context, key string) (store.KV, error) {
	kvs, _, err := c.store.List(ctx, key)
	if err != nil {
		return store.KV{}, err
	}
	if len(kvs) > 0 && kvs[0].Key == key { // the first in byte order
		return kvs[0], nil
	}
	return store.KV{}, nil
}

// finish ends the plan's claims and returns the agent as it is now; ok is false
// when that is not what was asked for, because somebody changed it meanwhile.
func (c *Coordinator) finish(p *plan, req *api.RegisterRequest, done bool) (a *agent, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.view.settle(p.claimed)
	if !done {
		c.view.dropDrafts(&p.txn)
	}
	pres := c.presence[req.AgentID]
	pres.registering--
	a = c.view.agents[req.AgentID]
	if a == nil && pres.registering == 0 && len(pres.watches) == 0 {
		delete(c.presence, req.AgentID)
	}
	if !done || a == nil || a.IP != req.AgentIP || a.Superseded != "" || !slices.Equal(a.Bridges, req.Bridges) || a.Underlay != p.next.Underlay || p.network != c.view.network {
		return nil, false
	}
	p.claim = c.view.claimOf(a)
	pres.told, pres.toldNetwork = a.mod, p.network.mod
	pres.contest.won(req)
	for w := range pres.watches {
		if !w.ip.IsValid() {
			w.ip = a.IP
		}
	}
	return a, true
}
