package coordinator

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unique"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// What coordinators tell each other through the store, and the next start of this
// one: which of them is at work, where each agent is connected, and when one
// that is not was seen last. Writes are few: a beat now and then, and one key
// where an agent comes or goes.
//
// A coordinator that has the store for itself writes no key while agents are
// connected: an agent without one was there until the last beat. Who has gone is
// written with the beats, and at the end.
const (
	prefixCoordinator = "coordinators/" // <run> -> beat
	prefixSeen        = "seen/"         // <agent id> -> seen

	beatShared = 5 * time.Second
	beatAlone  = 10 * time.Minute
	// beatFailed is how soon a coordinator tries again that could not write last.
	beatFailed = 30 * time.Second
	// deadCoordinator is how long after its last beat a coordinator, and what it
	// said about agents, counts no longer. It is measured on the clock of who
	// reads the beats.
	deadCoordinator = 15 * time.Second
	// returning is how long agents have to come back after a start, before they
	// count as last seen by the coordinator before.
	returning = 2 * time.Minute
	// sweeping is how long a beat may be kept waiting by what earlier coordinators
	// left in the store: others take one that does not beat for dead.
	sweeping = time.Second
	// gatherSeen is how long agents that come and go are gathered for one write.
	gatherSeen = 100 * time.Millisecond
	maxSeen    = 50 // agents in one transaction
)

func keyCoordinator(run string) string { return prefixCoordinator + run }
func keySeen(id string) string         { return prefixSeen + id }

// beat says that a coordinator was at work, by its wall clock.
type beat struct {
	At int64 `json:"at"` // Unix seconds
	// Clock is for how many seconds coordinators were at work in all. It never
	// jumps and stands still while none is, so it is what terms are measured by.
	Clock int64 `json:"clock,omitempty"`
	// URLs are where other coordinators reach it.
	URLs []string `json:"urls,omitempty"`
	// Ended: it is the last one, so nobody has to wait for the next.
	Ended bool `json:"ended,omitempty"`
}

type storedBeat struct {
	beat
	mod   uint64
	heard time.Time // when the view got it
}

// seen is where an agent is connected, or when it was seen last.
type seen struct {
	By string `json:"by,omitempty"` // run of the coordinator it is connected to
	At int64  `json:"at,omitempty"` // Unix seconds
	// Clock is the beat.Clock of then.
	Clock int64 `json:"clock,omitempty"`
	// Asks is an instance of the agent that came to another coordinator than By,
	// which is to find out whether the one that is connected to it lives; Lives is
	// the last one that was answered so. See instance.go.
	Asks  string `json:"asks,omitempty"`
	Lives string `json:"lives,omitempty"`
}

type storedSeen struct {
	seen
	mod   uint64
	heard time.Time
}

func (v *view) applySeen(e store.Event) error {
	id := strings.TrimPrefix(e.Key, prefixSeen)
	if e.Delete {
		delete(v.seen, id)
		return nil
	}
	s := storedSeen{mod: e.Mod, heard: time.Now()}
	if err := json.Unmarshal(e.Value, &s.seen); err != nil {
		return fmt.Errorf("key %s: %w", e.Key, err)
	}
	s.By = unique.Make(s.By).Value() // a few coordinators, many agents
	v.seen[v.name(id)] = s
	return nil
}

func (v *view) applyBeat(e store.Event) error {
	run := strings.TrimPrefix(e.Key, prefixCoordinator)
	if e.Delete {
		delete(v.beats, run)
		return nil
	}
	b := storedBeat{mod: e.Mod, heard: time.Now()}
	if err := json.Unmarshal(e.Value, &b.beat); err != nil {
		return fmt.Errorf("key %s: %w", e.Key, err)
	}
	v.beats[run] = b
	return nil
}

// seenAnewLocked takes in what coordinators said, of agents and that they are at work,
// while the view was behind. What they said before that was heard then, and not now.
func (c *Coordinator) seenAnewLocked(old *view) {
	for run, b := range c.view.beats {
		if was := old.beats[run]; was.mod == b.mod {
			c.view.beats[run] = was
		} else {
			c.heardLocked(run)
		}
	}
	for id, s := range c.view.seen {
		if was := old.seen[id]; was.mod == s.mod {
			c.view.seen[id] = was
		} else {
			c.seenChangedLocked(id)
		}
	}
	for id := range old.seen {
		if _, there := c.view.seen[id]; !there {
			c.seenChangedLocked(id)
		}
	}
}

// connectedElsewhereLocked reports whether an agent is connected to another
// coordinator that is at work.
func (c *Coordinator) connectedElsewhereLocked(id string) bool {
	s := c.view.seen[id]
	return s.By != "" && s.By != c.run && !c.deadLocked(s.By)
}

