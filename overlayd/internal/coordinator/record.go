package coordinator

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unique"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/transfer"
)

// Keys of the store. An agent's resources have a key each, so that a grant can
// be conditional on "nobody has it"; the agent's record says the same once more
// from its side.
const (
	keyCluster     = transfer.KeyCluster // transfer.Cluster
	keyNetwork     = "network"           // conf.Network, as last configured
	keyRuns        = "runs"              // runs, the latest last
	keyDeleted     = "deleted"           // id of the agent that was deleted last; its revision counts
	prefixAgent    = "agents/"           // <agent id> -> record
	prefixStatus   = "status/"           // <agent id> -> status
	prefixIP       = "ip/"               // <agent IP> -> agent id
	prefixVTEP     = "vtep/"             // <address> -> agent id
	prefixVTEP6    = "vtep6/"            // <address> -> agent id
	prefixSubnet   = "subnet/"           // <overlay>/<prefix> -> agent id
	prefixReserved = "reserved/"         // <agent IP> -> record; its resources have this key for an owner
)

func keyAgent(id string) string    { return prefixAgent + id }
func keyStatus(id string) string   { return prefixStatus + id }
func keyIP(ip netip.Addr) string   { return prefixIP + ip.String() }
func keyVTEP(a netip.Addr) string  { return prefixVTEP + a.String() }
func keyVTEP6(a netip.Addr) string { return prefixVTEP6 + a.String() }
func keySubnet(overlay string, p netip.Prefix) string {
	return prefixSubnet + overlay + "/" + p.String()
}

// record is what is stored about an agent: exactly its lease. Whatever changes
// more often is kept elsewhere, because the record's revision is the epoch.
type record struct {
	IP      netip.Addr  `json:"ip"`
	Bridges []conf.Half `json:"bridges,omitempty"`
	VTEP    netip.Addr  `json:"vtep,omitzero"`
	VTEP6   netip.Addr  `json:"vtep6,omitzero"`
	// MAC6: the MAC of its VTEP is made of VTEP6, which it had before there were IPv4
	// addresses. It stays: another MAC would cut the host off for a moment (ADR 0060).
	MAC6    bool   `json:"mac6,omitempty"`
	Subnets []held `json:"subnets,omitempty"`
	// Adopted is the epoch of the lease that was adopted, when all the agent holds was
	// in it; 0: it was granted it at the revision of this record, or before.
	Adopted uint64 `json:"adopted,omitempty"`
	conf.Underlay
	// Superseded is the id of the agent that has the IP now.
	Superseded string `json:"superseded,omitempty"`
}

// ips are the agent IPs.
func (r *record) ips() []netip.Addr {
	if !r.SecondIP.IsValid() {
		return []netip.Addr{r.IP}
	}
	return []netip.Addr{r.IP, r.SecondIP}
}

// held are the agent subnets of one overlay.
type held struct {
	Overlay string       `json:"overlay"`
	Subnet  netip.Prefix `json:"subnet,omitzero"`
	Subnet6 netip.Prefix `json:"subnet6,omitzero"`
	// Blocks are further ones, in the order they were granted.
	Blocks []conf.Block `json:"blocks,omitempty"`
}

// all are the blocks held, the first one first.
func (h held) all() []conf.Block {
	return append([]conf.Block{{Subnet: h.Subnet, Subnet6: h.Subnet6}}, h.Blocks...)
}

// keys are those of the blocks.
func (h held) keys(blocks ...conf.Block) (keys []string) {
	for _, b := range blocks {
		for _, p := range b.Prefixes() {
			keys = append(keys, keySubnet(h.Overlay, p))
		}
	}
	return keys
}

// held returns what the agent has of an overlay.
func (r *record) held(overlay string) held {
	for i := range r.Subnets {
		if h := &r.Subnets[i]; h.Overlay == overlay {
			return *h
		}
	}
	return held{Overlay: overlay}
}

