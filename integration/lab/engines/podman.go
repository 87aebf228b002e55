package engines

import "context"

// Podman with its CNI backend. It has no daemon.
type Podman struct {
	Host *Host
}

// podmanConf is what an operator writes to use our networks. Without
// cni_plugin_dirs, Debian's Podman prefers the plugins in /usr/lib/cni.
const podmanConf = `[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
network_config_dir = "/etc/cni/net.d"

[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
`

// Name implements Engine.
func (p *Podman) Name() string { return "Podman (CNI)" }

// Version implements Engine.
func (p *Podman) Version(ctx context.Context) (string, error) {
	return p.Host.Exec(ctx, "podman", "version", "-f", "{{.Client.Version}}")
}

// Start implements Engine.
func (p *Podman) Start(ctx context.Context) error {
	if err := p.Host.Write("/etc/containers/containers.conf", podmanConf); err != nil {
		return err
	}
	_, err := p.Host.Exec(ctx, "podman", "load", "-q", "-i", p.Host.lab.images)
	return err
}

// Run implements Engine.
func (p *Podman) Run(ctx context.Context, s Spec) (*Container, error) {
	args := []string{"podman", "run", "-d", "--cap-add", "NET_RAW", "--cgroup-parent", "/" + p.Host.ID, "--name", s.Name, "--network", s.Network}
	for _, port := range s.Ports {
		args = append(args, "-p", port)
	}
	args = append(append(args, s.Args...), Image, "serve", s.Name)
	id, err := p.Host.Exec(ctx, args...)
	if err != nil {
		return nil, err
	}
	c := &Container{Name: s.Name, ID: id}
	c.exec = func(ctx context.Context, args ...string) (string, error) {
		return p.Host.Exec(ctx, append([]string{"podman", "exec", s.Name}, args...)...)
	}
	c.remove = func(ctx context.Context) error {
		_, err := p.Host.Exec(ctx, "podman", "rm", "-f", "-t", "5", s.Name)
		return err
	}
	settings, err := p.Host.inspect(ctx, "podman", s.Name)
	if err != nil {
		return c, err
	}
	c.Netns = settings.SandboxKey
	for _, n := range settings.Networks { // all of them: Network may be a list with options
		ips, err := n.ips()
		if err != nil {
			return c, err
		}
		c.IPs = append(c.IPs, ips...)
	}
	return c, nil
}
