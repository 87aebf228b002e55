package datapath

import (
	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// The kinds of drift that no operation of a plan has; the others are those of
// plan.Subjects.
const (
	driftFirewall    = "firewall"
	driftFirewalld   = "firewalld"
	driftSourceCheck = "source_check"
)

// DriftKinds are the kinds of what others change or remove.
func DriftKinds() []string {
	return append(plan.Subjects(), driftFirewall, driftFirewalld, driftSourceCheck)
}

// Drift is what others had changed or removed of ours since the last Apply, and
// was put back.
type Drift struct {
	Counts map[string]int // kernel objects by kind
	What   []string       // the first of the changes, as one would type them
}

// drift collects what one Apply puts back. A nil one collects nothing: something
// new was asked for, and there is no telling what was lost from what is new.
type drift struct {
	Drift
	mtu     int             // of the last Apply
	failing map[string]bool // overlays that had a problem then; "": the host
}

func (d *drift) add(kind string, n int, what string) {
	if d == nil || n == 0 || d.failing[""] {
		return
	}
	if d.Counts == nil {
		d.Counts = map[string]int{}
	}
	d.Counts[kind] += n
	if len(d.What) < maxReported {
		d.What = append(d.What, what)
	}
}

// done takes in an operation that the kernel carried out. What comes of an
// underlay with another MTU, or of a problem that has ended, was not taken away
// by anybody.
func (d *drift) done(p *plan.Plan) func(plan.Op) {
	if d == nil {
		return nil
	}
	return func(o plan.Op) {
		if o.Obj == plan.LinkMTU && p.MTU != d.mtu || d.failing[o.Overlay] {
			return
		}
		d.add(o.Subject(), 1, o.String())
	}
}

// settled is what the last Apply came to, whether or not the next one may rely
// on it.
type settled struct {
	asked   plan.Wanted // without the peers
	peers   map[string]conf.Peer
	mtu     int
	failing map[string]bool
}

// drifts begins to collect where nothing but what was asked for the last time
// is asked for.
func (d *Datapath) drifts(w Wanted) *drift {
	s := d.settled
	if s == nil || !w.Resync || !plan.SameHost(s.asked, w.Host) || s.asked.Partial != w.Partial || s.peers == nil {
		return nil
	}
	m := memory{peers: s.peers}
	var old, now []conf.Peer
	if w.Changes != nil {
		old, now = m.changes(w.Changes.Set, w.Changes.Gone)
	} else {
		old, now = m.difference(w.Peers)
	}
	if len(old)+len(now) > 0 {
		return nil
	}
	return &drift{mtu: s.mtu, failing: s.failing}
}

// settle remembers what an Apply came to.
func (d *Datapath) settle(w plan.Wanted, mtu int, peers map[string]conf.Peer, problems []plan.Problem) {
	s := &settled{asked: w, peers: peers, mtu: mtu, failing: map[string]bool{}}
	s.asked.Peers = nil
	for _, p := range problems {
		s.failing[p.Overlay] = true
	}
	d.settled = s
}