// with returns a copy of the record that holds h instead of what it held of
// that overlay.
func (r *record) with(h held) record {
	next := *r
	next.Subnets = append(make([]held, 0, len(r.Subnets)+1), r.Subnets...)
	for i := range next.Subnets {
		if next.Subnets[i].Overlay == h.Overlay {
			next.Subnets[i] = h
			return next
		}
	}
	next.Subnets = append(next.Subnets, h)
	return next
}

// macOf is the address that the MAC of the agent's VTEP is made of.
func (r *record) macOf() netip.Addr {
	if r.MAC6 {
		return r.VTEP6
	}
	return r.VTEP
}

// hasVTEP reports whether the agent has a VTEP address of a family that a network has.
// Without one its lease is of no use: the agent refuses it.
func (r *record) hasVTEP(n *network) bool {
	return n.VTEPSubnet.IsValid() && r.VTEP.IsValid() || n.VTEPSubnet6.IsValid() && r.VTEP6.IsValid()
}

// resources are the keys an agent's record owns, its IP left out.
func (r *record) resources() (keys []string) {
	if r.VTEP.IsValid() {
		keys = append(keys, keyVTEP(r.VTEP))
	}
	if r.VTEP6.IsValid() {
		keys = append(keys, keyVTEP6(r.VTEP6))
	}
	return append(keys, r.subnetKeys()...)
}

func (r *record) subnetKeys() (keys []string) {
	for _, h := range r.Subnets {
		keys = append(keys, h.keys(h.all()...)...)
	}
	return keys
}

// agent is a stored record. It never changes; a new revision is a new agent.
type agent struct {
	id          string
	create, mod uint64
	record
}

func decodeAgent(kv store.KV) (*agent, error) {
	a := newAgent(kv)
	if err := json.Unmarshal(kv.Value, &a.record); err != nil {
		return nil, fmt.Errorf("key %s: %w", kv.Key, err)
	}
	return a, a.settle(kv.Key)
}

func newAgent(kv store.KV) *agent {
	return &agent{id: strings.TrimPrefix(kv.Key, prefixAgent), create: kv.Create, mod: kv.Mod}
}

// settle refuses a record that is none, and has it take no more memory than it needs.
func (a *agent) settle(key string) error {
	if !a.IP.IsValid() || !a.macOf().IsValid() {
		return fmt.Errorf("key %s: agent IP or VTEP address is missing", key)
	}
	a.Bridges = sharedBridges(a.Bridges)
	for i := range a.Subnets { // a few names, many agents
		a.Subnets[i].Overlay = unique.Make(a.Subnets[i].Overlay).Value()
	}
	return nil
}

// sharedBridges are the same halves in memory that all agents share, where they stand
// in their usual order.
func sharedBridges(bridges []conf.Half) []conf.Half {
	if len(bridges) == 0 {
		return nil
	}
	for from := range conf.Halves {
		if to := from + len(bridges); to <= len(conf.Halves) && slices.Equal(bridges, conf.Halves[from:to]) {
			return conf.Halves[from:to:to]
		}
	}
	return bridges
}

// status is what is stored about an agent beside its lease.
type status struct {
	Version  string                        `json:"version,omitempty"`
	Instance string                        `json:"instance,omitempty"` // start of the agent that has the lease
	Withheld bool                          `json:"withheld,omitempty"` // it was told nothing of overlays whose halves are shared
	Overlays map[string]conf.OverlayStatus `json:"overlays,omitempty"`
}

// storedStatus is a status as the view keeps it: encoded, and shared among the
// many agents that say the same.
type storedStatus struct {
	mod uint64
	raw unique.Handle[string]
}

func (s storedStatus) decode() (st status) {
	if s.mod == 0 {
		return st
	}
	_ = json.Unmarshal([]byte(s.raw.Value()), &st) // it was valid when the view took it
	return st
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err)) // plain data of ours; cannot fail
	}
	return b
}
