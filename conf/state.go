package conf

import "net/netip"

// The JSON shapes of the two DC/OS endpoints, key for key. encoding/json prints
// fields in the order of declaration, and DC/OS prints keys in byte order, so
// the fields stand in the order of their keys.

// MasterState is GET /overlay-master/state.
type MasterState struct {
	Agents  []MasterAgent `json:"agents,omitempty"` // in order of registration
	Network Network       `json:"network"`
}

// MasterAgent is one agent in MasterState.
type MasterAgent struct {
	IP       netip.Addr     `json:"ip"`
	Overlays []AgentOverlay `json:"overlays,omitempty"`
}

// AgentOverlay is one overlay on one agent.
type AgentOverlay struct {
	Backend      Backend        `json:"backend"`
	Blocks       []Block        `json:"blocks,omitempty"` // further agent subnets, each with the same halves
	DockerBridge *Bridge        `json:"docker_bridge,omitempty"`
	Info         Overlay        `json:"info"`
	MesosBridge  *Bridge        `json:"mesos_bridge,omitempty"`
	State        *OverlayStatus `json:"state,omitempty"` // absent until the agent reported
	Subnet       netip.Prefix   `json:"subnet,omitzero"`
	Subnet6      netip.Prefix   `json:"subnet6,omitzero"`
}

// Bridge is one bridge. IP and IP6 are the network addresses of the half, as
// DC/OS shows them; the bridge device itself has the Gateway of each. Where the
// halves share a pool, both name the one bridge and the whole agent subnet.
type Bridge struct {
	IP   netip.Prefix `json:"ip,omitzero"`
	IP6  netip.Prefix `json:"ip6,omitzero"`
	Name string       `json:"name"`
}

// Backend is how an overlay reaches other hosts.
type Backend struct {
	VXLAN VXLAN `json:"vxlan"`
}

// VXLAN is the VTEP of a host.
type VXLAN struct {
	VNI      int          `json:"vni"`
	VTEPIP   netip.Prefix `json:"vtep_ip"` // invalid, and printed as "", where the host has none
	VTEPIP6  netip.Prefix `json:"vtep_ip6,omitzero"`
	VTEPMAC  MAC          `json:"vtep_mac"`
	VTEPMTU  int          `json:"vtep_mtu,omitzero"`
	VTEPName string       `json:"vtep_name"`
}

// Bridge returns the overlay's bridge of that half, nil where there is none.
func (o AgentOverlay) Bridge(h Half) *Bridge {
	if h == Mesos {
		return o.MesosBridge
	}
	return o.DockerBridge
}

// Ranges are the prefixes of one half, those of the first block before those of the
// further ones, and IPv4 before IPv6; none where there is no such bridge.
func (o AgentOverlay) Ranges(h Half) []netip.Prefix {
	b := o.Bridge(h)
	if b == nil {
		return nil
	}
	v4, v6 := make([]netip.Prefix, 0, 2*(1+len(o.Blocks))), []netip.Prefix(nil)
	if b.IP.IsValid() {
		v4 = append(v4, b.IP)
	}
	if b.IP6.IsValid() {
		v6 = append(v6, b.IP6)
	}
	for _, block := range o.Blocks {
		if p := o.Info.Part(h, block.Subnet); p.IsValid() {
			v4 = append(v4, p)
		}
		if p := o.Info.Part(h, block.Subnet6); p.IsValid() {
			v6 = append(v6, p)
		}
	}
	return append(v4, v6...)
}

// Parts are the parts of a further block that the pools have; a half without a
// bridge has none.
func (o AgentOverlay) Parts(b Block) map[Half][]netip.Prefix {
	parts := map[Half][]netip.Prefix{}
	for _, pool := range o.Pools() {
		for _, p := range b.Prefixes() {
			parts[pool.Half] = append(parts[pool.Half], o.Info.Part(pool.Half, p))
		}
	}
	return parts
}

// All are the agent subnets, the first block before the further ones.
func (o AgentOverlay) All() []Block { return allBlocks(o.Subnet, o.Subnet6, o.Blocks) }

// AgentOverlays renders a lease in DC/OS's shape. status may be nil; an overlay
// it does not name gets no state.
func (l Lease) AgentOverlays(status map[string]OverlayStatus) []AgentOverlay {
	backend := Backend{VXLAN: VXLAN{
		VNI: VNI, VTEPIP: l.VTEP.IP, VTEPIP6: l.VTEP.IP6,
		VTEPMAC: l.VTEP.MAC, VTEPMTU: l.VTEP.MTU, VTEPName: VTEPName,
	}}
	var out []AgentOverlay
	for _, g := range l.Grants {
		o := AgentOverlay{Backend: backend, Blocks: g.Blocks, Info: g.Overlay, Subnet: g.Subnet, Subnet6: g.Subnet6}
		if g.Subnet.IsValid() || g.Subnet6.IsValid() {
			for _, h := range l.Bridges {
				b := &Bridge{IP: g.Overlay.Part(h, g.Subnet), IP6: g.Overlay.Part(h, g.Subnet6), Name: g.Overlay.BridgeName(h)}
				if h == Mesos {
					o.MesosBridge = b
				} else {
					o.DockerBridge = b
				}
			}
		}
		if s, ok := status[g.Overlay.Name]; ok {
			o.State = &s
		}
		out = append(out, o)
	}
	return out
}

