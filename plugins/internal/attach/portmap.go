package attach

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
)

// Some runtimes know no chains of plugins: Mesos passes the host ports that a
// container asks for in args, netavark with the container, and whoever attaches
// it has to see to them. The reference plugin for that is run, as a runtime with
// chains would run it.

// portmapPlugin is its name in CNI_PATH.
const portmapPlugin = "portmap"

// portmapVersion is the newest version that every portmap in use speaks.
const portmapVersion = "1.0.0"

// hostPorts are the port mappings that are ours to see to: those of Mesos, and
// those of a runtime that was told that we can (capability portMappings). In a
// chain with portmap we ask for them too, with hostPorts false: only to know
// whether there are any.
func hostPorts(n conf.NetConf) []conf.PortMapping {
	if !n.MapsHostPorts() {
		return nil
	}
	out := n.RuntimeConfig.PortMappings
	info := n.Args.Mesos.NetworkInfo
	if info == nil {
		return out
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
		"runtimeConfig": map[string]any{"portMappings": hostPorts(n)},
	}
	if prev != nil {
		r, err := cni.ForVersion(prev, portmapVersion).GetAsVersion(portmapVersion)
		if err != nil {
			return nil, err
		}
		out["prevResult"] = r
	}
	return json.Marshal(out)
}

// mapPorts makes the host ports that were asked for lead to the container, in
// both families.
func (a *attaching) mapPorts(ctx context.Context, r *types100.Result) error {
	if len(hostPorts(a.call.Conf)) == 0 {
		return nil
	}
	stdin, err := portmapConf(a.call.Conf, r)
	if err != nil {
		return err
	}
	a.undo.push(func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		// A plugin that could not do the one can often not do the other either, and
		// then there is no port. The rest goes all the same, which it does not in DEL:
		// nothing has used this port yet, and each try would keep an address.
		if err := unmapPorts(ctx, a.call); err != nil {
			a.warn(a.call, "take back the host ports of a failed ADD: %v; DEL will try again", err)
		}
		return nil
	})
	_, err = execPlugin(ctx, a.call, portmapPlugin, "ADD", stdin)
	return err
}

// unmapPorts takes the host ports away. Where the plugin is absent there are
// none: ADD fails then.
func unmapPorts(ctx context.Context, c *cni.Call) error {
	if len(hostPorts(c.Conf)) == 0 {
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

// checkPorts lets portmap compare its rules with the host ports. Those before
// CNI 1.1.0 look for the rules of one family in the tables of the other, so that
// their CHECK always fails; they are not asked.
func checkPorts(ctx context.Context, c *cni.Call, prev *types100.Result) error {
	if len(hostPorts(c.Conf)) == 0 {
		return nil
	}
	said, err := execPlugin(ctx, c, portmapPlugin, "VERSION", []byte(`{"cniVersion":"`+portmapVersion+`"}`))
	if err != nil {
		return err
	}
	var v struct{ SupportedVersions []string }
	if json.Unmarshal(said, &v) != nil || !slices.Contains(v.SupportedVersions, "1.1.0") {
		return nil
	}
	stdin, err := portmapConf(c.Conf, prev)
	if err != nil {
		return err
	}
	_, err = execPlugin(ctx, c, portmapPlugin, "CHECK", stdin)
	return err
}
