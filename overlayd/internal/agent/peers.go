package agent

import (
	"context"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// follow watches the peers, from where we know them if they are of the same
// cluster.
func (l *loop) follow(ctx context.Context) {
	l.unfollow()
	if l.clusterID != l.held.ClusterID {
		l.clusterID, l.known = l.held.ClusterID, api.Known{}
	}
	l.watches++
	w := &watcher{
		watch: l.opts.Coordinator.Watch, id: l.id, generation: l.watches, known: l.known,
		timing: l.timing, log: l.log, register: l.registrar.kick, out: l.peersIn,
	}
	ctx, l.stopWatch = context.WithCancel(ctx)
	l.group.Go(func() error { return w.run(ctx) })
}

// unfollow ends the watch and reports whether there was one.
func (l *loop) unfollow() bool {
	if l.stopWatch == nil {
		return false
	}
	l.stopWatch()
	l.stopWatch = nil
	l.catch.clear() // what we missed has not come over this stream
	return true
}

// peersChanged takes in an event of the watch.
func (l *loop) peersChanged(c peerChange) {
	if l.stopWatch == nil || c.generation != l.watches {
		return // of a watch that was ended
	}
	if c.connected {
		l.log.Info("following the peers", "revision", c.event.Revision)
		l.tellStatus(true) // the coordinator may have been restarted
		if !l.caughtUp {
			// What was missed while we were away comes in several events.
			l.catch.in(l.timing.catchUp)
		}
	}
	if now := (api.Known{Revision: c.event.Revision, Run: c.event.Run}); now.Revision > 0 && now != l.known {
		l.known = now
		l.save.in(l.timing.resync) // no hurry: an older revision only costs a longer answer
	}
	if l.patch(c.event) {
		l.save.in(l.timing.savePeers)
		l.apply.in(l.soon())
	}
	l.checkSelf(c.self)
}

// checkSelf looks for another host that got our lease, because it has a copy of
// our agent id. The coordinator takes this stream for that host's and would
// refuse us because of it, even when the other has gone. So the stream ends, and
// we ask again: either we are told that the other is connected, or the lease is
// ours again. News of an older registration are none.
func (l *loop) checkSelf(self conf.Peer) {
	if !self.AgentIP.IsValid() || self.AgentIP == l.ip || self.Epoch <= l.held.Epoch {
		return
	}
	l.log.Warn("a host at another address has registered with this agent id; registering again", "ip", self.AgentIP, "epoch", self.Epoch)
	l.unfollow()
	kick(l.registrar.kick)
}

// soon is when to apply a peer that changed: at once, but never more than half
// of the time is spent applying.
func (l *loop) soon() time.Duration { return max(0, l.applyTook-time.Since(l.appliedAt)) }

// applyPeers sends what changed to the kernel.
func (l *loop) applyPeers(ctx context.Context) {
	began := time.Now()
	l.reconcile(ctx, false)
	l.appliedAt, l.applyTook = time.Now(), time.Since(began)
}

// patch applies an event to the peers and reports whether it changed any.
func (l *loop) patch(e api.PeerEvent) bool {
	debug := l.log.Enabled(context.Background(), slog.LevelDebug) // what is not logged need not be put together
	set, removed := 0, 0
	gone := e.Delete
	if e.Snapshot && len(l.claims.peers) > 0 {
		now := map[string]bool{}
		for _, p := range e.Put {
			now[p.AgentID] = true
		}
		for id := range l.claims.peers {
			if !now[id] {
				gone = append(gone, id)
			}
		}
	}
	for _, id := range gone {
		if _, ok := l.claims.peers[id]; ok {
			l.claims.remove(id)
			removed++
			if debug {
				l.log.Debug("peer gone", "peer", id)
			}
		}
	}
	for _, p := range e.Put {
		old, known := l.claims.peers[p.AgentID]
		if known && samePeer(old, p) {
			continue
		}
		l.claims.put(p)
		set++
		if debug {
			l.log.Debug("peer", "peer", p.AgentID, "ip", p.AgentIP, "epoch", p.Epoch)
		}
	}
	if set+removed == 0 {
		return false
	}
	l.log.Info("peers changed", "set", set, "gone", removed, "peers", len(l.claims.peers))
	return true
}

// savePeers writes the peers on a goroutine of its own: with thousands of them
// on a slow disk it takes longer than a new peer should wait. The answer comes
// through l.saved.
func (l *loop) savePeers() {
	if l.saving {
		l.save.in(l.timing.savePeers)
		return
	}
	s := savedPeers{AgentID: l.id, ClusterID: l.clusterID, Revision: l.known.Revision, Run: l.known.Run, Peers: slices.Collect(maps.Values(l.claims.peers))}
	l.saving = true
	l.group.Go(func() error {
		slices.SortFunc(s.Peers, func(a, b conf.Peer) int { return strings.Compare(a.AgentID, b.AgentID) })
		l.saved <- conf.WriteJSON(l.files.peers(), s, 0o600)
		return nil
	})
}

// peersSaved takes in what came of savePeers.
func (l *loop) peersSaved(err error) {
	l.saving = false
	l.tidy.in(l.timing.tidy)
	l.logOnce("storing the peers", err)
	if err != nil {
		l.save.in(l.timing.resync)
	}
}

// giveBack returns to the machine what learning of many peers took for a
// moment. The runtime would keep it, since nearly nothing is allocated from then
// on, and this process lives beside the containers for months.
func (l *loop) giveBack() {
	l.group.Go(func() error {
		debug.FreeOSMemory()
		return nil
	})
}

// flushPeers writes what was not yet written when the loop ends.
func (l *loop) flushPeers() {
	if l.saving {
		l.peersSaved(<-l.saved)
	}
	if l.save.isSet() {
		l.savePeers()
		l.peersSaved(<-l.saved)
	}
}
