package coordinator

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// Delete gives back the leases of agents, named by agent id or agent IP, and
// returns the state afterwards. Those that are not known are ignored. Every
// agent is a transaction of its own; on an error some may be deleted and the
// call can be repeated. A deleted agent that is alive registers again and gets
// a new lease.
func (c *Coordinator) Delete(ctx context.Context, agents []string) (conf.MasterState, error) {
	for i, name := range agents {
		if _, err := netip.ParseAddr(name); err != nil && conf.CheckAgentID(name) != nil {
			return conf.MasterState{}, refuse(http.StatusBadRequest,
				"agents[%d]: %.80q is neither an IP address nor an agent id; nothing was deleted", i, name)
		}
	}
	for _, name := range agents {
		if err := c.deleteAgent(ctx, name); err != nil {
			return conf.MasterState{}, fmt.Errorf("delete agent %s: %w", name, err)
		}
	}
	return c.State(), nil
}

func (c *Coordinator) deleteAgent(ctx context.Context, name string) error {
	if err := c.catchUpWith(ctx, name); err != nil {
		return err
	}
	for attempt := 0; attempt < maxAttempts; {
		txn, viewRev, more, ok := c.planDelete(name)
		if !ok {
			return nil
		}
		err := c.commit(ctx, txn)
		if err == nil && more {
			continue
		} else if err == nil {
			c.log.Info("agent deleted, its lease is free", "agent", name)
			return nil
		} else if !errors.Is(err, store.ErrConflict) {
			return err
		}
		// Perhaps it was carried out all the same. Who has registered since, or has the
		// address now, is not who was to be deleted.
		if gone, err := c.deletedSince(ctx, txn.If[0]); gone || err != nil {
			return err
		}
		if err := c.catchUp(ctx, txn, viewRev, attempt); err != nil {
			return err
		}
		attempt++
	}
	return refuse(http.StatusServiceUnavailable, "the store changed %d times in between; try again", maxAttempts)
}

// deletedSince reports whether the agent that was as in a condition has been deleted
// since, by whomever, and waits until the view knows.
func (c *Coordinator) deletedSince(ctx context.Context, was store.Cond) (bool, error) {
	kv, err := c.read(ctx, was.Key)
	if err != nil || kv.Mod != 0 && kv.Create <= was.Mod {
		return false, err
	}
	last, err := c.read(ctx, keyDeleted)
	if err != nil {
		return false, err
	}
	return true, c.await(ctx, last.Mod)
}

// catchUpWith waits until the view has the agent as it is in the store, where other
// coordinators may have registered it.
func (c *Coordinator) catchUpWith(ctx context.Context, name string) error {
	if !c.shared {
		return nil
	}
	key := keyAgent(name)
	if ip, err := netip.ParseAddr(name); err == nil {
		key = keyIP(ip.Unmap())
	}
	kv, err := c.read(ctx, key)
	if err != nil {
		return err
	}
	return c.await(ctx, kv.Mod)
}

// planDelete makes the transaction; ok is false when there is no such agent. An
// agent of very many overlays is deleted in several transactions, of which the
// first ones only take subnets from it; then more is true.
func (c *Coordinator) planDelete(name string) (txn store.Txn, viewRev uint64, more, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.view.agents[name]
	if ip, err := netip.ParseAddr(name); a == nil && err == nil {
		a = c.view.agents[c.view.byIP[ip.Unmap()].id]
	}
	if a == nil {
		return txn, 0, false, false
	}
	txn.If = []store.Cond{{Key: keyAgent(a.id), Mod: a.mod}}
	remove := func(key string) { txn.Then = append(txn.Then, store.Op{Key: key, Delete: true}) }
	if len(a.resources()) > maxBlocks {
		less, keys := a.shed(maxBlocks)
		txn.Then = append(txn.Then, store.Op{Key: keyAgent(a.id), Value: encode(less)})
		for _, key := range keys {
			remove(key)
		}
		return txn, c.view.rev, true, true
	}
	remove(keyAgent(a.id))
	remove(keyStatus(a.id))
	remove(keySeen(a.id))
	for _, key := range a.resources() {
		remove(key)
	}
	for _, ip := range a.ips() {
		if c.view.byIP[ip].id == a.id {
			remove(keyIP(ip))
		}
	}
	txn.Then = append(txn.Then, store.Op{Key: keyDeleted, Value: []byte(a.id)})
	return txn, c.view.rev, false, true
}