// deadLocked reports whether another coordinator is at work no longer.
func (c *Coordinator) deadLocked(run string) bool {
	b, ok := c.view.beats[run]
	return !c.shared || !ok || b.Ended || time.Since(b.heard) > deadCoordinator
}

// lastSeenLocked is when an agent was last heard of, now when it is connected; zero
// when nobody knows.
func (c *Coordinator) lastSeenLocked(id string) time.Time {
	p, s := c.presence[id], c.view.seen[id]
	var stored time.Time
	switch {
	case p != nil && len(p.watches) > 0, c.connectedElsewhereLocked(id):
		return time.Now()
	case s.At != 0:
		stored = time.Unix(s.At, 0)
	case s.By != "" && s.By != c.run:
		stored = unixTime(c.view.beats[s.By].At)
	case !c.shared:
		stored = unixTime(c.lastBeatLocked().At)
	}
	if p != nil && p.seen.After(stored) {
		return p.seen
	}
	return stored // also where it was here once, and elsewhere since
}

func unixTime(seconds int64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0)
}

// lastBeatLocked is the latest beat of the coordinators before this one. The wall
// clock of one of them may have been ahead.
func (c *Coordinator) lastBeatLocked() (last beat) {
	for run, b := range c.view.beats {
		if run != c.run && cmp.Or(cmp.Compare(b.Clock, last.Clock), cmp.Compare(b.At, last.At)) > 0 {
			last = b.beat
		}
	}
	return last
}

// clock is beat.Clock as of now; it begins at 1, because 0 stands for none.
func (c *Coordinator) clock() int64 { return c.clockBase + 1 + int64(time.Since(c.started).Seconds()) }

// clockAt is clock as it was at a time since the start.
func (c *Coordinator) clockAt(t time.Time) int64 { return c.clock() - int64(time.Since(t).Seconds()) }

// noteSeenLocked has it written where an agent is, or that it has gone.
func (c *Coordinator) noteSeenLocked(id string) {
	if s := c.view.seen[id]; !c.shared && s.mod == 0 && c.presence[id] != nil && len(c.presence[id].watches) > 0 {
		return // nothing to say
	}
	c.moves[id] = struct{}{}
	c.move()
}

// noteRenewalLocked has it written now and then that an agent is alive which renews
// and is connected nowhere: by what is written its lease would expire.
func (c *Coordinator) noteRenewalLocked(id string) {
	s := c.view.seen[id]
	if s.By == "" && s.Clock != 0 && c.clock()-s.Clock > int64(c.term.Seconds())/4 {
		c.noteSeenLocked(id)
	}
}

// move has moves written soon. It never waits: who takes the token from moved
// calls it, too.
func (c *Coordinator) move() {
	select {
	case c.moved <- struct{}{}:
	default:
	}
}

// keepPresence writes beats, and who comes and goes, until ctx ends.
func (c *Coordinator) keepPresence(ctx context.Context) {
	every := beatAlone
	if c.shared {
		every = beatShared
	}
	moved := c.moved
	if !c.shared {
		moved = nil // nobody waits for it
	}
	next := time.NewTicker(every)
	defer next.Stop()
	again := time.NewTicker(beatFailed)
	defer again.Stop()
	swept := false
	for {
		select {
		case <-next.C:
			c.beat(ctx)
			c.writeSeen(ctx)
			c.sweepSeen(ctx)
			swept = swept || c.sweepIPs(ctx)
		case <-again.C:
			if c.writeFailed() {
				c.beat(ctx)
			}
		case <-moved:
			select {
			case <-time.After(gatherSeen):
			case <-ctx.Done():
			}
			if !c.writeSeen(ctx) {
				select { // the next beat sees to it
				case <-next.C:
					c.beat(ctx)
					c.move()
				case <-ctx.Done():
				}
			}
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			c.beatAs(last, true)
			if !c.shared {
				c.writeSeen(last)
			}
			return
		}
	}
}

func (c *Coordinator) beatOp() store.Op {
	return c.beatOpAs(false)
}

func (c *Coordinator) beatOpAs(ended bool) store.Op {
	return store.Op{Key: keyCoordinator(c.run), Value: encode(beat{At: time.Now().Unix(), Clock: c.clock(), URLs: c.urls, Ended: ended})}
}

func (c *Coordinator) beat(ctx context.Context) { c.beatAs(ctx, false) }

func (c *Coordinator) beatAs(ctx context.Context, ended bool) {
	_, err := c.store.Commit(ctx, store.Txn{Then: []store.Op{c.beatOpAs(ended)}})
	c.noteWrite(err)
}

// writeSeen writes what is to be said of the agents that came or went. It reports
// whether all of it was written.
func (c *Coordinator) writeSeen(ctx context.Context) bool {
	for {
		c.mu.Lock()
		var ids []string
		var txn store.Txn
		for id := range c.moves {
			if len(ids) == maxSeen {
				break
			}
			ids = append(ids, id)
			delete(c.moves, id)
			c.composeSeenLocked(&txn, id)
		}
		c.mu.Unlock()
		if len(ids) == 0 {
			return true
		}
		if err := c.commitSeen(ctx, txn, c.shared); err != nil {
			c.mu.Lock()
			for _, id := range ids {
				c.moves[id] = struct{}{}
			}
			c.mu.Unlock()
			return false
		}
	}
}

