package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/integration/lab"
)

// converge measures how fast a host knows its peers.
func converge(ctx context.Context, c *config) error {
	coord, err := c.lab.Node(ctx, "coord", 2)
	if err != nil {
		return err
	}
	coordinator, err := c.lab.StartCoordinator(ctx, coord, singleYAML)
	if err != nil {
		return err
	}
	url := coordinator.URL
	client := clientIn(coord, 32)
	const part = "convergence"
	perEntry := map[int]float64{}
	have := 0
	for _, step := range []struct {
		peers, starts int
	}{{100, 5}, {4000, 5}, {16000, 3}} {
		if _, err := registerMany(ctx, client, url, have, step.peers, 32); err != nil {
			return err
		}
		have = step.peers
		row, err := c.coldRows(ctx, url, step.peers, step.starts)
		if err != nil {
			return fmt.Errorf("%d peers: %w", step.peers, err)
		}
		perEntry[step.peers] = row.P50 / float64(step.peers)
		if step.peers == 100 {
			continue
		}
		var slow []float64
		for k := range max(1, step.starts-2) {
			space, err := c.lab.Netns(ctx, fmt.Sprintf("fl%d-%d", step.peers, k))
			if err != nil {
				return err
			}
			t, err := oneByOne(space, step.peers)
			if err != nil {
				return err
			}
			slow = append(slow, ms(t))
		}
		c.report.add(part, fmt.Sprintf("one by one, a socket each, %d peers", step.peers), "ms", slow)
		if step.peers == 4000 {
			if err := c.oneMore(ctx, url, client, have); err != nil {
				return err
			}
			have += oneMoreSamples
		}
	}
	r := c.report
	r.ratio(part, "all entries from cold, 4000 peers", "one by one, a socket each, 4000 peers", "<=", 0.12)
	r.ratio(part, "all entries from cold, 16000 peers", "one by one, a socket each, 16000 peers", "<=", 0.05)
	r.goal(part, "per entry, 16,000 peers", "per entry, 4,000 peers", perEntry[16000]/perEntry[4000], "<=", 1.3)
	r.absolute(part, "agent start to last route, 4000 peers", "<=", 500)
	r.absolute(part, "agent start to last route, 100 peers", "<=", 100)
	return nil
}

// absolute adds a goal on a row's median itself.
func (r *Report) absolute(part, what, op string, limit float64) {
	if row, ok := r.find(part, what); ok {
		r.goal(part, what+" ("+row.Unit+")", "", row.P50, op, limit)
	}
}

// otherBuild ends the names of rows that the agent of another build made.
const otherBuild = ", other build"

// coldRows starts an agent on a new host several times, by turns with that of
// another build where there is one. Its rows are the time from the start of the
// process to the last route, and from the first forwarding entry to the last
// route; the latter is returned.
func (c *config) coldRows(ctx context.Context, url string, peers, n int) (Row, error) {
	builds := []string{c.bin}
	if c.base != "" {
		builds, n = append(builds, c.base), max(n, baseRounds)
	}
	starts, programs := make([][]float64, len(builds)), make([][]float64, len(builds))
	for range n {
		for _, i := range rand.Perm(len(builds)) {
			start, program, err := c.coldStart(ctx, builds[i], url, peers)
			if err != nil {
				return Row{}, err
			}
			starts[i], programs[i] = append(starts[i], start), append(programs[i], program)
		}
	}
	const part = "convergence"
	start, program := fmt.Sprintf("agent start to last route, %d peers", peers), fmt.Sprintf("all entries from cold, %d peers", peers)
	c.report.add(part, start, "ms", starts[0])
	row := c.report.add(part, program, "ms", programs[0])
	if c.base != "" {
		c.report.add(part, start+otherBuild, "ms", starts[1])
		c.report.add(part, program+otherBuild, "ms", programs[1])
		c.report.ratio(part, start, start+otherBuild, "<=", baseLimit)
		c.report.ratio(part, program, program+otherBuild, "<=", baseLimit)
	}
	return row, nil
}

