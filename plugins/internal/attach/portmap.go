package attach

import (
	"context"
	"encoding/json"
	"errors"
	"strings"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam/cnimain"
)

// Mesos knows no chains of plugins: it passes the host ports that a container
// asks for in args, and whoever attaches the container has to see to them. The
// reference plugin for that is run, as a runtime with chains would run it.

// portmapPlugin is its name in CNI_PATH.
const portmapPlugin = "portmap"

// portmapVersion is the newest version that every portmap in use speaks.
const portmapVersion = "1.0.0"

// mesosPorts are the port mappings that Mesos passed.
func mesosPorts(n conf.NetConf) (out []conf.PortMapping) {
	info := n.Args.Mesos.NetworkInfo
	if info == nil {
		return nil
	}
	for _, p := range info.PortMappings {
		protocol := strings.ToLower(p.Protocol)
		if protocol == "" {
			protocol = "tcp"
		}
		out = append(out, conf.PortMapping{HostPort: p.HostPort, ContainerPort: p.ContainerPort, Protocol: protocol})
	}
	return out
}

// portmapConf is the configuration portmap is run with. snat lets the container
// reach itself through its own host port.
func portmapConf(n conf.NetConf, prev *types100.Result) ([]byte, error) {
	out := map[string]any{
		"cniVersion": portmapVersion, "name": n.Name, "type": portmapPlugin, "snat": true,
		"capabilities":  map[string]bool{"portMappings": true},
		"runtimeConfig": map[string]any{"portMappings": mesosPorts(n)},
	}
	if prev != nil {
		r, err := prev.GetAsVersion(portmapVersion)
		if err != nil {
			return nil, err
		}
		out["prevResult"] = r
	}
	return json.Marshal(out)
}

// mapPorts makes the host ports that Mesos asked for lead to the container, in
// both families.
func (a *attaching) mapPorts(ctx context.Context, r *types100.Result) error {
	if len(mesosPorts(a.call.Conf)) == 0 {
		return nil
	}
	stdin, err := portmapConf(a.call.Conf, r)
	if err != nil {
		return err
	}
	a.undo.push(func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		return unmapPorts(ctx, a.call)
	})
	_, err = execPlugin(ctx, a.call, portmapPlugin, "ADD", stdin)
	return err
}

// unmapPorts takes the host ports away. Where the plugin is absent there are
// none: ADD fails then.
func unmapPorts(ctx context.Context, c *cnimain.Call) error {
	if len(mesosPorts(c.Conf)) == 0 {
		return nil
	}
	stdin, err := portmapConf(c.Conf, nil)
	if err != nil {
		return err
	}
	_, err = execPlugin(ctx, c, portmapPlugin, "DEL", stdin)
	if errors.As(err, new(*missingPlugin)) {
		return nil
	}
	return err
}
