package main

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/integration/lab"
)

// clusterYAML has an overlay with one family and one with both.
const clusterYAML = `
vtep_subnet: 44.0.0.0/8
vtep_subnet6: fd01:a::/64
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
  - {name: v4, subnet: 9.0.0.0/8, prefix: 24}
  - {name: dual, subnet: 10.0.0.0/8, prefix: 24, subnet6: "fd01:b::/64", prefix6: 80}
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

// startAgent runs an agent and waits until its host is set up.
func (c *config) startAgent(ctx context.Context, h *lab.Host, url string) error {
	if err := h.StartAgent(url); err != nil {
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
