package coordinator

import (
	"net/http"
	"net/netip"
	"slices"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// alive is how long after its last registration an agent counts as alive even
// if it does not watch.
const alive = 90 * time.Second

// presence is what this coordinator knows of an agent beyond the store; what it
// tells others is in seen.go. It is forgotten when the coordinator ends.
type presence struct {
	seen        time.Time           // last registration or renewal here
	told        uint64              // epoch of the lease last answered here
	toldNetwork uint64              // revision of the network that the lease was of
	registering int                 // registrations in progress
	watches     map[*watch]struct{} // nil until there is one
	contest     *contest            // nil until somebody came in its place
}

// watch is one connected stream of peers.
type watch struct {
	ip       netip.Addr         // the agent's address when the stream began; invalid: not known
	ahead    bool               // the stream must begin with a snapshot
	run      string             // of the revision that it begins after
	instance string             // of the agent that follows; empty: it did not say
	wake     chan struct{}      // has a token when there is something to ask for
	register bool               // the agent is to register again; Coordinator.mu
	report   bool               // the agent is to tell what it has attached; Coordinator.mu
	orders   []*api.SurveyOrder // that the agent has not been sent; Coordinator.mu
}

// askToRegister has every stream of the agent say so.
func (p *presence) askToRegister() {
	for w := range p.watches {
		w.ask()
	}
}

func (w *watch) ask() {
	w.register = true
	w.rouse()
}

// rouse has the stream look at what is to be asked for.
func (w *watch) rouse() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// presenceLocked returns the presence of an agent, made if there is none.
func (c *Coordinator) presenceLocked(id string) *presence {
	p := c.presence[id]
	if p == nil {
		p = &presence{}
		c.presence[c.view.name(id)] = p
	}
	return p
}

// checkLiveLocked refuses a registration that would take something from a host
// that is alive: its agent id, or its agent IP.
func (c *Coordinator) checkLiveLocked(req *api.RegisterRequest) error {
	proven, err := c.checkInstanceLocked(req)
	if err != nil {
		return err
	}
	if p := c.presence[req.AgentID]; p != nil {
		for w := range p.watches {
			if proven && (w.instance == req.Instance || slices.Contains(req.Previous, w.instance)) {
				continue // its own, from the address that it had
			}
			if w.ip.IsValid() && w.ip != req.AgentIP {
				return idInUse(req, w.ip)
			}
		}
	}
	if a := c.view.agents[req.AgentID]; a != nil && a.IP != req.AgentIP && !proven && c.connectedElsewhereLocked(req.AgentID) {
		return idInUse(req, a.IP)
	}
	holder := c.view.byIP[req.AgentIP].id
	if a := c.view.agents[holder]; a == nil || holder == req.AgentID || a.IP != req.AgentIP {
		return nil // where it is the holder's second one, he goes on without
	}
	if proven && req.Source == req.AgentIP && c.takeOverLocked(req.AgentIP) {
		return nil // it speaks from there, so the holder is there no longer
	}
	heard, connected := c.lastHeardLocked(holder)
	if ago := time.Since(heard); connected || ago < alive {
		what := "is connected"
		if !connected {
			what = "may be alive (it counts as such for " + alive.String() + ")"
		}
		return refuse(http.StatusConflict,
			"agent IP %s belongs to agent %s, which %s, so agent %s cannot have it; "+
				"if it is the same host with a new agent id, stop the old agent and try again after %s, or delete agent %s; otherwise give this host its own --agent-ip",
			req.AgentIP, holder, what, req.AgentID, alive, holder)
	}
	return nil
}

// takeOverAgain is how long nobody gets an address from its holder, who got it so
// himself. Two hosts that both speak from one address would change it for ever.
const takeOverAgain = time.Minute

// takeOverLocked reports whether an address may go to a host that speaks from it.
func (c *Coordinator) takeOverLocked(ip netip.Addr) bool {
	now := time.Now()
	for taken, at := range c.takenOver {
		if now.Sub(at) > takeOverAgain {
			delete(c.takenOver, taken)
		}
	}
	if _, again := c.takenOver[ip]; again {
		return false
	}
	c.takenOver[ip] = now
	return true
}

func idInUse(req *api.RegisterRequest, by netip.Addr) error {
	return refuseKind(api.KindIDInUse,
		"agent id %s is in use by the host at %s, which is connected, so the host at %s cannot register with it; "+
			"give each host its own agent id (remove the copied agent-id file or pass --agent-id). "+
			"A host that only changed its address is accepted as soon as its old connection has ended, within %s",
		req.AgentID, by, req.AgentIP, serve.DeadConnection+api.HeartbeatInterval)
}

// lastHeardLocked is when an agent was last heard of, at the earliest when this
// coordinator began: before that it may have talked to another one.
func (c *Coordinator) lastHeardLocked(id string) (heard time.Time, connected bool) {
	heard = c.started
	if s := c.view.seen[id]; s.heard.After(heard) {
		heard = s.heard
	}
	if c.connectedElsewhereLocked(id) {
		return heard, true
	}
	p := c.presence[id]
	if p == nil {
		return heard, false
	}
	if p.seen.After(heard) {
		heard = p.seen
	}
	return heard, len(p.watches) > 0
}
