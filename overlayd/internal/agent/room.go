package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/ipam/rebuild"
	"overlayd.internal/overlay/overlayd/internal/crashpoint"
	"overlayd.internal/overlay/overlayd/internal/dirwatch"
	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/problems"
)

// A room looks at how full the halves are: whenever a program has changed an address
// store, and now and then. It says that an overlay needs a further block before the
// last address of a half is gone, and that one may be given back when it has been
// empty for long. It is a goroutine of its own because address stores may have to be
// waited for.
type room struct {
	dir     string // of the stores
	cooling time.Duration
	idle    time.Duration // how long a block has to be empty
	every   time.Duration
	pause   time.Duration
	now     func() time.Duration
	log     *slog.Logger

	unfiled  func() // has dockerd asked whose address is whose; it does not block
	watch    *dirwatch.Watch
	problems *problems.Set
	shown    chan struct{} // capacity 1: show was called
	out      chan roomNews

	mu       sync.Mutex
	overlays []conf.AgentOverlay // as published

	// Of the goroutine.
	seen  map[string]looked // by overlay
	empty map[ownBlock]time.Duration
	said  map[string]int // want of the last news
}

// roomNews is what a look found. taken is closed when the loop has taken it in.
type roomNews struct {
	want  map[string]int // how many blocks the overlays should have
	empty []ownBlock     // retired in the store: no address of them is given out any more
	taken chan struct{}
}

// ownBlock is a further block of this host.
type ownBlock struct {
	overlay string
	block   conf.Block
}

// looked is what the last look at an overlay's store found, and of which file.
type looked struct {
	at      time.Time
	written time.Time // zero: there was no file
	blocks  []conf.Block
	want    int
}

func (a *Agent) newRoom(log *slog.Logger) *room {
	unfiled := func() {}
	if a.docker != nil {
		unfiled = a.docker.LookSoon
	}
	return &room{
		unfiled: unfiled,
		dir:     filepath.Join(a.opts.RunDir, conf.IPAMDir), cooling: a.opts.Cooling, idle: a.opts.BlockIdle,
		every: a.timing.room, pause: a.timing.roomPause, now: conf.Boottime, log: log,
		watch: dirwatch.New(), problems: problems.New(log),
		shown: make(chan struct{}, 1), out: make(chan roomNews),
		seen: map[string]looked{}, empty: map[ownBlock]time.Duration{}, said: map[string]int{},
	}
}

// show says which overlays there are, with their blocks. It does not block.
func (r *room) show(overlays []conf.AgentOverlay) {
	r.mu.Lock()
	r.overlays = overlays
	r.mu.Unlock()
	kick(r.shown)
}

// run looks until ctx is done, then returns nil.
func (r *room) run(ctx context.Context) error {
	defer r.watch.Close()
	// Made before the first store is, so that no change of one is missed.
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		r.problems.Report("watching the address stores", err)
	}
	timer, due := time.NewTimer(r.every), time.Now().Add(r.every)
	defer timer.Stop()
	for {
		all := false
		select {
		case <-ctx.Done():
			return nil
		case <-r.shown:
		case <-r.watch.Events():
		case <-timer.C:
			all = true
		}
		if err := r.watch.Add(r.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			r.problems.Report("watching the address stores", err)
		}
		again, err := r.round(ctx, all)
		if err != nil {
			return nil // ctx is done
		}
		// Addresses cool without a change of the store, and whoever opens one wakes us:
		// a look at all is not put off by that.
		if next := time.Now().Add(again); all || next.Before(due) {
			due = next
		}
		timer.Reset(time.Until(due))
		if !pause(ctx, r.pause) {
			return nil
		}
	}
}

