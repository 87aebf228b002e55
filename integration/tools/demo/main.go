// Command demo shows the overlay at work on one machine: a coordinator, a host
// without bridges, two agents, containers on both halves of two overlays, and
// the proof that all of them talk. Every host is a network namespace; nothing
// of the machine itself is changed.
//
// It runs the real programs in -bin and is started from the top of the tree
// (make demo).
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run returns the exit status: 0 when every check passed, 1 when not, 2 for
// wrong usage, 130 when it was interrupted.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	keep := flags.Bool("keep", false, "leave everything up at the end")
	clean := flags.Bool("clean", false, "remove what -keep left, and do nothing else")
	bin := flags.String("bin", "bin", "`directory` of the programs")
	cnitool := flags.String("cnitool", "bin/tools/cnitool", "the `program` cnitool")
	config := flags.String("config", "conf/examples/overlay.yaml", "cluster configuration `file`")
	store := flags.String("store", "bbolt", "bbolt, or etcd with two coordinators")
	state := flags.String("state", "integration/testdata/seed-state.json", "`file` with the state the coordinator must show")
	if err := flags.Parse(args); err != nil || flags.NArg() > 0 || *store != "bbolt" && *store != "etcd" {
		return 2
	}

	d := &demo{out: stdout, start: time.Now(), lab: lab.Options{Bin: *bin, CNITool: *cnitool, Keep: *keep, Secure: true, Etcd: *store == "etcd"}}
	var err error
	if *clean {
		err = d.clean(ctx)
	} else {
		err = d.show(ctx, *config, *state)
	}
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "demo: interrupted")
		return 130
	case err != nil:
		fmt.Fprintln(stderr, "demo:", err)
		return 1
	case len(d.failed) > 0:
		fmt.Fprintf(stdout, "\ndemo: %d of %d checks FAILED\n", len(d.failed), d.passed+len(d.failed))
		for _, f := range d.failed {
			fmt.Fprintln(stdout, "  -", f)
		}
		return 1
	case !*clean:
		fmt.Fprintf(stdout, "demo: %d checks passed\n", d.passed)
	}
	return 0
}

type demo struct {
	out    io.Writer
	lab    lab.Options
	start  time.Time
	passed int
	failed []string
}

// check counts one check.
func (d *demo) check(what string, err error) {
	if err != nil {
		d.failed = append(d.failed, fmt.Sprintf("%s: %v", what, err))
		return
	}
	d.passed++
}

// step runs f and prints when it ended, how long it took and what it says.
func (d *demo) step(f func() (string, error)) error {
	start := time.Now()
	what, err := f()
	if err != nil {
		return err
	}
	fmt.Fprintf(d.out, "%7.2fs  %6.3fs  %s\n", time.Since(d.start).Seconds(), time.Since(start).Seconds(), what)
	return nil
}

const topology = `
                        underlay 172.17.0.0/16, fd00:172:17::/64
   ┌─────────────────────────┬─────────────────────────┬──────────────────────┐
   │ .2                      │ .4                      │ .3                   │ .200
 ┌─┴────────────────┐  ┌─────┴────────────┐  ┌─────────┴────────┐  ┌──────────┴──────┐
 │ master           │  │ agent1           │  │ agent2           │  │ outside         │
 │ coordinator      │  │ agent            │  │ agent            │  │ knows no overlay│
 │ agent, no bridges│  │                  │  │                  │  └─────────────────┘
 │ vtep1024         │  │ vtep1024         │  │ vtep1024         │
 └──────────────────┘  │ m-dcos   d-dcos  │  │ m-dcos   d-dcos  │   VXLAN 1024, UDP 64000,
                       │ m-dcos6  d-dcos6 │  │ m-dcos6  d-dcos6 │   between every two hosts
                       │ 8 containers     │  │ 4 containers     │
                       └──────────────────┘  └──────────────────┘

   done at     took  step
`

func (d *demo) show(ctx context.Context, configFile, stateFile string) (err error) {
	config, err := os.ReadFile(configFile)
	if err != nil {
		return fmt.Errorf("%w (the demo starts from the top of the tree; make demo does)", err)
	}
	want, err := os.ReadFile(stateFile)
	if err != nil {
		return err
	}
	fmt.Fprint(d.out, topology)
	var s *lab.Seed
	err = d.step(func() (string, error) {
		s, err = lab.NewSeed(ctx, d.lab, string(config))
		return "made the underlay and four machines, as network namespaces", err
	})
	if err != nil {
		return err
	}
	defer func() {
		if ctx.Err() == nil && (err != nil || len(d.failed) > 0) {
			s.Logs(d.out, 15)
		}
		err = errors.Join(err, d.remove(s))
	}()

	if err := d.up(ctx, s); err != nil {
		return err
	}
	if err := d.state(ctx, s, want); err != nil {
		return err
	}
	if err := d.attach(ctx, s); err != nil {
		return err
	}
	if err := d.traffic(ctx, s); err != nil {
		return err
	}
	if d.lab.Keep {
		d.lookAround(s)
		return nil
	}
	return d.down(ctx, s)
}

