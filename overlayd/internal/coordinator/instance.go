package coordinator

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// Every start of an agent is an instance, with a random name that the agent keeps
// in its state directory and shows at its next start. So a host that starts again
// is told from a copy of it, even with the same id, certificate and address: the
// copy shows an instance that is not the current one, or one whose stream is open.

// linger is how long the stream of an instance may still be open when the next
// one registers.
const linger = time.Second

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
	switch {
	case current == "":
		return false, nil
	case current == req.Instance:
		return true, nil
	case slices.Contains(req.Previous, current) && !p.isRival(req):
		if p.watchedBy(current) {
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
	p := c.presenceLocked(req.AgentID)
	if p.rivals == nil || len(p.rivals) >= maxRivals {
		p.rivals = map[string]bool{}
	}
	if !p.rivals[req.Instance] {
		p.rivals[req.Instance] = true
		c.log.Warn("a copy of an agent asks for its lease", "agent", req.AgentID, "ip", req.AgentIP)
	}
	return &api.Error{Code: http.StatusConflict, Kind: api.KindIDInUse, Message: "agent id " + req.AgentID + " is in use by another host, which is alive, so this host (" +
		req.AgentIP.String() + ") is a copy of it, or its state directory was put back from a backup; stop the agent of the host that is not to have the id, " +
		"and remove agent-id, instance and the directory pki there; then it joins as a new host with a token of its own"}
}

// isRival reports whether a request is from a copy that was refused before, or
// from one that has started again since.
func (p *presence) isRival(req api.RegisterRequest) bool {
	return p != nil && (p.rivals[req.Instance] || slices.ContainsFunc(req.Previous, func(i string) bool { return p.rivals[i] }))
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
// before to end.
func (c *Coordinator) planUnlessLingering(ctx context.Context, req api.RegisterRequest) (*plan, error) {
	end := time.NewTimer(linger)
	defer end.Stop()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for {
		p, err := c.plan(req)
		if !errors.Is(err, errLingering) {
			return p, err
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-end.C:
			c.mu.Lock()
			defer c.mu.Unlock()
			if err := c.refuseCopyLocked(req); err != nil {
				return nil, err
			}
			return nil, refuse(http.StatusServiceUnavailable, "the stream of agent %s has just ended; try again", req.AgentID)
		}
	}
}
