package coordinator

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// refusedSecondLocked says why an agent does not get the second agent IP that it asks
// with; empty: it does, or asks with none. It is found by the host, not chosen by a
// person, and the agent works without it: so it never keeps a host from registering,
// nor another from an address that is its first.
func (c *Coordinator) refusedSecondLocked(req *api.RegisterRequest) string {
	ip := req.SecondIP
	if !ip.IsValid() {
		return ""
	}
	if ip.Is4() == req.AgentIP.Is4() {
		return fmt.Sprintf("%s is of the same family as agent IP %s", ip, req.AgentIP)
	}
	if err := checkAgentIP(c.view.network.Network, ip); err != nil {
		return err.Error()
	}
	for _, n := range c.networks {
		if err := conf.CheckInNetwork(ip, n); err != nil {
			return err.Error()
		}
	}
	holder := c.view.byIP[ip].id
	other := c.view.agents[holder]
	if other == nil || holder == req.AgentID {
		return ""
	}
	heard, connected := c.lastHeardLocked(holder)
	if other.IP == ip || connected || time.Since(heard) < alive {
		return fmt.Sprintf("%s belongs to agent %s at %s; if that one is gone, delete it", ip, holder, other.IP)
	}
	return ""
}

// takeIPsLocked has the keys of the plan's agent IPs lead to its agent. An agent that
// had the first one is superseded; one of whom it was the second goes on without.
func (c *Coordinator) takeIPsLocked(p *plan, id string) {
	put := func(key string, value []byte) { p.txn.Then = append(p.txn.Then, store.Op{Key: key, Value: value}) }
	var lost map[string]record // which it hardly ever is
	for _, ip := range p.next.ips() {
		key := c.view.byIP[ip]
		holder, other := key.id, c.view.agents[key.id]
		if other != nil && holder == id {
			continue
		}
		put(keyIP(ip), []byte(id))
		if other == nil {
			// Nobody has it, or it leads to one that a coordinator of before second agent
			// IPs deleted. Without an agent's record to depend on, it is the key itself.
			p.txn.If = append(p.txn.If, store.Cond{Key: keyIP(ip), Mod: key.mod})
			continue
		}
		less, known := lost[holder]
		if !known {
			// Its record changes whenever its IPs do, so this condition covers both.
			p.txn.If = append(p.txn.If, store.Cond{Key: keyAgent(holder), Mod: other.mod})
			less = other.record
		}
		if other.IP == ip {
			less.Superseded = id
		} else {
			less.Underlay = less.OneFamily()
		}
		if lost == nil {
			lost = map[string]record{}
		}
		lost[holder] = less
	}
	for _, holder := range slices.Sorted(maps.Keys(lost)) {
		less := lost[holder]
		less.Adopted = c.view.claimKept(c.view.agents[holder], &less)
		put(keyAgent(holder), encode(less))
	}
	if p.old == nil {
		return
	}
	for _, ip := range p.old.ips() {
		if c.view.byIP[ip].id == id && !slices.Contains(p.next.ips(), ip) {
			p.txn.Then = append(p.txn.Then, store.Op{Key: keyIP(ip), Delete: true})
		}
	}
}

// sweepIPs mends what coordinators of before second agent IPs leave, and no later ones
// do, so that once in a coordinator's life is enough: keys that lead to nobody, and hosts
// that they took for superseded when only the second address went to another one. It
// reports whether nothing is left of it.
func (c *Coordinator) sweepIPs(ctx context.Context) bool {
	if time.Since(c.started) < returning {
		return false // who comes back sees to its own
	}
	for end := time.Now().Add(sweeping); time.Now().Before(end); {
		txn := c.planSweepIPs()
		if len(txn.Then) == 0 {
			return true
		}
		if err := c.commitSeen(ctx, txn, true); err != nil {
			return false // the next beat tries again
		}
		c.log.Info("mended agent IPs that an earlier coordinator left", "keys", len(txn.Then))
	}
	return false // the next beat goes on
}

// planSweepIPs is the next transaction of sweepIPs. It depends on the agents as well as on
// the keys: one that registers with such a coordinator under the same id has the key as it is.
func (c *Coordinator) planSweepIPs() (txn store.Txn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for ip, key := range c.view.byIP {
		holder := c.view.agents[key.id]
		if holder != nil && (holder.Superseded == "" || holder.IP != ip) {
			continue
		}
		txn.If = append(txn.If, store.Cond{Key: keyIP(ip), Mod: key.mod})
		if holder == nil {
			txn.If = append(txn.If, store.Cond{Key: keyAgent(key.id)})
			txn.Then = append(txn.Then, store.Op{Key: keyIP(ip), Delete: true})
		} else { // its first address still leads to it
			next := holder.record
			next.Superseded, next.Adopted = "", c.view.claimKept(holder, &next)
			txn.If = append(txn.If, store.Cond{Key: keyAgent(key.id), Mod: holder.mod})
			txn.Then = append(txn.Then, store.Op{Key: keyAgent(key.id), Value: encode(next)})
		}
		if len(txn.Then) == maxSeen {
			break
		}
	}
	return txn
}
