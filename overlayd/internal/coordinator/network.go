package coordinator

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/allocate"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// network is the configuration that is served: the one in the store, which all
// coordinators on it follow, whatever their files say. It never changes; a new
// revision is a new network.
type network struct {
	conf.Network
	// takenDown are overlays that were removed by force.
	takenDown []string
	oui       conf.MAC
	mod       uint64 // revision at which it was stored; 0: it is about to be
	// json has the overlays as they stand in leases.
	json map[overlayKey][]byte
}

// overlayKey is what may differ of an overlay between leases under one network.
type overlayKey struct {
	name      string
	isolation conf.Isolation // see inFlags
}

func newNetwork(n conf.Network, mod uint64) *network {
	encoded := make(map[overlayKey][]byte, len(n.Overlays))
	for i := range n.Overlays {
		o := &n.Overlays[i]
		encoded[overlayKey{o.Name, o.Isolation}] = encode(o)
	}
	return &network{Network: n, oui: n.OUI(), mod: mod, json: encoded}
}

// networkValue is what is stored under keyNetwork.
type networkValue struct {
	conf.Network
	TakenDown []string `json:"taken_down,omitempty"`
}

// maxTakenDown is how many overlays that were removed by force are remembered. They
// are names, and a host that is away learns of them when it is back.
const maxTakenDown = 64

// encodeNetwork is what is stored of a network that follows the present one. An
// overlay that is back is no longer taken down.
func encodeNetwork(next conf.Network, takenDown ...string) []byte {
	takenDown = slices.DeleteFunc(slices.Clone(takenDown), func(name string) bool {
		_, back := next.Overlay(name)
		return back
	})
	return encode(networkValue{next, takenDown[max(0, len(takenDown)-maxTakenDown):]})
}

func decodeNetwork(kv store.KV) (*network, error) {
	var v networkValue
	if err := json.Unmarshal(kv.Value, &v); err != nil {
		return nil, fmt.Errorf("key %s: %w", kv.Key, err)
	}
	n := newNetwork(v.Network, kv.Mod)
	n.takenDown = v.TakenDown
	return n, nil
}

// storedNetwork is the network among what a store holds, nil if there is none.
func storedNetwork(kvs []store.KV) (*network, error) {
	for _, kv := range kvs {
		if kv.Key == keyNetwork {
			return decodeNetwork(kv)
		}
	}
	return nil, nil
}

func sameNetwork(a, b conf.Network) bool {
	return bytes.Equal(encode(a), encode(b))
}

// network is what is served now. Who needs it more than once takes it once.
func (c *Coordinator) network() *network { return c.served.Load() }

// setNetwork has the view hand out the blocks of another network. What agents
// hold, and what registrations in progress have taken, stays in use.
func (v *view) setNetwork(n *network) error {
	old := v.pools
	v.network, v.pools = n, newPools(n.Network)
	var errs []error
	for _, m := range v.reserveAll(v.pools) {
		errs = append(errs, m)
	}
	v.keepOrphans(old)
	v.carryClaims(v.claims)
	return errors.Join(errs...)
}

// keepOrphans keeps in use what is stored and no record has: a coordinator of an
// earlier version leaves such keys behind when it rewrites a record of which it does
// not know all. Handed out, they would fail every transaction, one after the other.
func (v *view) keepOrphans(old pools) {
	claimed := map[*allocate.Pool]map[netip.Prefix]bool{}
	for _, c := range v.claims {
		if claimed[c.pool] == nil {
			claimed[c.pool] = map[netip.Prefix]bool{}
		}
		claimed[c.pool][c.block] = true
	}
	keep := func(was, now *allocate.Pool) {
		if was == nil || now == nil {
			return
		}
		for block := range was.Blocks() {
			if !claimed[was][block] && !now.InUse(block) {
				_ = now.Reserve(block) // what no longer fits is not handed out either
			}
		}
	}
	keep(old.vtep, v.pools.vtep)
	keep(old.vtep6, v.pools.vtep6)
	for name, p := range v.pools.overlays {
		keep(old.overlays[name].v4, p.v4)
		keep(old.overlays[name].v6, p.v6)
	}
}

// reserveAll takes what agents hold, or will, out of pools that are new, and returns what
// these cannot hold.
func (v *view) reserveAll(p pools) (misfits []*misfit) {
	for owner, rec := range v.holders() {
		for _, key := range rec.resources() {
			r, _, err := p.resource(key)
			if err != nil || r.pool == nil {
				continue // of an overlay or family that is not configured
			}
			if err := r.pool.Reserve(r.block); err != nil {
				misfits = append(misfits, &misfit{resource: r, owner: owner, err: err})
			}
		}
	}
	slices.SortFunc(misfits, func(a, b *misfit) int { return a.block.Addr().Compare(b.block.Addr()) })
	return misfits
}

// carryClaims takes over the claims of registrations that are in progress. A block
// that the pools do not have can no longer be granted: the transaction depends on
// the network that it was picked from.
func (v *view) carryClaims(claims map[string]*claim) {
	for key, claim := range claims {
		r, _, _ := v.pools.resource(key) // it is a key that take made
		claim.pool = r.pool
		if r.pool != nil && !claim.stored && r.pool.Reserve(claim.block) != nil {
			claim.pool = nil
		}
		v.claims[key] = claim
	}
}

// networkChangedLocked tells everybody whom another network concerns: all agents
// what is configured now, and their peers what they hold of it.
func (c *Coordinator) networkChangedLocked(old *network) {
	n := c.view.network
	c.served.Store(n)
	c.overlayEvents(old.Network, n.Network)
	for id, a := range c.view.agents {
		if !reflect.DeepEqual(peerOf(old, a, 0), peerOf(n, a, 0)) {
			c.changed[id] = struct{}{}
		}
	}
	c.tellSoon()
	for _, p := range c.presence {
		if p.registering == 0 && p.toldNetwork != n.mod {
			p.askToRegister()
		}
	}
	c.log.Info("the cluster configuration has changed", "revision", n.mod)
	c.logFileDiffersLocked()
	c.logUnconfigured()
}
