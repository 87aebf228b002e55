package datapath

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/firewall/iptables"
	"overlayd.internal/overlay/internal/firewall/nftables"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// FirewallKinds are what --firewall can be. Auto takes iptables where its
// programs are installed, because what accepts a packet has to be in the same
// place as what would refuse it (Docker, ufw, a policy of DROP), and nftables
// elsewhere.
var FirewallKinds = []string{"auto", "iptables", "nftables"}

// rules keeps the firewall of a host. The zero value is auto.
type rules struct {
	kind   string
	active firewall.Firewall
	// iptables is one of active and others; it holds a socket.
	iptables *iptables.Firewall
	others   []firewall.Firewall // left to be removed, once
	guard    guard
	senders  *senders            // of the last set
	left     map[string]string   // of the last set
	underlay []string            // devices that have the agent IPs
	policy   *firewall.Config    // of the last set, as far as connections depend on it
	owed     bool                // connections that are not allowed may be left
	cutting  func() (int, error) // waits for those that are being ended; nil: none are
}

// SelectFirewall chooses one of FirewallKinds, before the first Apply.
func (d *Datapath) SelectFirewall(kind string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules.kind = kind
}

// open finds the implementation. What the other one has of an earlier run is
// removed when this one is in place.
func (r *rules) open() error {
	if r.active != nil {
		return nil
	}
	ipt, err := iptables.New()
	if err != nil {
		return err
	}
	kind := r.kind
	if kind == "" || kind == "auto" {
		switch err := iptables.Usable(); {
		case err == nil:
			kind = "iptables"
		case nftables.Usable() == nil:
			kind = "nftables"
		default:
			return fmt.Errorf("there is neither iptables nor nftables, so containers reach nothing outside and are not kept apart: %w", errors.Join(err, nftables.Usable()))
		}
	}
	r.iptables = ipt
	if kind == "nftables" {
		r.active, r.others = nftables.New(), []firewall.Firewall{ipt}
	} else {
		r.active, r.others = ipt, []firewall.Firewall{nftables.New()}
	}
	return nil
}

// name is that of the implementation.
func (r *rules) name() string {
	if r.active == nil {
		return ""
	}
	return r.active.Name()
}

func (r *rules) close() {
	if r.iptables != nil {
		r.iptables.Close()
	}
	r.guard.close()
}

// setRules sets the rules that a plan needs, and says what cannot be had of the guard.
func (d *Datapath) setRules(ctx context.Context, p *plan.Plan, have *plan.State, peers map[string]conf.Peer) (changed int, err error) {
	asBefore := maps.Equal(d.rules.left, p.LeftBridges)
	cfg := p.Wanted
	if len(p.Devices) == 0 && len(cfg.Overlays) == 0 {
		// There is no VTEP, and its range may be another network's.
		cfg.VTEP.IP, cfg.VTEP.IP6, peers = netip.Prefix{}, netip.Prefix{}, nil
	}
	d.rules.underlay = []string{have.Underlay, have.Second}
	changed, err = d.rules.set(ctx, cfg, p.LeftBridges, sendersOf(peers, cfg, have), have.IPv6)
	if asBefore { // else the last container has gone from a bridge, which nobody put back
		d.drift.add(driftFirewall, changed, fmt.Sprintf("%d chains and sets of %s", changed, d.rules.name()))
	}
	if busy := d.rules.guard.busy; busy != nil {
		d.log.Warn("another process guards the VXLAN port; trying again at the next look", logkey.Err, busy)
	}
	if off := d.rules.guard.off; off != nil && !d.warned.guard {
		d.log.Info("VXLAN of others is kept out by rules that can be flushed", logkey.Reason, off)
		d.warned.guard = true
	}
	if why := d.rules.guard.unbounded; why != nil && !d.warned.unbounded {
		d.log.Warn("the kernel cannot bound what containers make this host resolve; one can fill its table of neighbours", logkey.Reason, why)
		d.warned.unbounded = true
	}
	return changed, err
}

