package coordinator_test

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// TestRandomOperator: agents come, move and are deleted, and between that the
// coordinator is started with one configuration after the other, in no order
// that anybody would think of. What an agent was told stays true as long as it is
// not deleted, also while its overlay is not configured, and is never within what
// another has. Whoever watches now and then knows all peers.
func TestRandomOperator(t *testing.T) {
	const runs, steps = 20, 60
	var all operator
	for seed := range uint64(runs) {
		o := operator{
			Rand: rand.New(rand.NewPCG(seed, 0)), t: t, store: newStore(t),
			held: map[string]map[string]netip.Prefix{}, ips: map[string]string{},
			known: map[string]api.Known{}, peers: map[string]map[string]conf.Peer{},
		}
		o.network = o.someNetwork()
		o.node = start(t, o.store, o.network)
		for range steps {
			o.step()
			o.check()
			if t.Failed() {
				t.Fatalf("seed %d:\n%s", seed, strings.Join(o.did, "\n"))
			}
		}
		o.node.stop()
		all.leases, all.starts, all.misfits = all.leases+o.leases, all.starts+o.starts, all.misfits+o.misfits
	}
	t.Logf("%d leases, %d other configurations, %d that did not fit", all.leases, all.starts, all.misfits)
	if all.leases == 0 || all.starts == 0 || all.misfits == 0 {
		t.Error("something never happened; the test shows less than it says")
	}
}

// operator does things and remembers what agents were told.
type operator struct {
	*rand.Rand
	t       *testing.T
	store   store.Store
	network string
	node    *node
	did     []string

	held  map[string]map[string]netip.Prefix // by agent id, and what it is
	ips   map[string]string
	known map[string]api.Known
	peers map[string]map[string]conf.Peer // by watcher

	leases, starts, misfits int
}

func (o *operator) log(format string, args ...any) {
	o.did = append(o.did, fmt.Sprintf(format, args...))
}

func (o *operator) oneOf(s ...string) string { return s[o.IntN(len(s))] }

// someNetwork makes a valid configuration. Overlays have ranges of their own
// mostly, and sometimes that of another.
func (o *operator) someNetwork() string {
	for {
		var overlays []string
		for _, n := range o.Perm(4)[:1+o.IntN(4)] {
			s, of, families := fmt.Sprintf(`{"name": "o%d"`, n), n, 1+o.IntN(3)
			if o.IntN(4) == 0 {
				of = o.IntN(4)
			}
			if families&1 != 0 {
				s += fmt.Sprintf(`, "subnet": "10.%d.0.0/%s", "prefix": %s`, of, o.oneOf("16", "16", "21", "22"), o.oneOf("24", "24", "24", "25"))
			}
			if families&2 != 0 {
				s += fmt.Sprintf(`, "subnet6": "fd01:%d::/%s", "prefix6": %s`, of, o.oneOf("64", "64", "77"), o.oneOf("80", "80", "80", "81"))
			}
			overlays = append(overlays, s+o.oneOf("", "", `, "enabled": false`, `, "enabled": true`, `, "isolation": true`)+"}")
		}
		network := fmt.Sprintf(`{"vtep_subnet": "44.128.0.0/%s", "vtep_mac_oui": "%s", "vtep_subnet6": "fd01:a::/%s", "overlays": [%s]}`,
			o.oneOf("20", "20", "27"), o.oneOf("70:B3:D5:00:00:00", "02:00:00:00:00:00"), o.oneOf("64", "64", "124"), strings.Join(overlays, ", "))
		if len(parseNetwork(o.t, network).Validate()) == 0 {
			return network
		}
	}
}

func (o *operator) step() {
	id := fmt.Sprintf("a%d", o.IntN(12))
	switch n := o.IntN(20); {
	case n < 11:
		o.register(id)
	case n < 13:
		o.log("delete %s", id)
		if _, err := o.node.client.Delete(o.t.Context(), []string{id}); err != nil {
			o.t.Error(err)
		}
		delete(o.held, id)
		delete(o.ips, id)
	case n < 16:
		o.watch(id)
	default:
		o.reconfigure(o.someNetwork())
	}
}

