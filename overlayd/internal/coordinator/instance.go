package coordinator

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// Every start of an agent is an instance, with a random name that the agent keeps
// in its state directory and shows at its next start. So a host that starts again
// is told from a copy of it, even with the same id, certificate and address: the
// copy shows an instance that is not the current one, or one whose stream is open.

// linger is how long the stream of an instance may still be open when the next
// one registers. Who follows it is asked to register meanwhile: a host that lives
// answers at once, and where it lost its power what is sent ends the stream, because
// whoever has its address by now knows no such connection.
const linger = time.Second

// moving is how long an agent may take from a coordinator that ended in order to
// another one; see leftLatelyLocked.
const moving = 3 * time.Second

// maxRivals bounds the copies of one agent that are remembered.
const maxRivals = 16

// errLingering: the instance before is still connected.
var errLingering = errors.New("the instance before is still connected")

// checkInstanceLocked refuses a copy of a host that is alive. proven says that
// the request is from the host that has the agent id.
func (c *Coordinator) checkInstanceLocked(req api.RegisterRequest) (proven bool, err error) {
	if req.Instance == "" || len(req.Previous) == 0 && c.view.statuses[req.AgentID].decode().Instance != req.Instance {
		return false, nil // a copy of a state directory shows what it copied
	}
	current := c.view.statuses[req.AgentID].decode().Instance
	p := c.presence[req.AgentID]
	if p != nil {
		p.contest.about(current)
	}
	switch {
	case current == "":
		return false, nil
	case current == req.Instance:
		c.answeredLocked(req.AgentID)
		return true, nil
	case slices.Contains(req.Previous, current) && !p.isRival(req):
		if p.watchedBy(current) || c.connectedElsewhereLocked(req.AgentID) || c.leftLatelyLocked(req.AgentID) {
			return false, errLingering
		}
		return true, nil
	}
	return false, c.refuseCopyLocked(req)
}

// refuseCopyLocked refuses a copy, unless the host itself has not been heard of
// for so long that it is none.
func (c *Coordinator) refuseCopyLocked(req api.RegisterRequest) error {
	heard, connected := c.lastHeardLocked(req.AgentID)
	if !connected && time.Since(heard) >= alive {
		return nil
	}
	return c.isCopyLocked(req)
}

// isCopyLocked refuses a copy, and remembers it.
func (c *Coordinator) isCopyLocked(req api.RegisterRequest) error {
	c.addRivalLocked(req.AgentID, req.Instance)
	return &api.Error{Code: http.StatusConflict, Kind: api.KindIDInUse, Message: "agent id " + req.AgentID + " is in use by another host, which is alive, so this host (" +
		req.AgentIP.String() + ") is a copy of it, or its state directory was put back from a backup; stop the agent of the host that is not to have the id, " +
		"and remove agent-id, instance and the directory pki there; then it joins as a new host with a token of its own"}
}

// leftLatelyLocked reports whether an agent has just lost another coordinator, which
// has ended in order, and has not come here. A copy that was refused there must not
// come first.
func (c *Coordinator) leftLatelyLocked(id string) bool {
	s, p := c.view.seen[id], c.presence[id]
	if s.By == "" || s.By == c.run || p != nil && len(p.watches) > 0 {
		return false
	}
	b := c.view.beats[s.By]
	return c.shared && b.Ended && time.Since(b.heard) < moving && (p == nil || p.seen.Before(b.heard))
}

// contest is what is known of those who came in the place of an agent.
type contest struct {
	of       string          // the instance whose place it is
	answered time.Time       // last registration of the current instance here since it began
	rivals   map[string]bool // instances that were refused as copies
	unproven map[string]bool // those that are copies if the current one ever answers
}

func (c *Coordinator) contestLocked(id string) *contest {
	p, current := c.presenceLocked(id), c.view.statuses[id].decode().Instance
	if p.contest == nil {
		p.contest = &contest{of: current}
	}
	p.contest.about(current)
	return p.contest
}

// about has a new contest begin where the place is another instance's by now, which is
// no copy then. Copies that were refused stay refused.
func (k *contest) about(current string) {
	if k == nil || k.of == current {
		return
	}
	delete(k.rivals, current)
	k.of, k.answered, k.unproven = current, time.Time{}, nil
}

// won takes in who was accepted: neither it nor a start of it before is a copy.
func (k *contest) won(req api.RegisterRequest) {
	if k == nil || req.Instance == "" {
		return
	}
	delete(k.rivals, req.Instance)
	for _, before := range req.Previous {
		delete(k.rivals, before)
	}
}

func (c *Coordinator) addRivalLocked(id, instance string) {
	k := c.contestLocked(id)
	if k.rivals == nil || len(k.rivals) >= maxRivals {
		k.rivals = map[string]bool{}
	}
	if !k.rivals[instance] {
		k.rivals[instance] = true
		c.log.Warn("a copy of an agent asks for its lease", "agent", id, "instance", instance)
	}
}

