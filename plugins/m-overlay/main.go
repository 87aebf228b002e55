// m-overlay is the CNI plugin that attaches a container to the Mesos half of
// an overlay on this host.
package main

import (
	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/plugins/internal/attach"
)

func main() { attach.Main(conf.Mesos) }
