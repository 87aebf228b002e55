// Package transfer moves the content of one store to another, or to a file and
// back, and checks every entry that it has written.
//
// What counts revisions does not move: the runs and the beats of coordinators stay
// behind. The epochs of leases go on above all that were given before, because
// the new store's revisions begin anew; see Cluster.
package transfer

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// ErrNotEmpty: the store to write to holds something.
var ErrNotEmpty = errors.New("the store to write to is not empty")

// KeyCluster is the key of Cluster.
const KeyCluster = "cluster"

// Cluster is what is stored about the cluster as a whole.
type Cluster struct {
	ID string `json:"id"`
	// EpochBase is added to the revision of an agent's record to make the epoch of
	// its lease. A store that was put together anew begins at the time in
	// milliseconds, so that its epochs are higher than any given before.
	EpochBase uint64 `json:"epoch_base,omitempty"`
	// Past are the bases before, the latest last.
	Past []Base `json:"past,omitempty"`
	// Adopting is the clock of the coordinators (see package coordinator) when it was
	// found out that leases are missing in the store; 0: none are, or those who held
	// them have had the time to say so.
	Adopting int64 `json:"adopting,omitempty"`
	// Lost is what Adopting was last; it stays. Agents may have been seen after the
	// store says that they were gone.
	Lost int64 `json:"lost,omitempty"`
	// Clock is where the clock goes on in this store, and Adopting counts from there at
	// the earliest: when agents were seen is measured by it, and moves.
	Clock int64 `json:"clock,omitempty"`
}

// Base was the epoch base up to a revision.
type Base struct {
	Until uint64 `json:"until"` // the last revision
	Base  uint64 `json:"base"`
	// Flat: nobody knows any more at which revisions what was written up to then was
	// granted, so all of it counts as granted at Base.
	Flat bool `json:"flat,omitempty"`
}

// maxPast is how many bases are remembered.
const maxPast = 64

// Epoch is the epoch of what was written at a revision, by the base of that time.
func (c Cluster) Epoch(revision uint64) uint64 {
	for _, b := range c.Past {
		switch {
		case revision > b.Until:
		case b.Flat:
			return b.Base
		default:
			return b.Base + revision
		}
	}
	return c.EpochBase + revision
}

// Raised is the cluster with epochs from now on above at least, and above all that
// its store can have given up to a revision.
func (c Cluster) Raised(revision, least uint64, now time.Time) Cluster {
	c.Past = append(slices.Clone(c.Past), Base{Until: revision, Base: c.EpochBase})
	c.Past = c.Past[max(0, len(c.Past)-maxPast):]
	c.EpochBase = max(c.EpochBase+revision, least, uint64(now.UnixMilli()))
	return c
}

// left are the keys that do not move.
var left = []string{"runs", "coordinators/"}

// Entry is one key.
type Entry struct {
	Key   string `json:"key"`
	Value []byte `json:"value"`
}

// Content is everything that a store holds and that moves, in the order in which
// the keys were made.
type Content struct {
	Cluster  Cluster
	Revision uint64 // of the store it was read from
	Entries  []Entry
}

// Read reads a store as it is at one revision.
func Read(ctx context.Context, from store.Store) (Content, error) {
	kvs, rev, err := from.List(ctx, "")
	if err != nil {
		return Content{}, fmt.Errorf("read the store: %w", err)
	}
	slices.SortStableFunc(kvs, func(a, b store.KV) int { return cmp.Compare(a.Create, b.Create) })
	c := Content{Revision: rev}
	for _, kv := range kvs {
		if slices.ContainsFunc(left, func(prefix string) bool { return strings.HasPrefix(kv.Key, prefix) }) {
			continue
		}
		c.Entries = append(c.Entries, Entry{kv.Key, kv.Value})
	}
	return c, c.check()
}

// check reads who the cluster is, and refuses what is none.
func (c *Content) check() error {
	seen := map[string]bool{}
	for _, e := range c.Entries {
		if seen[e.Key] {
			return fmt.Errorf("key %q stands there twice", e.Key)
		}
		seen[e.Key] = true
		if e.Key == KeyCluster {
			if err := json.Unmarshal(e.Value, &c.Cluster); err != nil {
				return fmt.Errorf("key %s: %w", e.Key, err)
			}
		}
		if err := store.Validate(store.Txn{Then: []store.Op{{Key: e.Key, Value: e.Value}}}); err != nil {
			return err
		}
	}
	if c.Cluster.ID == "" {
		return errors.New("it holds no cluster: the key \"cluster\" is missing")
	}
	return nil
}

// batch is how many entries are written in one transaction.
const batch = 100

