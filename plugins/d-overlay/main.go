// The Go runtime would read the whole table of mounts to find the CPU limits of
// the control group. On a host full of containers that table is long, and a
// program that runs for three milliseconds has no use for the answer.
//
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0

// d-overlay is the CNI plugin that attaches a container to the Docker half of
// an overlay on this host: for Docker's kin, such as containerd and Podman.
package main

import (
	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/plugins/internal/attach"
)

func main() { attach.Main(conf.Docker) }
