package coordinator

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"time"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// makeWay sees to it that a lease that is shown by an agent with an address can be
// adopted where it has to be: it finds out about a loss, and takes from others what
// they claim with less right. again says that something has changed.
func (c *Coordinator) makeWay(ctx context.Context, ip netip.Addr, shown *shownLease) (again bool, err error) {
	if shown == nil || !c.inQuestion(ip, shown) {
		return false, nil
	}
	rev, err := c.newest(ctx, shown.AgentID)
	if err != nil {
		return false, err
	}
	var txn store.Txn
	c.mu.Lock()
	viewRev := c.view.rev
	lost, r := c.judgeLocked(ip, shown, rev)
	switch {
	case lost && c.identity == nil && shown.Epoch > uint64(time.Now().UnixMilli())+maxAhead:
		c.mu.Unlock()
		return false, refuse(http.StatusForbidden, "agent %s shows a lease with epoch %d, which no coordinator gave; nothing was leased", shown.AgentID, shown.Epoch)
	case lost:
		cluster := c.lost(c.view.cluster, rev, shown.Epoch)
		txn.If = append(txn.If, store.Cond{Key: keyCluster, Mod: c.view.clusterMod})
		txn.Then = append(txn.Then, store.Op{Key: keyCluster, Value: encode(cluster)})
	case r != nil && r.reserved != nil:
		txn = r.reserved.drop()
	}
	c.mu.Unlock()
	switch {
	case lost:
		c.log.Error("the store lacks leases that were granted, so it was put back as it was before; they are adopted",
			"agent", shown.AgentID, "epoch", shown.Epoch, "for", c.adopt.For)
	case r == nil:
		return false, nil
	case r.agent != nil:
		c.log.Warn("two agents hold leases of the same; the later one has it, and the other asks anew",
			"agent", shown.AgentID, "claim", shown.claim, "other", r.agent.id)
		var ok bool
		if txn, ok = c.takeAway(r.agent); !ok {
			return true, nil
		}
	default:
		c.log.Warn("an agent holds what is reserved for another address; it has it, and the reservation goes",
			"agent", shown.AgentID, "reserved", r.reserved.IP)
	}
	if err = c.commit(ctx, txn); errors.Is(err, store.ErrConflict) {
		err = c.catchUp(ctx, txn, viewRev, 0)
	}
	return true, err
}

// takeAway makes the transaction that deletes an agent's record as it was judged; ok is
// false when it is another by now. Of very much it deletes a part; the rest keeps its
// claim.
func (c *Coordinator) takeAway(a *agent) (txn store.Txn, ok bool) {
	txn, _, more, ok := c.planDelete(a.id)
	if !ok || txn.If[0].Mod != a.mod {
		return txn, false
	}
	if more {
		less, _ := a.shed(maxBlocks)
		c.mu.Lock()
		less.Adopted = c.view.claimOf(a)
		c.mu.Unlock()
		txn.Then[0].Value = encode(less)
	}
	return txn, true
}

// drop makes the transaction that deletes the reservation.
func (r *reservation) drop() (txn store.Txn) {
	key := keyReserved(r.IP)
	txn.If = []store.Cond{{Key: key, Mod: r.mod}}
	for _, k := range append([]string{key}, r.resources()...) {
		txn.Then = append(txn.Then, store.Op{Key: k, Delete: true})
	}
	return txn
}

func (c *Coordinator) inQuestion(ip netip.Addr, shown *shownLease) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	lost, r := c.judgeLocked(ip, shown, 0)
	return lost || r != nil
}

// newest waits until the view has what the store knows of an agent, and returns the
// store's revision: another coordinator may have granted it something a moment ago.
func (c *Coordinator) newest(ctx context.Context, id string) (rev uint64, err error) {
	var target uint64
	for _, key := range []string{keyAgent(id), keyCluster, keyDeleted} {
		kvs, now, err := c.store.List(ctx, key)
		if err != nil {
			return 0, err
		}
		rev = now
		if len(kvs) > 0 && kvs[0].Key == key { // the first in byte order
			target = max(target, kvs[0].Mod)
		}
	}
	return rev, c.await(ctx, target)
}

// judgeLocked reports whether a lease that is shown proves that the store lacks some,
// and who else holds something of it with less right. The store is at rev at least.
//
// A lease with an epoch of this base was in the store. Its agent may have lost what is
// in it to a claim of before since; then who has it now got it later. Otherwise the
// store lacks something.
//
// A reservation was made for what an agent had before; who shows a lease while they
// are adopted knows better, unless it is for its own address, and its own.
func (c *Coordinator) judgeLocked(ip netip.Addr, shown *shownLease, rev uint64) (lost bool, who *rival) {
	v, old := c.view, c.view.agents[shown.AgentID]
	base, adopting := v.cluster.EpochBase, c.adoptingLocked() > 0
	switch {
	case shown.Epoch > base+max(v.rev, rev), old != nil && shown.Epoch > base && shown.Epoch > base+old.mod:
		return true, nil // the store cannot have given it
	case old != nil && !c.adoptableLocked(old, shown):
		return false, nil // nearly always
	}
	past := shown.Epoch <= base
	each(shown.Lease, func(_, key string, block netip.Prefix) {
		if r, _, err := v.pools.resource(key); who != nil || err != nil || r.pool == nil || !r.pool.InUse(block) || old != nil && old.owns(key) {
			return
		}
		if h := v.holder(key); h != nil {
			if h != old && (past && shown.claim > v.claimOf(h) || !past && shown.Epoch > base+h.mod) {
				who = &rival{agent: h}
			}
			return
		}
		r := v.reservation(key)
		if r == nil || !past || old == nil && r.IP == ip {
			return
		}
		if adopting || shown.claim > v.cluster.Epoch(r.mod) {
			who = &rival{reserved: r}
		}
	})
	return who != nil && !adopting, who
}
