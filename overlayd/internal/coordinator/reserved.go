package coordinator

import (
	"fmt"
	"iter"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// A reservation is a lease that waits for the agent with an address: what a DC/OS
// cluster had given it. Its VTEP and subnets have their keys in the store like
// those of an agent, so that every coordinator, also one of a version before
// reservations, leaves them alone. The agent's first registration takes the whole
// of it in the transaction that grants the lease.
type reservation struct {
	mod uint64
	record
}

// has reports whether the reservation has a block of a lease.
func (r *reservation) has(l *conf.Lease) bool {
	any := false
	each(l, func(_, key string, _ netip.Prefix) { any = any || r.owns(key) })
	return any
}

// reservation is the one that owns a key; nil: none does.
func (v *view) reservation(key string) *reservation {
	for _, r := range v.reserved {
		if r.owns(key) {
			return r
		}
	}
	return nil
}

func keyReserved(ip netip.Addr) string { return prefixReserved + ip.String() }

// size is how many blocks it has; nil has none.
func (r *reservation) size() int {
	if r == nil {
		return 0
	}
	return len(r.resources())
}

// holderName says whose a stored resource is.
func holderName(owner string) string {
	if ip, ok := strings.CutPrefix(owner, prefixReserved); ok {
		return "the reservation for " + ip
	}
	return "agent " + owner
}

// holders are all that hold resources, agents and reservations, by what stands in
// the keys of these.
func (v *view) holders() iter.Seq2[string, record] {
	return func(yield func(string, record) bool) {
		for id, a := range v.agents {
			if !yield(id, a.record) {
				return
			}
		}
		for ip, r := range v.reserved {
			if !yield(keyReserved(ip), r.record) {
				return
			}
		}
	}
}

// owners are the holders of all resources by key.
func (v *view) owners() map[string]string {
	owners := map[string]string{}
	for owner, rec := range v.holders() {
		for _, key := range rec.resources() {
			owners[key] = owner
		}
	}
	return owners
}

func (v *view) applyReserved(e store.Event) error {
	ip, err := netip.ParseAddr(strings.TrimPrefix(e.Key, prefixReserved))
	if err != nil {
		return fmt.Errorf("key %s: %w", e.Key, err)
	}
	if e.Delete {
		delete(v.reserved, ip)
		return nil
	}
	a, err := decodeAgent(e.KV)
	if err != nil {
		return err
	}
	a.IP = ip
	v.reserved[ip] = &reservation{mod: e.Mod, record: a.record}
	return nil
}

// takeReservedLocked gives a new agent what waits for its address. An agent that
// has a lease keeps it, wherever it moves; so does one whose lease the store has
// lost, and who shows it: where it has something of the reservation, it gets the rest
// of it as well, and what it has instead takes the place of what is reserved.
func (c *Coordinator) takeReservedLocked(p *plan, shown *shownLease) {
	r := c.view.reserved[p.next.IP]
	if p.old != nil || r == nil || c.adoptableLocked(p.old, shown) && !r.has(shown.Lease) {
		return
	}
	p.reserved = r
	p.next.VTEP, p.next.VTEP6, p.next.MAC6 = p.reserved.VTEP, p.reserved.VTEP6, p.reserved.MAC6
	p.next.Subnets = slices.Clone(p.reserved.Subnets)
}

// redeemLocked adds to the transaction of a new agent that its reservation is
// gone, and its resources are the agent's; or that there was none.
func (c *Coordinator) redeemLocked(p *plan, id string) {
	if p.old != nil {
		return
	}
	key := keyReserved(p.next.IP)
	if p.reserved == nil {
		var mod uint64
		if r := c.view.reserved[p.next.IP]; r != nil { // it stays
			mod = r.mod
		}
		p.txn.If = append(p.txn.If, store.Cond{Key: key, Mod: mod})
		return
	}
	p.txn.If = append(p.txn.If, store.Cond{Key: key, Mod: p.reserved.mod})
	for _, resource := range p.reserved.resources() {
		if slices.Contains(p.dropped, resource) {
			continue // it holds another one that it has shown
		}
		p.txn.Then = append(p.txn.Then, store.Op{Key: resource, Value: []byte(id)})
	}
	p.txn.Then = append(p.txn.Then, store.Op{Key: key, Delete: true})
}

// Reserved lists the reservations in the order of their addresses.
func (c *Coordinator) Reserved() []api.Reservation {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]api.Reservation, 0, len(c.view.reserved))
	for _, r := range c.view.reserved {
		list = append(list, r.row())
	}
	slices.SortFunc(list, func(a, b api.Reservation) int { return a.AgentIP.Compare(b.AgentIP) })
	return list
}

func (r record) row() api.Reservation {
	row := api.Reservation{AgentIP: r.IP, VTEP: r.VTEP, VTEP6: r.VTEP6, Subnets: []api.ReservedSubnet{}}
	for _, h := range r.Subnets {
		row.Subnets = append(row.Subnets, api.ReservedSubnet{Overlay: h.Overlay, Subnet: h.Subnet, Subnet6: h.Subnet6})
	}
	return row
}

// maxImport bounds an imported state, in bytes: some ten thousand agents.
const maxImport = 64 << 20

// maxJoin bounds what asks for a certificate, some hundred bytes. It is read from
// anybody, over as many connections as a host may have.
const maxJoin = 64 << 10

// maxBody is the bound of a request's body where the route has one of its own.
func maxBody(path string) int64 {
	switch path {
	case api.PathReserved:
		return maxImport
	case api.PathJoin, api.PathRenew:
		return maxJoin
	}
	return 0
}

func (c *Coordinator) reservedRoutes() []route {
	return []route{
		{http.MethodGet, api.PathReserved, reader, c.serveReserved},
		{http.MethodPost, api.PathReserved, operator, c.serveImport},
		{http.MethodPost, api.PathReservedDrop, operator, c.serveReservedDrop},
	}
}

func (c *Coordinator) serveReserved(w http.ResponseWriter, _ *http.Request) error {
	serve.WriteJSON(w, http.StatusOK, c.Reserved())
	return nil
}