// answeredLocked notes that the current instance of an agent lives. Who came in its
// place meanwhile is a copy.
func (c *Coordinator) answeredLocked(id string) {
	p := c.presence[id]
	if p == nil || p.contest == nil {
		return
	}
	k := c.contestLocked(id)
	k.answered = time.Now()
	for instance := range k.unproven {
		c.addRivalLocked(id, instance)
	}
	k.unproven = nil
	if s := c.view.seen[id]; s.By == c.run && s.Asks != s.Lives && s.Asks != k.of {
		c.addRivalLocked(id, s.Asks)
		c.noteSeenLocked(id) // which tells who asked
	}
}

// seenChangedLocked takes in what coordinators say of an agent; see seen.
func (c *Coordinator) seenChangedLocked(id string) {
	c.announce.lookLater(id)
	if s, p := c.view.seen[id], c.presence[id]; p != nil && s.By == c.run && s.Asks != s.Lives {
		c.contestLocked(id)
		p.askToRegister()
	}
}

// askWhetherItLives has who follows the stream of the instance before asked to
// register, here or by the coordinator that it is connected to.
func (c *Coordinator) askWhetherItLives(ctx context.Context, req api.RegisterRequest) error {
	c.mu.Lock()
	c.contestLocked(req.AgentID)
	c.presence[req.AgentID].askToRegister()
	s, elsewhere := c.view.seen[req.AgentID], c.connectedElsewhereLocked(req.AgentID)
	c.mu.Unlock()
	if !elsewhere {
		return nil
	}
	key := keySeen(req.AgentID)
	_, err := c.store.Commit(ctx, store.Txn{
		If:   []store.Cond{{Key: key, Mod: s.mod}},
		Then: []store.Op{{Key: key, Value: encode(seen{By: s.By, Asks: req.Instance})}},
	})
	if errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrUnknown) {
		return nil // it has gone or moved, or the next attempt asks again
	}
	return err
}

// livesLocked reports whether the instance before has registered since a time, here
// or where it was asked to for this request.
func (c *Coordinator) livesLocked(req api.RegisterRequest, since time.Time) bool {
	return c.contestLocked(req.AgentID).answered.After(since) || c.view.seen[req.AgentID].Lives == req.Instance
}

// notEndedLocked refuses who comes while the stream of the instance before is open,
// and nobody has answered on it. Either it is the same host, whose connection from
// before a power cut has not ended yet, or a copy of one that is slow to answer.
func (c *Coordinator) notEndedLocked(req api.RegisterRequest) error {
	k := c.contestLocked(req.AgentID)
	if k.unproven == nil || len(k.unproven) >= maxRivals {
		k.unproven = map[string]bool{}
	}
	k.unproven[req.Instance] = true
	return &api.Error{Code: http.StatusServiceUnavailable, Kind: api.KindIDInUse, Message: "agent id " + req.AgentID + " is connected from a start before, and does not answer there. " +
		"If this host (" + req.AgentIP.String() + ") is the same after a power cut, it is accepted when that connection has ended, within " +
		(serve.DeadConnection + api.HeartbeatInterval).String() + "; otherwise it is a copy: stop its agent, and remove agent-id, instance and the directory pki"}
}

// isRival reports whether a request is from a copy that was refused before, or
// from one that has started again since.
func (p *presence) isRival(req api.RegisterRequest) bool {
	if p == nil || p.contest == nil {
		return false
	}
	rivals := p.contest.rivals
	return rivals[req.Instance] || slices.ContainsFunc(req.Previous, func(i string) bool { return rivals[i] })
}

// watchedBy reports whether a stream of an instance is open here.
func (p *presence) watchedBy(instance string) bool {
	if p == nil {
		return false
	}
	for w := range p.watches {
		if w.instance == instance {
			return true
		}
	}
	return false
}

// planUnlessLingering is plan, and waits a moment for the stream of the instance
// before to end, or for who follows it to say that he lives.
func (c *Coordinator) planUnlessLingering(ctx context.Context, req api.RegisterRequest) (*plan, error) {
	p, err := c.plan(req)
	if !errors.Is(err, errLingering) {
		return p, err
	}
	var asked time.Time
	end := time.NewTimer(linger)
	defer end.Stop()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for ; errors.Is(err, errLingering); p, err = c.plan(req) {
		if asked.IsZero() {
			asked = time.Now()
			if err := c.askWhetherItLives(ctx, req); err != nil {
				return nil, err
			}
		}
		c.mu.Lock()
		lives := c.livesLocked(req, asked)
		c.mu.Unlock()
		if !lives {
			select {
			case <-look.C:
				continue
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-end.C:
			}
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if lives {
			return nil, c.isCopyLocked(req)
		}
		return nil, c.notEndedLocked(req)
	}
	return p, err
}
