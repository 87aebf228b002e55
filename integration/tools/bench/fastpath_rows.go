package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// only picks what a short run measures: rows and ways by the beginning of their
// names, separated by commas. Empty: everything.
type only struct{ rows, ways string }

func picked(list, name string) bool {
	if list == "" {
		return true
	}
	return slices.ContainsFunc(strings.Split(list, ","), func(s string) bool { return strings.HasPrefix(name, s) })
}

// fastpath compares the fast path with our own kernel path, with VXLAN made by
// hand and with plain routes between the hosts (flannel's host-gw), each with a
// masquerading rule, and with the underlay alone: between the same hosts, rules and all,
// and between hosts without any.
func fastpath(ctx context.Context, c *config) error {
	all, err := c.fastVariants(ctx)
	if err != nil {
		return err
	}
	stop, err := c.serveFast(all)
	if err != nil {
		return err
	}
	defer stop()
	for _, v := range all {
		for _, to := range []netip.Addr{v.to4, v.to6} {
			if err := c.reachable(ctx, pair{name: v.name, client: v.client, to: to}); err != nil {
				return err
			}
		}
	}
	if err := fastFamily(ctx, c, all, false); err != nil {
		return err
	}
	if err := fastFamily(ctx, c, all, true); err != nil {
		return err
	}
	for _, part := range []struct {
		row string
		run func(context.Context, *config, []*route) error
	}{
		{"rules", fastRules}, {"streams", fastStreams}, {"applications", fastApplications}, {"attach", fastAttach}, {"offload", fastWithoutOffload},
	} {
		if !picked(c.only.rows, part.row) {
			continue
		}
		if err := part.run(ctx, c, all); err != nil {
			return err
		}
	}
	return nil
}

// fastRounds is how often everything is measured.
func (c *config) fastRounds() int { return max(9, c.rounds/3) }

// sampled collects what is measured of every route, round by round, each time
// beginning with another one. The first round is not counted.
func sampled(rounds int, all []*route, measure func(v *route) ([]float64, error)) (map[string][][]float64, error) {
	out := map[string][][]float64{}
	for round := range rounds + 1 {
		for j := range all {
			v := all[(j+round)%len(all)]
			values, err := measure(v)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", v.name, err)
			}
			if round == 0 {
				out[v.name] = make([][]float64, len(values))
				continue
			}
			for i, x := range values {
				out[v.name][i] = append(out[v.name][i], x)
			}
		}
	}
	return out, nil
}

// kind is one thing that is measured, and what it should be against the others.
type kind struct {
	name, unit, op string
	limits         map[string]float64 // of the fast path, by route
	direct         float64            // of direct routing against host-gw; 0: none
}

// reportFast adds the rows of a part and the goals.
func (c *config) reportFast(part string, all []*route, kinds []kind, samples map[string][][]float64) {
	for i, k := range kinds {
		for _, v := range all {
			c.report.add(part, k.name+", "+v.name, k.unit, samples[v.name][i])
		}
		for _, v := range all {
			if limit, ok := k.limits[v.name]; ok {
				c.paired(part, k, fastName, v.name, limit, i, samples)
			}
		}
		if k.direct != 0 {
			c.paired(part, k, directName, routedName, k.direct, i, samples)
		}
	}
	c.report.print(os.Stdout, part)
}

// paired adds a goal on one route against another: the median of the rounds' own
// ratios. What disturbs a round disturbs both.
func (c *config) paired(part string, k kind, what, against string, limit float64, row int, samples map[string][][]float64) {
	if samples[what] == nil || samples[against] == nil {
		return // not picked
	}
	var ratios []float64
	for round, x := range samples[against][row] {
		ratios = append(ratios, samples[what][row][round]/x)
	}
	slices.Sort(ratios)
	c.report.goal(part, k.name+", "+what, k.name+", "+against, quantile(ratios, 0.5), k.op, limit)
}

// fastFamily is bulk TCP, small datagrams and round trips.
func fastFamily(ctx context.Context, c *config, all []*route, six bool) error {
	part, family := "fast path, IPv4 overlay", "4"
	if six {
		part, family = "fast path, IPv6 overlay", "6"
	}
	var kinds []kind
	var measures []func(context.Context, *route, pair) ([]float64, error)
	for _, row := range []struct {
		name    string
		kinds   []kind
		measure func(context.Context, *route, pair) ([]float64, error)
	}{
		{"tcp", []kind{
			{"TCP, 1 stream", "Gbit/s", ">=", map[string]float64{kernelName: 1.30, handName: 1.30, routedName: 1.15, hostsName: 0.90, rawName: 0.90}, 1.15},
			{"CPU per GB", "ms", "<=", map[string]float64{kernelName: 0.75, handName: 0.75, routedName: 0.80}, 0.80},
		}, bulk},
		{"udp", []kind{{"UDP, 64 bytes", "kpps", ">=", map[string]float64{kernelName: 2.0, handName: 2.0, routedName: 1.5, hostsName: 0.90, rawName: 0.90}, 1.5}},
			func(ctx context.Context, _ *route, p pair) ([]float64, error) {
				rate, err := iperf(ctx, p, "-u", "-l", "64", "-b", "0")
				return []float64{rate}, err
			}},
		{"latency", []kind{{"ping-pong, one CPU, one way", "us", "<=", map[string]float64{kernelName: 0.60, handName: 0.60, routedName: 0.80}, 0.80}},
			func(ctx context.Context, _ *route, p pair) ([]float64, error) {
				t, err := pingPong(ctx, p)
				return []float64{t}, err
			}},
	} {
		if picked(c.only.rows, row.name+family) {
			kinds, measures = append(kinds, row.kinds...), append(measures, row.measure)
		}
	}
	if len(kinds) == 0 {
		return nil
	}
	samples, err := sampled(c.fastRounds(), all, func(v *route) (values []float64, err error) {
		p := pair{name: v.name, client: v.client, server: v.server, to: v.to4}
		if six {
			p.to = v.to6
		}
		for _, measure := range measures {
			got, err := measure(ctx, v, p)
			if err != nil {
				return nil, err
			}
			values = append(values, got...)
		}
		return values, nil
	})
	if err != nil {
		return err
	}
	c.reportFast(part, all, kinds, samples)
	return nil
}

// bulk is the rate of one stream, and the processor time it takes per GB.
func bulk(ctx context.Context, v *route, p pair) ([]float64, error) {
	before, err := processorTime(v.served)
	if err != nil {
		return nil, err
	}
	rate, err := iperf(ctx, p, "-P", "1")
	if err != nil {
		return nil, err
	}
	after, err := processorTime(v.served)
	// A second of so many Gbit/s is an eighth of as many GB.
	return []float64{rate, (after - before) * 1000 / (rate / 8)}, err
}

// own are our two ways over VXLAN.
func own(all []*route) (two []*route) {
	for _, v := range all {
		if v.name == fastName || v.name == kernelName {
			two = append(two, v)
		}
	}
	return two
}
