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

// settling is how long the end of a connection may take to be noticed.
const settling = 50 * time.Millisecond

// moving is how long an agent may take from a coordinator that ended in order to
// another one; see leftLatelyLocked.
const moving = 3 * time.Second

// maxRivals bounds the copies of one agent that are remembered.
const maxRivals = 16

var (
	// errLingering: the instance before is still connected.
	errLingering = errors.New("the instance before is still connected")
	// errAnswers: it registers, and somebody waits to hear whether it lives.
	errAnswers = errors.New("the current instance may be answering")
	// errCopy: it is no start that is known of a host that is alive.
	errCopy = errors.New("another host has the agent id")
)

// checkInstanceLocked refuses a copy of a host that is alive. proven says that
// the request is from the host that has the agent id.
func (c *Coordinator) checkInstanceLocked(req *api.RegisterRequest) (proven bool, err error) {
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
	case current == req.Instance && p.asks(req.Came):
		return true, errAnswers
	case current == req.Instance:
		return true, nil
	case slices.Contains(req.Previous, current) && !p.isRival(req, current):
		if p.watchedBy(current) || c.connectedElsewhereLocked(req.AgentID) || c.leftLatelyLocked(req.AgentID) {
			return false, errLingering
		}
		return true, nil
	}
	// Where the host itself has not been heard of for so long, it is none.
	if heard, connected := c.lastHeardLocked(req.AgentID); !connected && time.Since(heard) >= alive {
		return false, nil
	}
	return false, errCopy
}

// isCopyLocked refuses a copy, and remembers it.
func (c *Coordinator) isCopyLocked(req *api.RegisterRequest) error {
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
	of       string               // the instance whose place it is
	asked    time.Time            // when it was last asked whether it lives
	answered time.Time            // when its last registration came that says that it does
	rivals   map[string]bool      // instances that were refused as copies
	unproven map[string]time.Time // those that are copies if it answers what it was asked then
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
	k.of, k.asked, k.answered, k.unproven = current, time.Time{}, time.Time{}, nil
}

// asks reports whether a registration of the current instance that came then is the
// answer to a question. One that was on its way when the question was put says nothing:
// who sent it may have been killed since, and who came in its place is its own host.
func (p *presence) asks(came time.Time) bool {
	if p == nil || p.contest == nil {
		return false
	}
	k := p.contest
	return came.After(k.asked) && k.asked.After(k.answered)
}

