package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

// clusterFlags ask for more than this host.
type clusterFlags struct {
	all           bool
	host, overlay string
}

func (f *clusterFlags) declare(e *env, cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.BoolVar(&f.all, "all", false, "of the whole cluster, as the coordinator knows it")
	fs.StringVar(&f.host, "host", "", "of one host, by agent id or agent IP, as the coordinator knows it")
	fs.StringVar(&f.overlay, "overlay", "", "of one overlay, as the coordinator knows it")
	_ = cmd.RegisterFlagCompletionFunc("host", e.completeAgents) // the flag was declared above
	_ = cmd.RegisterFlagCompletionFunc("overlay", e.completeOverlays)
}

// cluster reports whether the coordinator is to be asked.
func (f *clusterFlags) cluster() bool { return f.all || f.host != "" || f.overlay != "" }

func (f *clusterFlags) query() url.Values {
	q := url.Values{}
	if f.host != "" {
		q.Set("agent", f.host)
	}
	if f.overlay != "" {
		q.Set("overlay", f.overlay)
	}
	return q
}

// known is the error of a host or an overlay that the cluster does not have. It is asked
// where nothing was found.
func (f *clusterFlags) known(ctx context.Context, client *api.Client) error {
	if f.host != "" {
		agents, err := client.Agents(ctx)
		if err != nil {
			return err
		}
		ip, _ := netip.ParseAddr(f.host) // or it is an id
		if !slices.ContainsFunc(agents, func(a api.Agent) bool { return a.AgentID == f.host || a.AgentIP == ip }) {
			return fmt.Errorf("--host: no host of the cluster has the agent id or the agent IP %q; overlayctl agents lists them", f.host)
		}
	}
	if f.overlay != "" {
		overlays, err := client.Overlays(ctx)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(overlays, func(o api.Overlay) bool { return o.Name == f.overlay }) {
			return fmt.Errorf("--overlay: the cluster has no overlay %q; overlayctl overlays lists them", f.overlay)
		}
	}
	return nil
}

// completionTimeout is how long somebody waits who presses the tab key.
const completionTimeout = 2 * time.Second

