package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"overlayd.internal/overlay/integration/lab/ucr"
)

// The halves of an agent subnet.
const (
	Mesos  = "mesos"
	Docker = "docker"
)

// Container is a network namespace attached to one half of an overlay.
type Container struct {
	*Netns
	Short   string // the name without the lab's
	Host    *Host
	Overlay string
	Half    string
	Addrs   []netip.Prefix
}

// Attach makes a namespace and attaches it the way the half's runtime does: the
// Docker half with cnitool and the conflist the agent wrote, the Mesos half as
// Mesos' network/cni isolator does. When the ADD fails, the namespace is still
// there.
func (h *Host) Attach(ctx context.Context, name, overlay, half string) (*Container, error) {
	short := filepath.Base(h.Dir) + "-" + name
	ns, err := h.Lab.Netns(ctx, short)
	if err != nil {
		return nil, err
	}
	c := &Container{Netns: ns, Short: short, Host: h, Overlay: overlay, Half: half}
	return c, c.Add(ctx)
}

// Add attaches the container and fills in Addrs.
func (c *Container) Add(ctx context.Context) (err error) {
	if c.Half == Mesos {
		c.Addrs, err = c.mesosAdd(ctx)
	} else {
		c.Addrs, err = c.cnitoolAdd(ctx)
	}
	return err
}

// Del detaches the container; its namespace stays.
func (c *Container) Del(ctx context.Context) error {
	if c.Half == Mesos {
		return c.Host.isolator().Del(ctx, c.mesosID())
	}
	_, err := c.cnitool(ctx, "del")
	return err
}

// Remove detaches the container and deletes its namespace.
func (c *Container) Remove(ctx context.Context) error {
	return errors.Join(c.Del(ctx), c.Delete(ctx))
}

// Addr is the container's address of the overlay's only, or first, family.
func (c *Container) Addr() netip.Addr {
	if len(c.Addrs) == 0 {
		return netip.Addr{}
	}
	return c.Addrs[0].Addr()
}

// cnitool runs cnitool on the host. libcni caches results in /var/lib/cni; every
// host gets its own there.
func (c *Container) cnitool(ctx context.Context, verb string) ([]byte, error) {
	h := c.Host
	cmd := h.Command(ctx, "unshare", "--mount", "--propagation", "private", "sh", "-c",
		`mkdir -p /var/lib/cni && mount --bind "$0" /var/lib/cni && exec "$@"`, h.cniCache,
		h.Lab.CNITool, verb, c.Overlay, c.Path)
	cmd.Env = append(os.Environ(), "NETCONFPATH="+h.CNIConfDir, "CNI_PATH="+h.Lab.Bin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: cnitool %s %s: %w: %s%s", c.Name, verb, c.Overlay, err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.Bytes(), nil
}

func (c *Container) cnitoolAdd(ctx context.Context) ([]netip.Prefix, error) {
	out, err := c.cnitool(ctx, "add")
	if err != nil {
		return nil, err
	}
	var result struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal(out, &result); err != nil {
		return nil, fmt.Errorf("%s: result of cnitool add: %w: %s", c.Name, err, out)
	}
	var addrs []netip.Prefix
	for _, ip := range result.IPs {
		addrs = append(addrs, ip.Address)
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("%s: cnitool add reports no address: %s", c.Name, out)
	}
	return addrs, nil
}

// isolator is the host's Mesos agent, as far as networks are concerned.
func (h *Host) isolator() *ucr.Isolator {
	return &ucr.Isolator{
		ConfDir: h.UCRConfDir, PluginsDir: h.Lab.Bin, Root: filepath.Join(h.Dir, "mesos"),
		Command: h.Command,
	}
}

// mesosID has a dot, as the ids of nested containers have.
func (c *Container) mesosID() string { return c.Name + ".task" }

func (c *Container) mesosAdd(ctx context.Context) ([]netip.Prefix, error) {
	i := c.Host.isolator()
	handle := i.Handle(c.mesosID())
	if err := os.MkdirAll(filepath.Dir(handle), 0o755); err != nil {
		return nil, err
	}
	if err := os.Symlink(c.Path, handle); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	results, err := i.Attach(ctx, c.mesosID(), ucr.NetworkInfo{Name: c.Overlay})
	if err != nil {
		return nil, err
	}
	var addrs []netip.Prefix
	for _, ip := range []*ucr.IPConfig{results[0].IP4, results[0].IP6} {
		if p := ip.Prefix(); p.IsValid() {
			addrs = append(addrs, p)
		}
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("%s: the result of m-overlay has neither ip4 nor ip6", c.Name)
	}
	return addrs, nil
}
