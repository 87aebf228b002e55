package datapath

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// senders are who may send overlay packets to this host.
type senders struct {
	hosts tally[netip.Addr] // underlay addresses, which send VXLAN
	// Subnets of peers, which send without, and the device that they reach.
	direct tally[firewall.Element]
	afar   *afar
}

// tally counts who has a thing.
type tally[K comparable] map[K]int

// change takes things of the old ones out and of the new ones in, and returns
// what nobody had before and what nobody has now.
func (t tally[K]) change(old, now []K) (add, remove []K) {
	had := map[K]bool{}
	count := func(k K, n int) {
		if _, touched := had[k]; !touched {
			had[k] = t[k] > 0
		}
		t[k] += n
	}
	for _, k := range old {
		count(k, -1)
	}
	for _, k := range now {
		count(k, 1)
	}
	for k, before := range had {
		switch has := t[k] > 0; {
		case has && !before:
			add = append(add, k)
		case !has:
			delete(t, k)
			if before {
				remove = append(remove, k)
			}
		}
	}
	return add, remove
}

// sendersOf counts those of peers. Where there may be more peers than are given,
// those that the kernel already forwards to count as well.
func sendersOf(peers map[string]conf.Peer, cfg Host, have *plan.State) *senders {
	s := &senders{hosts: make(tally[netip.Addr], len(peers)), direct: tally[firewall.Element]{}, afar: afarOf(peers, cfg, have)}
	add := func(p *conf.Peer) {
		for _, ip := range agentIPs(p) {
			s.hosts[ip]++
		}
		for _, e := range directOf(p, cfg) {
			s.direct[e]++
		}
	}
	for _, p := range peers {
		add(&p)
	}
	if peers == nil {
		for i := range cfg.Peers {
			add(&cfg.Peers[i])
		}
	}
	if !cfg.Partial {
		return s
	}
	for _, device := range [...]string{conf.VTEPName, mark.SecondVTEP} {
		for _, a := range have.On(device).FDB {
			s.hosts[a] = max(s.hosts[a], 1)
		}
	}
	for dst, r := range have.Routes {
		if r.Kind == plan.Plain && cfg.Direct.Take && cfg.Underlay != "" {
			e := firewall.Element{Prefix: dst, Device: cfg.Underlay}
			s.direct[e] = max(s.direct[e], 1)
		}
	}
	return s
}

// agentIPs are the addresses that a peer may send VXLAN from: while one comes or goes,
// hosts have not all heard of it.
func agentIPs(p *conf.Peer) []netip.Addr {
	if p.SecondIP.IsValid() {
		return []netip.Addr{p.AgentIP, p.SecondIP}
	}
	return []netip.Addr{p.AgentIP}
}

// sentTo are the agent IPs by which peers are reached.
func sentTo(w *plan.Wanted, peers map[string]conf.Peer) []netip.Addr {
	ips := make([]netip.Addr, 0, len(peers))
	for _, p := range peers {
		if _, to, ok := w.Reach(&p); ok {
			ips = append(ips, to)
		}
	}
	return ips
}

// directOf are the sources that a peer may send from without VXLAN: its subnets
// and its VTEP address, of the underlay's family, at the device that has our agent IP, which is where it
// arrives whatever our own way to the peer is. The peer need not have said that it
// does so already: whoever begins must not have to wait until all have heard it.
func directOf(p *conf.Peer, cfg Host) (out []firewall.Element) {
	if cfg.Underlay == "" || !cfg.Direct.Take || p.AgentIP == cfg.VTEP.Local {
		return nil
	}
	for _, s := range append([]netip.Prefix{p.VTEPOf(p.AgentIP)}, p.Subnets...) {
		if s.IsValid() && s.Addr().Is6() == p.AgentIP.Is6() {
			out = append(out, firewall.Element{Prefix: s.Masked(), Device: cfg.Underlay})
		}
	}
	return out
}

