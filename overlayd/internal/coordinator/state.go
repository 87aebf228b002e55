package coordinator

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/allocate"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// known is an agent with what its row in a listing needs. What it points at
// never changes, so that listings are encoded without the lock.
type known struct {
	*agent
	status    storedStatus
	connected bool // here
	elsewhere bool
	gone      bool // see api.Agent
	seen      time.Time
	missing   map[string]string
}

// knownAgents returns every agent in the order of first registration.
func (c *Coordinator) knownAgents(withMissing bool) []known {
	c.mu.Lock()
	list := make([]known, 0, len(c.view.agents))
	for id, a := range c.view.agents {
		k := known{agent: a, status: c.view.statuses[id]}
		if p := c.presence[id]; p != nil {
			k.connected = len(p.watches) > 0
		}
		k.gone = c.goneLocked(id)
		if withMissing {
			k.elsewhere, k.seen = c.connectedElsewhereLocked(id), c.lastSeenLocked(id)
			k.missing = c.missingLocked(a)
		}
		list = append(list, k)
	}
	c.mu.Unlock()
	slices.SortFunc(list, func(a, b known) int { return cmp.Compare(a.create, b.create) })
	return list
}

// goneLocked reports whether nobody has seen an agent for as long as its lease is
// kept for it.
func (c *Coordinator) goneLocked(id string) bool {
	seen := c.lastSeenLocked(id)
	return !seen.IsZero() && time.Since(seen) > graceTerms*c.term
}

// State is what GET /overlay-master/state shows: every agent that is not
// superseded, in the order of registration, with what it was leased of the
// configured overlays.
func (c *Coordinator) State() conf.MasterState {
	s := conf.MasterState{Network: c.network().Network}
	for _, k := range c.knownAgents(false) {
		if k.Superseded != "" {
			continue
		}
		s.Agents = append(s.Agents, conf.MasterAgent{
			IP:       k.IP,
			Overlays: c.lease(k.agent, nil).AgentOverlays(k.status.decode().Overlays),
		})
	}
	return s
}

// encodedState is State as it is served, at one revision of the view.
type encodedState struct {
	mu       sync.Mutex // held while it is made, so that one is enough
	rev      uint64
	document []byte // never changed; nil: not made yet
}

// stateDocument is State as a line of JSON, made once for everybody who asks
// while nothing changes.
func (c *Coordinator) stateDocument() ([]byte, error) {
	c.mu.Lock()
	rev := c.view.rev
	c.mu.Unlock()
	e := &c.encoded
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.document != nil && e.rev >= rev {
		return e.document, nil
	}
	c.mu.Lock()
	rev = c.view.rev // what State sees is at least as new
	c.mu.Unlock()
	b, err := json.Marshal(c.State())
	if err != nil {
		return nil, fmt.Errorf("encode the state: %w", err)
	}
	e.rev, e.document = rev, append(b, '\n')
	return e.document, nil
}

// Agents lists every agent, superseded ones too, in the order of registration.
func (c *Coordinator) Agents() []api.Agent {
	out := []api.Agent{}
	for _, k := range c.knownAgents(true) {
		st := k.status.decode()
		host, problems := c.book.Host(k.id)
		out = append(out, api.Agent{
			Lease: c.lease(k.agent, k.missing), Version: st.Version, Status: st.Overlays,
			Connected: k.connected || k.elsewhere, LastSeen: k.seen.Truncate(time.Second), Superseded: k.Superseded, Gone: k.gone,
			Host: host, Problems: problems,
		})
	}
	return out
}

// Overlays lists every configured overlay in the order of the configuration,
// then those of which only stored leases are left.
func (c *Coordinator) Overlays() []api.Overlay {
	byAgent := map[string]map[string]int{} // by overlay that is drained
	for _, o := range c.network().Overlays {
		if o.Draining { // who counts looks at every container: not while others wait
			byAgent[o.Name] = c.book.AttachedTo(o.Name)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	leases := maps.Clone(c.view.leases)
	out := []api.Overlay{}
	for _, o := range c.network().Overlays {
		p := c.view.pools.overlays[o.Name]
		row := api.Overlay{
			Overlay: o, Configured: true, Leases: leases[o.Name],
			Pool: poolOf(p.v4), Pool6: poolOf(p.v6), FileDiffers: c.fileDiffersLocked(o),
		}
		row.Containers = c.book.Total(o.Name)
		if o.Draining {
			row.Hosts = c.hostsOfLocked(o.Name, byAgent[o.Name])
		}
		out = append(out, row)
		delete(leases, o.Name)
	}
	for _, o := range c.file.Overlays { // those that only the file has
		if _, ok := c.network().Overlay(o.Name); !ok {
			out = append(out, api.Overlay{Overlay: o, Leases: leases[o.Name], FileDiffers: "in the file alone, not applied"})
			delete(leases, o.Name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(leases)) {
		out = append(out, api.Overlay{Overlay: conf.Overlay{Name: name}, Leases: leases[name]})
	}
	return out
}

func poolOf(p *allocate.Pool) *api.Pool {
	if p == nil {
		return nil
	}
	return &api.Pool{Total: p.Total(), Used: p.Used()}
}