// complete makes a completion of what the coordinator knows.
func (e *env) complete(ctx context.Context, list func(context.Context, *api.Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	client, err := e.client(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names, _ := list(ctx, client) // nothing to complete with is no error
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (e *env) completeAgents(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return e.complete(cmd.Context(), func(ctx context.Context, c *api.Client) (out []string, err error) {
		agents, err := c.Agents(ctx)
		for _, a := range agents {
			out = append(out, a.AgentID+"\t"+a.AgentIP.String(), a.AgentIP.String()+"\t"+a.AgentID)
		}
		return out, err
	})
}

func (e *env) completeOverlays(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return e.complete(cmd.Context(), func(ctx context.Context, c *api.Client) (out []string, err error) {
		overlays, err := c.Overlays(ctx)
		for _, o := range overlays {
			out = append(out, o.Name)
		}
		return out, err
	})
}

// completeContainers completes with the containers of this host.
func (e *env) completeContainers(cmd *cobra.Command, args []string, _ string) (out []string, _ cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	state, _ := lastPublished(e.runDir) // it need not be there
	stores, _ := audit.ReadAttached(ctx, e.runDir, state)
	for overlay, s := range stores {
		for _, r := range s.Records {
			out = append(out, r.ContainerID+"\t"+overlay)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// pageSize is how many containers are asked for at a time.
const pageSize = 5000

// clusterContainers prints the containers of the cluster that match.
func (e *env) clusterContainers(ctx context.Context, f clusterFlags, text string) error {
	client, err := e.client(ctx)
	if err != nil {
		return err
	}
	query := f.query()
	query.Set("limit", fmt.Sprint(pageSize))
	if text != "" {
		query.Set("q", text)
	}
	all := api.Containers{Containers: []api.Container{}}
	for {
		page, err := client.Containers(ctx, query)
		if err != nil {
			return err
		}
		all.Total, all.Incomplete, all.Unreported = page.Total, page.Incomplete, page.Unreported
		all.Containers = append(all.Containers, page.Containers...)
		if page.Next == "" {
			break
		}
		query.Set("after", page.Next)
	}
	if len(all.Containers) == 0 {
		if err := f.known(ctx, client); err != nil {
			return err
		}
	}
	if e.structured() {
		return e.print(all)
	}
	titles := []string{"CONTAINER", "NAME", "OVERLAY", "HALF", "ADDRESSES", "HOST", "SINCE"}
	if e.output == outputWide {
		titles = append(titles, "RUNTIME", "IFNAME", "NETWORK", "AGENT")
	}
	var rows [][]string
	for _, c := range all.Containers {
		row := []string{c.ID, c.Name, c.Overlay, string(c.Half), addrs(c.Addresses), c.AgentIP.String(), c.Since.Local().Format(time.DateTime)}
		if e.output == outputWide {
			row = append(row, c.Runtime, c.IfName, c.Network, c.AgentID)
		} else {
			row[0] = shortID(c.ID)
		}
		rows = append(rows, row)
	}
	if err := e.printTable(titles, rows); err != nil {
		return err
	}
	e.warnIncomplete(all.Incomplete, all.Unreported)
	return nil
}

// shortID is what people type of an id.
func shortID(id string) string {
	if len(id) == 64 {
		return id[:12]
	}
	return id
}

func addrs(list []netip.Addr) string {
	var out []string
	for _, a := range list {
		out = append(out, a.String())
	}
	return strings.Join(out, " ")
}

// warnIncomplete says on standard error that a list may lack something.
func (e *env) warnIncomplete(coordinators []string, agents int) {
	for _, c := range coordinators {
		fmt.Fprintf(e.stderr, "incomplete: coordinator %s cannot be reached; what its agents report is missing, or old\n", printable(c))
	}
	if agents > 0 {
		fmt.Fprintf(e.stderr, "incomplete: %d connected agents have not reported yet; they do within 30 seconds, or are of an earlier version\n", agents)
	}
}

// clusterAddresses prints how full the halves of the cluster are.
func (e *env) clusterAddresses(ctx context.Context, f clusterFlags) error {
	client, err := e.client(ctx)
	if err != nil {
		return err
	}
	a, err := client.Addresses(ctx, f.query())
	if err == nil && len(a.Agents) == 0 {
		err = f.known(ctx, client)
	}
	if err != nil {
		return err
	}
	if e.structured() {
		return e.print(a)
	}
	numbers := func(c api.Count) []string {
		return []string{fmt.Sprint(c.Used), fmt.Sprint(c.Cooling), fmt.Sprint(c.Free), fmt.Sprint(c.Total), level(c.Level())}
	}
	titles := []string{"USED", "COOLING", "FREE", "TOTAL", "LEVEL"}
	var rows [][]string
	for _, o := range a.Overlays {
		rows = append(rows, append([]string{o.Overlay, string(o.Half)}, numbers(o.Count)...))
	}
	if err := e.printTable(append([]string{"OVERLAY", "HALF"}, titles...), rows); err != nil {
		return err
	}
	fmt.Fprintln(e.stdout)
	rows = nil
	for _, x := range a.Agents {
		if e.output != outputWide && f.host == "" && x.Level == api.LevelOK {
			continue // those that want attention, unless all are asked for
		}
		rows = append(rows, append([]string{x.AgentIP.String(), x.Overlay, string(x.Half), prefixes(x.Subnet, x.Subnet6)}, append(numbers(x.Count), x.AgentID)...))
	}
	if len(rows) > 0 {
		if err := e.printTable(slices.Concat([]string{"HOST", "OVERLAY", "HALF", "SUBNET"}, titles, []string{"AGENT"}), rows); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(e.stdout, "no half of any host is nearly full; -o wide lists all %d\n", len(a.Agents))
	}
	e.warnIncomplete(a.Incomplete, a.Unreported)
	return nil
}

// level is a level as it stands in a table.
func level(l api.Level) string {
	switch l {
	case api.LevelWarning:
		return "NEARLY FULL"
	case api.LevelFull:
		return "FULL"
	}
	return "ok"
}

func (e *env) eventsCommand() *cobra.Command {
	follow := false
	var after int64
	cmd := &cobra.Command{
		Use: "events [--follow]", Short: "what happened in the cluster lately: agents, containers, addresses that run out, problems", Args: cobra.NoArgs,
		Long: `What happened in the cluster lately: agents, containers, addresses that run out,
problems. The coordinator remembers the last thousand since it was started.`,
		Example: "  overlayctl events --follow\n  overlayctl events -o json | jq 'select(.kind == \"container_attached\")'",
		RunE:    func(cmd *cobra.Command, _ []string) error { return e.runEvents(cmd.Context(), follow, after) },
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with those to come, until interrupted")
	cmd.Flags().Int64Var(&after, "after", 0, "begin after the event of this id")
	return cmd
}

func (e *env) runEvents(ctx context.Context, follow bool, after int64) error {
	client, err := e.client(ctx)
	if err != nil {
		return err
	}
	for {
		err := client.Events(ctx, after, follow, func(ev api.Event) error {
			after = ev.ID
			return e.printEvent(ev)
		})
		var refused *api.Error
		switch {
		case ctx.Err() != nil && follow, err == nil && !follow:
			return nil
		case !follow, errors.As(err, &refused):
			return err
		}
		fmt.Fprintln(e.stderr, cli.Printable(err)) // it may be there again
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(watchEvery):
		}
	}
}

func (e *env) printEvent(ev api.Event) error {
	switch e.output {
	case outputJSON:
		return e.printLine(ev)
	case outputYAML:
		if _, err := fmt.Fprintln(e.stdout, "---"); err != nil {
			return err
		}
		return e.print(ev)
	}
	_, err := fmt.Fprintf(e.stdout, "%s  %-18s  %s\n", ev.Time.Local().Format(time.DateTime), ev.Kind, printable(ev.Text))
	return err
}
