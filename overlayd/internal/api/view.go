package api

import (
	"net/netip"
	"time"

	"overlayd.internal/overlay/conf"
)

// Paths of the coordinator about the whole cluster.
const (
	PathAttachments = "/v1/attachments"  // POST AttachmentReport -> 204; GET a stream of AttachmentLine
	PathContainers  = "/v1/containers"   // GET ?overlay=&agent=&q=&after=&limit= Containers
	PathAddresses   = "/v1/addresses"    // GET ?overlay=&agent= Addresses
	PathEvents      = "/v1/events"       // GET ?after=ID server-sent events, data is an Event
	PathOpenAPI     = "/v1/openapi.json" // GET the description of all these routes
)

// AttachmentReport is what has changed of an agent's containers and addresses
// since the report before. Sequence grows by one with each report of one start of
// the agent; one that brings no change repeats the last. Who does not know the
// report before answers KindSnapshotWanted, and gets everything.
type AttachmentReport struct {
	AgentID  string       `json:"agent_id"`
	Instance string       `json:"instance"`
	Sequence uint64       `json:"sequence"`
	Snapshot bool         `json:"snapshot,omitempty"` // Put, Usage and Problems are all there is
	Put      []Attachment `json:"put,omitempty"`
	Delete   []string     `json:"delete,omitempty"` // as Attachment.Key
	// Usage replaces what was said before of the same overlay and half.
	Usage []HalfUsage `json:"usage,omitempty"`
	// Problems replace what was said before; null: they are the same.
	Problems *[]string `json:"problems,omitempty"`
	// Host replaces what was said before; null: it is the same.
	Host *Host `json:"host,omitempty"`
}

// AttachmentLine is one line of the stream of what agents have reported to one
// coordinator. An empty one is a heartbeat.
type AttachmentLine struct {
	Run string `json:"run,omitempty"` // of the coordinator; in the first line alone
	// Report is everything that an agent has, and Revision what the coordinator
	// knew of the store then.
	Report   *AttachmentReport `json:"report,omitempty"`
	Revision uint64            `json:"revision,omitempty"`
	Complete bool              `json:"complete,omitempty"` // everything has been told, changes follow
}

// Speaker is the id of the agent that a request speaks for.
func (r AttachmentReport) Speaker() string { return r.AgentID }

// Host is what an agent says of its host.
type Host struct {
	MTU      int    `json:"mtu"`                // of VTEP, bridges and containers
	Datapath string `json:"datapath,omitempty"` // kernel or ebpf
	Drift    int    `json:"drift"`              // kernel objects that others changed and the agent put back, since it was started
	// Routes are ranges outside of the overlays that routes of others lead to there,
	// the largest of them.
	Routes []netip.Prefix `json:"routes,omitempty"`
}

// Attachment is one interface of a container.
type Attachment struct {
	Network   string       `json:"network"`
	ID        string       `json:"id"` // of the container
	IfName    string       `json:"ifname"`
	Overlay   string       `json:"overlay"`
	Half      conf.Half    `json:"half"`
	Addresses []netip.Addr `json:"addresses"`
	Since     int64        `json:"since"` // Unix seconds
	Runtime   string       `json:"runtime,omitempty"`
	Name      string       `json:"name,omitempty"` // as the runtime tells it
}

// Key tells the attachment from the agent's others.
func (a Attachment) Key() string {
	return a.Overlay + "/" + conf.Attachment{Network: a.Network, ContainerID: a.ID, IfName: a.IfName}.Key().String()
}

// HalfUsage is how full a half of an agent subnet is. Where it has addresses of
// both families, it is the one that is exhausted first.
type HalfUsage struct {
	Overlay string       `json:"overlay"`
	Half    conf.Half    `json:"half"`
	Subnet  netip.Prefix `json:"subnet,omitzero"`
	Subnet6 netip.Prefix `json:"subnet6,omitzero"`
	Count
}

// Count is how many containers fit, are there, and how many addresses are free at
// once or cooling.
type Count struct {
	Total   uint64 `json:"total"`
	Used    uint64 `json:"used"`
	Cooling uint64 `json:"cooling"`
	Free    uint64 `json:"free"`
}

