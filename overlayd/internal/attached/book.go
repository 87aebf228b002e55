// Package attached is what every agent of the cluster has attached, and how full
// its halves are, as the agents report it: packed, since there may be a million
// containers, searched and summed. It is kept in memory alone; after a start the
// agents report again.
package attached

import (
	"errors"
	"maps"
	"math"
	"slices"
	"sync"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// ErrSnapshotWanted: what the report continues is not known.
var ErrSnapshotWanted = errors.New("the report before this one is not known here")

// ErrTooMany: with the report the agent would have more than it may.
var ErrTooMany = errors.New("too many attachments")

// MaxAddresses is how many addresses an attachment may have.
const MaxAddresses = 15

// Book is safe for concurrent use.
type Book struct {
	mu        sync.RWMutex
	agents    map[string]*agent // none of them ever changes; a report replaces one
	totals    map[string]int    // attachments, by overlay
	followers map[*Follower]struct{}
}

// agent is what one agent has reported.
type agent struct {
	instance string
	sequence uint64
	source   string // the coordinator that it came from; empty: the agent itself
	kinds    kinds
	count    int
	records  []byte // see pack.go
	usage    []byte
	problems []string
	host     *api.Host // never changed; nil: it has not said
}

// New makes an empty book.
func New() *Book {
	return &Book{agents: map[string]*agent{}, totals: map[string]int{}, followers: map[*Follower]struct{}{}}
}

// Change is what a report has changed.
type Change struct {
	First    bool // nothing was known of the agent
	Attached []api.Attachment
	Detached []api.Attachment
	Levels   []api.HalfUsage // of halves whose level is another one
	Begun    []string        // problems
	Ended    []string
}

// Apply takes a report of an agent in, which may have so many attachments at most.
// A report that was taken in before changes nothing.
func (b *Book) Apply(r api.AttachmentReport, most int) (Change, error) {
	return b.apply(r, "", most, func(known *agent) bool {
		return known == nil || known.instance != r.Instance || r.Sequence >= known.sequence
	})
}

// Copy takes in what another coordinator was told by an agent, which is all that
// the agent has. It is left alone where more is known. current is the instance
// that the agent has registered with.
func (b *Book) Copy(r api.AttachmentReport, source, current string) (Change, error) {
	return b.apply(r, source, math.MaxInt, func(known *agent) bool {
		switch {
		case known == nil:
			return true
		case known.instance == r.Instance:
			return r.Sequence > known.sequence || r.Sequence == known.sequence && known.source != ""
		}
		return r.Instance == current
	})
}

func (b *Book) apply(r api.AttachmentReport, source string, most int, newer func(*agent) bool) (Change, error) {
	if len(r.Put) > most {
		return Change{}, ErrTooMany
	}
	for {
		b.mu.RLock()
		old := b.agents[r.AgentID]
		b.mu.RUnlock()
		same := old != nil && old.instance == r.Instance
		switch {
		case r.Snapshot && !newer(old):
			return Change{}, nil
		case r.Snapshot:
		case same && r.Sequence == old.sequence:
			if old.source == source {
				return Change{}, nil
			}
		case !same || r.Sequence != old.sequence+1:
			return Change{}, ErrSnapshotWanted
		}
		now, change := old.with(r, source)
		if now.count > most {
			return Change{}, ErrTooMany
		}
		if b.replace(r.AgentID, old, now) {
			return change, nil
		}
	}
}

// replace puts an agent in the place of another one, if that is still there.
func (b *Book) replace(id string, old, now *agent) bool {
	was, is := old.byOverlay(), now.byOverlay()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.agents[id] != old {
		return false
	}
	b.agents[id] = now
	b.count(was, is)
	if now.source == "" {
		for f := range b.followers {
			f.mark(id)
		}
	}
	return true
}

// with is the agent after a report. old may be nil.
func (old *agent) with(r api.AttachmentReport, source string) (*agent, Change) {
	change := Change{First: old == nil}
	if old == nil {
		old = &agent{}
	}
	if r.Sequence == old.sequence && !r.Snapshot && old.instance == r.Instance {
		now := *old // the agent has come here from another coordinator, and nothing is new
		now.source = source
		return &now, change
	}
	now := &agent{instance: r.Instance, sequence: r.Sequence, source: source, problems: old.problems, host: old.host}
	before := map[string]api.Attachment{}
	for a := range old.attachments() {
		before[a.Key()] = a
	}
	after := map[string]api.Attachment{}
	if !r.Snapshot {
		maps.Copy(after, before)
	}
	for _, key := range r.Delete {
		delete(after, key)
	}
	for _, a := range r.Put {
		after[a.Key()] = a
	}
	now.pack(after)
	change.compare(before, after)
	now.packUsage(old, r, &change)
	switch {
	case r.Problems != nil:
		now.problems = slices.Clone(*r.Problems)
	case r.Snapshot:
		now.problems = nil
	}
	switch {
	case r.Host != nil:
		host := *r.Host
		now.host = &host
	case r.Snapshot:
		now.host = nil
	}
	change.Begun = without(now.problems, old.problems)
	change.Ended = without(old.problems, now.problems)
	return now, change
}

func (a *agent) pack(all map[string]api.Attachment) {
	list := slices.Collect(maps.Values(all))
	slices.SortFunc(list, byOrder)
	var b []byte
	for _, x := range list {
		b = appendRecord(b, a.kinds.find(kindOf(x)), x)
	}
	a.records, a.count = slices.Clip(slices.Clone(b)), len(list)
}

// packUsage takes over the usage that is not replaced.
func (a *agent) packUsage(old *agent, r api.AttachmentReport, change *Change) {
	type half struct {
		overlay string
		half    conf.Half
	}
	before := map[half]api.HalfUsage{}
	for u := range old.usages() {
		before[half{u.Overlay, u.Half}] = u
	}
	list := slices.Clone(r.Usage)
	for _, u := range list {
		key := half{u.Overlay, u.Half}
		if before[key].Level() != u.Level() {
			change.Levels = append(change.Levels, u)
		}
		delete(before, key)
	}
	if !r.Snapshot {
		for u := range old.usages() {
			if _, kept := before[half{u.Overlay, u.Half}]; kept {
				list = append(list, u)
			}
		}
	}
	var b []byte
	for _, u := range list {
		b = appendUsage(b, a.kinds.find(kind{overlay: u.Overlay, half: u.Half}), u)
	}
	a.usage = slices.Clip(slices.Clone(b))
	a.kinds = slices.Clip(slices.Clone(a.kinds))
}

func (c *Change) compare(before, after map[string]api.Attachment) {
	for key, a := range after {
		if was, ok := before[key]; !ok || !slices.Equal(was.Addresses, a.Addresses) {
			c.Attached = append(c.Attached, a)
		}
	}
	for key, a := range before {
		if is, ok := after[key]; !ok || !slices.Equal(is.Addresses, a.Addresses) {
			c.Detached = append(c.Detached, a)
		}
	}
	slices.SortFunc(c.Attached, byOrder)
	slices.SortFunc(c.Detached, byOrder)
}

func without(list, these []string) (out []string) {
	for _, s := range list {
		if !slices.Contains(these, s) {
			out = append(out, s)
		}
	}
	return out
}

// Forget drops what is known of an agent.
func (b *Book) Forget(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.count(b.agents[id].byOverlay(), nil)
	delete(b.agents, id)
}

// count takes in that an agent has other attachments. The caller has mu.
func (b *Book) count(was, is map[string]int) {
	for overlay, n := range was {
		if b.totals[overlay] -= n; b.totals[overlay] == 0 {
			delete(b.totals, overlay)
		}
	}
	for overlay, n := range is {
		b.totals[overlay] += n
	}
}

// byOverlay counts what an agent has attached. The agent may be nil.
func (a *agent) byOverlay() map[string]int {
	if a == nil {
		return nil
	}
	out := map[string]int{}
	for b := a.records; len(b) > 0; {
		var r record
		r, b = next(b)
		out[a.kinds[r.kind].Value().overlay]++
	}
	return out
}

// Has reports whether the agent has reported.
func (b *Book) Has(id string) bool { return b.get(id) != nil }

// Knows reports whether that start of the agent has reported.
func (b *Book) Knows(id, instance string) bool {
	a := b.get(id)
	return a != nil && a.instance == instance
}

// Agents is how many agents have reported.
func (b *Book) Agents() int {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return len(b.agents)
}

// Len is how many attachments there are.
func (b *Book) Len() (n int) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	for _, a := range b.agents {
		n += a.count
	}
	return n
}

func (b *Book) get(id string) *agent {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.agents[id]
}