// round is one look at the stores that may have changed, or at all. It returns when
// the next one is due.
func (r *room) round(ctx context.Context, all bool) (again time.Duration, err error) {
	r.mu.Lock()
	overlays := r.overlays
	r.mu.Unlock()
	news := roomNews{want: map[string]int{}, taken: make(chan struct{})}
	there := map[ownBlock]bool{}
	for _, o := range overlays {
		name := o.Info.Name
		for _, b := range o.Blocks {
			there[ownBlock{name, b}] = true
		}
		if mostBlocks(o.Info) <= 1 && len(o.Blocks) == 0 {
			continue
		}
		empty, err := r.look(ctx, o, all)
		r.problems.Report("looking at how full overlay "+name+" is", err)
		news.empty = append(news.empty, empty...)
		if n := r.seen[name].want; n > 0 {
			news.want[name] = n
		}
	}
	for b := range r.empty {
		if !there[b] {
			delete(r.empty, b)
		}
	}
	again = r.every
	for _, since := range r.empty {
		if left := since + r.idle - r.now(); left > 0 {
			again = min(again, max(r.pause, left))
		}
	}
	if len(news.empty) == 0 && equalWants(news.want, r.said) {
		return again, nil
	}
	select {
	case r.out <- news:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	select {
	case <-news.taken:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	r.said = news.want
	return again, nil
}

func equalWants(a, b map[string]int) bool {
	if len(a) != len(b) {
		return false
	}
	for name, n := range a {
		if b[name] != n {
			return false
		}
	}
	return true
}

// coarse is how far the times of two writes must lie apart to be told apart.
const coarse = 20 * time.Millisecond

// look looks at one overlay, unless nothing has changed. It returns the blocks that
// it has retired.
func (r *room) look(ctx context.Context, o conf.AgentOverlay, all bool) ([]ownBlock, error) {
	name := o.Info.Name
	now := looked{at: time.Now(), blocks: o.Blocks}
	info, err := os.Lstat(filepath.Join(r.dir, name+".db"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if len(o.Blocks) == 0 {
			r.seen[name] = now // nobody has an address yet
			return nil, nil
		}
	case err != nil:
		return nil, err
	default:
		now.written = info.ModTime()
	}
	before, known := r.seen[name]
	if known && !all && slices.Equal(before.blocks, o.Blocks) && now.written.Equal(before.written) && before.at.Sub(now.written).Abs() > coarse { // the clock may have been set back
		return nil, nil
	}
	s, err := ipam.TakeSnapshot(ctx, r.store(name))
	if err != nil {
		return nil, err
	}
	defer s.Close()
	if err := r.file(ctx, s, o); err != nil {
		return nil, err
	}
	use, err := r.use(ctx, s, o)
	if err != nil {
		return nil, err
	}
	now.want = use.want(o)
	r.seen[name] = now
	return r.retire(ctx, o, use)
}

// store says which store an overlay has.
func (r *room) store(overlay string) ipam.Options {
	return ipam.Options{
		Dir: r.dir, Overlay: overlay, Cooling: r.cooling, Now: r.now,
		Rebuild: func(context.Context) (ipam.Known, error) { return rebuild.Known(filepath.Dir(r.dir), overlay) },
	}
}

// change opens an overlay's store for one change.
func (r *room) change(ctx context.Context, overlay string, f func(*ipam.Store) error) error {
	s, err := ipam.Open(ctx, r.store(overlay))
	if err != nil {
		return err
	}
	return errors.Join(f(s), s.Close())
}

// file sees to a store that was made anew and waits for Docker's addresses: dockerd is
// asked for them, unless its containers have gone meanwhile.
func (r *room) file(ctx context.Context, s *ipam.Snapshot, o conf.AgentOverlay) error {
	if unfiled, err := s.Unfiled(ctx); err != nil || len(unfiled) == 0 {
		return err
	}
	return r.change(ctx, o.Info.Name, func(s *ipam.Store) error {
		unfiled, err := s.Unfiled(ctx)
		if err != nil {
			return err
		}
		known, err := rebuild.Known(filepath.Dir(r.dir), o.Info.Name)
		if err != nil {
			return err
		}
		if len(known.Unfiled) == 0 {
			return s.Filed(ctx, unfiled)
		}
		r.unfiled()
		return nil
	})
}

// use is how full the halves of an overlay are: by half, the ranges in order.
type use map[conf.Half][]ipam.Stats

// use reads it, and has retired ranges that are this host's again given out again.
func (r *room) use(ctx context.Context, s *ipam.Snapshot, o conf.AgentOverlay) (use, error) {
	out, retired := use{}, map[conf.Half][]netip.Prefix{}
	for _, pool := range o.Pools() {
		half, ranges := pool.Half, pool.Ranges
		var err error
		if out[half], err = s.Stats(ctx, half, ranges); err != nil {
			return nil, err
		}
		again, err := s.Retired(ctx, half, ranges)
		if err != nil {
			return nil, err
		}
		if again != nil {
			retired[half] = again
		}
	}
	if len(retired) > 0 {
		return out, r.change(ctx, o.Info.Name, func(s *ipam.Store) error { return s.Reinstate(ctx, retired) })
	}
	return out, nil
}

// low is how few free addresses of a half are too few: an eighth of a block, and
// two at least, where it has so many.
func low(family ipam.Stats) uint64 {
	one := conf.Containers(family.Range)
	return max(min(2, one), one/8)
}

// want is how many blocks the overlay should have; 0: it has enough. Where nothing
// is left, addresses go faster than blocks come: then it is twice as many.
func (u use) want(o conf.AgentOverlay) int {
	most, have, want := mostBlocks(o.Info), len(o.All()), 0
	for _, all := range u {
		for _, family := range ipam.Sum(all) {
			switch {
			case family.PortLimited(): // more addresses are of no use
			case family.Used >= family.Addresses():
				want = max(want, 2*have)
			case family.Free() < low(family):
				want = max(want, have+1)
			}
		}
	}
	if want = min(want, most); want > have {
		return want
	}
	return 0
}

// without is the use of the other blocks.
func (u use) without(parts map[conf.Half][]netip.Prefix) use {
	out := use{}
	for half, all := range u {
		out[half] = slices.DeleteFunc(slices.Clone(all), func(s ipam.Stats) bool { return slices.Contains(parts[half], s.Range) })
	}
	return out
}

// suffices reports whether so much is free that no block is wanted again soon.
func (u use) suffices() bool {
	for _, all := range u {
		for _, family := range ipam.Sum(all) {
			if family.Used+family.Cooling > 0 && !family.PortLimited() && family.Free() < 2*low(family) {
				return false
			}
		}
	}
	return true
}

// isEmpty reports whether no address of the parts is in use or cooling.
func (u use) isEmpty(parts map[conf.Half][]netip.Prefix) bool {
	for half, all := range u {
		for _, s := range all {
			if slices.Contains(parts[half], s.Range) && s.Used+s.Cooling > 0 {
				return false
			}
		}
	}
	return true
}

// The addresses of a family.
var (
	allIPv4 = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	allIPv6 = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
)

// goneFamilies are all addresses of the families that an overlay has not got, maybe no
// longer. A block that goes back has a part of them which this host is not told of.
func goneFamilies(o conf.Overlay) (out []netip.Prefix) {
	if !o.Subnet.IsValid() {
		out = append(out, allIPv4)
	}
	if !o.Subnet6.IsValid() {
		out = append(out, allIPv6)
	}
	return out
}

// retire has the store give out nothing more of the blocks that have been empty for
// long enough, the last one first, as long as the others suffice.
func (r *room) retire(ctx context.Context, o conf.AgentOverlay, u use) (out []ownBlock, _ error) {
	for i := len(o.Blocks) - 1; i >= 0; i-- {
		b := ownBlock{o.Info.Name, o.Blocks[i]}
		parts := o.Parts(b.block)
		if !u.isEmpty(parts) {
			delete(r.empty, b)
			continue
		}
		since, before := r.empty[b]
		if !before {
			since = r.now()
			r.empty[b] = since
		}
		rest := u.without(parts)
		if r.now()-since < r.idle || !rest.suffices() {
			continue
		}
		retired := false
		err := r.change(ctx, b.overlay, func(s *ipam.Store) (err error) {
			retired, err = s.Retire(ctx, parts, goneFamilies(o.Info)...)
			return err
		})
		if err != nil {
			return out, fmt.Errorf("retire a block: %w", err)
		}
		delete(r.empty, b) // it counts anew if somebody was faster
		if retired {
			crashpoint.At("block-retired")
			r.log.Debug("block retired", logkey.Overlay, b.overlay, logkey.Subnets, b.block.Prefixes())
			out, u = append(out, b), rest
		}
	}
	return out, nil
}
