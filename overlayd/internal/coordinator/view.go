package coordinator

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unique"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/allocate"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/transfer"
)

// view is the store's content at one revision, in memory, and beside it what
// registrations in progress have picked and not yet written. It is pure
// bookkeeping; Coordinator.mu guards it.
type view struct {
	rev        uint64
	agents     map[string]*agent
	leases     map[string]int // agents that hold something of an overlay, by its name
	statuses   map[string]storedStatus
	byIP       map[netip.Addr]ipKey
	cluster    transfer.Cluster
	clusterMod uint64
	network    *network // as stored
	runs       runs
	runsMod    uint64
	seen       map[string]storedSeen       // by agent id
	beats      map[string]storedBeat       // by run
	deletedMod uint64                      // of the last deletion of an agent
	reserved   map[netip.Addr]*reservation // by agent IP

	pools  pools
	claims map[string]*claim // by key
	drafts map[string]draft  // by key
}

// draft is what a transaction in progress writes under the key of an agent or of its
// status. What comes back from the store as it was written here need not be read once
// more to find out what it says.
type draft struct {
	value  []byte
	record *record // of an agent
}

// takeDraft returns what was written under a key, if this is it.
func (v *view) takeDraft(key string, value []byte) (draft, bool) {
	d, ok := v.drafts[key]
	delete(v.drafts, key)
	return d, ok && bytes.Equal(d.value, value)
}

// dropDrafts forgets what a transaction was to write that was not written.
func (v *view) dropDrafts(txn *store.Txn) {
	for i := range txn.Then {
		delete(v.drafts, txn.Then[i].Key)
	}
}

// ipKey is the key of an agent IP: whom it leads to, who may be gone, and its revision.
type ipKey struct {
	id  string
	mod uint64
}

// pools are the pools of the configured network.
type pools struct {
	vtep, vtep6 *allocate.Pool // nil without vtep_subnet, vtep_subnet6
	overlays    map[string]overlayPools
}

// overlayPools has nil for a family that the overlay lacks.
type overlayPools struct{ v4, v6 *allocate.Pool }

// claim is a block that a registration in progress has taken out of its pool; the
// pool is nil when the network has changed since and no longer has the block.
// stored says that the view has meanwhile seen the block's key, whoever put it;
// then the block stays in use when the claim ends.
type claim struct {
	pool   *allocate.Pool
	block  netip.Prefix
	stored bool
}

// newView is a view of nothing, for a network.
func newView(n *network) *view {
	return &view{
		network:  n,
		agents:   map[string]*agent{},
		leases:   map[string]int{},
		statuses: map[string]storedStatus{},
		byIP:     map[netip.Addr]ipKey{},
		seen:     map[string]storedSeen{},
		beats:    map[string]storedBeat{},
		reserved: map[netip.Addr]*reservation{},
		claims:   map[string]*claim{},
		drafts:   map[string]draft{},
		pools:    newPools(n.Network),
	}
}

// newPools are the pools of a network, with nothing in use.
func newPools(n conf.Network) pools {
	p := pools{overlays: map[string]overlayPools{}}
	if n.VTEPSubnet.IsValid() {
		p.vtep = allocate.NewAddrs(n.VTEPSubnet)
	}
	if n.VTEPSubnet6.IsValid() {
		p.vtep6 = allocate.NewAddrs(n.VTEPPool6())
	}
	for _, o := range n.Overlays {
		var of overlayPools
		if o.Subnet.IsValid() {
			of.v4 = allocate.NewSubnets(o.Subnet, o.Prefix)
		}
		if o.Subnet6.IsValid() {
			of.v6 = allocate.NewSubnets(o.Subnet6, o.Prefix6)
		}
		p.overlays[o.Name] = of
	}
	return p
}

// name is an agent's id, the same string wherever it is kept. One that was cut from
// a key, or came with a request, would keep all of that in memory.
func (v *view) name(id string) string {
	if a := v.agents[id]; a != nil {
		return a.id
	}
	return strings.Clone(id)
}

// floor is the revision from which on the agents' own revisions tell what has
// changed of the peers: before it some were deleted, or all were configured
// otherwise or had other epochs.
func (v *view) floor() uint64 { return max(v.deletedMod, v.network.mod, v.clusterMod) }

// resource is the pool and the block that a key stands for. The pool is nil
// when the block's overlay or family is not configured.
type resource struct {
	overlay string // empty for a VTEP address
	pool    *allocate.Pool
	block   netip.Prefix
}

// resource parses a key; ok is false when the key is not that of a resource.
func (p pools) resource(key string) (r resource, ok bool, err error) {
	addr := func(s string) (netip.Prefix, error) {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return netip.Prefix{}, err
		}
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	if s, found := strings.CutPrefix(key, prefixVTEP); found {
		r.pool = p.vtep
		r.block, err = addr(s)
	} else if s, found := strings.CutPrefix(key, prefixVTEP6); found {
		r.pool = p.vtep6
		r.block, err = addr(s)
	} else if s, found := strings.CutPrefix(key, prefixSubnet); found {
		name, block, _ := strings.Cut(s, "/")
		r.overlay = name
		r.block, err = netip.ParsePrefix(block)
		if of := p.overlays[name]; r.block.Addr().Is4() {
			r.pool = of.v4
		} else {
			r.pool = of.v6
		}
	} else {
		return r, false, nil
	}
	if err != nil {
		return r, true, fmt.Errorf("key %s: %w", key, err)
	}
	return r, true, nil
}

