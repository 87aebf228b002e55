package main

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/audit"
	"overlayd.internal/overlay/overlayd/internal/audit/ping"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

// mostProbes bounds how many probes one ping sends to each host.
const mostProbes = 1000

func (e *env) pingCommand() *cobra.Command {
	var all bool
	count, wait := 5, time.Second
	cmd := &cobra.Command{
		Use: "ping [HOST|ADDRESS...] [--all] [flags]", Short: "loss, round trip and path MTU from this host to others, through the overlay",
		Long: `Loss, round trip and path MTU from this host to others, through the overlay.

A HOST is an agent id, the beginning of one, an agent IP or a VTEP address; its
VTEP is probed. An ADDRESS is one of an overlay, as of a container on another
host. --all is every other host that this host's agent knows. The path MTU is the
largest packet that goes there and back without being fragmented; it should be
the MTU of this host's overlay devices.

These are the ways from this host. For those between other hosts run it there.
The exit code is 0 if nothing was lost and every path carries full packets.`,
		Example: "  overlayctl ping --all\n  overlayctl ping 10.10.0.117 9.0.2.130 --count 20\n  overlayctl ping --all -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case all == (len(args) > 0):
				return cli.Usagef("name hosts or addresses, or --all")
			case count < 1 || count > mostProbes:
				return cli.Usagef("--count %d: want 1 to %d", count, mostProbes)
			case wait < 10*time.Millisecond || wait > time.Minute:
				return cli.Usagef("--wait %s: want 10ms to 1m", wait)
			}
			return e.runPing(cmd, args, ping.Options{Count: count, Wait: wait})
		},
	}
	fs := cmd.Flags()
	fs.BoolVar(&all, "all", false, "every other host that this host's agent knows")
	fs.IntVar(&count, "count", count, "probes to each, for loss and round trip")
	fs.DurationVar(&wait, "wait", wait, "how long an answer is waited for")
	return cmd
}

func (e *env) runPing(cmd *cobra.Command, names []string, o ping.Options) error {
	state, err := askAgent(cmd.Context(), e.runDir)
	if err != nil {
		if state, _ = lastPublished(e.runDir); len(state.Overlays) == 0 { // the way may be there without an agent
			return err
		}
	}
	peers, err := audit.StoredPeers(cmp.Or(state.Directories.State, e.agentStateDir()))
	if err != nil {
		return err
	}
	targets, err := pingTargets(peers, names)
	if err != nil {
		return err
	}
	o.From, o.MTU = state.IP, state.MTU
	if len(state.Overlays) > 0 {
		o.Source = state.Overlays[0].Backend.VXLAN.VTEPIP.Addr()
	}
	if terminal(e.stderr) {
		o.Progress = func(done, all int) {
			fmt.Fprintf(e.stderr, "\rmeasured %d of %d", done, all)
			if done == all {
				fmt.Fprint(e.stderr, "\r\x1b[K")
			}
		}
	}
	results, err := ping.Run(cmd.Context(), o, targets)
	if err != nil {
		return err
	}
	if err := e.printPing(results); err != nil {
		return err
	}
	if slices.ContainsFunc(results, func(r ping.Result) bool { return !r.Whole() }) {
		return cli.ErrReported
	}
	return nil
}

// pingTargets are the VTEPs of all peers, or what the names stand for.
func pingTargets(peers []conf.Peer, names []string) ([]ping.Target, error) {
	slices.SortFunc(peers, func(a, b conf.Peer) int { return a.VTEPIP.Compare(b.VTEPIP) })
	targets := []ping.Target{}
	if len(names) == 0 {
		for _, p := range peers {
			targets = append(targets, ping.Target{Address: p.VTEPIP, AgentIP: p.AgentIP, AgentID: p.AgentID})
		}
		return targets, nil
	}
	for _, name := range names {
		t, err := pingTarget(peers, name)
		if err != nil {
			return nil, err
		}
		targets = append(targets, t)
	}
	return targets, nil
}

func pingTarget(peers []conf.Peer, name string) (ping.Target, error) {
	if a, err := netip.ParseAddr(name); err == nil {
		for _, p := range peers {
			t := ping.Target{Address: p.VTEPIP, AgentIP: p.AgentIP, AgentID: p.AgentID}
			switch {
			case a == p.AgentIP, a == p.VTEPIP:
				return t, nil
			case a == p.VTEPIP6 || slices.ContainsFunc(p.Subnets, func(s netip.Prefix) bool { return s.Contains(a) }):
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
	return ping.Target{Address: peers[i].VTEPIP, AgentIP: peers[i].AgentIP, AgentID: peers[i].AgentID}, nil
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
		row := []string{r.From.String(), r.To.String(), r.Address.String(), fmt.Sprintf("%.0f%%", r.Loss), trip, mtu, pingNote(r)}
		if e.output == outputWide {
			row = append(row, fmt.Sprint(r.Sent), fmt.Sprint(r.Received), r.AgentID)
		}
		rows = append(rows, row)
	}
	return e.printTable(titles, rows)
}

func pingNote(r ping.Result) string {
	switch {
	case r.Received == 0:
		return "no answer; overlayctl doctor on both hosts"
	case r.PathMTU < r.MTU:
		return fmt.Sprintf("packets of %d do not arrive; set vtep_mtu to %d", r.MTU, r.PathMTU)
	}
	return ""
}
