// overlay-netavark is the netavark plugin for Podman 5 and later: it attaches a
// container to the Docker half of an overlay on this host, as d-overlay does.
package main

import "overlayd.internal/overlay/plugins/internal/netavark"

func main() { netavark.Main() }
