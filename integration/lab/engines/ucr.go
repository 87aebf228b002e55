package engines

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"overlayd.internal/overlay/integration/lab/ucr"
)

// UCR stands for the Mesos containerizer: a process in a network namespace of its own,
// attached the way the isolator of a Mesos agent does it.
type UCR struct {
	Host     *Host
	Isolator *ucr.Isolator
}

// ucrRoot is where the isolator keeps its namespaces and checkpoints.
const ucrRoot = "/run/mesos/isolators/network/cni"

// NewUCR is the Mesos agent of a host of a cluster.
func NewUCR(h *Host) *UCR {
	return &UCR{h, &ucr.Isolator{
		ConfDir: UCRConfDir, PluginsDir: PluginDir, Root: ucrRoot,
		Command: h.Command, File: h.File,
	}}
}

// Name implements Engine.
func (u *UCR) Name() string { return "Mesos UCR (its isolator, replayed)" }

// Version implements Engine.
func (u *UCR) Version(context.Context) (string, error) { return "c1b42f79d", nil }

// Start implements Engine: the Mesos agent's look at the configuration. A file
// that it would skip is an error.
func (u *UCR) Start(context.Context) error {
	_, skipped, err := u.Isolator.Networks()
	return errors.Join(append(skipped, err)...)
}

// Run implements Engine.
func (u *UCR) Run(ctx context.Context, s Spec) (*Container, error) {
	info := ucr.NetworkInfo{Name: s.Network}
	for _, p := range s.Ports {
		m := ucr.PortMapping{Protocol: "tcp"}
		if _, err := fmt.Sscanf(p, "%d:%d", &m.HostPort, &m.ContainerPort); err != nil {
			return nil, fmt.Errorf("port %q: want HOST:CONTAINER", p)
		}
		info.PortMappings = append(info.PortMappings, m)
	}
	id := newUUID()
	k := &Container{Name: s.Name, ID: id, Netns: u.Isolator.Handle(id)}
	k.exec = func(ctx context.Context, args ...string) (string, error) {
		// Busybox alone, as in the images of the other engines.
		return u.Host.Exec(ctx, append([]string{"nsenter", "--net=" + k.Netns, "busybox"}, args...)...)
	}
	task, err := u.launch(ctx, id, s.Name)
	if err != nil {
		return nil, err
	}
	k.remove = func(ctx context.Context) error { return errors.Join(task.Stop(), u.destroy(ctx, id)) }
	results, err := u.Isolator.Attach(ctx, id, info)
	if err != nil {
		return nil, errors.Join(err, k.Remove(ctx))
	}
	for _, r := range results {
		for _, ip := range []*ucr.IPConfig{r.IP4, r.IP6} {
			if p := ip.Prefix(); p.IsValid() {
				k.IPs = append(k.IPs, p.Addr())
			}
		}
	}
	return k, nil
}

// launch starts the task in a new namespace and hands that to the isolator. As
// under Mesos the process is there before its network is.
func (u *UCR) launch(ctx context.Context, id, name string) (*Daemon, error) {
	page := filepath.Join("/run/pages", id)
	if err := u.Host.Write(filepath.Join(page, "index.html"), name+"\n"); err != nil {
		return nil, err
	}
	task, err := u.Host.Start("ucr-"+name, "unshare", "--net", "sh", "-ec",
		`ip link set lo up; exec busybox httpd -f -p 80 -h "$1"`, "sh", page)
	if err != nil {
		return nil, err
	}
	err = eventually(10*time.Second, func() error { return hasOwn("net", task.pid, u.Host.initPID()) })
	if err == nil {
		var inside string
		if inside, err = insidePID(task.pid); err == nil {
			err = u.Isolator.Isolate(ctx, id, "/proc/"+inside+"/ns/net")
		}
	}
	if err != nil {
		return nil, errors.Join(err, task.Kill())
	}
	return task, nil
}

// destroy detaches the container, and then once more without its namespace, as
// a Mesos agent does that was restarted half-way.
func (u *UCR) destroy(ctx context.Context, id string) error {
	if err := u.Isolator.Del(ctx, id); err != nil {
		return err
	}
	if err := u.Isolator.Forget(ctx, id); err != nil {
		return err
	}
	return u.Isolator.Detach(ctx, id)
}

// hasOwn says whether a process is in another namespace of that kind than the
// init of its host.
func hasOwn(kind string, pid, init int) error {
	of, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
	if err != nil {
		return err
	}
	host, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", init, kind))
	if err == nil && of == host {
		err = fmt.Errorf("process %d has no %s namespace of its own yet", pid, kind)
	}
	return err
}

// insidePID is the number a process of a host has there.
func insidePID(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if numbers, ok := strings.CutPrefix(line, "NSpid:"); ok {
			f := strings.Fields(numbers)
			return f[len(f)-1], nil
		}
	}
	return "", fmt.Errorf("the kernel tells no NSpid of process %d", pid)
}