// change takes old peers out of the rules and new ones in.
func (r *rules) change(ctx context.Context, cfg Host, old, now []conf.Peer) error {
	if r.active == nil || r.senders == nil {
		return errors.New("the rules were not set yet")
	}
	of := func(peers []conf.Peer) (hosts []netip.Addr, direct []firewall.Element) {
		for i := range peers {
			hosts = append(hosts, agentIPs(&peers[i])...)
			direct = append(direct, directOf(&peers[i], cfg)...)
		}
		return hosts, direct
	}
	oldHosts, oldDirect := of(old)
	nowHosts, nowDirect := of(now)
	add, remove := r.senders.hosts.change(oldHosts, nowHosts)
	if len(add)+len(remove) > 0 {
		more, less := elements(add), elements(remove)
		err := r.guard.elements(ctx, firewall.PeersSet, more, less)
		if err := errors.Join(err, r.active.Elements(ctx, firewall.PeersSet, more, less)); err != nil {
			return err
		}
	}
	if err := r.changeAfar(ctx, cfg, old, now); err != nil {
		return err
	}
	with, without := r.senders.direct.change(oldDirect, nowDirect)
	if len(with)+len(without) == 0 {
		return nil
	}
	return r.active.Elements(ctx, firewall.DirectSet, with, without)
}

func elements(addrs []netip.Addr) []firewall.Element {
	out := make([]firewall.Element, 0, len(addrs))
	for _, a := range addrs {
		out = append(out, firewall.Address(a))
	}
	return out
}

// moved asks the kernel again which peers are on a link, and reports whether that
// is another answer than before.
func (d *Datapath) moved() bool {
	known := d.memory.possible
	if !known.Direct.Send {
		return false
	}
	ips := sentTo(&d.memory.possible, d.memory.peers)
	ways, err := d.kernel.OnLink(ips)
	if err != nil {
		return true
	}
	for _, ip := range ips {
		if ways[ip] != known.Ways[ip] {
			return true
		}
	}
	return false
}

// narrowed reports whether the ways to peers carry something else than before.
func (d *Datapath) narrowed(have *plan.State) bool {
	known := d.memory.possible.PathMTU
	if len(have.Narrow) == 0 {
		return len(known) > 0
	}
	ips := sentTo(&d.memory.possible, d.memory.peers)
	now, err := d.kernel.PathMTU(ips, have.Narrow)
	return err != nil || !maps.Equal(now, known)
}

// locate finds out of the peers that changed which are on a link, and what the
// way to each carries. It answers no where that says something new about what is
// known already.
func (d *Datapath) locate(old, now []conf.Peer) bool {
	known := &d.memory.possible
	if !known.Direct.Send && len(known.Narrow) == 0 {
		return true
	}
	ips := make([]netip.Addr, 0, len(now))
	for i := range now {
		if _, to, ok := known.Reach(&now[i]); ok {
			ips = append(ips, to)
		}
	}
	ways, mtus := map[netip.Addr]string{}, map[netip.Addr]int{}
	var err error
	if known.Direct.Send {
		ways, err = d.kernel.OnLink(ips)
	}
	if err == nil && len(known.Narrow) > 0 {
		mtus, err = d.kernel.PathMTU(ips, known.Narrow)
	}
	if err != nil {
		return false
	}
	for _, ip := range ips {
		if known.Ways[ip] == ways[ip] && known.PathMTU[ip] == mtus[ip] {
			continue
		}
		another := slices.ContainsFunc(old, func(p conf.Peer) bool { return slices.Contains(agentIPs(&p), ip) })
		if known.Ways[ip] != "" || known.PathMTU[ip] != 0 || another || ways[ip] != "" && !d.leads(ways[ip]) {
			return false
		}
		// There are none as long as no route has them.
		if ways[ip] != "" {
			if known.Ways == nil {
				known.Ways = map[netip.Addr]string{}
			}
			known.Ways[ip] = ways[ip]
		}
		if mtus[ip] != 0 {
			if known.PathMTU == nil {
				known.PathMTU = map[netip.Addr]int{}
			}
			known.PathMTU[ip] = mtus[ip]
		}
	}
	return true
}

// leads reports whether a device is one that leads to peers already, and so is
// watched.
func (d *Datapath) leads(device string) bool {
	for _, known := range d.memory.possible.Ways {
		if known == device {
			return true
		}
	}
	return false
}
