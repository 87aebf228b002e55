// Package api is the wire between coordinator, agents and overlayctl: paths,
// messages and the client. HTTP/1.1 and JSON, so that curl can speak it; over TLS
// unless the cluster runs without identities.
package api

import (
	"net/netip"
	"time"

	"overlayd.internal/overlay/conf"
)

// Paths of the coordinator.
const (
	PathMasterState  = "/overlay-master/state"         // GET conf.MasterState
	PathAgentsDelete = "/overlay-master/agents/delete" // POST DeleteRequest -> conf.MasterState
	PathRegister     = "/v1/register"                  // POST RegisterRequest -> conf.Lease
	PathStatus       = "/v1/status"                    // POST StatusReport -> 204
	PathWatch        = "/v1/watch"                     // GET ?agent=ID&revision=N&run=R -> stream of PeerEvent, one a line
	PathAgents       = "/v1/agents"                    // GET []Agent
	PathPrune        = "/v1/agents/prune"              // POST PruneRequest -> []Agent
	PathBackup       = "/v1/backup"                    // GET a copy of all that is stored, see overlayctl restore
	PathOverlays     = "/v1/overlays"                  // GET []Overlay
)

// Paths of the agent, on <run-dir>/overlayd.sock and --listen.
const (
	PathAgentOverlay  = "/overlay-agent/overlay"  // GET conf.State
	PathAgentOverlays = "/overlay-agent/overlays" // the same; the name in DC/OS's documentation
)

// Paths of both.
const (
	PathHealth  = "/healthz"
	PathReady   = "/readyz"
	PathMetrics = "/metrics" // GET text for Prometheus
)

// MaxPresented bounds the lease that an agent presents, in bytes. A larger one, of
// thousands of overlays, is not presented.
const MaxPresented = 512 << 10

// MaxPrevious bounds the instances before that an agent shows.
const MaxPrevious = 16

// RegisterRequest asks for a lease, or renews the one the agent has. It may be
// repeated: the same agent id gets the same answer.
type RegisterRequest struct {
	AgentID string      `json:"agent_id"`
	AgentIP netip.Addr  `json:"agent_ip"`
	Bridges []conf.Half `json:"bridges"` // empty: no bridges
	Version string      `json:"version"`
	conf.Underlay
	// ClusterID is of the lease that the agent holds; empty: it holds none.
	ClusterID string `json:"cluster_id,omitempty"`
	// Instance is another one at every start of the agent; Previous are those that
	// the host had before, newest first. They tell a host that starts again from a copy
	// of it.
	Instance string   `json:"instance,omitempty"`
	Previous []string `json:"previous,omitempty"`
	// Presented is the lease that the agent holds, as it was signed.
	Presented *conf.SignedLease `json:"presented,omitempty"`
	// Shown is what Presented says, once its signature was found good.
	Shown *conf.Lease `json:"-"`
	// Want is how many blocks of an overlay the agent would like to have in all, by
	// overlay name, where one is not enough. It gets what can be had.
	Want map[string]int `json:"want,omitempty"`
	// SharedHalves: the agent knows overlays whose halves share a pool. One that does
	// not is granted nothing of them.
	SharedHalves bool `json:"shared_halves,omitempty"`
	// Return are further blocks that the agent no longer uses.
	Return *Return `json:"return,omitempty"`
	// Source is the address that the request came from, as the coordinator sees it, and
	// Came is when it had come.
	Source netip.Addr `json:"-"`
	Came   time.Time  `json:"-"`
}

// Return gives further blocks back. It is carried out only while the lease has still
// the epoch in which the agent decided it: a request that was long on its way must
// not take what has been granted anew since.
type Return struct {
	Epoch  uint64                  `json:"epoch"`
	Blocks map[string][]conf.Block `json:"blocks"` // by overlay name
}

// Speaker is the id of the agent that a request speaks for.
func (r RegisterRequest) Speaker() string { return r.AgentID }

// StatusReport is what an agent has made of its lease, by overlay name.
type StatusReport struct {
	AgentID  string                        `json:"agent_id"`
	Overlays map[string]conf.OverlayStatus `json:"overlays"`
}

// Speaker is the id of the agent that a request speaks for.
func (r StatusReport) Speaker() string { return r.AgentID }

// Known is what a watcher has heard so far, as in its last event. Every
// coordinator on the same store can continue from there.
type Known struct {
	Instance string // of the watcher, as in RegisterRequest
	Revision uint64 // 0: nothing
	Run      string // the run of the store that the revision belongs to; empty: any
}