func (c *config) coldStart(ctx context.Context, bin, url string, peers int) (start, program float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	// Every start is a host of its own, and so a peer of the later ones: the
	// routes are counted, so a few more do no harm. It has to come
	// with an address of its own too: an address belongs to its last agent for a while.
	c.hosts++
	host, err := c.lab.Host(ctx, fmt.Sprintf("p%dk%d", peers, c.hosts), byte(10+c.hosts))
	if err != nil {
		return 0, 0, err
	}
	defer host.Delete(context.WithoutCancel(ctx))
	entries, err := watchEntries(host.Netns)
	if err != nil {
		return 0, 0, err
	}
	defer entries.close()
	host.Bin = bin
	if err := calm(ctx, host.Netns); err != nil {
		return 0, 0, err
	}
	began := time.Now()
	if err := host.StartAgent(url); err != nil {
		return 0, 0, err
	}
	defer host.Proc.Kill()
	first, last, err := entries.until(ctx, peers)
	if err != nil {
		return 0, 0, err
	}
	return ms(last.Sub(began)), ms(last.Sub(first)), nil
}

// calm waits until the kernel has taken away the namespaces of earlier hosts. It does
// so beside everything else for some tenths of a second, with the lock that whoever
// looks at an interface needs, and the next start would pay for the one before.
func calm(ctx context.Context, n *lab.Netns) error {
	const (
		quick  = time.Millisecond
		needed = 25 // in turn
		pace   = 4 * time.Millisecond
	)
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Second, errors.New("the kernel is busy with links; measure where nothing else runs"))
	defer cancel()
	return ns.WithNetNSPath(n.Path, func(ns.NetNS) error {
		lo, err := netlink.LinkByName("lo")
		for quiet := 0; err == nil && quiet < needed; quiet++ {
			asked := time.Now()
			if err = netlink.LinkSetUp(lo); err != nil {
				break
			}
			if time.Since(asked) > quick {
				quiet = -1
			}
			err = pause(ctx, pace)
		}
		return err
	})
}

const oneMoreSamples = 40

// oneMore measures from the answer to a new agent's registration to its route
// on an agent that has all the others.
func (c *config) oneMore(ctx context.Context, url string, client *http.Client, have int) error {
	host, err := c.lab.Host(ctx, "more", 200)
	if err != nil {
		return err
	}
	routes, err := watchEntries(host.Netns)
	if err != nil {
		return err
	}
	defer routes.close()
	if err := host.StartAgent(url); err != nil {
		return err
	}
	defer host.Proc.Kill()
	limited, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	if _, _, err := routes.until(limited, have); err != nil {
		return err
	}
	if err := host.WaitReady(ctx); err != nil {
		return err
	}
	routes.drain()
	var asking, joining, waits []float64
	for k := range oneMoreSamples {
		// Hosts join one by one; a storm is another measurement.
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
		asked := time.Now()
		if err := register(ctx, client, url, have+k); err != nil {
			return err
		}
		answered := time.Now()
		_, last, err := routes.until(limited, 1)
		if err != nil {
			return err
		}
		asking = append(asking, ms(answered.Sub(asked)))
		joining = append(joining, ms(last.Sub(asked)))
		// The agent may well be done when the answer has been read.
		waits = append(waits, max(0, ms(last.Sub(answered))))
	}
	const part, name = "convergence", "one more peer, 4,000 known: registered to programmed"
	c.report.add(part, "one more peer, 4,000 known: asked to registered", "ms", asking)
	c.report.add(part, "one more peer, 4,000 known: asked to programmed", "ms", joining)
	row := c.report.add(part, name, "ms", waits)
	c.report.goal(part, name+", p50 (ms)", "", row.P50, "<=", 5)
	c.report.goal(part, name+", p95 (ms)", "", row.P95, "<=", 25)
	return nil
}
