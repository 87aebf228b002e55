package main

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

func (e *env) agentsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "agents", Short: "every agent that has a lease, and whether it is connected", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return e.runAgents(cmd.Context()) },
	}
	cmd.AddCommand(&cobra.Command{
		Use: "revoke AGENT...", Short: "refuse the certificates of agents from now on, and close their connections", Args: cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeAgents,
		Long: `Refuse the certificates of agents, named by id or address, from now on, and close
their connections.

Their leases stay, and containers go on talking. To let such a host in again,
make a token for it: overlayctl token create.`,
		RunE: func(cmd *cobra.Command, ids []string) error {
			client, err := e.operator(cmd.Context())
			if err != nil {
				return err
			}
			names := slices.DeleteFunc(slices.Clone(ids), func(name string) bool { // which the coordinator refuses itself
				_, err := netip.ParseAddr(name)
				return err == nil
			})
			if err := e.noteUnknown(cmd.Context(), client, names, "a certificate of this id is refused from now on, if there is one"); err != nil {
				return err
			}
			return client.AgentsRevoke(cmd.Context(), ids)
		},
	})
	cmd.AddCommand(e.agentsRemoveCommand(), e.agentsPruneCommand())
	return cmd
}

func (e *env) agentsRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use: "remove AGENT...", Short: "give back the leases of agents, named by id or address", Args: cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeAgents,
		Long: `Give back the leases of agents, named by id or address.

Their subnets are free for other hosts at once, so their containers have to be
gone. An agent that still runs registers again and gets a new lease.`,
		RunE: func(cmd *cobra.Command, names []string) error {
			client, err := e.operator(cmd.Context())
			if err != nil {
				return err
			}
			if err := e.noteUnknown(cmd.Context(), client, names, "there is nothing to give back"); err != nil {
				return err
			}
			_, err = client.Delete(cmd.Context(), names)
			return err
		},
	}
}

// noteUnknown says on standard error which names are those of no agent, and what comes
// of that: a mistyped one is not taken for done.
func (e *env) noteUnknown(ctx context.Context, client *api.Client, names []string, then string) error {
	agents, err := client.Agents(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		ip, err := netip.ParseAddr(name) // or it is an id
		ip = ip.Unmap()
		if !slices.ContainsFunc(agents, func(a api.Agent) bool {
			return a.AgentID == name || err == nil && (a.AgentIP == ip || a.SecondIP == ip)
		}) {
			fmt.Fprintf(e.stderr, "no agent has a lease under %q: %s; overlayctl agents lists them\n", name, then)
		}
	}
	return nil
}

func (e *env) agentsPruneCommand() *cobra.Command {
	var absence time.Duration
	var dryRun bool
	cmd := &cobra.Command{
		Use: "prune [--not-seen DURATION] [--dry-run]", Short: "give back the leases of agents that were superseded or are long gone", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := e.operator(cmd.Context())
			if err != nil {
				return err
			}
			gone, err := client.Prune(cmd.Context(), api.PruneRequest{NotSeenSeconds: int64(absence / time.Second), DryRun: dryRun})
			if err != nil {
				return err
			}
			if e.structured() {
				return e.print(gone)
			}
			for _, a := range gone {
				fmt.Fprintf(e.stdout, "%s at %s, last seen %s\n", a.AgentID, a.AgentIP, lastSeen(a))
			}
			_, err = fmt.Fprintf(e.stdout, "%d leases %s\n", len(gone), map[bool]string{true: "would be given back", false: "given back"}[dryRun])
			return err
		},
	}
	cmd.Flags().DurationVar(&absence, "not-seen", 30*24*time.Hour, "how long an agent has to be gone")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only list them")
	return cmd
}

func (e *env) runAgents(ctx context.Context) error {
	client, err := e.client(ctx)
	if err != nil {
		return err
	}
	agents, err := client.Agents(ctx)
	if err != nil {
		return err
	}
	if e.structured() {
		return e.print(agents)
	}
	var rows [][]string
	for _, a := range agents {
		rows = append(rows, []string{a.AgentID, agentIPs(a), vtepOf(a.VTEP), halves(a.Bridges),
			fmt.Sprint(a.Epoch), lastSeen(a), a.Version, agentStatus(a)})
	}
	return e.printTable([]string{"AGENT", "AGENT IP", "VTEP", "BRIDGES", "EPOCH", "LAST SEEN", "VERSION", "STATUS"}, rows)
}

// vtepOf is the address of a VTEP: that of IPv4 where it has one.
func vtepOf(v conf.VTEP) string {
	if v.IP.IsValid() {
		return v.IP.Addr().String()
	}
	return v.IP6.Addr().String()
}

// agentIPs are the addresses that an agent's host is reached at.
func agentIPs(a api.Agent) string {
	if a.SecondIP.IsValid() {
		return a.AgentIP.String() + " " + a.SecondIP.String()
	}
	return a.AgentIP.String()
}

// lastSeen says how long ago an agent was heard of.
func lastSeen(a api.Agent) string {
	switch {
	case a.Connected:
		return "connected"
	case a.LastSeen.IsZero():
		return "never"
	}
	return shortAge(time.Since(a.LastSeen)) + " ago"
}

// shortAge is a duration in its two largest units.
func shortAge(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// agentStatus sums up an agent: what is wrong, or ok.
func agentStatus(a api.Agent) string {
	if a.Superseded != "" {
		return "superseded by " + a.Superseded
	}
	if a.Gone {
		return "gone; overlayctl agents prune gives its lease back"
	}
	var bad []string
	for _, g := range a.Grants {
		if g.Error != "" {
			bad = append(bad, g.Error)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(a.Status)) {
		if s := a.Status[name]; s.Status != conf.StatusOK {
			bad = append(bad, name+" "+statusText(&s))
		}
	}
	switch {
	case len(bad) > 0:
		return strings.Join(bad, "; ")
	case len(a.Status) == 0:
		return "no report yet"
	}
	return "ok"
}
