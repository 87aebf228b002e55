package agent

import (
	"context"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/crashpoint"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// What the loop does about further blocks. room.go decides that one is needed, or no
// longer; the loop alone changes what the host has:
//
//	        want                       granted
//	room ---------> next registration ---------> held, programmed, published
//
//	      retired in the store          lease.json says that it is not used
//	room ----------------------> loop ---------------------------------------> kernel and
//	      document without it ---> next registration returns it ---> lease without it
//
// A crash at any of these steps leaves the block with this host alone: in use, or
// retired and not used, or returned; and who is returned a block that is his again
// uses it again.

// returnedBlock is a further block that the host no longer uses.
type returnedBlock struct {
	Overlay string     `json:"overlay"`
	Block   conf.Block `json:"block"`
	Epoch   uint64     `json:"epoch"` // of the lease it was returned under
}

// roomAsks is what a registration asks for besides the lease.
type roomAsks struct {
	want map[string]int
	back *api.Return
}

// inUse is the lease without the blocks that are returned.
func (h *heldLease) inUse() conf.Lease {
	l := h.Lease
	if len(h.returned) == 0 {
		return l
	}
	l.Grants = slices.Clone(l.Grants)
	for i, g := range l.Grants {
		l.Grants[i].Blocks = slices.DeleteFunc(slices.Clone(g.Blocks), func(b conf.Block) bool {
			return slices.ContainsFunc(h.returned, func(r returnedBlock) bool { return r.Overlay == g.Overlay.Name && r.Block == b })
		})
	}
	return l
}

// has reports whether a lease has a further block.
func has(l conf.Lease, overlay string, b conf.Block) bool {
	return slices.ContainsFunc(l.Grants, func(g conf.Grant) bool { return g.Overlay.Name == overlay && slices.Contains(g.Blocks, b) })
}

// stillReturned are the returned blocks that an answer of the coordinator leaves so.
// What it no longer has is done. What it has in another epoch than that of the return
// is this host's again: a return that is still on its way is void.
func stillReturned(before *heldLease, now conf.Lease) (out []returnedBlock) {
	if before == nil || before.ClusterID != now.ClusterID {
		return nil
	}
	for _, r := range before.returned {
		if has(now, r.Overlay, r.Block) && now.Epoch == r.Epoch {
			out = append(out, r)
		}
	}
	return out
}

// takeAnswer takes in how much of what was wanted an answer brought.
func (l *loop) takeAnswer(r registration) {
	l.lease.short = map[string]bool{}
	for _, g := range r.lease.Grants {
		name := g.Overlay.Name
		l.lease.short[name] = len(g.All()) < r.want[name]
	}
	want := map[string]int{}
	if asks := l.lease.asks.Load(); asks != nil {
		want = asks.want
	}
	l.ask(want)
}

// ask sets what registrations ask for from now on. Nothing is returned that the
// kernel may still have, or who reads what was published.
func (l *loop) ask(want map[string]int) {
	var back *api.Return
	if held := l.lease.held; held != nil && len(held.returned) > 0 && l.outcome.applied && !l.outcome.failing && l.published.err == nil {
		back = &api.Return{Epoch: held.Epoch, Blocks: map[string][]conf.Block{}}
		for _, r := range held.returned {
			back.Blocks[r.Overlay] = append(back.Blocks[r.Overlay], r.Block)
		}
	}
	l.lease.asks.Store(&roomAsks{want: want, back: back})
}

// roomChanged takes in what was found of how full the halves are.
func (l *loop) roomChanged(ctx context.Context, n roomNews) {
	defer close(n.taken)
	held := l.lease.held
	if held == nil {
		return
	}
	var back []returnedBlock
	for _, b := range n.empty {
		if has(held.inUse(), b.overlay, b.block) {
			back = append(back, returnedBlock{Overlay: b.overlay, Block: b.block, Epoch: held.Epoch})
		}
	}
	crashpoint.At("room-looked")
	if len(back) > 0 {
		before := held.returned
		held.returned = append(slices.Clone(before), back...)
		// An agent that starts again must not use what it has returned.
		if l.saveLease(); l.problems.Text(storeLeaseProblem) != "" {
			held.returned = before
			return
		}
		crashpoint.At("return-stored")
		for _, b := range back {
			l.log.Info("further block is empty and given back", logkey.Overlay, b.Overlay, logkey.Subnets, b.Block.Prefixes())
		}
		l.reconcile(ctx, false)
		crashpoint.At("return-published")
	}
	l.ask(n.want)
	if len(back) > 0 || len(n.want) > 0 {
		kick(l.registrar.kick)
	}
}

// hasRoom are the overlays that a further block can be had of, as far as is known and
// the coordinator answers.
func (l *loop) hasRoom() (out []string) {
	if len(l.opts.Bridges) == 0 {
		return nil
	}
	for _, g := range l.lease.held.inUse().Grants {
		name := g.Overlay.Name
		if g.Overlay.IsEnabled() && !g.Overlay.Draining && !l.lease.short[name] && len(g.All()) > 0 && len(g.All()) < mostBlocks(g.Overlay) {
			out = append(out, name)
		}
	}
	return out
}

// mostBlocks is how many blocks of an overlay are of use to a host: a bridge has no
// more ports than one large block has addresses.
func mostBlocks(o conf.Overlay) int {
	shared := 0
	if o.Shared() { // one pool has all of it
		shared = 1
	}
	for _, family := range [...]struct {
		there bool
		bits  int
	}{{o.Subnet.IsValid(), 32 - o.Prefix}, {o.Subnet6.IsValid(), 128 - o.Prefix6}} {
		if family.there && family.bits <= smallBlock-shared {
			return o.Blocks()
		}
	}
	return 1
}

// smallBlock is the most host bits of a block whose halves run out of addresses
// before a bridge runs out of ports.
const smallBlock = 10

// showRoom tells room what the host has now.
func (l *loop) showRoom(overlays []conf.AgentOverlay) {
	if l.published.err != nil || !l.outcome.applied {
		return
	}
	l.room.show(overlays)
}