// up starts coordinator and agents in the order of the seed's state.
func (d *demo) up(ctx context.Context, s *lab.Seed) error {
	err := d.step(func() (string, error) {
		err := s.StartCoordinator(ctx)
		if s.Second != nil {
			return "two coordinators ready, on the master and on agent1, with their leases in etcd", err
		}
		return "coordinator ready on the master", err
	})
	if err != nil {
		return err
	}
	for _, h := range s.Hosts() {
		err := d.step(func() (string, error) {
			if err := s.StartAgent(h); err != nil {
				return "", err
			}
			err := h.WaitRegistered(ctx, s.Coordinator)
			return fmt.Sprintf("agent %s has leased its subnets and set them up; it joined with a token", h.IP), err
		})
		if err != nil {
			return err
		}
	}
	return d.step(func() (string, error) { return "every host knows the way to every other", s.WaitMesh(ctx) })
}

func (d *demo) state(ctx context.Context, s *lab.Seed, want []byte) error {
	got, err := s.Coordinator.Get(ctx, "/overlay-master/state")
	if err != nil {
		return err
	}
	diff := lab.DiffState(got, want)
	if diff != "" {
		err = fmt.Errorf("not the expected one (-want +got):\n%s", diff)
	}
	d.check("state JSON", err)
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, got, "  ", "  "); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "\n  GET %s/overlay-master/state\n  %s\n\n", s.Coordinator.URL, bytes.TrimSpace(pretty.Bytes()))
	return nil
}

