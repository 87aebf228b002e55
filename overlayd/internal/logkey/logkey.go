// Package logkey declares the keys of log records once, so that one search
// finds every record about one thing.
package logkey

// The keys. Messages beside them are constant text.
const (
	Addr        = "addr"        // that is served on
	Addrs       = "addrs"       // container addresses
	Agent       = "agent"       // agent id
	Answer      = "answer"      // of Docker's plugin protocol
	API         = "api"         // version of Docker's API
	Before      = "before"      // epoch before a change
	Bridge      = "bridge"      // device name
	CA          = "ca"          // fingerprint
	Cluster     = "cluster"     // cluster id
	Connections = "connections" // number
	Container   = "container"   // container id
	Datapath    = "datapath"    // kernel or ebpf
	Dir         = "dir"
	Epoch       = "epoch"
	Err         = "err"
	Expires     = "expires"
	From        = "from" // value before a change
	Gone        = "gone" // number of peers
	Half        = "half"
	IfName      = "ifname"
	IP          = "ip"    // agent IP
	Key         = "key"   // of the store
	Kind        = "kind"  // of a survey
	Kinds       = "kinds" // of kernel objects
	Left        = "left"
	Method      = "method" // of Docker's plugin protocol
	Name        = "name"   // of an identity
	Network     = "network"
	Objects     = "objects" // number of kernel objects
	Overlay     = "overlay"
	Path        = "path"
	Peer        = "peer"  // agent id
	Peers       = "peers" // number of peers
	Reason      = "reason"
	Remote      = "remote"
	Request     = "request"  // of Docker's plugin protocol
	Revision    = "revision" // of the stream of peers
	Role        = "role"     // of an identity
	RunDir      = "run_dir"
	Set         = "set" // number of peers
	Stack       = "stack"
	StateDir    = "state_dir"
	Subnets     = "subnets"
	To          = "to"    // value after a change
	Token       = "token" // id
	Until       = "until"
	URL         = "url"
	Uses        = "uses" // of a token
	Version     = "version"
	VTEP        = "vtep"
	VTEP6       = "vtep6"
	What        = "what" // what does not work
)
