package coordinator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/allocate"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/dcosstate"
	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// Import reserves for every agent of a DC/OS cluster what it holds there, as the
// cluster's state says, so that nothing is renumbered. What is reserved in the
// same way already, or leased to the agent, is left as it is; so the call can be
// repeated. On any problem nothing is reserved, and the refusal has all of them.
func (c *Coordinator) Import(ctx context.Context, document []byte, dryRun bool) (api.Imported, error) {
	agents, skipped, unread := dcosstate.Parse(document)
	made := map[netip.Addr]record{} // by this call
	for attempt := 0; attempt < maxAttempts; {
		p, problems := c.planImport(agents)
		if problems = append(slices.Clone(unread), problems...); len(problems) > 0 {
			return api.Imported{}, errors.Join(refuseImport(problems), c.takeBack(ctx, made))
		}
		if dryRun {
			return p.result(dryRun, skipped, made), nil
		}
		txn, err := c.reserve(ctx, p, made)
		if err == nil {
			c.log.Info("imported the state of a DC/OS cluster", logkey.Set, len(made))
			return p.result(false, skipped, made), nil
		}
		if errors.Is(err, store.ErrConflict) {
			err = c.catchUp(ctx, txn, p.viewRev, attempt)
			attempt++
		}
		if err != nil {
			return api.Imported{}, errors.Join(fmt.Errorf("import state: %w", err), c.takeBack(ctx, made))
		}
	}
	return api.Imported{}, errors.Join(refuse(http.StatusServiceUnavailable,
		"import state: the store changed %d times in between; try again", maxAttempts), c.takeBack(ctx, made))
}

func refuseImport(problems []conf.Problem) error {
	e := &api.Error{Code: http.StatusUnprocessableEntity}
	for _, p := range problems {
		e.Problems = append(e.Problems, p.String())
	}
	e.Message = fmt.Sprintf("%d of what the state says cannot be reserved, so nothing was; the first: %s", len(problems), e.Problems[0])
	return e
}

// importPlan is one attempt at an import.
type importPlan struct {
	viewRev       uint64
	network       *network
	wanted        []record
	before, taken []netip.Addr
}

// result sums up an import that made some of the reservations in earlier attempts.
func (p *importPlan) result(dryRun bool, skipped []string, made map[netip.Addr]record) api.Imported {
	r := api.Imported{DryRun: dryRun, Reserved: []api.Reservation{}, Before: []netip.Addr{}, Taken: append([]netip.Addr{}, p.taken...), Skipped: skipped}
	for _, ip := range p.before {
		if rec, mine := made[ip]; mine {
			r.Reserved = append(r.Reserved, rec.row())
		} else {
			r.Before = append(r.Before, ip)
		}
	}
	for _, rec := range p.wanted {
		r.Reserved = append(r.Reserved, rec.row())
	}
	return r
}

// planImport sorts out what is to be reserved, what is already, and what cannot be.
func (c *Coordinator) planImport(agents []dcosstate.Agent) (*importPlan, []conf.Problem) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := &importPlan{viewRev: c.view.rev, network: c.view.network}
	check := &importCheck{c: c, owners: c.view.owners(), seen: map[string]string{}}
	for _, a := range agents {
		rec := record{IP: a.IP, VTEP: a.VTEP, VTEP6: a.VTEP6, MAC6: !a.VTEP.IsValid()}
		for _, s := range a.Subnets {
			if s.Subnet.IsValid() || s.Subnet6.IsValid() {
				rec.Subnets = append(rec.Subnets, held{Overlay: s.Overlay, Subnet: s.Subnet, Subnet6: s.Subnet6})
			}
		}
		holder := c.view.byIP[a.IP].id
		switch already, registered := c.view.reserved[a.IP], c.view.agents[holder]; {
		case registered != nil && registered.holds(rec):
			check.agent(a, holder)
			p.taken = append(p.taken, a.IP)
		case registered != nil:
			check.add(a.Path+".ip", "agent %s has registered with %s and holds another lease (%s); delete it first (overlayctl agents remove %s) when its containers are gone",
				holder, a.IP, registered.describe(), holder)
		case already != nil && already.same(rec):
			check.agent(a, keyReserved(a.IP))
			p.before = append(p.before, a.IP)
		case already != nil:
			check.add(a.Path+".ip", "for %s another lease is reserved (%s); drop it first (overlayctl import-state --drop %s)", a.IP, already.describe(), a.IP)
		default:
			check.agent(a, keyReserved(a.IP))
			p.wanted = append(p.wanted, rec)
		}
	}
	return p, check.problems
}

