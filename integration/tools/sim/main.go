// Command sim drives one real coordinator with many simulated agents. The
// coordinator is the program users run, with its bbolt file on disk; an agent
// here is no more than what a coordinator sees of one: connections, requests,
// and a stream of peers that it reads and checks.
//
//	sim [-overlayd FILE] [-agents N] [-watchers N] [-joiners N] [-json FILE] ...
//
// It goes through what a cluster goes through:
//
//	early     the first agents register, report, and follow the peers
//	storm     all other agents want a lease at the same moment
//	cold      agents follow the peers that know none of them yet
//	idle      agents follow the peers while nothing happens
//	renewal   every agent renews; nothing may be written
//	restart   the coordinator is killed and started; every agent comes back
//	reports   with -containers: the storm once more, without and with reports of
//	          what is attached, for what they cost
//	storms    with -base or -secure: the storm once more, in turns: by two builds
//	          of the program; without and with TLS over connections that are reused
//
// An agent has a connection and an address of its own (127.x.y.z), registers
// and reports over it, and closes it. Only so many are open at a time (-conns),
// as in the queue of a listener; an agent's wait counts from the moment it wants
// its lease, so the time in that queue is part of it.
//
// Streams are what a full mesh consists of, and N agents that hear of N peers
// each are too much for one machine: so some agents follow the peers, each until
// it knows all of them, compared entry by entry with what was leased, and the
// cost of one is multiplied. It exits 1 when a goal is missed.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"
)

// config is the size of a simulation.
type config struct {
	overlayd string
	dir      string // of the coordinator; empty: a temporary one
	agents   int
	watchers int // follow from before the storm
	joiners  int // follow from when they have their lease, in the storm
	cold     int // follow afterwards, from nothing
	idle     int // follow afterwards, knowing everything
	conns    int
	plain    int // percent of those who follow that do not take gzip
	over     time.Duration
	window   time.Duration // over which idle CPU is measured

	containers int  // that each agent reports; 0: none reports any
	only       bool // nothing but comparisons of storms

	base       string // another build of the program, to compare with; empty: none
	rounds     int    // of every storm that is compared
	secure     bool   // compare TLS with connections that are reused with the same without
	tls, reuse bool   // of one run
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code, err := run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "sim:", err)
	}
	os.Exit(code)
}

func run(ctx context.Context) (int, error) {
	var c config
	flag.StringVar(&c.overlayd, "overlayd", "bin/overlayd", "the program to drive")
	flag.StringVar(&c.dir, "dir", "", "directory of the coordinator; default: a temporary one")
	flag.IntVar(&c.agents, "agents", 65536, "agents")
	flag.IntVar(&c.watchers, "watchers", 1024, "agents that follow the peers from before the storm")
	flag.IntVar(&c.joiners, "joiners", 256, "agents of the storm that follow the peers as soon as they have a lease")
	flag.IntVar(&c.cold, "cold", 128, "agents that follow the peers after the storm, from nothing")
	flag.IntVar(&c.idle, "idle", 4096, "agents that follow the peers while nothing happens")
	flag.IntVar(&c.conns, "conns", 256, "connections open at a time, those that follow left out")
	flag.IntVar(&c.plain, "plain", 5, "percent of the agents that follow the peers without asking for gzip")
	flag.DurationVar(&c.over, "over", 0, "time over which the agents of the storm come; 0: all at the same moment")
	flag.DurationVar(&c.window, "window", 10*time.Second, "time over which the CPU of a coordinator without work is measured")
	flag.IntVar(&c.containers, "containers", 0, "containers that each agent reports; the storm is then compared with one without reports")
	flag.StringVar(&c.base, "base", "", "another build of the program; the storm is compared with one that it goes through")
	flag.BoolVar(&c.secure, "secure", false, "compare the storm over TLS, and connections that are reused as by a proxy, with the same without TLS")
	flag.IntVar(&c.rounds, "rounds", 3, "how often each storm that is compared is gone through, in turns")
	flag.BoolVar(&c.only, "only", false, "go through nothing but the comparisons")
	jsonFile := flag.String("json", "", "write the report to this file too")
	flag.Parse()
	if flag.NArg() > 0 {
		return 2, fmt.Errorf("%q: takes flags only", flag.Arg(0))
	}
	if err := c.check(); err != nil {
		return 2, err
	}
	debug.SetGCPercent(400) // it shares the cores with what it measures
	report, err := simulate(ctx, c)
	if err != nil {
		return 1, err
	}
	report.print(os.Stdout)
	if *jsonFile != "" {
		b, err := json.MarshalIndent(report, "", "  ")
		if err != nil {
			return 1, err
		}
		if err := os.WriteFile(*jsonFile, append(b, '\n'), 0o644); err != nil {
			return 1, err
		}
	}
	if report.missed() > 0 {
		return 1, nil
	}
	return 0, nil
}

// maxAgents is what the overlay of the simulated cluster has room for.
const maxAgents = 1 << 16

// maxContainers is what a half has room for.
const maxContainers = 125

func (c config) check() error {
	switch {
	case c.agents < 2 || c.agents > maxAgents:
		return fmt.Errorf("-agents %d: want 2 to %d", c.agents, maxAgents)
	case min(c.watchers, c.joiners, c.cold, c.idle) < 0 || c.conns < 1:
		return fmt.Errorf("negative number of agents, or no connections")
	case c.watchers < 1 || c.watchers+c.joiners >= c.agents:
		return fmt.Errorf("%d agents cannot have %d watchers and %d joiners", c.agents, c.watchers, c.joiners)
	case c.containers < 0 || c.containers > maxContainers:
		return fmt.Errorf("-containers %d: want 0 to %d", c.containers, maxContainers)
	case c.only && c.containers == 0 && c.base == "" && !c.secure:
		return fmt.Errorf("-only: there is nothing to compare; give -containers, -base or -secure")
	case c.rounds < 1:
		return fmt.Errorf("-rounds %d: want 1 or more", c.rounds)
	case c.cold > c.agents || c.idle > c.agents:
		return fmt.Errorf("%d agents cannot have %d that follow from nothing, or %d that are idle", c.agents, c.cold, c.idle)
	}
	return nil
}
