package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
)

// crowdYAML has overlays with room for as many containers as a bridge has ports.
const crowdYAML = `
vtep_subnet: 44.0.0.0/8
vtep_subnet6: fd01:a::/64
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
  - {name: few4, subnet: 9.0.0.0/8, prefix: 20}
  - {name: many4, subnet: 10.0.0.0/8, prefix: 20}
  - {name: few46, subnet: 11.0.0.0/8, prefix: 20, subnet6: "fd01:b::/64", prefix6: 80}
  - {name: many46, subnet: 12.0.0.0/8, prefix: 20, subnet6: "fd01:c::/64", prefix6: 80}
`

// How many containers are on a bridge with few, and on one with many.
const (
	few  = 10
	many = 1000
)

// crowd measures ADD and DEL on a bridge with many containers against one with
// few, with and without an agent that looks on.
func crowd(ctx context.Context, c *config) error {
	host, err := c.startHost(ctx, crowdYAML)
	if err != nil {
		return err
	}
	b, err := makeBox(ctx, c.lab, host.Netns, "c", many+1)
	if err != nil {
		return err
	}
	variants := map[string][]variant{}
	builds := []struct{ name, from string }{{"", c.bin}}
	if c.base != "" {
		builds = append(builds, struct{ name, from string }{"other build, ", c.base})
	}
	for i, build := range builds {
		bin, err := c.install(build.from, "m-overlay")
		if err != nil {
			return err
		}
		for _, family := range []string{"4", "46"} {
			for name, n := range map[string]int{"few": few, "many": many} {
				conf := map[string]any{"cniVersion": "1.0.0", "name": name + family, "type": "m-overlay", "runDir": host.RunDir}
				if i == 0 {
					if err := b.attachMany(ctx, filepath.Join(bin, "m-overlay"), conf, "x"+name+family, n); err != nil {
						return err
					}
				}
				row := build.name + crowdName(n, family)
				variants[family] = append(variants[family], b.cniVariant(row, filepath.Join(bin, "m-overlay"), bin, conf))
			}
		}
	}
	for _, agent := range []string{"", ", agent stopped"} {
		if agent != "" {
			host.Proc.Kill()
		}
		for _, family := range []string{"4", "46"} {
			rep := &Report{}
			if err := b.interleaved(ctx, rep, c.rounds, variants[family]); err != nil {
				return err
			}
			for _, row := range rep.Rows {
				row.Part = "crowd" + agent + " " + row.Part
				c.report.Rows = append(c.report.Rows, row)
			}
			for _, verb := range []string{" ADD", " DEL"} {
				c.report.ratio("crowd"+agent+verb, crowdName(many, family), crowdName(few, family), "<=", 1.3)
			}
		}
	}
	return nil
}

// idle measures an agent that has nothing to do, without containers and with some.
func idle(ctx context.Context, c *config) error {
	host, err := c.startHost(ctx, crowdYAML)
	if err != nil {
		return err
	}
	b, err := makeBox(ctx, c.lab, host.Netns, "i", many)
	if err != nil {
		return err
	}
	bin, err := c.install(c.bin, "m-overlay")
	if err != nil {
		return err
	}
	attached := 0
	for _, step := range []struct {
		overlay string
		n       int
	}{{"", 0}, {"few46", 100}, {"many46", many - 100}} {
		if step.n > 0 {
			conf := map[string]any{"cniVersion": "1.0.0", "name": step.overlay, "type": "m-overlay", "runDir": host.RunDir}
			if err := b.attachMany(ctx, filepath.Join(bin, "m-overlay"), conf, step.overlay, step.n); err != nil {
				return err
			}
			attached += step.n
		}
		// Two rounds of the slow look, after what the attaching has set off.
		const settle, window = 15 * time.Second, 130 * time.Second
		if err := pause(ctx, settle); err != nil {
			return err
		}
		before, err := cpuSeconds(host.Proc.Pid())
		if err != nil {
			return err
		}
		if err := pause(ctx, window); err != nil {
			return err
		}
		after, err := cpuSeconds(host.Proc.Pid())
		if err != nil {
			return err
		}
		c.report.add("idle", fmt.Sprintf("CPU of the agent, %d attachments", attached), "% of a core", []float64{100 * (after - before) / window.Seconds()})
	}
	return nil
}

func crowdName(n int, family string) string {
	name := map[string]string{"4": "IPv4", "46": "dual stack"}[family]
	return fmt.Sprintf("%s, %d on the bridge", name, n)
}

// attachMany attaches n containers through an interface of their own; the last
// namespaces of the box stay free of them.
func (b *box) attachMany(ctx context.Context, path string, conf map[string]any, ifName string, n int) error {
	text, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.NumCPU())
	for i := range n {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			call := func() *exec.Cmd {
				cmd := cni(path, "ADD", string(text), fmt.Sprintf("crowd-%d", i), b.spaces[i+1].Path, filepath.Dir(path))
				cmd.Env = append(cmd.Env, "CNI_IFNAME="+ifName)
				return cmd
			}
			_, err := b.run(call())
			return err
		})
	}
	return g.Wait()
}