// take claims the lowest free block of a pool, but for those to pass over, under the
// key it will have.
func (v *view) take(pool *allocate.Pool, passed int, key func(netip.Prefix) string) (netip.Prefix, string, bool) {
	block, ok := pool.NextPast(passed)
	if !ok {
		return netip.Prefix{}, "", false
	}
	k := key(block)
	v.claims[k] = &claim{pool: pool, block: block}
	return block, k, true
}

// settle ends claims: a block goes back unless it was stored.
func (v *view) settle(keys []string) {
	for _, k := range keys {
		c := v.claims[k]
		delete(v.claims, k)
		if c != nil && !c.stored && c.pool != nil {
			c.pool.Release(c.block)
		}
	}
}

// apply takes over one change of the store. It returns the id of the agent
// whose record changed, if it is one.
func (v *view) apply(e store.Event) (agentID string, err error) {
	switch key := e.Key; {
	case strings.HasPrefix(key, prefixAgent):
		return v.applyAgent(e)
	case strings.HasPrefix(key, prefixStatus):
		id := strings.TrimPrefix(key, prefixStatus)
		if e.Delete {
			delete(v.statuses, id)
			return "", nil
		}
		if _, ours := v.takeDraft(key, e.Value); !ours {
			if err := json.Unmarshal(e.Value, &status{}); err != nil {
				return "", fmt.Errorf("key %s: %w", key, err)
			}
		}
		v.statuses[v.name(id)] = storedStatus{mod: e.Mod, raw: unique.Make(string(e.Value))}
		return "", nil
	case strings.HasPrefix(key, prefixSeen):
		return "", v.applySeen(e)
	case strings.HasPrefix(key, prefixCoordinator):
		return "", v.applyBeat(e)
	case strings.HasPrefix(key, prefixReserved):
		return "", v.applyReserved(e)
	case strings.HasPrefix(key, prefixIP):
		ip, err := netip.ParseAddr(strings.TrimPrefix(key, prefixIP))
		if err != nil {
			return "", fmt.Errorf("key %s: %w", key, err)
		}
		if e.Delete {
			delete(v.byIP, ip)
		} else {
			v.byIP[ip] = ipKey{id: v.name(string(e.Value)), mod: e.Mod}
		}
		return "", nil
	case key == keyCluster:
		v.cluster, v.clusterMod = transfer.Cluster{}, e.Mod
		return "", json.Unmarshal(e.Value, &v.cluster)
	case key == keyRuns:
		var rs runs
		if err := json.Unmarshal(e.Value, &rs); err != nil || len(rs) == 0 {
			return "", fmt.Errorf("key %s: no runs in it: %w", key, err)
		}
		rs[len(rs)-1].Began = e.Mod
		v.runs, v.runsMod = rs, e.Mod
		return "", nil
	case key == keyDeleted:
		v.deletedMod = e.Mod
		return "", nil
	case key == keyNetwork:
		n, err := decodeNetwork(e.KV)
		if err != nil {
			return "", err
		}
		return "", v.setNetwork(n)
	}
	r, ok, err := v.pools.resource(e.Key)
	if !ok || err != nil {
		return "", err // a key of a later version is none of ours
	}
	return "", v.applyResource(e, r)
}

func (v *view) applyAgent(e store.Event) (string, error) {
	id := strings.TrimPrefix(e.Key, prefixAgent)
	was := v.agents[id]
	if e.Delete {
		v.countLeases(was, -1)
		delete(v.agents, id)
		delete(v.drafts, e.Key)
		return id, nil
	}
	a, err := v.agentOf(e.KV)
	if err != nil {
		return "", err
	}
	if was != nil {
		a.id = was.id // which others have, see name
	}
	v.countLeases(was, -1)
	v.countLeases(a, 1)
	v.agents[a.id] = a
	return id, nil
}

// agentOf is decodeAgent, which has nothing to do where the record was made here.
func (v *view) agentOf(kv store.KV) (*agent, error) {
	d, ours := v.takeDraft(kv.Key, kv.Value)
	if !ours || d.record == nil {
		return decodeAgent(kv)
	}
	a := newAgent(kv)
	a.record = *d.record
	// It may be that of the agent as it was before, which others read.
	a.Subnets = slices.Clone(a.Subnets)
	return a, a.settle(kv.Key)
}

// countLeases adds to the leases what an agent holds. The agent may be nil.
func (v *view) countLeases(a *agent, n int) {
	if a == nil {
		return
	}
	for _, h := range a.Subnets {
		if v.leases[h.Overlay] += n; v.leases[h.Overlay] == 0 {
			delete(v.leases, h.Overlay)
		}
	}
}

func (v *view) applyResource(e store.Event, r resource) error {
	c := v.claims[e.Key]
	switch {
	case r.pool == nil:
		return nil
	case c != nil:
		c.stored = !e.Delete
	case e.Delete:
		r.pool.Release(r.block)
	case e.Create == e.Mod || !r.pool.InUse(r.block): // else a put that changes the owner, not the use
		if err := r.pool.Reserve(r.block); err != nil {
			return &misfit{resource: r, owner: string(e.Value), err: err}
		}
	}
	return nil
}

// misfit is a stored block that the configured pool cannot hold.
type misfit struct {
	resource
	owner string
	err   error
}

func (m *misfit) Error() string {
	what := "VTEP address"
	if m.overlay != "" {
		what = "agent subnet of overlay " + m.overlay
	}
	return fmt.Sprintf("%s of %s: %v", what, holderName(m.owner), m.err)
}