func (o *operator) register(id string) {
	ip := o.ips[id]
	if ip == "" || o.IntN(6) == 0 {
		ip = fmt.Sprintf("172.16.0.%d", 1+o.IntN(30))
	}
	o.log("register %s at %s", id, ip)
	lease, err := o.node.client.Register(o.t.Context(), request(id, ip))
	if err != nil {
		refused(o.t, err, http.StatusConflict) // the address of another
		return
	}
	o.leases++
	o.ips[id] = ip
	if o.held[id] == nil {
		o.held[id] = map[string]netip.Prefix{}
	}
	told := func(what string, p netip.Prefix) {
		if before, ok := o.held[id][what]; ok && before != p && p.IsValid() {
			o.t.Errorf("%s of %s was %s and is %s", what, id, before, p)
		}
		if p.IsValid() {
			o.held[id][what] = p
		}
	}
	single := func(p netip.Prefix) netip.Prefix { return netip.PrefixFrom(p.Addr(), p.Addr().BitLen()) }
	told("VTEP", single(lease.VTEP.IP))
	told("VTEP6", single(lease.VTEP.IP6))
	for _, g := range lease.Grants {
		told(g.Overlay.Name, g.Subnet)
		told(g.Overlay.Name+", IPv6", g.Subnet6)
	}
}

// watch follows the peers until it knows all of them as they are.
func (o *operator) watch(id string) {
	want := map[string]string{}
	exists := false
	for _, a := range o.node.Agents() {
		exists = exists || a.AgentID == id
		if a.Superseded == "" {
			want[a.AgentID] = fmt.Sprint(a.Lease.Peer())
		}
	}
	if !exists {
		return
	}
	o.log("watch as %s, which knows %+v", id, o.known[id])
	if o.peers[id] == nil {
		o.peers[id] = map[string]conf.Peer{}
	}
	w := o.node.watchFrom(o.t, id, o.known[id])
	defer w.stop()
	// At most what was missed, what is new, a question to register, a heartbeat.
	for range 6 {
		events := 0
		w.follow(o.t, o.peers[id], func() bool { events++; return events > 1 })
		have := map[string]string{}
		for id, p := range o.peers[id] {
			have[id] = fmt.Sprint(p)
		}
		if maps.Equal(have, want) {
			o.known[id] = w.last
			return
		}
	}
	o.t.Errorf("%s knows %v, want %v", id, o.peers[id], want)
}

// reconfigure starts the coordinator with another configuration if that fits.
func (o *operator) reconfigure(network string) {
	o.node.stop()
	_, err := coordinator.New(o.t.Context(), coordinator.Options{
		Network: parseNetwork(o.t, network), Store: o.store, Log: slog.New(slog.DiscardHandler),
	})
	switch {
	case err == nil:
		o.starts++
		o.network = network
	case errors.Is(err, coordinator.ErrMisfit):
		o.misfits++
		o.log("refused %s: %v", network, err)
	default:
		o.t.Error(err)
	}
	o.log("start with %s", o.network)
	o.node = start(o.t, o.store, o.network)
}

// check compares what everybody was told, and what is known with what is stored.
func (o *operator) check() {
	if wrong := o.node.Misread(o.t, o.store); wrong != nil {
		o.t.Errorf("known otherwise than stored: %v", wrong)
	}
	type holding struct {
		netip.Prefix
		of, what string
	}
	var all []holding
	for id, held := range o.held {
		for what, p := range held {
			all = append(all, holding{p, id, what})
		}
	}
	slices.SortFunc(all, func(a, b holding) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	for i := 1; i < len(all); i++ { // in this order those that overlap are neighbours
		if a, b := all[i-1], all[i]; a.Overlaps(b.Prefix) {
			o.t.Errorf("%s %s of %s overlaps %s %s of %s", a.what, a.Prefix, a.of, b.what, b.Prefix, b.of)
		}
	}
}
