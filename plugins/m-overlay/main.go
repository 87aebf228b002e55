// The Go runtime would read the whole table of mounts to find the CPU limits of
// the control group. On a host full of containers that table is long, and a
// program that runs for three milliseconds has no use for the answer.
//
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0

// m-overlay is the CNI plugin that attaches a container to the Mesos half of
// an overlay on this host.
package main

import (
	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/plugins/internal/attach"
)

func main() { attach.Main(conf.Mesos) }
