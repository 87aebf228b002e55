package conf

import "net/netip"

// How the halves of an overlay give out the addresses of an agent subnet.
const (
	HalvesSplit  = "split"  // each from its own half, on its own bridge
	HalvesShared = "shared" // both from the whole of it, on one bridge (ADR 0040)
)

// Shared reports whether both halves give out addresses of the whole agent subnet.
func (o Overlay) Shared() bool { return o.Halves == HalvesShared }

// Pool is the half whose pool and bridge the programs of h use: h, or Mesos where
// both share one.
func (o Overlay) Pool(h Half) Half {
	if o.Shared() {
		return Mesos
	}
	return h
}

// BridgeName is the name of the bridge that the programs of h attach to.
func (o Overlay) BridgeName(h Half) string { return o.Pool(h).Bridge(o.Name) }

// SharedPool stands for the pool of both halves in what is reported of it. Nothing is
// attached or stored under it: the records of a shared pool are filed under Mesos.
const SharedPool Half = "shared"

// PoolName is the pool of h, for reports.
func (o Overlay) PoolName(h Half) Half {
	if o.Shared() {
		return SharedPool
	}
	return h
}

// PoolText names a pool in messages.
func (h Half) PoolText() string {
	if h == SharedPool {
		return "shared pool"
	}
	return string(h) + " half"
}

// Part is what h gives out of an agent subnet: its half, or all of it. It is the
// zero Prefix when the subnet is not valid (the overlay lacks that family).
func (o Overlay) Part(h Half, agentSubnet netip.Prefix) netip.Prefix {
	if o.Shared() {
		return agentSubnet
	}
	return h.Of(agentSubnet)
}

// Pools are the halves of these that give out addresses of their own.
func (o Overlay) Pools(halves []Half) []Half {
	if o.Shared() && len(halves) > 0 {
		return []Half{Mesos}
	}
	return halves
}

// A Pool is the addresses on this host that one bridge serves.
type Pool struct {
	Half   Half // under which it is filed; Mesos where both share it
	Name   Half // for reports: Half, or SharedPool
	Bridge *Bridge
	Ranges []netip.Prefix // of all blocks; see AgentOverlay.Ranges
}

// Pools are the pools of the overlay on this host, none twice.
func (o AgentOverlay) Pools() (out []Pool) {
	for _, h := range Halves {
		b := o.Bridge(h)
		if b == nil || len(out) > 0 && out[0].Bridge.Name == b.Name {
			continue
		}
		out = append(out, Pool{Half: o.Info.Pool(h), Name: o.Info.PoolName(h), Bridge: b, Ranges: o.Ranges(h)})
	}
	return out
}