// won takes in who was accepted: neither it nor a start of it before is a copy.
func (k *contest) won(req *api.RegisterRequest) {
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

// takeAnswer takes in that the current instance of an agent lives, unless its
// connection has ended: a request that was read late may be from one that was killed.
func (c *Coordinator) takeAnswer(ctx context.Context, req *api.RegisterRequest) error {
	if err := stays(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.view.statuses[req.AgentID].decode().Instance == req.Instance {
		c.answeredLocked(req.AgentID, req.Came)
	}
	return nil
}

// stays waits until the end of a connection would have been noticed, and returns it.
func stays(ctx context.Context) error {
	select {
	case <-time.After(settling):
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// answeredLocked notes that the current instance of an agent lived at a time. Who was
// in its place by then is a copy.
func (c *Coordinator) answeredLocked(id string, came time.Time) {
	k := c.contestLocked(id)
	k.answered = came
	for instance, asked := range k.unproven {
		if came.After(asked) {
			c.addRivalLocked(id, instance)
			delete(k.unproven, instance)
		}
	}
	if s := c.view.seen[id]; s.By == c.run && s.Asks != s.Lives && s.Asks != k.of && came.After(s.heard) {
		c.addRivalLocked(id, s.Asks)
		c.noteSeenLocked(id) // which tells who asked
	}
}

// askLocked has the current instance asked whether it lives, if its stream is here.
func (c *Coordinator) askLocked(id string) (asked time.Time) {
	k := c.contestLocked(id)
	k.asked = time.Now()
	c.presence[id].askToRegister()
	return k.asked
}

// seenChangedLocked takes in what coordinators say of an agent; see seen.
func (c *Coordinator) seenChangedLocked(id string) {
	c.announce.lookLater(id)
	if s := c.view.seen[id]; c.presence[id] != nil && s.By == c.run && s.Asks != s.Lives {
		c.askLocked(id)
	}
}

// askWhetherItLives has who follows the stream of the instance before asked to
// register, here or by the coordinator that it is connected to. It returns when.
func (c *Coordinator) askWhetherItLives(ctx context.Context, req *api.RegisterRequest) (asked time.Time, err error) {
	c.mu.Lock()
	asked = c.askLocked(req.AgentID)
	s, elsewhere := c.view.seen[req.AgentID], c.connectedElsewhereLocked(req.AgentID)
	c.mu.Unlock()
	if !elsewhere {
		return asked, nil
	}
	key := keySeen(req.AgentID)
	_, err = c.store.Commit(ctx, store.Txn{
		If:   []store.Cond{{Key: key, Mod: s.mod}},
		Then: []store.Op{{Key: key, Value: encode(seen{By: s.By, Asks: req.Instance})}},
	})
	if errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrUnknown) {
		err = nil // it has gone or moved, or the next attempt asks again
	}
	return asked, err
}

// livesLocked reports whether the instance before has answered what it was asked then,
// here or where it was asked to for this request.
func (c *Coordinator) livesLocked(req *api.RegisterRequest, asked time.Time) bool {
	return c.contestLocked(req.AgentID).answered.After(asked) || c.view.seen[req.AgentID].Lives == req.Instance
}

// notEndedLocked refuses who comes while the stream of the instance before is open,
// and nobody has answered on it. Either it is the same host, whose connection from
// before a power cut has not ended yet, or a copy of one that is slow to answer.
func (c *Coordinator) notEndedLocked(req *api.RegisterRequest, asked time.Time) error {
	k := c.contestLocked(req.AgentID)
	if k.unproven == nil || len(k.unproven) >= maxRivals {
		k.unproven = map[string]time.Time{}
	}
	k.unproven[req.Instance] = asked
	return &api.Error{Code: http.StatusServiceUnavailable, Kind: api.KindIDInUse, Message: "agent id " + req.AgentID + " is connected from a start before, and does not answer there. " +
		"If this host (" + req.AgentIP.String() + ") is the same after a power cut, it is accepted when that connection has ended, within " +
		(serve.DeadConnection + api.HeartbeatInterval).String() + "; otherwise it is a copy: stop its agent, and remove agent-id, instance and the directory pki"}
}

// isRival reports whether a request is from a copy that was refused before, or from one
// that has started again since, of an instance that it shows. What it had before that one
// is no copy, though it was refused if its request came late.
func (p *presence) isRival(req *api.RegisterRequest, of string) bool {
	if p == nil || p.contest == nil {
		return false
	}
	rivals, since := p.contest.rivals, req.Previous
	if i := slices.Index(since, of); i >= 0 {
		since = since[:i]
	}
	return rivals[req.Instance] || slices.ContainsFunc(since, func(i string) bool { return rivals[i] })
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
func (c *Coordinator) planUnlessLingering(ctx context.Context, req *api.RegisterRequest, passed int) (*plan, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p, err := c.planLingering(ctx, req, passed)
	if !errors.Is(err, errCopy) {
		return p, err
	}
	if err := stays(ctx); err != nil {
		return nil, err // it was killed, and one that came after it was faster
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return nil, c.isCopyLocked(req)
}

func (c *Coordinator) planLingering(ctx context.Context, req *api.RegisterRequest, passed int) (*plan, error) {
	p, err := c.plan(req, passed)
	if errors.Is(err, errAnswers) {
		if err := c.takeAnswer(ctx, req); err != nil {
			return nil, err
		}
		p, err = c.plan(req, passed)
	}
	if !errors.Is(err, errLingering) {
		return p, err
	}
	asked, err := c.askWhetherItLives(ctx, req)
	if err != nil {
		return nil, err
	}
	end := time.NewTimer(linger)
	defer end.Stop()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for {
		if p, err = c.plan(req, passed); !errors.Is(err, errLingering) {
			return p, err
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
		if lives {
			return nil, errCopy
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		return nil, c.notEndedLocked(req, asked)
	}
}
