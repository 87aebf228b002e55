package coordinator_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// slower is a real store in which somebody else is faster a few times.
type slower struct {
	store.Store
	left atomic.Int32
}

func (l *slower) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	for _, op := range txn.Then {
		if strings.HasPrefix(op.Key, "subnet/") && l.left.Add(-1) >= 0 {
			return 0, store.ErrConflict
		}
	}
	return l.Store.Commit(ctx, txn)
}

// What is granted after a transaction that was written is the lowest that is free again:
// blocks are passed over for those that were lost, and for no others.
func TestLowestAfterLosses(t *testing.T) {
	const overlays = 100
	var rows []string
	for i := range overlays {
		rows = append(rows, fmt.Sprintf(`{"name": "o%d", "subnet": "10.%d.0.0/16", "prefix": 24}`, i, i))
	}
	s := &slower{Store: newStore(t)}
	n := start(t, s, networkOf(rows...))
	s.left.Store(6)
	for i, g := range n.register(t, nth(0)).Grants {
		if i >= 80 && g.Subnet.Addr().As4()[2] != 0 { // the first 80 are those that were lost
			t.Errorf("%s of overlay %s, and lower ones are free", g.Subnet, g.Overlay.Name)
		}
	}
}
