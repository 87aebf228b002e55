package coordinator

import (
	"context"
	"math/rand/v2"
	"time"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// maxAttempts bounds how often a transaction is tried again because somebody
// else changed the store in between.
const maxAttempts = 32

// passedAt is how many free blocks an attempt passes over after so many were lost. The lowest free one may be
// just being taken at another coordinator, and if that one is busier, so will be the next
// one by the time it is known here. Whoever lost twice takes one at random from
// a range that grows, so that it is ahead of the other; who comes later fills the gap.
func passedAt(lost int) int {
	if lost < 2 {
		return 0
	}
	return rand.N(1 << min(lost, 8))
}

// catchUp waits after a conflict until the view knows what it did not when the
// transaction was made.
func (c *Coordinator) catchUp(ctx context.Context, txn store.Txn, viewRev uint64, attempt int) error {
	target := viewRev + 1
	for _, cond := range txn.If {
		kv, err := c.read(ctx, cond.Key)
		if err != nil {
			return err
		}
		target = max(target, kv.Mod)
	}
	// After a commit of unknown outcome there may be nothing to catch up with,
	// and two coordinators that always pick the same block had better not
	// run in step.
	wait, cancel := context.WithTimeout(ctx, time.Duration(1+attempt)*10*time.Millisecond)
	defer cancel()
	if err := c.await(wait, target); err != nil && wait.Err() == nil {
		return err
	}
	if attempt > 2 {
		select {
		case <-time.After(rand.N(time.Duration(attempt) * 5 * time.Millisecond)):
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}