// holds reports whether a lease has everything of another record.
func (r record) holds(want record) bool {
	if want.VTEP.IsValid() && r.VTEP != want.VTEP || want.VTEP6.IsValid() && r.VTEP6 != want.VTEP6 {
		return false
	}
	for _, w := range want.Subnets {
		h := r.held(w.Overlay)
		if w.Subnet.IsValid() && h.Subnet != w.Subnet || w.Subnet6.IsValid() && h.Subnet6 != w.Subnet6 {
			return false
		}
	}
	return true
}

// same reports whether two records hold the same, in whatever order.
func (r record) same(o record) bool { return r.holds(o) && o.holds(r) }

func (r record) describe() string {
	text := "VTEP " + r.macOf().String()
	for _, h := range r.Subnets {
		for _, p := range []netip.Prefix{h.Subnet, h.Subnet6} {
			if p.IsValid() {
				text += fmt.Sprintf(", %s of %s", p, h.Overlay)
			}
		}
	}
	return text
}

// importCheck finds out what cannot be reserved. Coordinator.mu is held.
type importCheck struct {
	c        *Coordinator
	owners   map[string]string // of stored resources
	seen     map[string]string // place in the document by resource
	problems []conf.Problem
}

func (k *importCheck) add(path, format string, args ...any) {
	k.problems = append(k.problems, conf.Problem{Path: path, Text: fmt.Sprintf(format, args...)})
}

// agent checks what one agent is to get, of which owner has what is stored.
func (k *importCheck) agent(a dcosstate.Agent, owner string) {
	network := k.c.view.network
	if a.IP.IsValid() {
		if err := checkAgentIP(k.c.network().Network, a.IP); err != nil {
			k.add(a.Path+".ip", "%v", err)
		}
		k.once(a.Path+".ip", keyIP(a.IP), a.IP.String())
	}
	if a.VTEP.IsValid() {
		k.block(a.VTEPPath+".vtep_ip", k.c.view.pools.vtep, addrBlock(a.VTEP), keyVTEP(a.VTEP), owner, "vtep_subnet")
		k.mac(a, a.VTEP)
	} else if a.VTEP6.IsValid() {
		if network.VTEPSubnet.IsValid() {
			k.add(a.VTEPPath+".vtep_ip", "missing, but vtep_subnet is configured here; leave it out of the configuration until the agents are there, or give the agent an address of it")
		}
		k.mac(a, a.VTEP6)
	}
	if a.VTEP6.IsValid() {
		k.block(a.VTEPPath+".vtep_ip6", k.c.view.pools.vtep6, addrBlock(a.VTEP6), keyVTEP6(a.VTEP6), owner, "vtep_subnet6")
	}
	if n := len(a.Subnets); n > maxBlocks/2 {
		k.add(a.Path, "holds subnets of %d overlays, at most %d can be reserved", n, maxBlocks/2)
	}
	for _, s := range a.Subnets {
		o, ok := network.Overlay(s.Overlay)
		if !ok {
			k.add(s.Path+".info.name", "overlay %.80q is not configured here; take over the DC/OS cluster's dcos_overlay_network as it is", s.Overlay)
			continue
		}
		pools := k.c.view.pools.overlays[o.Name]
		if s.Subnet.IsValid() {
			k.block(s.Path+".subnet", pools.v4, s.Subnet, keySubnet(o.Name, s.Subnet), owner, "subnet of overlay "+o.Name)
		}
		if s.Subnet6.IsValid() {
			k.block(s.Path+".subnet6", pools.v6, s.Subnet6, keySubnet(o.Name, s.Subnet6), owner, "subnet6 of overlay "+o.Name)
		}
	}
}

// mac checks that the VTEP keeps its MAC, which is made of an address.
func (k *importCheck) mac(a dcosstate.Agent, of netip.Addr) {
	n := k.c.view.network
	if want := conf.VTEPMAC(n.oui, of); a.MAC != (conf.MAC{}) && a.MAC != want {
		k.add(a.VTEPPath+".vtep_mac", "%s, but vtep_mac_oui %s makes %s of %s; configure the OUI of the DC/OS cluster", a.MAC, n.VTEPMACOUI, want, of)
	}
}

