package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// recallPeers reads the peers that an earlier run stored.
func (l *loop) recallPeers(clusterID string) {
	s, ok := l.files.loadPeers(l.id, clusterID)
	if !ok {
		return
	}
	l.peers.position, l.peers.clusterID = api.Known{Revision: s.Revision, Run: s.Run}, s.ClusterID
	for _, p := range s.Peers {
		l.peers.claims.put(p)
	}
}

// follow watches the peers, from the present position if they are of the same
// cluster.
func (l *loop) follow(ctx context.Context) {
	l.unfollow()
	p := &l.peers
	if p.clusterID != l.lease.held.ClusterID {
		p.clusterID, p.position = l.lease.held.ClusterID, api.Known{}
	}
	p.since = time.Now()
	p.generation++
	w := &watcher{
		watch: l.opts.Coordinator.Watch, id: l.id, instance: l.instance.own, generation: p.generation, position: p.position,
		timing: l.timing, log: l.log, register: l.registrar.kick, out: p.in,
	}
	ctx, p.stop = context.WithCancel(ctx)
	l.group.Go(func() error { return w.run(ctx) })
}

// unfollow ends the watch and reports whether there was one.
func (l *loop) unfollow() bool {
	p := &l.peers
	if p.stop == nil {
		return false
	}
	p.stop()
	p.stop = nil
	p.backlog.clear() // what we missed has not come over this stream
	l.setFollowing(false, errors.New("the stream was ended to register again"))
	return true
}

// setFollowing takes in that the stream of peers has begun, or ended because of
// err.
func (l *loop) setFollowing(now bool, err error) {
	p := &l.peers
	if p.following != now {
		p.since = time.Now()
	}
	p.following, p.broken = now, err
	if now {
		p.silent.clear()
	}
}

// expectPeers begins to wait for the stream of peers, after a registration.
func (l *loop) expectPeers() {
	p := &l.peers
	if p.following {
		return
	}
	if p.since.IsZero() {
		p.since = time.Now()
	}
	p.silent.in(l.timing.follow)
}

// notFollowing says why this host does not learn of other hosts although the
// coordinator answers it. While the coordinator does not answer, that is the
// problem, and the lease tells of it.
func (l *loop) notFollowing() error {
	p := &l.peers
	if p.following || !l.lease.online || l.lease.refusal != "" || p.since.IsZero() || time.Since(p.since) < l.timing.follow {
		return nil
	}
	why := errors.New("no event has arrived")
	if p.broken != nil {
		why = p.broken
	}
	return fmt.Errorf("hosts that join or move are not learnt, although the coordinator answers: %w; does a proxy on the way buffer the answer of %s?", why, api.PathWatch)
}

// peersChanged takes in an event of the watch.
func (l *loop) peersChanged(e peerEvent) {
	p := &l.peers
	if p.stop == nil || e.generation != p.generation {
		return // of a watch that was ended
	}
	if e.broken != nil {
		l.setFollowing(false, e.broken)
		l.expectPeers()
		return
	}
	if e.connected {
		l.log.Info("following the peers", logkey.Revision, e.event.Revision)
		l.setFollowing(true, nil)
		l.reportStatus(true) // the coordinator may have been restarted
		if !p.complete {
			// What was missed while we were away comes in several events.
			p.backlog.in(l.timing.backlog)
		}
	}
	if e.event.Report {
		kick(l.inventory.begun)
	}
	if e.event.Survey != nil {
		l.survey(*e.event.Survey)
	}
	if now := (api.Known{Revision: e.event.Revision, Run: e.event.Run}); now.Revision > 0 && now != p.position {
		p.position = now
		p.save.in(l.timing.resync) // no hurry: an older revision only costs a longer answer
	}
	if l.patch(e.event) {
		p.save.in(l.timing.savePeers)
		l.apply.in(l.soon())
	}
	if e.connected && l.problems.Text(followProblem) != "" {
		l.publish()
	}
	l.checkSelf(e.self)
}

