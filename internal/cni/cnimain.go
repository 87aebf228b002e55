// Package cni is the frame that every CNI program of ours runs in: it reads
// environment and stdin, checks all of it before anything has a side effect,
// calls one function for the verb, and prints exactly one JSON document or
// nothing. It stands below the plugins because overlay-ipam needs it too.
package cni

import (
	"context"
	"io"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// Plugin is one CNI program: a function per verb. All six must be there.
type Plugin struct {
	Name string // of the binary
	// Interface: the program makes interfaces, so that the network namespace
	// must be there, and not be our own, before Add runs.
	Interface bool
	// Origin is the container's where the program was told it otherwise than by
	// CNI; zero: see Call.Origin.
	Origin conf.Origin

	// Add returns a result, which the frame converts to the configuration's
	// version and prints, and a function that takes everything back, which the
	// frame calls when the result cannot be printed.
	Add    func(ctx context.Context, c *Call) (result *types100.Result, undo func(), err error)
	Del    func(ctx context.Context, c *Call) error
	Check  func(ctx context.Context, c *Call) error
	GC     func(ctx context.Context, c *Call) error
	Status func(ctx context.Context, c *Call) error
}

// Call is one invocation, checked.
type Call struct {
	Command     string
	ContainerID string
	NetNS       string // path; may be empty or gone except in ADD and CHECK
	IfName      string
	Args        Args // CNI_ARGS
	Path        []string
	Stdin       []byte
	Conf        conf.NetConf
	Stderr      io.Writer

	// Origin is of the container of an ADD, as far as that can be told.
	Origin conf.Origin

	// BootID is that of this boot, where the program has read the published
	// state and so knows it; empty: the address store asks the kernel.
	BootID string
	// Rebuild, if the program sets it, says what the kernel knows about the
	// addresses of the overlay in use: ipam.Options.Rebuild of OpenStore.
	Rebuild func(context.Context) (ipam.Known, error)
}

// Args is CNI_ARGS as far as we know it; everything else in it is ignored.
type Args struct {
	IP  []string // IP=, comma separated
	MAC string   // MAC=

	PodNamespace, PodName string // K8S_POD_NAMESPACE=, K8S_POD_NAME=
	Hostname              string // NERDCTL_CNI_DHCP_HOSTNAME=
}

// Codes of our own; those of the specification are in types.Err*. What passes
// by itself (store busy or full disk, agent not there yet, lease run out, no
// address left) has the specification's code 11, "try again later".
const (
	ErrCodeNotReady   uint = 100 // the published state cannot be read or makes no sense
	ErrCodeNoOverlay  uint = 101 // the overlay is not leased here, or has no bridge of this half
	ErrCodeAddress    uint = 102 // an address asked for by name was refused
	ErrCodeExists     uint = 103 // the interface is there already
	ErrCodeDamaged    uint = 104 // the address store is damaged
	ErrCodeMissing    uint = 105 // CHECK: something that ADD made is gone or differs
	ErrCodeDelegate   uint = 106 // a delegated plugin failed or is absent
	ErrCodeKernel     uint = 107 // the kernel refused; the message names the step
	ErrCodeStaleState uint = 108 // the lease is lost to another host; new addresses are refused
	ErrCodeInternal   uint = 109 // a defect of the program itself
	ErrCodeDraining   uint = 110 // the overlay is being drained; nothing new is attached
)