// commitSeen writes, and waits until the view has it if that is wanted. At the end
// the view follows no longer.
func (c *Coordinator) commitSeen(ctx context.Context, txn store.Txn, wait bool) error {
	if len(txn.Then) == 0 {
		return nil
	}
	rev, err := c.store.Commit(ctx, txn)
	c.noteWrite(err)
	if err != nil || !wait {
		return err
	}
	return c.await(ctx, rev)
}

// composeSeenLocked adds what is to be said of an agent, if anything.
func (c *Coordinator) composeSeenLocked(txn *store.Txn, id string) {
	p, s := c.presence[id], c.view.seen[id]
	connected := p != nil && len(p.watches) > 0
	op := store.Op{Key: keySeen(id)}
	switch {
	case c.view.agents[id] == nil || connected && !c.shared:
		if s.mod == 0 {
			return
		}
		op.Delete = true
	case connected:
		now := seen{By: c.run}
		if s.By == c.run {
			now = s.seen
		}
		if p.contest != nil && p.contest.answered.After(s.heard) {
			now.Lives = now.Asks
		}
		if now == s.seen {
			return
		}
		op.Value = encode(now)
	case s.At != 0 && s.By == "" && (p == nil || c.clockAt(p.seen) <= s.Clock):
		return // gone already, and not seen since
	case c.shared && s.By != "" && s.By != c.run:
		return // it is elsewhere
	default:
		at := time.Now()
		if p != nil && !p.seen.IsZero() {
			at = p.seen
		}
		op.Value = encode(seen{At: at.Unix(), Clock: c.clockAt(at)})
	}
	txn.If = append(txn.If, store.Cond{Key: op.Key, Mod: s.mod})
	txn.Then = append(txn.Then, op)
}

// sweepSeen writes down when the agents of coordinators that are dead were seen
// last, and forgets those coordinators.
func (c *Coordinator) sweepSeen(ctx context.Context) {
	if time.Since(c.started) < returning {
		return
	}
	for end := time.Now().Add(sweeping); time.Now().Before(end); {
		txn := c.planSweep()
		if len(txn.Then) == 0 || c.commitSeen(ctx, txn, true) != nil {
			return
		}
	}
}

// unknownLocked reports whether nobody knows when an agent was seen that was there when
// this coordinator began: the store was copied or put back, and the coordinator that it
// was connected to has its beats in another.
func (c *Coordinator) unknownLocked(a *agent) bool {
	s := c.view.seen[a.id]
	if s.mod == 0 {
		return a.mod <= c.firstRev
	}
	_, beats := c.view.beats[s.By]
	return s.By != "" && s.By != c.run && !beats
}

// planSweep is the next transaction of sweepSeen.
func (c *Coordinator) planSweep() (txn store.Txn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	dead := maps.Clone(c.view.beats)
	maps.DeleteFunc(dead, func(run string, _ storedBeat) bool { return run == c.run || !c.deadLocked(run) })
	last := c.lastBeatLocked()
	for id, a := range c.view.agents {
		s, p := c.view.seen[id], c.presence[id]
		by, ok := dead[s.By]
		at, clock := by.At, by.Clock
		switch {
		case ok:
		case !c.shared && s.mod == 0 && len(dead) > 0:
			at, clock = last.At, last.Clock
		case c.unknownLocked(a):
			at, clock = time.Now().Unix(), c.clock()
		default:
			continue
		}
		switch {
		case p == nil:
		case len(p.watches) > 0:
			continue // it is here
		case c.clockAt(p.seen) > clock: // it was since
			at, clock = p.seen.Unix(), c.clockAt(p.seen)
		}
		txn.If = append(txn.If, store.Cond{Key: keySeen(id), Mod: s.mod})
		txn.Then = append(txn.Then, store.Op{Key: keySeen(id), Value: encode(seen{At: at, Clock: clock})})
		if len(txn.Then) == maxSeen {
			return txn
		}
	}
	if len(txn.Then) > 0 {
		return txn
	}
	if len(dead) == 0 {
		return txn
	}
	gone := slices.SortedFunc(maps.Keys(dead), func(a, b string) int { return cmp.Compare(dead[a].mod, dead[b].mod) })
	for _, run := range gone[:min(maxSeen, len(gone))] {
		txn.If = append(txn.If, store.Cond{Key: keyCoordinator(run), Mod: dead[run].mod})
		txn.Then = append(txn.Then, store.Op{Key: keyCoordinator(run), Delete: true})
	}
	return txn
}
