package coordinator

import (
	"net/http"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/allocate"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// Further blocks: an agent whose half is full gets more agent subnets of the same
// overlay, and gives them back when they are empty. They are granted and freed in
// the transaction of its registration, as the first one is.

// reserve is the part of an overlay's blocks that further blocks are not taken from:
// an eighth, and one at least. It is for hosts that join.
const reserve = 8

// validateRoom refuses what no agent asks for.
func (c *Coordinator) validateRoom(req *api.RegisterRequest) error {
	for name, n := range req.Want {
		if conf.CheckName(name) != nil || n < 0 || n > conf.MaxBlocksPerAgent {
			return refuse(http.StatusBadRequest, "want of agent %s: %d blocks of overlay %.80q, at most %d", req.AgentID, n, name, conf.MaxBlocksPerAgent)
		}
	}
	if req.Return == nil {
		return nil
	}
	for name, blocks := range req.Return.Blocks {
		if conf.CheckName(name) != nil || len(blocks) > conf.MaxBlocksPerAgent {
			return refuse(http.StatusBadRequest, "return of agent %s: %d blocks of overlay %.80q", req.AgentID, len(blocks), name)
		}
	}
	return nil
}

// takeBackLocked takes further blocks back that the agent holds and returns. The
// first block stays whatever is returned. One that is returned without a family that the
// overlay has lost goes back whole: the agent has no address of that family in use.
func (c *Coordinator) takeBackLocked(p *plan, r *api.Return) {
	if r == nil || p.old == nil || r.Epoch != c.epochBase.Load()+p.old.mod { // as in the lease that the agent has
		return
	}
	for name, blocks := range r.Blocks {
		h := p.next.held(name)
		o, there := p.network.Overlay(name)
		var left []conf.Block
		before := len(p.freed)
		for _, b := range h.Blocks {
			returned := slices.Contains(blocks, b) || there && slices.Contains(blocks, familiesOf(&o, b))
			if returned && len(p.freed) < maxFreed {
				p.freed = append(p.freed, h.keys(b)...)
				continue
			}
			left = append(left, b)
		}
		h.Blocks = left
		if len(p.freed) > before {
			p.next = p.next.with(h)
		}
	}
}

// maxFreed is how many keys one registration gives back; the agent returns the rest
// with its next one. Together with maxBlocks it fits in one transaction.
const maxFreed = 20

// takeFurtherLocked gives the agent blocks until it has as many as it wants, or as
// can be had.
func (c *Coordinator) takeFurtherLocked(p *plan, o *conf.Overlay, want int) {
	pools := c.view.pools.overlays[o.Name]
	if c.adoptingLocked() > 0 {
		return // what is free may be in a lease that nobody has shown yet
	}
	for range min(want, o.Blocks()) {
		h := p.next.held(o.Name)
		v4, v6 := lacks(o, held{})
		switch {
		case !h.Subnet.IsValid() && !h.Subnet6.IsValid() || p.missing[o.Name] != "":
			return // it has not got the first one
		case 1+len(h.Blocks) >= min(want, o.Blocks()), !v4 && !v6, o.Draining:
			return
		case v4 && !spare(pools.v4), v6 && !spare(pools.v6):
			return
		case len(p.claimed)+2 > maxBlocks:
			p.more = true
			return
		}
		b, ok := c.takeBlockLocked(p, o, pools)
		if !ok {
			return
		}
		h.Blocks = append(slices.Clone(h.Blocks), b)
		p.next = p.next.with(h)
	}
}

// adoptFurtherLocked gives the agent the further blocks of the grant that it shows, in
// the place of those in its record: they are from before.
func (c *Coordinator) adoptFurtherLocked(p *plan, claim uint64, g conf.Grant) {
	h := p.next.held(g.Overlay.Name)
	before := h.Blocks
	h.Blocks = nil
	for _, b := range g.Blocks {
		var got conf.Block
		for _, s := range b.Prefixes() {
			key := keySubnet(h.Overlay, s)
			if p.size() >= maxBlocks {
				p.more, p.next.Adopted = true, claim-1 // the rest when that is written
			}
			if !p.next.owns(key) && (p.more || !c.claimLocked(p, h.Overlay, key, s)) {
				continue
			}
			if s.Addr().Is4() {
				got.Subnet = s
			} else {
				got.Subnet6 = s
			}
		}
		if got != (conf.Block{}) {
			h.Blocks = append(h.Blocks, got)
		}
	}
	kept := h.keys(h.Blocks...)
	for _, b := range before {
		b = less(b, func(s netip.Prefix) bool { return slices.Contains(kept, keySubnet(h.Overlay, s)) })
		switch {
		case b == (conf.Block{}):
		case p.size() >= maxBlocks:
			p.more, p.next.Adopted = true, claim-1
			h.Blocks = append(h.Blocks, b) // it goes when that is written
		default:
			p.dropped = append(p.dropped, h.keys(b)...)
		}
	}
	if !slices.Equal(before, h.Blocks) {
		p.next = p.next.with(h)
	}
}

// less is a block without the subnets that are kept elsewhere.
func less(b conf.Block, kept func(netip.Prefix) bool) conf.Block {
	for _, s := range [...]*netip.Prefix{&b.Subnet, &b.Subnet6} {
		if kept(*s) {
			*s = netip.Prefix{}
		}
	}
	return b
}

// takeBlockLocked takes a block of every family of the overlay, or nothing.
func (c *Coordinator) takeBlockLocked(p *plan, o *conf.Overlay, pools overlayPools) (b conf.Block, ok bool) {
	before := len(p.claimed)
	key := func(s netip.Prefix) string { return keySubnet(o.Name, s) }
	ok = true
	if o.Subnet.IsValid() {
		b.Subnet, ok = c.takeLocked(p, pools.v4, key)
	}
	if ok && o.Subnet6.IsValid() {
		b.Subnet6, ok = c.takeLocked(p, pools.v6, key)
	}
	if !ok {
		c.view.settle(p.claimed[before:])
		p.claimed = p.claimed[:before]
	}
	return b, ok
}

// spare reports whether a further block may be taken from a pool.
func spare(p *allocate.Pool) bool {
	free := p.Total() - min(p.Total(), p.Used())
	return free > max(1, p.Total()/reserve)
}

// granted are the blocks of an overlay, without the families that it no longer has.
func (h held) granted(o *conf.Overlay) (first conf.Block, further []conf.Block) {
	for _, b := range h.Blocks {
		if b = familiesOf(o, b); b != (conf.Block{}) {
			further = append(further, b)
		}
	}
	return familiesOf(o, conf.Block{Subnet: h.Subnet, Subnet6: h.Subnet6}), further
}

// familiesOf is a block without the families that the overlay no longer has, as the
// agent knows it.
func familiesOf(o *conf.Overlay, b conf.Block) conf.Block {
	if !o.Subnet.IsValid() {
		b.Subnet = netip.Prefix{}
	}
	if !o.Subnet6.IsValid() {
		b.Subnet6 = netip.Prefix{}
	}
	return b
}

// shed returns the record without some of its subnets, and their keys: about half as
// many as one transaction writes.
func (r record) shed(most int) (less record, keys []string) {
	less = r
	less.Subnets = slices.Clone(r.Subnets)
	for i := len(less.Subnets) - 1; i >= 0; i-- {
		h := less.Subnets[i]
		for len(h.Blocks) > 0 && len(keys) < most/2 {
			last := len(h.Blocks) - 1
			keys = append(keys, h.keys(h.Blocks[last])...)
			h.Blocks = h.Blocks[:last:last]
		}
		less.Subnets[i] = h
		if len(keys) >= most/2 {
			return less, keys
		}
		keys = append(keys, h.keys(conf.Block{Subnet: h.Subnet, Subnet6: h.Subnet6})...)
		less.Subnets = less.Subnets[:i]
	}
	return less, keys
}
