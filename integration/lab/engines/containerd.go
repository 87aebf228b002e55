package engines

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
)

// Containerd is one containerd on a host, of one of two generations that can
// run side by side. Ctr and CRI launch containers through it.
type Containerd struct {
	Host   *Host
	Daemon *Daemon

	name   string // of the state directory and the log
	bin    string // directory of its programs; empty for Debian's
	config string
}

// Containerd1 is Debian's containerd.
func Containerd1(h *Host) *Containerd {
	return &Containerd{Host: h, name: "containerd", config: `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "/run/containerd/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "` + PauseImage + `"
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
`}
}

// Containerd2 is the containerd that scripts/engines built.
func Containerd2(h *Host) *Containerd {
	return &Containerd{Host: h, name: "containerd2", bin: filepath.Join(h.lab.tools, "containerd"), config: `version = 3
root = "/var/lib/containerd2"
state = "/run/containerd2"

[grpc]
address = "/run/containerd2/containerd.sock"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "` + PauseImage + `"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/opt/cni/bin"]
conf_dir = "/etc/cni/net.d"
`}
}

func (c *Containerd) socket() string { return "/run/" + c.name + "/containerd.sock" }

// ctr is a command line of the client that came with it. The namespace is the
// host's, so that its cgroups can be told apart.
func (c *Containerd) ctr(args ...string) []string {
	return c.ctrIn(c.Host.ID, args...)
}

func (c *Containerd) ctrIn(namespace string, args ...string) []string {
	return append([]string{filepath.Join(c.bin, "ctr"), "-a", c.socket(), "-n", namespace}, args...)
}

// Version is what the daemon says.
func (c *Containerd) Version(ctx context.Context) (string, error) {
	out, err := c.Host.Exec(ctx, c.ctr("version")...)
	if err != nil {
		return "", err
	}
	_, server, _ := strings.Cut(out, "Server:")
	_, version, _ := strings.Cut(server, "Version:")
	version, _, _ = strings.Cut(version, "\n")
	return strings.TrimPrefix(strings.TrimSpace(version), "v"), nil
}

// Start starts it, unless it runs, and loads the images.
func (c *Containerd) Start(ctx context.Context) error {
	if c.Daemon != nil && !c.Daemon.Ended() {
		return nil
	}
	if err := c.StartDaemon(ctx); err != nil {
		return err
	}
	// k8s.io is the namespace the runtime interface works in.
	for _, namespace := range []string{c.Host.ID, "k8s.io"} {
		args := []string{"image", "import", c.Host.lab.images}
		if c.bin != "" {
			args = []string{"image", "import", "--local", c.Host.lab.images}
		}
		if _, err := c.Host.Exec(ctx, c.ctrIn(namespace, args...)...); err != nil {
			return err
		}
	}
	return nil
}

// StartDaemon starts containerd and waits until it answers.
func (c *Containerd) StartDaemon(ctx context.Context) (err error) {
	file := "/etc/containerd/" + c.name + ".toml"
	if err := c.Host.Write(file, c.config); err != nil {
		return err
	}
	// It looks for its shim in PATH.
	path := "PATH=" + c.bin + ":/usr/sbin:/usr/bin:/sbin:/bin"
	c.Daemon, err = c.Host.Start(c.name, "env", path, filepath.Join(c.bin, "containerd"), "--config", file)
	if err != nil {
		return err
	}
	return c.Host.ready(ctx, c.Daemon, c.ctr("version")...)
}

// Ctr launches containers with "ctr run --cni".
type Ctr struct {
	*Containerd
	execs atomic.Int64
}

// Name implements Engine.
func (c *Ctr) Name() string { return "containerd (ctr run --cni)" }

