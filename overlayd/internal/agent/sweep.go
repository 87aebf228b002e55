package agent

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/audit"
	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/problems"
)

// A sweeper releases the addresses of containers that are gone without a DEL:
// the runtime was killed, lost its memory, or never calls it (Mesos after a
// reboot). A store of an earlier boot is opened once, which releases all of it: the
// addresses would not begin to rest before somebody attaches a container.
//
// A container counts as gone when it is found so twice, at least a minute apart,
// and at every look in between: an ADD has its address before its interface, but
// never for that long.
type sweeper struct {
	runDir  string
	cooling time.Duration
	every   time.Duration // between two looks
	apart   time.Duration // from the first look to the release
	now     func() time.Duration
	log     *slog.Logger

	problems *problems.Set
	seen     map[abandoned]time.Duration // when it was first found gone
}

// abandoned is one attachment at one time: an attachment that is made again has
// another since.
type abandoned struct {
	overlay string
	half    conf.Half
	key     conf.Key
	since   time.Duration
}

func (a *Agent) newSweeper(log *slog.Logger) *sweeper {
	return &sweeper{
		runDir: a.opts.RunDir, cooling: a.opts.Cooling,
		every: a.timing.sweep, apart: a.timing.abandoned, now: conf.Boottime, log: log,
		problems: problems.New(log),
	}
}

// run looks now and then until ctx is done. It is a goroutine of its own because
// address stores may have to be waited for.
func (s *sweeper) run(ctx context.Context) error {
	for {
		s.round(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(s.every):
		}
	}
}

// round is one look, and the releases that are due.
func (s *sweeper) round(ctx context.Context) {
	h, err := audit.Read(ctx, s.runDir)
	if s.problems.Report("looking for abandoned addresses", err); err != nil {
		return
	}
	found := map[abandoned]ipam.Record{}
	unread := map[string]bool{}
	for overlay, store := range h.Stores {
		err := store.Err
		if err == nil && len(store.Problems) > 0 {
			err = fmt.Errorf("%v", store.Problems)
		}
		unread[overlay] = err != nil
		if err == nil && store.EarlierBoot {
			err = s.open(ctx, overlay, func(*ipam.Store) error { return nil })
		}
		s.problems.Report("address store of "+overlay, err)
		for _, rec := range h.Abandoned(overlay) {
			found[abandoned{overlay, rec.Half, rec.Key(), rec.Since}] = rec
		}
	}
	for _, a := range s.due(s.now(), slices.Collect(maps.Keys(found)), unread) {
		s.release(ctx, a, found[a])
	}
}

// due takes in what was found abandoned at one look and returns what has been
// so for long enough. An overlay that could not be read was not looked at.
func (s *sweeper) due(now time.Duration, found []abandoned, unread map[string]bool) (out []abandoned) {
	seen := make(map[abandoned]time.Duration, len(found))
	for _, a := range found {
		first, before := s.seen[a]
		if !before {
			first = now
		}
		seen[a] = first
		if before && now-first >= s.apart {
			out = append(out, a)
		}
	}
	for a, first := range s.seen {
		if unread[a.overlay] {
			seen[a] = first
		}
	}
	s.seen = seen
	return out
}

// release gives the addresses back, unless the attachment has been made again
// since.
func (s *sweeper) release(ctx context.Context, a abandoned, rec ipam.Record) {
	log := s.log.With(logkey.Overlay, a.overlay, logkey.Half, a.half, logkey.Container, rec.ContainerID, logkey.IfName, rec.IfName, logkey.Addrs, rec.Addrs)
	var released []ipam.Record
	err := s.open(ctx, a.overlay, func(store *ipam.Store) (err error) {
		released, err = store.GC(ctx, rec.Network, a.half, func(r ipam.Record) bool {
			return r.Key() != a.key || r.Since != a.since
		})
		return err
	})
	switch {
	case err != nil:
		log.Warn("abandoned addresses not released; trying again", logkey.Err, err)
	case len(released) > 0:
		log.Info("addresses of a container that is gone released")
	}
}

// open opens a store for one change.
func (s *sweeper) open(ctx context.Context, overlay string, f func(*ipam.Store) error) error {
	store, err := ipam.Open(ctx, ipam.Options{Dir: conf.NetConf{RunDir: s.runDir}.IPAMPath(), Overlay: overlay, Cooling: s.cooling, Existing: true})
	if err != nil {
		return err
	}
	defer store.Close()
	return f(store)
}