func addrBlock(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// block checks that a block is one of the pool, that nobody else has it, and that
// the document names it once.
func (k *importCheck) block(path string, pool *allocate.Pool, block netip.Prefix, key, owner, what string) {
	name := block.String()
	if block.IsSingleIP() {
		name = block.Addr().String()
	}
	if pool == nil {
		k.add(path, "%s, but no %s is configured here", name, what)
		return
	}
	if err := pool.Check(block); err != nil {
		k.add(path, "%s is no block of the configured %s: %v", name, what, err)
		return
	}
	if has := k.owners[key]; has != "" && has != owner {
		k.add(path, "%s is leased to %s", name, holderName(has))
	}
	k.once(path, key, name)
}

func (k *importCheck) once(path, key, name string) {
	if other, twice := k.seen[key]; twice {
		k.add(path, "%s stands at %s too", name, other)
		return
	}
	k.seen[key] = path
}

// reserve writes reservations, as many at once as one transaction takes, and
// notes them in made. On an error it returns the transaction that failed.
func (c *Coordinator) reserve(ctx context.Context, p *importPlan, made map[netip.Addr]record) (store.Txn, error) {
	sameNetwork := store.Cond{Key: keyNetwork, Mod: p.network.mod}
	txn := store.Txn{If: []store.Cond{sameNetwork}}
	var batch []record
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		if err := c.commit(ctx, txn); err != nil {
			return err
		}
		for _, rec := range batch {
			made[rec.IP] = rec
		}
		txn, batch = store.Txn{If: []store.Cond{sameNetwork}}, nil
		return nil
	}
	for _, rec := range p.wanted {
		// Nobody has registered with the address, or reserved for it, or has any of it.
		keys := append([]string{keyReserved(rec.IP)}, rec.resources()...)
		if len(txn.If)+len(keys)+1 > store.MaxOps {
			if err := flush(); err != nil {
				return txn, err
			}
		}
		batch = append(batch, rec)
		txn.If = append(txn.If, store.Cond{Key: keyIP(rec.IP)})
		for i, key := range keys {
			txn.If = append(txn.If, store.Cond{Key: key})
			value := []byte(keys[0])
			if i == 0 {
				value = encode(rec)
			}
			txn.Then = append(txn.Then, store.Op{Key: key, Value: value})
		}
	}
	err := flush()
	return txn, err
}

// takeBack drops what an import has reserved before it failed.
func (c *Coordinator) takeBack(ctx context.Context, made map[netip.Addr]record) error {
	if len(made) == 0 {
		return nil
	}
	const patience = 10 * time.Second
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	if _, err := c.DropReserved(ctx, api.ReservedDrop{Agents: slices.Collect(maps.Keys(made))}); err != nil {
		return fmt.Errorf("take back what was reserved before (drop it with overlayctl import-state --drop all): %w", err)
	}
	return nil
}

// DropReserved gives reservations back, and returns those that were there. What
// an agent has taken is a lease and stays.
func (c *Coordinator) DropReserved(ctx context.Context, req api.ReservedDrop) ([]api.Reservation, error) {
	dropped := []api.Reservation{}
	for attempt := 0; attempt < maxAttempts; {
		txn, batch, viewRev := c.planDrop(req)
		if len(batch) == 0 {
			c.log.Info("dropped reservations", logkey.Gone, len(dropped))
			return dropped, nil
		}
		err := c.commit(ctx, txn)
		if err == nil {
			dropped = append(dropped, batch...)
			continue
		}
		if !errors.Is(err, store.ErrConflict) {
			return dropped, fmt.Errorf("drop reservations: %w", err)
		}
		if err := c.catchUp(ctx, txn, viewRev, attempt); err != nil {
			return dropped, fmt.Errorf("drop reservations: %w", err)
		}
		attempt++
	}
	return dropped, refuse(http.StatusServiceUnavailable, "drop reservations: the store changed %d times in between; try again", maxAttempts)
}

// planDrop makes a transaction that drops as many as it takes.
func (c *Coordinator) planDrop(req api.ReservedDrop) (txn store.Txn, batch []api.Reservation, viewRev uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ips := req.Agents
	if req.All {
		ips = slices.SortedFunc(maps.Keys(c.view.reserved), netip.Addr.Compare)
	}
	named := map[netip.Addr]bool{}
	for _, ip := range ips {
		r := c.view.reserved[ip]
		if r == nil || named[ip] {
			continue
		}
		named[ip] = true
		if len(txn.Then)+r.size()+1 > store.MaxOps {
			break
		}
		txn.If = append(txn.If, store.Cond{Key: keyReserved(ip), Mod: r.mod})
		for _, key := range append([]string{keyReserved(ip)}, r.resources()...) {
			txn.Then = append(txn.Then, store.Op{Key: key, Delete: true})
		}
		batch = append(batch, r.row())
	}
	return txn, batch, c.view.rev
}

func (c *Coordinator) serveImport(w http.ResponseWriter, r *http.Request) error {
	var document json.RawMessage
	if err := serve.ReadJSON(w, r, &document); err != nil {
		return err
	}
	result, err := c.Import(r.Context(), document, r.URL.Query().Get("dry_run") == "true")
	if err != nil {
		return err
	}
	serve.WriteJSON(w, http.StatusOK, result)
	return nil
}

func (c *Coordinator) serveReservedDrop(w http.ResponseWriter, r *http.Request) error {
	var req api.ReservedDrop
	if err := serve.ReadJSON(w, r, &req); err != nil {
		return err
	}
	dropped, err := c.DropReserved(r.Context(), req)
	if err != nil {
		return err
	}
	serve.WriteJSON(w, http.StatusOK, dropped)
	return nil
}
