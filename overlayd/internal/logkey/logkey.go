// Package logkey declares the keys of log records once, so that one search
// finds every record about one thing.
package logkey

// The keys. Messages beside them are constant text.
const (
	Addrs     = "addrs"     // container addresses
	Agent     = "agent"     // agent id
	Answer    = "answer"    // of Docker's plugin protocol
	API       = "api"       // version of Docker's API
	Before    = "before"    // epoch before a change
	Bridge    = "bridge"    // device name
	Cluster   = "cluster"   // cluster id
	Container = "container" // container id
	Datapath  = "datapath"  // kernel or ebpf
	Epoch     = "epoch"
	Err       = "err"
	From      = "from" // value before a change
	Gone      = "gone" // number of peers
	Half      = "half"
	IfName    = "ifname"
	IP        = "ip" // agent IP
	Left      = "left"
	Method    = "method" // of Docker's plugin protocol
	Network   = "network"
	Objects   = "objects" // number of kernel objects
	Overlay   = "overlay"
	Path      = "path"
	Peer      = "peer"  // agent id
	Peers     = "peers" // number of peers
	Reason    = "reason"
	Request   = "request"  // of Docker's plugin protocol
	Revision  = "revision" // of the stream of peers
	RunDir    = "run_dir"
	Set       = "set" // number of peers
	StateDir  = "state_dir"
	Subnets   = "subnets"
	To        = "to" // value after a change
	URL       = "url"
	Version   = "version"
	VTEP      = "vtep"
	VTEP6     = "vtep6"
	What      = "what" // what does not work
)
