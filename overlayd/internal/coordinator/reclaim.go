package coordinator

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// graceTerms is after how many terms without a sign of life a lease may go to
// somebody else. After one term the agent attaches nothing any more; the rest is
// for its containers to end.
const graceTerms = 3

func isExhausted(err error) bool {
	var refusal *api.Error
	return errors.As(err, &refusal) && refusal.Code == http.StatusInsufficientStorage
}

// expiredLocked reports whether nobody has seen an agent for so long that its
// lease may go to somebody else.
func (c *Coordinator) expiredLocked(id string) bool {
	s, p := c.view.seen[id], c.presence[id]
	grace := graceTerms * c.term
	switch {
	case c.network().Reclaim == conf.ReclaimNever, s.By != "", s.Clock == 0:
		return false
	case p != nil && (len(p.watches) > 0 || p.registering > 0 || time.Since(p.seen) < grace):
		return false
	}
	// Where leases were lost nobody knows who was seen between then and now.
	return c.clock()-max(s.Clock, c.view.cluster.Lost) > int64(grace.Seconds())
}

// reclaimFor is reclaim for the first overlay that the agent lacks.
func (c *Coordinator) reclaimFor(ctx context.Context, missing map[string]string) bool {
	if len(missing) == 0 {
		return false
	}
	for _, overlay := range slices.Sorted(maps.Keys(missing)) {
		if c.reclaim(ctx, overlay) {
			return true
		}
	}
	return false
}

// reclaim deletes the agent whose lease has expired longest ago, of those that
// hold something of the overlay (empty: of all), and reports whether it did. It is
// called when nothing else is left.
func (c *Coordinator) reclaim(ctx context.Context, overlay string) bool {
	for {
		id, txn, more := c.planReclaim(overlay)
		if id == "" {
			return false
		}
		err := c.commit(ctx, txn)
		switch {
		case err == nil && more:
			continue
		case err == nil:
			c.log.Warn("lease has expired and nothing else is free; it goes to another agent", "agent", id, "overlay", overlay)
			return true
		case !errors.Is(err, store.ErrConflict):
			c.log.Error("cannot reclaim an expired lease", "agent", id, "err", err)
			return false
		}
		if c.catchUp(ctx, txn, 0, 0) != nil {
			return false
		}
	}
}

// planReclaim picks the agent and makes the transaction that deletes it; id is
// empty when there is none.
func (c *Coordinator) planReclaim(overlay string) (id string, txn store.Txn, more bool) {
	c.mu.Lock()
	if c.adoptingLocked() > 0 { // what is missing is not because nothing is free
		c.mu.Unlock()
		return "", txn, false
	}
	var oldest storedSeen
	for candidate, a := range c.view.agents {
		h := a.held(overlay)
		if overlay != "" && !h.Subnet.IsValid() && !h.Subnet6.IsValid() || !c.expiredLocked(candidate) {
			continue
		}
		if s := c.view.seen[candidate]; id == "" || s.Clock < oldest.Clock {
			id, oldest = candidate, s
		}
	}
	c.mu.Unlock()
	if id == "" {
		return "", txn, false
	}
	txn, _, more, ok := c.planDelete(id)
	if !ok {
		return "", txn, false
	}
	txn.If = append(txn.If, store.Cond{Key: keySeen(id), Mod: oldest.mod})
	return id, txn, more
}