// Run implements Engine. ctr uses the first network it finds and reports no
// address, so IPs are those the container has.
func (c *Ctr) Run(ctx context.Context, s Spec) (*Container, error) {
	args := append([]string{"run", "--rm", "--cni"}, s.Args...)
	args = append(args, Image, s.Name, "serve", s.Name)
	// In the foreground: when it is detached, ctr never detaches the network.
	client, err := c.Host.Start(c.name+"-"+s.Name, c.ctr(args...)...)
	if err != nil {
		return nil, err
	}
	k := &Container{Name: s.Name, ID: c.Host.ID + "-" + s.Name}
	k.exec = func(ctx context.Context, args ...string) (string, error) {
		id := fmt.Sprintf("exec%d", c.execs.Add(1))
		return c.Host.Exec(ctx, c.ctr(append([]string{"task", "exec", "--exec-id", id, s.Name}, args...)...)...)
	}
	k.remove = func(ctx context.Context) error {
		if _, err := c.Host.Exec(ctx, c.ctr("task", "kill", "-s", "SIGTERM", s.Name)...); err != nil {
			return err
		}
		select {
		case <-client.done:
		case <-ctx.Done():
			return fmt.Errorf("ctr run of %s does not end: %w", s.Name, ctx.Err())
		}
		if client.err != nil {
			return fmt.Errorf("ctr run of %s: %w: %s", s.Name, client.err, client.Tail(10))
		}
		return nil
	}
	// Programs can be executed in it before it has its network, but it serves
	// only afterwards.
	if err := c.Host.ready(ctx, client, c.ctr("task", "exec", "--exec-id", "ready", s.Name, "wget", "-q", "-O-", "http://127.0.0.1/")...); err != nil {
		return k, err
	}
	k.IPs, err = k.Addrs(ctx, "eth0")
	return k, err
}

// CRI launches containers in sandboxes through the runtime interface, as a
// kubelet does, with a client of its own.
type CRI struct {
	*Containerd
}

// Name implements Engine.
func (c *CRI) Name() string { return "containerd (CRI)" }

// Client runs a command of the client and decodes what it answers into v,
// unless that is nil.
func (c *CRI) Client(ctx context.Context, v any, args ...string) error {
	out, err := c.Host.Exec(ctx, c.client(args...)...)
	if err != nil || v == nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), v); err != nil {
		return fmt.Errorf("answer to %s: %w: %s", args, err, out)
	}
	return nil
}

func (c *CRI) client(args ...string) []string {
	return append([]string{filepath.Join(c.Host.lab.tools, "crictl"), "-socket", c.socket()}, args...)
}

// Pod is what the client says of a sandbox.
type Pod struct {
	Sandbox, Container, Name, Netns string
	Ready                           bool
	IPs                             []string
}

// Run implements Engine.
func (c *CRI) Run(ctx context.Context, s Spec) (*Container, error) {
	// The service reads the directory when it changes, a moment later.
	if err := c.networkReady(ctx); err != nil {
		return nil, err
	}
	args := []string{"run", "-name", s.Name, "-image", Image, "-cgroup-parent", "/" + c.Host.ID}
	for _, p := range s.Ports {
		args = append(args, "-port", p)
	}
	var pod Pod
	if err := c.Client(ctx, &pod, append(append(args, s.Args...), "serve", s.Name)...); err != nil {
		return nil, err
	}
	k := &Container{Name: s.Name, ID: pod.Container, Sandbox: pod.Sandbox, Netns: pod.Netns}
	k.exec = func(ctx context.Context, args ...string) (string, error) {
		return c.Host.Exec(ctx, c.client(append([]string{"exec", pod.Container}, args...)...)...)
	}
	k.remove = func(ctx context.Context) error {
		if err := c.Client(ctx, nil, "stop", pod.Sandbox); err != nil {
			return err
		}
		return c.Client(ctx, nil, "rm", pod.Sandbox)
	}
	var err error
	k.IPs, err = parseIPs(pod.IPs...)
	return k, err
}

func (c *CRI) networkReady(ctx context.Context) error {
	return Wait(ctx, func() error {
		var is map[string]string
		if err := c.Client(ctx, &is, "status"); err != nil {
			return err
		}
		if is["NetworkReady"] != "true" {
			return fmt.Errorf("%s on %s: network not ready: %s", c.name, c.Host.Name, is["NetworkReady"])
		}
		return nil
	})
}
