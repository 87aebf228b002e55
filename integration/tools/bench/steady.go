package main

import (
	"context"
	"time"
)

// steady measures an agent that has 4,096 peers and nothing to do.
func steady(ctx context.Context, c *config) error {
	coord, err := c.lab.Node(ctx, "coord", 2)
	if err != nil {
		return err
	}
	coordinator, err := c.lab.StartCoordinator(ctx, coord, clusterYAML)
	if err != nil {
		return err
	}
	if _, err := registerMany(ctx, clientIn(coord, 32), coordinator.URL, 0, 4096, 32); err != nil {
		return err
	}
	host, err := c.lab.Host(ctx, "host", 3)
	if err != nil {
		return err
	}
	if err := c.startAgent(ctx, host, coordinator.URL); err != nil {
		return err
	}
	agent := host.Proc
	// Let the start settle, then measure over two rounds of every timer.
	const settle, window = 15 * time.Second, 130 * time.Second
	if err := pause(ctx, settle); err != nil {
		return err
	}
	before, err := cpuSeconds(agent.Pid())
	if err != nil {
		return err
	}
	if err := pause(ctx, window); err != nil {
		return err
	}
	after, err := cpuSeconds(agent.Pid())
	if err != nil {
		return err
	}
	rss, err := memory(agent.Pid(), "VmRSS")
	if err != nil {
		return err
	}
	const part = "steady state, 4,096 peers"
	c.report.add(part, "resident memory of the agent", "MiB", []float64{rss})
	c.report.goal(part, "resident memory of the agent (MiB)", "", rss, "<=", 40)
	c.report.goal(part, "idle CPU of the agent (% of a core)", "", 100*(after-before)/window.Seconds(), "<=", 0.2)
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