// Copy writes the content to an empty store, as the one store moves to the other,
// and reads back every entry. A store that was written half is not empty; start with
// an empty one again.
func (c Content) Copy(ctx context.Context, to store.Store, now time.Time) error {
	c.Cluster.Past = []Base{{Base: c.Cluster.EpochBase + c.Revision, Flat: true}}
	c.Cluster.Adopting = min(c.Cluster.Adopting, 1) // anew
	return c.write(ctx, to, now)
}

// Restore is Copy of what was read some time ago: agents may hold leases that are
// not in it. They are adopted.
func (c Content) Restore(ctx context.Context, to store.Store, now time.Time) error {
	c.Cluster.Past, c.Cluster.Adopting, c.Cluster.Lost = []Base{{Flat: true}}, 1, max(1, c.clock())
	return c.write(ctx, to, now)
}

// clock is the latest that an agent was seen at, by the clock of the coordinators.
func (c *Content) clock() int64 {
	latest := max(c.Cluster.Clock, c.Cluster.Lost)
	for _, e := range c.Entries {
		var seen struct {
			Clock int64 `json:"clock"`
		}
		if strings.HasPrefix(e.Key, "seen/") && json.Unmarshal(e.Value, &seen) == nil {
			latest = max(latest, seen.Clock)
		}
	}
	return latest
}

// write writes the cluster last, with the base that everything before it is of.
func (c Content) write(ctx context.Context, to store.Store, now time.Time) error {
	kvs, _, err := to.List(ctx, "")
	if err != nil {
		return fmt.Errorf("read the store to write to: %w", err)
	}
	if len(kvs) > 0 {
		return fmt.Errorf("%w: it has %d keys, for example %q; name an empty one", ErrNotEmpty, len(kvs), kvs[0].Key)
	}
	cluster := c.Cluster
	cluster.Clock = c.clock()
	cluster.EpochBase = max(cluster.EpochBase+c.Revision, uint64(now.UnixMilli()))
	want := make(map[string][]byte, len(c.Entries))
	var entries []Entry
	for _, e := range c.Entries {
		if e.Key != KeyCluster {
			entries = append(entries, e)
			want[e.Key] = e.Value
		}
	}
	if err := fill(ctx, to, entries, want, cluster); err != nil {
		return fmt.Errorf("%w; what was written until then is still there: empty the store, or name another one, before you try again", err)
	}
	return nil
}

// fill writes the entries and the cluster, and reads them back.
func fill(ctx context.Context, to store.Store, entries []Entry, want map[string][]byte, cluster Cluster) error {
	for part := range slices.Chunk(entries, batch) {
		if err := writePart(ctx, to, part); err != nil {
			return fmt.Errorf("write %q and what follows: %w", part[0].Key, err)
		}
	}
	// The cluster comes last: a store without one is not taken for whole.
	_, revision, err := to.List(ctx, KeyCluster)
	if err != nil {
		return fmt.Errorf("read the store to write to: %w", err)
	}
	cluster.Past[0].Until = revision
	value, err := json.Marshal(cluster)
	if err != nil {
		return err
	}
	want[KeyCluster] = value
	if err := writePart(ctx, to, []Entry{{KeyCluster, value}}); err != nil {
		return fmt.Errorf("write %q: %w", KeyCluster, err)
	}
	return verify(ctx, to, want)
}

// writePart writes keys that must not be there. When the outcome is unknown, the
// last check finds out.
func writePart(ctx context.Context, to store.Store, part []Entry) error {
	var txn store.Txn
	for _, e := range part {
		txn.If = append(txn.If, store.Cond{Key: e.Key})
		txn.Then = append(txn.Then, store.Op{Key: e.Key, Value: e.Value})
	}
	const attempts = 5
	for attempt := range attempts {
		_, err := to.Commit(ctx, txn)
		switch {
		case err == nil, errors.Is(err, store.ErrConflict) && attempt > 0:
			return nil // a conflict with what an attempt before has written
		case !errors.Is(err, store.ErrUnknown):
			return err
		}
	}
	return fmt.Errorf("%w after %d attempts", store.ErrUnknown, attempts)
}

// verify compares what a store holds with what it should, entry by entry.
func verify(ctx context.Context, s store.Store, want map[string][]byte) error {
	kvs, _, err := s.List(ctx, "")
	if err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	for _, kv := range kvs {
		value, ok := want[kv.Key]
		switch {
		case !ok:
			return fmt.Errorf("read back: key %q was not written by this copy; does a coordinator use the store?", kv.Key)
		case !bytes.Equal(value, kv.Value):
			return fmt.Errorf("read back: key %q has another value than was written", kv.Key)
		}
	}
	if len(kvs) != len(want) {
		return fmt.Errorf("read back: %d keys, %d were written", len(kvs), len(want))
	}
	return nil
}