// Plus is the sum.
func (c Count) Plus(d Count) Count {
	return Count{Total: c.Total + d.Total, Used: c.Used + d.Used, Cooling: c.Cooling + d.Cooling, Free: c.Free + d.Free}
}

// NearlyFull is from what part on, in percent, the addresses of a half are nearly
// used up.
const NearlyFull = 80

// Level is how full that is. Cooling addresses are taken when nothing else is
// free, so a half is full when all that fits is used, and not before.
func (c Count) Level() Level {
	switch {
	case c.Total > 0 && c.Used >= c.Total:
		return LevelFull
	case c.Total > 0 && 100*(c.Used+c.Cooling) >= NearlyFull*c.Total:
		return LevelWarning
	}
	return LevelOK
}

// Level says in a word how full something is.
type Level string

const (
	LevelOK      Level = "ok"
	LevelWarning Level = "warning" // nearly full
	LevelFull    Level = "full"    // an attachment is refused
)

// Containers is the answer of PathContainers, in the order of agent IPs.
type Containers struct {
	Total      int         `json:"total"`          // that match, on all pages
	Next       string      `json:"next,omitempty"` // for after; empty: there are no more
	Containers []Container `json:"containers"`
	// Incomplete names coordinators that cannot be reached: what their agents
	// report is missing, or old.
	Incomplete []string `json:"incomplete,omitempty"`
	// Unreported is how many agents are connected and have not said yet what is
	// attached; some seconds after a start of a coordinator that is none.
	Unreported int `json:"unreported,omitempty"`
}

// Container is one interface of a container, and where it is.
type Container struct {
	ID        string       `json:"id"`
	Runtime   string       `json:"runtime"`
	Name      string       `json:"name"`
	Network   string       `json:"network"`
	IfName    string       `json:"ifname"`
	Overlay   string       `json:"overlay"`
	Half      conf.Half    `json:"half"`
	Addresses []netip.Addr `json:"addresses"`
	AgentID   string       `json:"agent_id"`
	AgentIP   netip.Addr   `json:"agent_ip"`
	Since     time.Time    `json:"since"`
}

// Addresses is the answer of PathAddresses.
type Addresses struct {
	Overlays   []OverlayAddresses `json:"overlays"`
	Agents     []AgentAddresses   `json:"agents"`
	Incomplete []string           `json:"incomplete,omitempty"` // as in Containers
	Unreported int                `json:"unreported,omitempty"`
}

// OverlayAddresses is how full the halves of all agents are together.
type OverlayAddresses struct {
	Overlay string    `json:"overlay"`
	Half    conf.Half `json:"half"`
	Count
	Level Level `json:"level"`
}

// AgentAddresses is how full one half of one agent is.
type AgentAddresses struct {
	AgentID string     `json:"agent_id"`
	AgentIP netip.Addr `json:"agent_ip"`
	HalfUsage
	Level Level `json:"level"`
}

// EventKind is the name of an event.
type EventKind string

const (
	EventAgentJoined       EventKind = "agent_joined"
	EventAgentGone         EventKind = "agent_gone"
	EventAgentChanged      EventKind = "agent_changed"
	EventAgentConnected    EventKind = "agent_connected"
	EventAgentDisconnected EventKind = "agent_disconnected"
	EventContainerAttached EventKind = "container_attached"
	EventContainerDetached EventKind = "container_detached"
	EventOverlayChanged    EventKind = "overlay_changed"
	EventAddressesWarning  EventKind = "addresses_warning"
	EventAddressesFull     EventKind = "addresses_full"
	EventAddressesOK       EventKind = "addresses_ok"
	EventProblemBegun      EventKind = "problem_begun"
	EventProblemEnded      EventKind = "problem_ended"
)

// Event is something that happened in the cluster.
type Event struct {
	// ID grows. It is near the microseconds since 1970, so that it can be
	// continued at another coordinator; it fits a number of JavaScript.
	ID        int64        `json:"id"`
	Time      time.Time    `json:"time"`
	Kind      EventKind    `json:"kind"`
	AgentID   string       `json:"agent_id,omitempty"`
	AgentIP   netip.Addr   `json:"agent_ip,omitzero"`
	Overlay   string       `json:"overlay,omitempty"`
	Half      conf.Half    `json:"half,omitempty"`
	Container string       `json:"container,omitempty"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	Text      string       `json:"text"`
}
