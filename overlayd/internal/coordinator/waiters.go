package coordinator

import (
	"container/heap"
	"context"
)

// waiters are those who wait for the view to reach a revision, lowest first.
type waiters struct{ heap waiterHeap }

type waiter struct {
	rev  uint64
	done chan struct{}
}

// add returns a channel that release closes.
func (w *waiters) add(rev uint64) <-chan struct{} {
	done := make(chan struct{})
	heap.Push(&w.heap, waiter{rev, done})
	return done
}

// release lets go everybody who waits for rev or less.
func (w *waiters) release(rev uint64) {
	for len(w.heap) > 0 && w.heap[0].rev <= rev {
		close(heap.Pop(&w.heap).(waiter).done)
	}
}

// await waits until the view has the given revision.
func (c *Coordinator) await(ctx context.Context, rev uint64) error {
	c.mu.Lock()
	if c.view.rev >= rev {
		c.mu.Unlock()
		return nil
	}
	done := c.waiters.add(rev)
	c.mu.Unlock()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-c.stopped:
		return errStopping
	}
}

type waiterHeap []waiter

func (h waiterHeap) Len() int           { return len(h) }
func (h waiterHeap) Less(i, j int) bool { return h[i].rev < h[j].rev }
func (h waiterHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *waiterHeap) Push(x any)        { *h = append(*h, x.(waiter)) }
func (h *waiterHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = waiter{}
	*h = old[:len(old)-1]
	return last
}