// PeerEvent is one line of the watch. The first line of a stream is a snapshot
// (Snapshot set, Put holds every peer) unless the coordinator still knows what
// happened since the revision asked for. An empty event is a heartbeat. The
// watching agent's own lease is among the peers; the agent leaves it out.
type PeerEvent struct {
	Revision uint64 `json:"revision"`
	Run      string `json:"run,omitempty"`
	Snapshot bool   `json:"snapshot,omitempty"`
	// Partial: there may be peers that the snapshot lacks, because the store lost their
	// leases and they have not shown them yet. Those that are known stay.
	Partial bool        `json:"partial,omitempty"`
	Put     []conf.Peer `json:"put,omitempty"`
	Delete  []string    `json:"delete,omitempty"` // agent ids
	// Register asks the agent to register again: its lease has changed.
	Register bool `json:"register,omitempty"`
	// Report asks the agent to tell what it has attached: that is not known here.
	Report bool `json:"report,omitempty"`
	// Survey asks the agent to look at something, and to report it.
	Survey *SurveyOrder `json:"survey,omitempty"`
}

// Agent is one row of PathAgents.
type Agent struct {
	conf.Lease
	Version    string                        `json:"version"`
	Status     map[string]conf.OverlayStatus `json:"status,omitempty"`
	Connected  bool                          `json:"connected"`            // it watches right now
	LastSeen   time.Time                     `json:"last_seen,omitzero"`   // by the coordinators; now when it is connected
	Superseded string                        `json:"superseded,omitempty"` // id of the agent that has its IP now
	// Gone: not seen for so long that the lease goes to another host when nothing else
	// is free, or would if the configuration did not keep it.
	Gone     bool     `json:"gone,omitempty"`
	Host     *Host    `json:"host,omitempty"`     // nil: it has not said
	Problems []string `json:"problems,omitempty"` // what it says is wrong
}

// Overlay is one row of PathOverlays.
type Overlay struct {
	conf.Overlay
	Configured bool  `json:"configured"` // false: stored leases of an overlay the configuration no longer has
	Leases     int   `json:"leases"`
	Pool       *Pool `json:"pool,omitempty"`
	Pool6      *Pool `json:"pool6,omitempty"`
	// Containers are those attached, as far as agents have told. Of an overlay that is
	// drained, Hosts is where they are, and which hosts have not told.
	Containers int           `json:"containers,omitempty"`
	Hosts      []OverlayHost `json:"hosts,omitempty"`
	// FileDiffers says in a few words that the coordinator's file says otherwise.
	FileDiffers string `json:"file_differs,omitempty"`
}

// OverlayHost is what is left of an overlay on a host.
type OverlayHost struct {
	AgentID    string     `json:"agent_id"`
	AgentIP    netip.Addr `json:"agent_ip"`
	Containers int        `json:"containers"`
	Unknown    bool       `json:"unknown,omitempty"` // it has set up the overlay and not told its containers
}

// Pool is how full a pool of agent subnets is.
type Pool struct {
	Total uint64 `json:"total"` // capped at 2^62
	Used  uint64 `json:"used"`
}

// PruneRequest gives back the leases of agents that are not connected and were
// superseded, or not seen for so long.
type PruneRequest struct {
	NotSeenSeconds int64 `json:"not_seen_seconds"`
	DryRun         bool  `json:"dry_run,omitempty"` // only list them
}

// DeleteRequest names agents, by IP as in DC/OS or by agent id, whose leases
// are given back.
type DeleteRequest struct {
	Agents []string `json:"agents"`
}

// Error is the body of every answer that is not 2xx.
type Error struct {
	Code    int    `json:"-"` // the HTTP status
	Message string `json:"error"`
	Kind    string `json:"kind,omitempty"` // what a program can act on
	// Problems are all that is wrong with a document, each with its place.
	Problems []string `json:"problems,omitempty"`
}

// Kinds of errors.
const (
	// KindIDInUse: another host that is alive has this agent id.
	KindIDInUse = "agent_id_in_use"
	// KindOtherCluster: the lease that the agent holds is of another cluster.
	KindOtherCluster = "other_cluster"
	// KindSnapshotWanted: the report before this one is not known; send everything.
	KindSnapshotWanted = "snapshot_wanted"
	// KindAdopting: the store was lost or put back, and this agent held nothing.
	KindAdopting = "adopting"
	// KindForgedLease: the lease that the agent presents is not one of this cluster
	// for this agent.
	KindForgedLease = "forged_lease"
)

func (e *Error) Error() string { return e.Message }