// attach runs the CNI programs: one step per container.
func (d *demo) attach(ctx context.Context, s *lab.Seed) error {
	for _, p := range lab.Placements() {
		err := d.step(func() (string, error) {
			c, err := s.Place(ctx, p)
			d.check("attach "+p.Name, err)
			if err != nil {
				return "", err
			}
			how := "m-overlay, called as Mesos does"
			if p.Half == lab.Docker {
				how = "d-overlay, called by cnitool"
			}
			return fmt.Sprintf("%-16s has %-24s (%s)", c.Short, c.Addrs[0], how), nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) traffic(ctx context.Context, s *lab.Seed) error {
	pairs, err := s.Pairs()
	if err != nil {
		return err
	}
	var results []lab.Result
	err = d.step(func() (string, error) {
		results = lab.CheckPairs(ctx, pairs)
		return fmt.Sprintf("%d pairs: 3 pings each, then %d KiB over TCP there and back, compared", len(pairs), results[0].Bytes>>10), ctx.Err()
	})
	if err != nil {
		return err
	}
	for _, r := range results {
		d.check(fmt.Sprintf("%s %s -> %s %s (%s)", r.From.Name, r.From.Addr, r.To.Name, r.To.Addr, r.Kind), r.Err)
	}
	d.matrix("IPv4, overlay dcos", results, func(r lab.Result) bool { return r.To.Addr.Is4() })
	d.matrix("IPv6, overlay dcos6", results, func(r lab.Result) bool { return r.To.Addr.Is6() })
	d.kinds(results)
	return nil
}

// matrix prints the round trips from each endpoint (row) to each (column).
func (d *demo) matrix(title string, results []lab.Result, of func(lab.Result) bool) {
	var ends []lab.Endpoint // in the order they come
	from, to := map[string]bool{}, map[string]bool{}
	cell := map[[2]string]string{}
	for _, r := range results {
		if !of(r) {
			continue
		}
		for _, e := range []lab.Endpoint{r.From, r.To} {
			if !slices.Contains(ends, e) {
				ends = append(ends, e)
			}
		}
		from[r.From.Name], to[r.To.Name] = true, true
		text := fmt.Sprintf("%.3f", float64(r.RTT.Microseconds())/1000)
		if r.Err != nil {
			text = "FAILED"
		}
		cell[[2]string{r.From.Name, r.To.Name}] = text
	}
	fmt.Fprintf(d.out, "\n  %s: round trip in ms from (row) to (column)\n\n", title)
	w := tabwriter.NewWriter(d.out, 0, 0, 2, ' ', 0)
	column := map[string]string{}
	head := "\t\t"
	for _, e := range ends {
		if to[e.Name] {
			column[e.Name] = fmt.Sprintf("[%d]", len(column)+1)
			head += "\t" + column[e.Name]
		}
	}
	fmt.Fprintln(w, head)
	for _, row := range ends {
		fmt.Fprintf(w, "  %s\t%s\t%s", column[row.Name], row.Name, row.Addr)
		for _, col := range ends {
			switch text, ok := cell[[2]string{row.Name, col.Name}]; {
			case !to[col.Name] || !from[row.Name]:
			case ok:
				fmt.Fprintf(w, "\t%s", text)
			default:
				fmt.Fprint(w, "\t-")
			}
		}
		fmt.Fprintln(w)
	}
	w.Flush()
}

// kinds prints one line per kind of pair.
func (d *demo) kinds(results []lab.Result) {
	var kinds []string
	by := map[string][]lab.Result{}
	for _, r := range results {
		if by[r.Kind] == nil {
			kinds = append(kinds, r.Kind)
		}
		by[r.Kind] = append(by[r.Kind], r)
	}
	fmt.Fprintln(d.out)
	w := tabwriter.NewWriter(d.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "  pairs\tpassed\tmedian round trip")
	for _, k := range kinds {
		var rtt []time.Duration
		for _, r := range by[k] {
			if r.Err == nil {
				rtt = append(rtt, r.RTT)
			}
		}
		median := "-"
		if slices.Sort(rtt); len(rtt) > 0 {
			median = fmt.Sprintf("%.3f ms", float64(rtt[len(rtt)/2].Microseconds())/1000)
		}
		fmt.Fprintf(w, "  %s\t%d of %d\t%s\n", k, len(rtt), len(by[k]), median)
	}
	w.Flush()
	fmt.Fprintln(d.out)
}

// down detaches the containers, checks that nothing of them stays, and stops
// the daemons.
func (d *demo) down(ctx context.Context, s *lab.Seed) error {
	err := d.step(func() (string, error) {
		for _, c := range s.Containers {
			d.check("detach "+c.Short, c.Del(ctx))
		}
		for _, h := range s.Agents {
			ports, err := h.BridgePorts(ctx)
			if err == nil && len(ports) > 0 {
				err = fmt.Errorf("left over: %s", strings.Join(ports, ", "))
			}
			d.check("ports of the bridges on "+h.Name, err)
		}
		return "detached the containers", ctx.Err()
	})
	if err != nil {
		return err
	}
	return d.step(func() (string, error) {
		for _, h := range s.Hosts() {
			d.check("stop the agent of "+h.Name, h.Proc.Stop())
		}
		d.check("stop the coordinator", s.Coordinator.Stop())
		if s.Second != nil {
			d.check("stop the second coordinator", s.Second.Stop())
		}
		return "stopped agents and coordinator", nil
	})
}

func (d *demo) lookAround(s *lab.Seed) {
	agent, c := s.Agents[0], s.Containers[0]
	fmt.Fprintf(d.out, `Everything is still up. Every machine and container is a network namespace:

  ip netns
  ip netns exec %[1]s ip -brief address
  ip netns exec %[1]s ip route
  ip netns exec %[2]s ip address
  ip netns exec %[2]s ping %[3]s

  ip netns exec %[1]s bin/overlayctl status --run-dir %[4]s
  ip netns exec %[1]s bin/overlayctl ipam --run-dir %[4]s
  bin/overlayctl agents --state-dir %[5]s/coordinator

State, address stores, CNI files and logs of every host are in %[5]s.
To remove everything: make demo CLEAN=1

`, agent.Name, c.Name, firstPeer(s), agent.RunDir, s.Dir)
}

// firstPeer is the address of a container of the first one's overlay on the
// other host.
func firstPeer(s *lab.Seed) string {
	for _, c := range s.Containers {
		if c.Overlay == s.Containers[0].Overlay && c.Host != s.Containers[0].Host {
			return c.Addr().String()
		}
	}
	return ""
}

func (d *demo) clean(ctx context.Context) error {
	names, err := lab.Kept()
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := lab.Remove(ctx, name); err != nil {
			return err
		}
		fmt.Fprintln(d.out, "removed", name)
	}
	if len(names) == 0 {
		fmt.Fprintln(d.out, "nothing to remove")
	}
	return nil
}

// remove takes the lab down, unless it is to stay, and looks whether all of it
// has gone.
func (d *demo) remove(s *lab.Seed) error {
	if d.lab.Keep {
		return s.Close()
	}
	return d.step(func() (string, error) {
		if err := s.Close(); err != nil {
			return "", err
		}
		left, err := filepath.Glob("/run/netns/" + s.Name + "-*")
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("still there: %s", strings.Join(left, " "))
		}
		return "removed everything\n", err
	})
}
