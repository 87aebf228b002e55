package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/integration/lab"
)

// clusterYAML has an overlay with one family and one with both. The halves have
// 2,045 addresses, so that none is given out again before it has rested: that
// takes a look at the whole table of connections, which no peer does.
const clusterYAML = `
vtep_subnet: 44.0.0.0/8
vtep_subnet6: fd01:a::/64
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
  - {name: v4, subnet: 9.0.0.0/8, prefix: 20}
  - {name: dual, subnet: 10.0.0.0/8, prefix: 20, subnet6: "fd01:b::/64", prefix6: 80}
`

// singleYAML has one overlay and one family, as much as the peer has, and room
// for 65,536 agents.
const singleYAML = `
vtep_subnet: 44.0.0.0/8
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
  - {name: v4, subnet: 9.0.0.0/8, prefix: 24}
`

// startHost runs a coordinator and an agent on one host and waits for both.
func (c *config) startHost(ctx context.Context, yaml string) (*lab.Host, error) {
	h, err := c.lab.Host(ctx, "host", 2)
	if err != nil {
		return nil, err
	}
	// /run is a tmpfs on every host; the lab's directory may be on a disk.
	if err := c.tmpfs(h.RunDir); err != nil {
		return nil, err
	}
	coordinator, err := c.lab.StartCoordinator(ctx, h.Node, yaml)
	if err != nil {
		return nil, err
	}
	return h, c.startAgent(ctx, h, coordinator.URL)
}

// install copies programs, as whoever installs them does. What a linker wrote
// through a mapping lies in the page cache in single pages, and starting it
// costs 0.3 ms more of page faults.
func (c *config) install(from string, names ...string) (dir string, err error) {
	if dir, err = os.MkdirTemp(c.lab.Dir, "installed-"); err != nil {
		return "", err
	}
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), b, 0o755); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// startAgent runs an agent and waits until its host is set up.
func (c *config) startAgent(ctx context.Context, h *lab.Host, url string, args ...string) error {
	if err := h.StartAgent(url, args...); err != nil {
		return fmt.Errorf("start the agent of %s: %w", h.Name, err)
	}
	return h.WaitReady(ctx)
}

// tmpfs mounts one over a directory until the part ends.
func (c *config) tmpfs(dir string) error {
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount a tmpfs on %s: %w", dir, err)
	}
	c.mounts = append(c.mounts, dir)
	return nil
}

func (c *config) unmount() {
	for _, dir := range c.mounts {
		unix.Unmount(dir, unix.MNT_DETACH)
	}
	c.mounts = nil
}
