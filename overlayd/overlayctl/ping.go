package main

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit"
	"overlayd.internal/overlay/overlayd/internal/audit/ping"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

// mostProbes bounds how many probes one ping sends to each host.
const mostProbes = 1000

func (e *env) pingCommand() *cobra.Command {
	var all, here bool
	count, wait := 5, time.Second
	cmd := &cobra.Command{
		Use: "ping [HOST|ADDRESS...] [--all [--here]] [flags]", Short: "loss, round trip and path MTU between hosts, through the overlay",
		Long: `Loss, round trip and path MTU between hosts, through the overlay.

A HOST is an agent id, the beginning of one, an agent IP or a VTEP address; its
VTEP is probed, from this host. An ADDRESS is one of an overlay, as of a container
on another host. The path MTU is the largest packet that goes there and back without
being fragmented; it should be the MTU of the overlay devices of the host it is
measured from.

--all measures the ways from every host to every other one: the coordinator has the
agents do it, which an operator may ask for (overlayctl login, or root on a
coordinator's host). With --here, and where the coordinator cannot be asked, it is
the ways from this host alone. Without --wait, many hosts or probes make --all wait
for less than a second, so that it ends within a minute.

The exit code is 0 if every host has answered, nothing was lost and every path
carries full packets.`,
		Example: "  overlayctl ping --all\n  overlayctl ping 10.10.0.117 9.0.2.130 --count 20\n  overlayctl ping --all -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case all == (len(args) > 0):
				return cli.Usagef("name hosts or addresses, or --all")
			case here && !all:
				return cli.Usagef("--here goes with --all; hosts that are named are measured from this one anyway")
			case count < 1 || count > mostProbes:
				return cli.Usagef("--count %d: want 1 to %d", count, mostProbes)
			case wait < 10*time.Millisecond || wait > time.Minute:
				return cli.Usagef("--wait %s: want 10ms to 1m", wait)
			}
			o := ping.Options{Count: count, Wait: wait}
			if all && !here {
				return e.runMatrix(cmd.Context(), o, cmd.Flags().Changed("wait"))
			}
			return e.runPing(cmd.Context(), args, o)
		},
	}
	fs := cmd.Flags()
	fs.BoolVar(&all, "all", false, "from every host to every other one")
	fs.BoolVar(&here, "here", false, "with --all: from this host alone")
	fs.IntVar(&count, "count", count, "probes to each, for loss and round trip")
	fs.DurationVar(&wait, "wait", wait, "how long an answer is waited for")
	return cmd
}

func (e *env) runPing(ctx context.Context, names []string, o ping.Options) error {
	state, err := askAgent(ctx, e.runDir)
	if err != nil {
		if state, _ = lastPublished(e.runDir); len(state.Overlays) == 0 { // the way may be there without an agent
			return err
		}
	}
	peers, err := audit.StoredPeers(cmp.Or(state.Directories.State, e.agentStateDir()))
	if err != nil {
		return err
	}
	targets, err := pingTargets(state, peers, names)
	if err != nil {
		return err
	}
	o = ping.From(state, o.Count, o.Wait)
	o.Progress = e.progress("measured")
	results, err := ping.Run(ctx, o, targets)
	if err != nil {
		return err
	}
	if err := e.printPing(results); err != nil {
		return err
	}
	return wholeOr(results)
}

// wholeOr is nil if everything arrives that should.
func wholeOr(ways []api.Way) error {
	if slices.ContainsFunc(ways, func(w api.Way) bool { return !w.Whole() }) {
		return cli.ErrReported
	}
	return nil
}

// pingTargets are the VTEPs of all peers, or what the names stand for.
func pingTargets(state conf.State, peers []conf.Peer, names []string) ([]ping.Target, error) {
	slices.SortFunc(peers, func(a, b conf.Peer) int { return a.VTEP().Compare(b.VTEP()) })
	targets := []ping.Target{}
	if len(names) == 0 {
		for _, p := range peers {
			targets = append(targets, ping.TargetOf(state, p))
		}
		return targets, nil
	}
	for _, name := range names {
		t, err := pingTarget(state, peers, name)
		if err != nil {
			return nil, err
		}
		targets = append(targets, t)
	}
	return targets, nil
}

func pingTarget(state conf.State, peers []conf.Peer, name string) (ping.Target, error) {
	if a, err := netip.ParseAddr(name); err == nil {
		a = a.Unmap()
		for _, p := range peers {
			t := ping.TargetOf(state, p)
			switch {
			case a == p.AgentIP, a == t.Address:
				return t, nil
			case a == p.VTEPIP, a == p.VTEPIP6, slices.ContainsFunc(p.Subnets, func(s netip.Prefix) bool { return s.Contains(a) }):
				t.Address = a
				return t, nil
			}
		}
		return ping.Target{}, fmt.Errorf("%s is no other host's, nor in a subnet that one has; overlayctl peers lists them", a)
	}
	i := slices.IndexFunc(peers, func(p conf.Peer) bool { return p.AgentID == name })
	if i < 0 {
		var found []int
		for k, p := range peers {
			if len(name) > 0 && len(p.AgentID) > len(name) && p.AgentID[:len(name)] == name {
				found = append(found, k)
			}
		}
		if len(found) != 1 {
			return ping.Target{}, fmt.Errorf("%q is the id of %d other hosts; overlayctl peers -o wide lists them", name, len(found))
		}
		i = found[0]
	}
	return ping.TargetOf(state, peers[i]), nil
}

func (e *env) printPing(results []ping.Result) error {
	if e.structured() {
		return e.print(results)
	}
	titles := []string{"FROM", "TO", "ADDRESS", "LOSS", "ROUND TRIP MIN/AVG/MAX", "PATH MTU", "NOTE"}
	if e.output == outputWide {
		titles = append(titles, "SENT", "RECEIVED", "AGENT")
	}
	rows := [][]string{}
	for _, r := range results {
		trip, mtu := "", ""
		if r.Received > 0 {
			trip, mtu = fmt.Sprintf("%.3f/%.3f/%.3f ms", r.Min, r.Avg, r.Max), fmt.Sprint(r.PathMTU)
		}
		row := []string{r.From.String(), r.To.String(), known(r.Address), fmt.Sprintf("%.0f%%", r.Loss), trip, mtu, pingNote(r)}
		if e.output == outputWide {
			row = append(row, fmt.Sprint(r.Sent), fmt.Sprint(r.Received), r.AgentID)
		}
		rows = append(rows, row)
	}
	return e.printTable(titles, rows)
}

func pingNote(r ping.Result) string {
	switch {
	case r.Sent == 0:
		return "the host it is measured from does not know the other one; overlayctl peers there"
	case r.Received == 0:
		return "no answer; overlayctl doctor on both hosts"
	case r.PathMTU == 0:
		return "the time was up before the path MTU was found"
	case r.PathMTU < r.MTU:
		return fmt.Sprintf("packets of %d do not arrive; set vtep_mtu to %d", r.MTU, r.PathMTU)
	}
	return ""
}

// known is an address, or nothing.
func known(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}