// set makes the rules what they should be. left are bridges that are not wanted and
// still have containers, with their overlays; from is who may send; without IPv6 in
// the kernel there are no rules for it. What it has begun is to be waited for with
// finish.
func (r *rules) set(ctx context.Context, cfg Host, left map[string]string, from *senders, ipv6 bool) (changed int, err error) {
	if err := r.open(); err != nil {
		return 0, err
	}
	c := firewallConfig(cfg)
	c.Bridges, c.Underlay = append(c.Bridges, leftBridges(c.Bridges, left)...), r.underlay
	r.left = left
	for a := range from.hosts {
		c.Peers = append(c.Peers, a)
	}
	c.Afar = from.afar.elements()
	if cfg.Direct.Take {
		c.Direct = &firewall.Direct{Sources: slices.Collect(maps.Keys(from.direct))}
	}
	r.senders = from
	changed, err = r.make(ctx, c, ipv6)
	if err != nil {
		return changed, err
	}
	// Where rules were missing, connections began that they would have refused or
	// translated. Finding them takes the kernel some milliseconds.
	if r.owed = r.owed || changed > 0 || r.policy != nil && !samePolicy(*r.policy, c); r.owed {
		r.cutting = firewall.Cut(c)
	}
	r.policy = &c
	for len(r.others) > 0 {
		n, err := r.others[0].Remove(ctx)
		changed += n
		if err != nil {
			return changed, fmt.Errorf("remove the rules that %s has of an earlier run: %w", r.others[0].Name(), err)
		}
		r.others = r.others[1:]
	}
	return changed, nil
}

// make makes the rules and the guard, which is a second one: what it does the rules
// leave to it, so it is made first. Where peers send without VXLAN it does less and the
// rules do everything, so they are. Without it they are still to be had.
func (r *rules) make(ctx context.Context, c firewall.Config, ipv6 bool) (changed int, err error) {
	var n int
	var guardErr error
	if c.Direct == nil {
		changed, guardErr = r.guard.set(ctx, c, ipv6)
		c.Guarded = guardErr == nil && r.guard.holds() && !r.outlast()
	}
	want := firewall.Build(c)
	want.IPv6 = want.IPv6 && ipv6
	n, err = r.active.Set(ctx, want)
	changed += n
	if c.Direct != nil {
		n, guardErr = r.guard.set(ctx, c, ipv6)
		changed += n
	}
	return changed, errors.Join(err, guardErr)
}

// outlast reports whether the rules stay when nftables is flushed, which takes the
// guard while no agent runs. They then do what it does themselves.
func (r *rules) outlast() bool { return r.active == r.iptables && r.iptables.Legacy() }

// finish waits until connections that are not allowed have been ended.
func (r *rules) finish() error {
	if r.cutting == nil {
		return nil
	}
	_, err := r.cutting()
	r.cutting = nil
	r.owed = err != nil
	return err
}

// firewallConfig is what the rules depend on, without the peers.
func firewallConfig(cfg Host) firewall.Config {
	c := firewall.Config{Underlay6: cfg.VTEP.Local.Is6(), Local: []netip.Addr{cfg.VTEP.Local}}
	if cfg.VTEP.Second.IsValid() {
		c.Second, c.Local = true, append(c.Local, cfg.VTEP.Second)
	}
	for _, p := range []netip.Prefix{cfg.VTEP.IP, cfg.VTEP.IP6} {
		if p.IsValid() {
			c.VTEPPools = append(c.VTEPPools, p.Masked())
			c.Local = append(c.Local, p.Addr())
		}
	}
	for _, o := range cfg.Overlays {
		c.Overlays = append(c.Overlays, firewall.Overlay{Name: o.Name, Subnets: o.Subnets, Isolation: o.Isolation, Allow: o.Allow})
	}
	for _, b := range cfg.Bridges {
		c.Bridges = append(c.Bridges, firewall.Bridge{Name: b.Name, Overlay: b.Overlay})
		for _, a := range b.Addrs {
			c.Local = append(c.Local, a.Addr())
		}
	}
	c.Bridges = append(c.Bridges, withdrawnBridges(cfg)...)
	return c
}

// withdrawnBridges are those that may be left with containers whose addresses are
// another host's now. They go on among themselves.
func withdrawnBridges(cfg Host) (left []firewall.Bridge) {
	for _, o := range cfg.Overlays {
		var only []netip.Prefix
		for _, w := range cfg.Withdrawn {
			if cfg.OverlayOf(w) == o.Name {
				only = append(only, w)
			}
		}
		for _, half := range conf.Halves {
			name := half.Bridge(o.Name)
			wanted := slices.ContainsFunc(cfg.Bridges, func(b Bridge) bool { return b.Name == name })
			if len(only) > 0 && !wanted {
				left = append(left, firewall.Bridge{Name: name, Overlay: o.Name, Only: only})
			}
		}
	}
	return left
}

// leftBridges are those of left that are not among the others. What is on them is
// still a container: it may send what those may, and not VXLAN. One whose overlay is
// not here any more reaches no overlay.
func leftBridges(others []firewall.Bridge, left map[string]string) (out []firewall.Bridge) {
	for _, name := range slices.Sorted(maps.Keys(left)) {
		if !slices.ContainsFunc(others, func(b firewall.Bridge) bool { return b.Name == name }) {
			out = append(out, firewall.Bridge{Name: name, Overlay: left[name]})
		}
	}
	return out
}