// checkSelf looks for another host that got our lease, because it has a copy of
// our agent id. The coordinator takes this stream for that host's and would
// refuse us because of it, even when the other has gone. So the stream ends, and
// we ask again: either we are told that the other is connected, or the lease is
// ours again. News of an older registration are none.
func (l *loop) checkSelf(self conf.Peer) {
	if !self.AgentIP.IsValid() || self.AgentIP == l.lease.ip || self.Epoch <= l.lease.held.Epoch {
		return
	}
	l.log.Warn("a host at another address has registered with this agent id; registering again", logkey.IP, self.AgentIP, logkey.Epoch, self.Epoch)
	l.unfollow()
	kick(l.registrar.kick)
}

// soon is when to apply a peer that changed: at once, but never more than half
// of the time is spent applying.
func (l *loop) soon() time.Duration { return max(0, l.peers.applyTook-time.Since(l.peers.appliedAt)) }

// applyPeers sends what changed to the kernel.
func (l *loop) applyPeers(ctx context.Context) {
	began := time.Now()
	l.reconcile(ctx, false)
	l.peers.appliedAt, l.peers.applyTook = time.Now(), time.Since(began)
}

// patch applies an event to the peers and reports whether it changed any.
func (l *loop) patch(e api.PeerEvent) bool {
	debug := l.log.Enabled(context.Background(), slog.LevelDebug) // what is not logged need not be put together
	claims := l.peers.claims
	set, removed := 0, 0
	for _, id := range goneWith(e, claims.peers) {
		if _, ok := claims.peers[id]; ok {
			claims.remove(id)
			removed++
			if debug {
				l.log.Debug("peer gone", logkey.Peer, id)
			}
		}
	}
	claims.expect(len(e.Put))
	for _, p := range e.Put {
		if old, ok := claims.peers[p.AgentID]; ok && samePeer(old, p) {
			continue
		}
		claims.put(p)
		set++
		if debug {
			l.log.Debug("peer set", logkey.Peer, p.AgentID, logkey.IP, p.AgentIP, logkey.Epoch, p.Epoch)
		}
	}
	if set+removed == 0 {
		return false
	}
	l.log.Info("peers changed", logkey.Set, set, logkey.Gone, removed, logkey.Peers, len(claims.peers))
	return true
}

// goneWith are the peers that an event deletes: those it names and, where it is
// a whole snapshot, those it does not.
func goneWith(e api.PeerEvent, peers map[string]conf.Peer) []string {
	gone := e.Delete
	if !e.Snapshot || e.Partial || len(peers) == 0 {
		return gone
	}
	now := map[string]bool{}
	for _, p := range e.Put {
		now[p.AgentID] = true
	}
	for id := range peers {
		if !now[id] {
			gone = append(gone, id)
		}
	}
	return gone
}

// savePeers writes the peers on a goroutine of its own: with thousands of them
// on a slow disk it takes longer than a new peer should wait. The answer comes
// through l.peers.saved.
func (l *loop) savePeers() {
	p := &l.peers
	if p.saving {
		p.save.in(l.timing.savePeers)
		return
	}
	s := savedPeers{AgentID: l.id, ClusterID: p.clusterID, Revision: p.position.Revision, Run: p.position.Run, Fields: peerFields(), Peers: slices.Collect(maps.Values(p.claims.peers))}
	p.saving = true
	l.group.Go(func() error {
		slices.SortFunc(s.Peers, func(a, b conf.Peer) int { return strings.Compare(a.AgentID, b.AgentID) })
		p.saved <- conf.WriteJSON(l.files.peers(), s, 0o600)
		return nil
	})
}

// peersSaved takes in what came of savePeers.
func (l *loop) peersSaved(err error) {
	l.peers.saving = false
	l.tidy.in(l.timing.tidy)
	l.problems.Report(storePeersProblem, err)
	if err != nil {
		l.peers.save.in(l.timing.resync)
	}
}

// giveBack returns to the machine what learning of many peers took for a
// moment. The runtime would keep it, since nearly nothing is allocated from then
// on, and this process lives beside the containers for months.
func (l *loop) giveBack() {
	if l.opts.Started != nil {
		l.opts.Started()
	}
	l.group.Go(func() error {
		debug.FreeOSMemory()
		return nil
	})
}

// flushPeers writes what was not yet written when the loop ends.
func (l *loop) flushPeers() {
	p := &l.peers
	if p.saving {
		l.peersSaved(<-p.saved)
	}
	if p.save.isSet() {
		l.savePeers()
		l.peersSaved(<-p.saved)
	}
}