// State is the document an agent publishes: <run-dir>/state.json, which the CNI
// programs read, and GET /overlay-agent/overlay. It is DC/OS's shape with keys
// of ours added.
type State struct {
	AgentID               string         `json:"agent_id"`
	BootID                string         `json:"boot_id"` // of the boot in which it was written
	ConfigurationAttempts int            `json:"configuration_attempts"`
	CoolingSeconds        int            `json:"cooling_seconds"`
	Coordinators          []string       `json:"coordinators,omitempty"` // URLs; for overlayctl
	Datapath              DatapathState  `json:"datapath,omitzero"`
	Directories           Directories    `json:"directories,omitzero"`
	Drift                 *DriftState    `json:"drift,omitempty"` // nil: nothing yet
	IP                    netip.Addr     `json:"ip"`
	Lease                 LeaseState     `json:"lease"`
	MTU                   int            `json:"mtu"`               // of VTEP, bridges and container interfaces
	Notices               []string       `json:"notices,omitempty"` // what somebody should look at, though overlays work
	Overlays              []AgentOverlay `json:"overlays,omitempty"`
	Problems              []string       `json:"problems,omitempty"` // that concern the host and stand nowhere else
	Room                  []string       `json:"room,omitempty"`     // overlays that a further block can be had of
	SecondIP              netip.Addr     `json:"second_ip,omitzero"` // agent IP of the other family
	Version               string         `json:"version"`
}

// DatapathState says which way traffic between hosts takes.
type DatapathState struct {
	Mode   string `json:"mode"`             // auto, kernel or ebpf: what the operator wants
	Taken  string `json:"taken"`            // kernel or ebpf
	Reason string `json:"reason,omitempty"` // why not ebpf
	// Routing is how the host sends to its peers; a host of an earlier release has
	// vxlan and says nothing.
	Routing Routing `json:"routing,omitempty"`
}

// NotLookedAt is the reason until a host has been looked at.
const NotLookedAt = "not looked at yet"

// MayFilter reports whether filters of the fast path are attached to the interfaces
// of containers, or may be soon.
func (d DatapathState) MayFilter() bool { return d.Taken == "ebpf" || d.Reason == NotLookedAt }

// DriftState is what others changed or removed of the agent's kernel objects and
// the agent put back since it was started.
type DriftState struct {
	Counts []DriftCount `json:"counts"`  // in the order of the kinds
	Last   string       `json:"last"`    // the last of the changes, as one would type them
	LastAt string       `json:"last_at"` // RFC 3339
}

// DriftCount is how many objects of a kind were put back.
type DriftCount struct {
	Kind    string `json:"kind"`
	Objects int    `json:"objects"`
}

// Directories are those the agent was started with; for overlayctl.
type Directories struct {
	CNIBin  []string `json:"cni_bin,omitempty"`
	CNIConf string   `json:"cni_conf,omitempty"`
	State   string   `json:"state,omitempty"`
}

// LeaseState tells the CNI programs whether new containers may be attached.
type LeaseState struct {
	Epoch uint64 `json:"epoch"`
	// Error says why the lease could not be renewed. It holds until it expires.
	Error string `json:"error,omitempty"`
	// ExpiresBoottime is the CLOCK_BOOTTIME, in nanoseconds, after which no
	// address may be given out because the term (less a margin) has ended.
	ExpiresBoottime int64 `json:"expires_boottime_ns"`
	// Lost says why the lease no longer holds, if it does not.
	Lost string `json:"lost,omitempty"`
}

// VTEPOf is the VTEP address by which the host that published s reaches a peer: one of
// a family that both have, IPv4 first; invalid: there is none. A host without overlays
// does not say what it has.
func (s *State) VTEPOf(p *Peer) netip.Addr {
	if len(s.Overlays) == 0 {
		return p.VTEP()
	}
	own := s.Overlays[0].Backend.VXLAN
	vtep, vtep6 := p.Meet(own.VTEPIP, own.VTEPIP6)
	if vtep.IsValid() {
		return vtep
	}
	return vtep6
}

// Overlay returns the overlay of that name.
func (s State) Overlay(name string) (AgentOverlay, bool) {
	for _, o := range s.Overlays {
		if o.Info.Name == name {
			return o, true
		}
	}
	return AgentOverlay{}, false
}
