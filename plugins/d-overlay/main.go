// d-overlay is the CNI plugin that attaches a container to the Docker half of
// an overlay on this host: for Docker's kin, such as containerd and Podman.
package main

import (
	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/plugins/internal/attach"
)

func main() { attach.Main(conf.Docker) }
