package coordinator

import (
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
func (c *Coordinator) refusedSecondLocked(req api.RegisterRequest) string {
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
	lost := map[string]record{}
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
		lost[holder] = less
	}
	for _, holder := range slices.Sorted(maps.Keys(lost)) {
		less := lost[holder]
		less.Adopted = c.view.claimKept(c.view.agents[holder], less)
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
