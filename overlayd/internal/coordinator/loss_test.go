package coordinator_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// loses ends a coordinator whose store is lost, and starts one on an empty store that
// adopts the leases of its cluster.
func (b *bubble) loses(empty store.Store) *bubble {
	b.t.Helper()
	b.stop()
	return bubbleWith(b.t, coordinator.Options{Store: empty, Adopt: coordinator.Adopt{Cluster: b.ClusterID()}})
}

// file is the file of a coordinator, and a copy of it as it was before.
type file struct {
	t     *testing.T
	path  string
	store store.Store
}

func newFile(t *testing.T) *file {
	return &file{t: t, path: filepath.Join(t.TempDir(), "coordinator.db")}
}

// start starts a coordinator on the file.
func (f *file) start() *bubble {
	f.t.Helper()
	f.store = openStore(f.t, f.path)
	return inBubble(f.t, f.store)
}

// again ends a coordinator, and starts the next.
func (f *file) again(b *bubble) *bubble {
	f.t.Helper()
	return f.between(b, func() {})
}

// copied is again, with a copy made in between.
func (f *file) copied(b *bubble) *bubble {
	f.t.Helper()
	return f.between(b, func() { copyFile(f.t, f.path, f.path+".copy") })
}

// putBack is again, with the copy in the place of the file.
func (f *file) putBack(b *bubble) *bubble {
	f.t.Helper()
	return f.between(b, func() { copyFile(f.t, f.path+".copy", f.path) })
}

func (f *file) between(b *bubble, do func()) *bubble {
	f.t.Helper()
	b.stop()
	f.store.Close()
	do()
	return f.start()
}

// contested is a cluster whose file was put back as it was before, and which has
// noticed: in it agent earlier has what agent later was granted since.
func contested(t *testing.T) (b *bubble, earlier, later conf.Lease) {
	t.Helper()
	f := newFile(t)
	b = f.start()
	earlier = b.register("earlier", "10.0.0.1")
	b = f.copied(b)
	if _, err := b.Delete(t.Context(), []string{"earlier"}); err != nil {
		t.Fatal(err)
	}
	later = b.register("later", "10.0.0.2")
	if blocks(earlier) != blocks(later) {
		t.Fatalf("%s and %s, want the same", blocks(earlier), blocks(later))
	}
	since := b.register("since", "10.0.0.3")
	for range 20 { // more than the start that follows writes
		since = b.register("since", since.AgentIP.Next().String())
	}
	b = f.putBack(b)
	kept(t, since, b.show(since)) // so the loss is noticed
	return b, earlier, later
}

// copyFile copies what a coordinator that has stopped left.
func copyFile(t testing.TB, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// hooked is a real store that calls a function before the first transaction that
// writes a key, or deletes it.
type hooked struct {
	store.Store
	key     string
	deletes bool
	call    func()
}

func (h *hooked) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	if call := h.call; call != nil && slices.ContainsFunc(txn.Then, func(op store.Op) bool { return op.Key == h.key && op.Delete == h.deletes }) {
		h.call = nil
		call()
	}
	return h.Store.Commit(ctx, txn)
}
