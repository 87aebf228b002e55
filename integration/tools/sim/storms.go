package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// What the storm takes of two builds of the program, and of one with TLS: they go
// through it in turns, each time with a coordinator and a store of its own, and
// medians are compared. TLS is for connections that are reused, as by a proxy of all
// agents; a handshake for each agent would be a comparison of handshakes.

// What a storm may take of the time, and of the memory at the peak, that it takes of
// the other build.
const (
	timeAgainstBase   = 1.1
	memoryAgainstBase = 0.8
)

// contender is one way to go through the storm.
type contender struct {
	name    string
	program string
	tls     bool

	seconds, cpu, peak []float64
}

// compareStorms adds what there is to compare.
func compareStorms(ctx context.Context, c config, r *Report) error {
	compare := func(part string, reuse bool, list ...*contender) error {
		r.part = part
		c.reuse = reuse
		for round := range c.rounds {
			for _, who := range inTurn(list, round) {
				if err := who.storm(ctx, c); err != nil {
					return fmt.Errorf("%s, %s: %w", part, who.name, err)
				}
			}
		}
		for _, who := range list {
			r.add(who.name+": "+untilLeased, "s", who.seconds...)
			r.add(who.name+": "+peakMemory, "MiB", who.peak...)
			r.add(who.name+": CPU of the coordinator", "s", who.cpu...)
		}
		return nil
	}
	ours, base := &contender{name: "ours", program: c.overlayd}, &contender{name: "base", program: c.base}
	if c.base != "" {
		if err := compare("storm, a connection for each agent", false, ours, base); err != nil {
			return err
		}
		r.against(c.agents, ours, base)
	}
	if !c.secure {
		return nil
	}
	part := fmt.Sprintf("storm, %d connections that are reused", c.conns)
	plain, secure := &contender{name: "without TLS", program: c.overlayd}, &contender{name: "with TLS", program: c.overlayd, tls: true}
	list := []*contender{plain, secure}
	if c.base != "" {
		base = &contender{name: "base, without TLS", program: c.base}
		list = append(list, base)
	}
	if err := compare(part, true, list...); err != nil {
		return err
	}
	r.add("with TLS / without TLS, time", "", median(secure.seconds)/median(plain.seconds))
	r.add("with TLS / without TLS, memory", "", median(secure.peak)/median(plain.peak))
	if c.base != "" {
		r.against(c.agents, plain, base)
		r.add("with TLS / base, without TLS, time", "", median(secure.seconds)/median(base.seconds))
		r.add("with TLS / base, without TLS, memory", "", median(secure.peak)/median(base.peak))
	}
	return nil
}

// inTurn is the order of a round: every other one goes backwards, for who went first was
// seen to be slower, whichever build that was. With an even number of rounds nobody is
// first more often than others.
func inTurn(list []*contender, round int) []*contender {
	list = slices.Clone(list)
	if round%2 == 1 {
		slices.Reverse(list)
	}
	return list
}

// against adds the goals of one that is compared with another build. Small storms are
// over before the collector has looked for garbage, and are mere rows.
func (r *Report) against(agents int, who, base *contender) {
	time, memory := median(who.seconds)/median(base.seconds), median(who.peak)/median(base.peak)
	what := who.name + " / " + base.name
	if agents >= worthComparing {
		r.atMost(what+", time", time, timeAgainstBase)
		r.atMost(what+", memory", memory, memoryAgainstBase)
		return
	}
	r.add(what+", time", "", time)
	r.add(what+", memory", "", memory)
}

func median(samples []float64) float64 { return quantile(slices.Sorted(slices.Values(samples)), 0.5) }

// storm goes through early and storm once.
func (who *contender) storm(ctx context.Context, c config) error {
	c.overlayd, c.tls, c.containers = who.program, who.tls, 0
	c.dir = filepath.Join(c.dir, "compared")
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(c.dir)
	return oneRun(ctx, c, func(ctx, followers context.Context, s *sim) error {
		if err := s.early(ctx, followers); err != nil {
			return err
		}
		if err := s.storm(ctx, followers); err != nil {
			return err
		}
		for _, row := range s.Rows {
			switch row.Name {
			case untilLeased:
				who.seconds = append(who.seconds, row.P50)
			case peakMemory:
				who.peak = append(who.peak, row.P50)
			}
		}
		cpu, err := s.coord.cpu()
		who.cpu = append(who.cpu, cpu)
		return err
	})
}
