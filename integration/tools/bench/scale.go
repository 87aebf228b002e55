package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

const (
	scaleRounds = 9 // at least
	fewOverlays = 2
	allOverlays = 200
	attachments = 10_000
)

// overlaysYAML has n overlays that are isolated from each other, which is the
// default; the first is called v4.
func overlaysYAML(n int) string {
	var b strings.Builder
	b.WriteString("vtep_subnet: 44.0.0.0/8\nvtep_mac_oui: 70:B3:D5:00:00:00\noverlays:\n")
	for i := range n {
		name := "v4"
		if i > 0 {
			name = fmt.Sprint("other", i)
		}
		fmt.Fprintf(&b, "  - {name: %s, subnet: 10.%d.0.0/16, prefix: 24}\n", name, i)
	}
	return b.String()
}

// scale measures what packets pay for overlays and attachments that are not
// theirs: between hosts with 200 isolated overlays against 2, and on a host whose
// source checks know 10,000 attachments against the one there is. The firewall is
// nftables.
func scale(ctx context.Context, c *config) error {
	const part = "packets at scale"
	args := []string{"--firewall", "nftables", "--datapath", "kernel"}
	var pairs []pair
	var loaded *lab.Host
	for i, n := range []int{fewOverlays, allOverlays} {
		p, made, err := c.pairOf(ctx, fmt.Sprintf("%d overlays", n), fmt.Sprint("n", n, "-"), 20+2*i, overlaysYAML(n), args...)
		if err != nil {
			return err
		}
		pairs = append(pairs, p)
		if n == allOverlays {
			if err := c.scaleStarts(ctx, part, made.coordinator.URL, args); err != nil {
				return err
			}
		} else {
			loaded = made.hosts[0]
		}
		// A lab has one coordinator at a time, and the agents would take out the
		// elements of attachments that are not there. Packets need neither.
		if err := c.leave(made); err != nil {
			return err
		}
		srv, err := c.lab.Start(p.server, p.server.Name+".iperf3", "iperf3", "-s")
		if err != nil {
			return err
		}
		defer srv.Kill()
	}
	many := pairs[0]
	many.name = fmt.Sprintf("%d attachments", attachments)
	return c.scaleTraffic(ctx, part, loaded, append(pairs, many))
}

// scaleTraffic measures by turns; the third pair is the first, with elements of
// many attachments in the sets.
func (c *config) scaleTraffic(ctx context.Context, part string, loaded *lab.Host, pairs []pair) error {
	kinds := []struct {
		name, unit string
		runs       int // whose mean is one sample: a TCP connection keeps one of two speeds
		args       []string
	}{
		{"TCP, 1 stream, ", "Gbit/s", 6, []string{"-P", "1", "-n", "1G"}},
		{"UDP, 64 bytes, ", "kpps", 2, []string{"-u", "-l", "64", "-b", "0"}},
	}
	samples := map[string][]float64{}
	for round := range max(scaleRounds, c.rounds/3) + 1 {
		for j := range pairs {
			i := (j + round) % len(pairs)
			if i == 2 {
				if err := fillSources(ctx, loaded, "add"); err != nil {
					return err
				}
			}
			for _, k := range kinds {
				var sum float64
				for range k.runs {
					v, err := iperf(ctx, pairs[i], k.args...)
					if err != nil {
						return fmt.Errorf("%s%s: %w", k.name, pairs[i].name, err)
					}
					sum += v
				}
				if round > 0 {
					samples[k.name+pairs[i].name] = append(samples[k.name+pairs[i].name], sum/float64(k.runs))
				}
			}
			if i == 2 {
				if err := fillSources(ctx, loaded, "delete"); err != nil {
					return err
				}
			}
		}
	}
	for _, k := range kinds {
		for _, p := range pairs {
			c.report.add(part, k.name+p.name, k.unit, samples[k.name+p.name])
		}
		c.report.ratio(part, k.name+pairs[1].name, k.name+pairs[0].name, ">=", 0.95)
		c.report.ratio(part, k.name+pairs[2].name, k.name+pairs[0].name, ">=", 0.97)
	}
	return nil
}

// fillSources adds or deletes the elements of attachments that are not there.
func fillSources(ctx context.Context, h *lab.Host, verb string) error {
	var ports, sources strings.Builder
	for i := range attachments - 1 {
		device, a := fmt.Sprintf("vm%012x", i), netip.AddrFrom4([4]byte{8, byte(i >> 16), byte(i >> 8), byte(i)})
		fmt.Fprintf(&ports, "%q, ", device)
		fmt.Fprintf(&sources, "%q . 0a:58:08:%02x:%02x:%02x . %s, ", device, byte(i>>16), byte(i>>8), byte(i), a)
	}
	cmd := exec.CommandContext(ctx, "ip", "netns", "exec", h.Netns.Name, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(fmt.Sprintf("%[1]s element bridge overlay ports { %[2]s }\n%[1]s element bridge overlay sources4 { %[3]s }\n", verb, ports.String(), sources.String()))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s elements of %d attachments: %w: %.200s", verb, attachments, err, out)
	}
	return nil
}

// leave kills coordinator and agents, and has the coordinator forgotten.
func (c *config) leave(made *cluster) error {
	for _, h := range made.hosts {
		h.Proc.Kill()
	}
	made.coordinator.Kill()
	return os.RemoveAll(filepath.Join(c.lab.Dir, "coordinator"))
}

// scaleStarts measures the first start of an agent on hosts of their own. The hosts
// stay until the end: for the eight seconds that the kernel takes to remove 400
// bridges with their namespace, it lets nobody else configure a link.
func (c *config) scaleStarts(ctx context.Context, part, url string, args []string) error {
	var took []float64
	for i := range 5 {
		host, err := c.lab.Host(ctx, fmt.Sprint("start", i), byte(31+i))
		if err != nil {
			return err
		}
		began := time.Now()
		if err := c.startAgent(ctx, host, url, args...); err != nil {
			return err
		}
		took = append(took, ms(time.Since(began)))
		host.Proc.Kill()
	}
	name := fmt.Sprintf("first start of an agent until it is ready, %d overlays", allOverlays)
	c.report.add(part, name, "ms", took)
	c.report.absolute(part, name, "<=", 1000)
	return nil
}