// samePolicy compares what says which connections are allowed.
func samePolicy(a, b firewall.Config) bool {
	return slices.EqualFunc(a.Overlays, b.Overlays, func(a, b firewall.Overlay) bool {
		return a.Name == b.Name && a.Isolation.Mode() == b.Isolation.Mode() && slices.Equal(a.Subnets, b.Subnets) && slices.Equal(a.Allow, b.Allow)
	})
}

// rulesAltered reports whether somebody changed rules of ours that the kernel
// does not announce. While an Apply runs nothing is said: it looks by itself.
func (d *Datapath) rulesAltered() bool {
	if !d.mu.TryLock() {
		return false
	}
	defer d.mu.Unlock()
	if d.rules.active == nil {
		return false
	}
	altered, err := d.rules.active.Altered()
	if err != nil && !d.warned.altered {
		d.log.Warn("cannot ask whether the rules were changed; they are repaired at the next look", logkey.Err, err)
	}
	d.warned.altered = err != nil
	return altered
}

// concernsFirewall reports whether a notification of nftables, which iptables is
// made of today, may tell of the loss of a rule of ours, or of another that
// comes before the jump to them. It cannot tell who did it; a look that finds
// everything in place costs a few milliseconds. New elements of sets are not
// looked at: they come with every peer and every container.
func concernsFirewall(h rtnl.Message) bool {
	const header = 4 // struct nfgenmsg: family, version, resource
	if h.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || h.Type&0xff == unix.NFT_MSG_NEWSETELEM || len(h.Data) < header {
		return false // the more often: there is one for every element
	}
	family := h.Data[0]
	names := map[uint16]string{}
	rtnl.EachAttr(h.Data[header:], func(typ uint16, v []byte) { names[typ] = unix.ByteSliceToString(v) })
	// The name of the table is the first attribute of all messages.
	table, chain := names[unix.NFTA_TABLE_NAME], names[unix.NFTA_RULE_CHAIN]
	ours := table == mark.NFTable && (family == unix.NFPROTO_INET || family == unix.NFPROTO_BRIDGE)
	theirs := family == unix.NFPROTO_IPV4 || family == unix.NFPROTO_IPV6
	if table == firewalldTable {
		return h.Type&0xff == unix.NFT_MSG_DELTABLE || h.Type&0xff == unix.NFT_MSG_NEWRULE
	}
	switch h.Type & 0xff {
	case unix.NFT_MSG_DELTABLE:
		return ours || theirs && (table == "filter" || table == "nat" || table == "raw") || family == unix.NFPROTO_INET
	case unix.NFT_MSG_DELCHAIN:
		return ours || theirs && mark.IsOurChain(names[unix.NFTA_CHAIN_NAME])
	case unix.NFT_MSG_DELRULE:
		return ours && chain != mark.UserChain || theirs && (mark.IsOurChain(chain) || isHook(chain))
	case unix.NFT_MSG_NEWRULE:
		return ours && chain != mark.UserChain || theirs && (mark.IsOurChain(chain) || isHook(chain))
	case unix.NFT_MSG_NEWCHAIN: // a policy; of others, it may drop what is ours
		_, base := names[unix.NFTA_CHAIN_HOOK]
		return ours || base && (theirs || family == unix.NFPROTO_INET)
	case unix.NFT_MSG_DELSET:
		return ours
	case unix.NFT_MSG_DELSETELEM:
		return ours && family == unix.NFPROTO_INET
	}
	return false
}

// isOthersRule reports whether a notification of nftables may tell of another rule, or
// another policy, that somebody else has for forwarded packets. Whether it is about
// overlays has to be asked.
func isOthersRule(h rtnl.Message) bool {
	const header = 4 // struct nfgenmsg
	if h.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(h.Data) < header {
		return false
	}
	var chain uint16 // the attribute with its name; 0: none, as of a table
	switch h.Type & 0xff {
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
		chain = unix.NFTA_RULE_CHAIN
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		chain = unix.NFTA_CHAIN_NAME
	case unix.NFT_MSG_DELTABLE:
	default:
		return false
	}
	names := map[uint16]string{}
	rtnl.EachAttr(h.Data[header:], func(typ uint16, v []byte) { names[typ] = unix.ByteSliceToString(v) })
	if name := names[chain]; name == mark.UserChain || mark.IsOurChain(name) {
		return name == mark.UserChain
	}
	table := names[unix.NFTA_TABLE_NAME]
	return table != mark.NFTable && table != mark.NFGuardTable
}

// firewalldTable is the table of firewalld. It is made anew when firewalld starts
// or reloads, which is when it forgets what it was told.
const firewalldTable = "firewalld"

// isHook reports whether a chain is one of those that ours are jumped to from.
func isHook(chain string) bool {
	switch chain {
	case "PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING":
		return true
	}
	return false
}
