package engines

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Docker is dockerd, with Debian's client. A host runs one at a time.
type Docker struct {
	Host   *Host
	Daemon *Daemon
	// Networks are those that an agent makes: Start returns when all are there.
	Networks []string

	name string
	bin  []string // directories of dockerd and its helpers, before Debian's
	args []string
}

// Docker20 is Debian's Docker.
func Docker20(h *Host) *Docker { return &Docker{Host: h, name: "Docker"} }

// Moby is the next Docker, with its firewall written through iptables or
// nftables. The error says that scripts/engines was not told to build it.
func Moby(h *Host, firewall string) (*Docker, error) {
	d := &Docker{Host: h, name: "Docker, moby v2 beta (" + firewall + ")", args: []string{
		"--firewall-backend=" + firewall, "--userland-proxy=false",
		// The runc it needs is built without seccomp.
		"--seccomp-profile=unconfined",
	}}
	for _, dir := range []string{"moby", "containerd", "runc"} {
		d.bin = append(d.bin, filepath.Join(h.lab.tools, dir))
	}
	if _, err := os.Stat(filepath.Join(d.bin[0], "dockerd")); err != nil {
		return nil, fmt.Errorf("not built; ENGINES_MOBY=1 scripts/engines does it: %w", err)
	}
	return d, nil
}

// Name implements Engine.
func (d *Docker) Name() string { return d.name }

// Version implements Engine.
func (d *Docker) Version(ctx context.Context) (string, error) {
	return d.Host.Exec(ctx, "docker", "version", "-f", "{{.Server.Version}}")
}

// Start implements Engine.
func (d *Docker) Start(ctx context.Context) error {
	if err := d.StartDaemon(ctx); err != nil {
		return err
	}
	if _, err := d.Host.Exec(ctx, "docker", "load", "-q", "-i", d.Host.lab.images); err != nil {
		return err
	}
	if len(d.Networks) == 0 {
		return nil
	}
	return d.Host.ready(ctx, d.Daemon, append([]string{"docker", "network", "inspect"}, d.Networks...)...)
}

// StartDaemon starts dockerd and waits until it answers.
func (d *Docker) StartDaemon(ctx context.Context) error {
	if err := d.launch(); err != nil {
		return err
	}
	return d.answers(ctx)
}

func (d *Docker) launch() (err error) {
	path := strings.Join(append(slices.Clone(d.bin), "/usr/sbin", "/usr/bin", "/sbin", "/bin"), ":")
	args := append([]string{"env", "PATH=" + path, "dockerd", "--cgroup-parent=/" + d.Host.ID}, d.args...)
	d.Daemon, err = d.Host.Start("dockerd", args...)
	return err
}

func (d *Docker) answers(ctx context.Context) error {
	return d.Host.ready(ctx, d.Daemon, "docker", "version")
}

// ready waits until a command succeeds, and gives up early when the daemon it
// asks has ended.
func (h *Host) ready(ctx context.Context, d *Daemon, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	err := Wait(ctx, func() error {
		if d.Ended() {
			giveUp(errors.New("it has ended"))
		}
		_, err := h.Exec(ctx, args...)
		return err
	})
	if err != nil {
		return fmt.Errorf("%s on %s is not ready: %w\n%s", d.Name, h.Name, err, d.Tail(20))
	}
	return nil
}

// Run implements Engine.
func (d *Docker) Run(ctx context.Context, s Spec) (*Container, error) {
	args := []string{"docker", "run", "-d", "--name", s.Name, "--network", s.Network}
	for _, p := range s.Ports {
		args = append(args, "-p", p)
	}
	args = append(append(args, s.Args...), Image, "serve", s.Name)
	id, err := d.Host.Exec(ctx, args...)
	if err != nil {
		return nil, err
	}
	c := &Container{Name: s.Name, ID: id}
	c.exec = func(ctx context.Context, args ...string) (string, error) {
		return d.Host.Exec(ctx, append([]string{"docker", "exec", s.Name}, args...)...)
	}
	c.remove = func(ctx context.Context) error {
		_, err := d.Host.Exec(ctx, "docker", "rm", "-f", s.Name)
		return err
	}
	settings, err := d.Host.inspect(ctx, "docker", id)
	if err != nil {
		return c, err
	}
	c.Netns = settings.SandboxKey
	c.IPs, err = settings.Networks[s.Network].ips()
	// Before 28, Docker wants IPv4 in every network: 169.254.0.0/16 where the
	// overlay has none. It leads nowhere.
	c.IPs = slices.DeleteFunc(c.IPs, netip.Addr.IsLinkLocalUnicast)
	return c, err
}
