package agent

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// peerEvent is what the watcher hands to the loop.
type peerEvent struct {
	generation int           // of the watcher
	connected  bool          // first of a stream
	broken     error         // the stream has ended; nothing else is set
	self       conf.Peer     // this agent as the coordinator tells of it; zero: it does not
	event      api.PeerEvent // without self
}

// watcher follows the peers from a position on.
type watcher struct {
	watch      func(ctx context.Context, agentID string, position api.Known, fn func(api.PeerEvent) error) error
	id         string
	instance   string // of the agent
	generation int
	position   api.Known
	timing     timing
	log        *slog.Logger
	register   chan<- struct{} // kicked when the lease may have changed
	out        chan<- peerEvent
}

// run connects again and again until ctx is done, then returns nil.
func (w *watcher) run(ctx context.Context) error {
	retry := backoff{min: w.timing.backoffMin, max: w.timing.backoffMax}
	broken := false
	for {
		received, err := w.stream(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if received {
			retry.reset()
			broken = false
		}
		if !broken {
			w.log.Warn("peers are no longer followed; connecting again", logkey.Err, err)
			broken = true
			select {
			case w.out <- peerEvent{generation: w.generation, broken: err}:
			case <-ctx.Done():
				return nil
			}
		}
		if refused(err) {
			kick(w.register) // the coordinator does not know us
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retry.next()):
		}
	}
}

// stream follows one connection to its end and reports whether anything was
// received over it.
func (w *watcher) stream(ctx context.Context) (received bool, err error) {
	from := w.position
	from.Instance = w.instance
	err = w.watch(ctx, w.id, from, func(e api.PeerEvent) error {
		first := !received
		received = true
		self := w.self(e.Put)
		if w.withoutSelf(&e) {
			kick(w.register)
		}
		if first || e.Report || e.Survey != nil || e.Snapshot || len(e.Put) > 0 || len(e.Delete) > 0 || e.Revision > w.position.Revision {
			select {
			case w.out <- peerEvent{generation: w.generation, connected: first, self: self, event: e}:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if e.Revision > 0 {
			w.position = api.Known{Revision: e.Revision, Run: e.Run}
		}
		return nil
	})
	return received, err
}

// self is this agent as the coordinator tells of it, zero if it does not.
func (w *watcher) self(put []conf.Peer) (p conf.Peer) {
	if i := slices.IndexFunc(put, w.isSelf); i >= 0 {
		p = put[i]
	}
	return p
}

func (w *watcher) isSelf(p conf.Peer) bool { return p.AgentID == w.id }

// withoutSelf takes this agent, and what nobody could forward to, out of an
// event. It reports whether the lease should be asked for again: the
// coordinator says so, or it does not have it any more.
func (w *watcher) withoutSelf(e *api.PeerEvent) (register bool) {
	register = e.Register || slices.Contains(e.Delete, w.id) ||
		e.Snapshot && !slices.ContainsFunc(e.Put, w.isSelf)
	e.Put = slices.DeleteFunc(e.Put, func(p conf.Peer) bool {
		if w.isSelf(p) {
			return true
		}
		err := checkPeer(p)
		if err != nil {
			w.log.Warn("peer left out", logkey.Peer, p.AgentID, logkey.Err, err)
			if !e.Snapshot { // what it was before is no longer true
				e.Delete = append(e.Delete, p.AgentID)
			}
		}
		return err != nil
	})
	e.Delete = slices.DeleteFunc(e.Delete, func(id string) bool { return id == w.id })
	return register
}
