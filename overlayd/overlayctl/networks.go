package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

func (e *env) overlaysPlanCommand() *cobra.Command {
	return &cobra.Command{
		Use: "plan FILE", Short: "say what a configuration would change, whom that concerns, and what forbids it", Args: cobra.ExactArgs(1),
		Long: `Say what a configuration would change, whom that concerns, and what forbids it.
Nothing is changed. The exit code is 0 if it can be applied, 1 if it is refused,
2 if it is no valid configuration.`,
		Example: "  overlayctl overlays plan /etc/overlay/overlay.yaml",
		RunE: func(cmd *cobra.Command, args []string) error {
			_, _, err := e.planFile(cmd.Context(), args[0], true)
			return err
		},
	}
}

func (e *env) overlaysApplyCommand() *cobra.Command {
	return &cobra.Command{
		Use: "apply FILE", Short: "make a configuration the cluster's, while traffic flows", Args: cobra.ExactArgs(1),
		Long: `Make a configuration the cluster's, while traffic flows. It is planned first, as
overlayctl overlays plan does, and not applied if something forbids it or if
somebody else changes the configuration meanwhile.

Every coordinator serves it from then on. Their files of --config stay as they
are: give them the same text.`,
		Example: "  overlayctl overlays apply /etc/overlay/overlay.yaml",
		RunE: func(cmd *cobra.Command, args []string) error {
			client, req, err := e.planFile(cmd.Context(), args[0], !e.structured())
			if err != nil {
				return err
			}
			plan, err := client.OverlaysApply(cmd.Context(), req)
			if err != nil {
				return badConfig(args[0], err)
			}
			return e.applied(plan)
		},
	}
}

// planFile plans a file and shows the plan, where it is wanted or refused. The request
// that it returns applies what was planned.
func (e *env) planFile(ctx context.Context, path string, show bool) (*api.Client, api.ConfigRequest, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, api.ConfigRequest{}, cli.Usage(err)
	}
	client, err := e.operator(ctx)
	if err != nil {
		return nil, api.ConfigRequest{}, err
	}
	req := api.ConfigRequest{Config: string(text)}
	plan, err := client.OverlaysPlan(ctx, req)
	if err != nil {
		return nil, req, badConfig(path, err)
	}
	req.Revision = plan.Revision
	if show || plan.Refused != nil {
		if err := e.printPlan(plan); err != nil {
			return nil, req, err
		}
	}
	if plan.Refused != nil {
		return nil, req, cli.ErrReported
	}
	return client, req, nil
}

// badConfig makes a mistake in the file of what the coordinator says of it.
func badConfig(path string, err error) error {
	var refusal *api.Error
	if !errors.As(err, &refusal) || refusal.Kind != api.KindBadConfig {
		return err
	}
	var problems []conf.Problem
	for _, p := range refusal.Problems {
		problems = append(problems, conf.Problem{Text: p})
	}
	return cli.Problems(path, problems)
}

func (e *env) overlaysDrainCommand() *cobra.Command {
	return &cobra.Command{
		Use: "drain NAME", Short: "attach nothing new to an overlay on any host; containers that are go on", Args: cobra.ExactArgs(1),
		RunE: e.overlayChange(func(ctx context.Context, c *api.Client, name string) (api.NetworkPlan, error) {
			return c.OverlayDrain(ctx, name, false)
		}),
	}
}

func (e *env) overlaysUndrainCommand() *cobra.Command {
	return &cobra.Command{
		Use: "undrain NAME", Short: "have containers attached to an overlay again", Args: cobra.ExactArgs(1),
		RunE: e.overlayChange(func(ctx context.Context, c *api.Client, name string) (api.NetworkPlan, error) {
			return c.OverlayDrain(ctx, name, true)
		}),
	}
}

func (e *env) overlaysRemoveCommand() *cobra.Command {
	force := false
	cmd := &cobra.Command{
		Use: "remove NAME [--force]", Short: "take an overlay off all hosts", Args: cobra.ExactArgs(1),
		Long: `Take an overlay off all hosts: bridges, routes, rules, files of the runtimes and
networks of Docker. It is refused while containers are attached. Its leases are
kept, and come back when an overlay of this name and range is configured again.

Take it out of the coordinators' files of --config as well: a file that still has
it brings it back when it is applied next.`,
		RunE: e.overlayChange(func(ctx context.Context, c *api.Client, name string) (api.NetworkPlan, error) {
			return c.OverlayRemove(ctx, api.OverlayRequest{Name: name, Force: force})
		}),
	}
	cmd.Flags().BoolVar(&force, "force", false, "also while containers are attached; they lose the network")
	return cmd
}

// overlayChange runs a change of one overlay.
func (e *env) overlayChange(change func(context.Context, *api.Client, string) (api.NetworkPlan, error)) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		client, err := e.operator(cmd.Context())
		if err != nil {
			return err
		}
		plan, err := change(cmd.Context(), client, args[0])
		if err != nil {
			return err
		}
		if !e.structured() {
			if err := e.printPlan(plan); err != nil {
				return err
			}
		}
		return e.applied(plan)
	}
}

// applied says that a plan was carried out.
func (e *env) applied(p api.NetworkPlan) error {
	if e.structured() {
		return e.print(p)
	}
	text := "nothing to change\n"
	if p.Applied {
		text = fmt.Sprintf("applied, as revision %d\n", p.Revision)
	}
	_, err := fmt.Fprint(e.stdout, text)
	return err
}

func (e *env) printPlan(p api.NetworkPlan) error {
	if e.structured() {
		return e.print(p)
	}
	if len(p.Changes) == 0 {
		_, err := fmt.Fprintln(e.stdout, "The configuration is what is served already.")
		return err
	}
	var rows [][]string
	for _, c := range p.Changes {
		rows = append(rows, []string{c.Overlay, c.What, fmt.Sprint(c.Hosts), fmt.Sprint(c.Containers), c.Effect})
	}
	if err := e.printTable([]string{"OVERLAY", "CHANGE", "HOSTS", "CONTAINERS", "EFFECT"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, c := range p.Capacity {
		rows = append(rows, []string{c.Overlay, c.Key, capacity(c.From), capacity(c.To)})
	}
	fmt.Fprintln(e.stdout)
	if err := e.printTable([]string{"OVERLAY", "POOL", "BEFORE", "AFTER"}, rows); err != nil {
		return err
	}
	var b strings.Builder
	for _, o := range p.Overlaps {
		fmt.Fprintf(&b, "\nOverlap: %s of %s, and host %s (agent %s) has a route of its own to %s", o.Range, cmp.Or(o.Overlay, "the VTEPs"), o.AgentIP, o.AgentID, o.Route)
	}
	for _, note := range p.Notes {
		b.WriteString("\nNote: " + note)
	}
	for _, why := range p.Refused {
		b.WriteString("\nRefused: " + why)
	}
	if b.Len() > 0 {
		b.WriteByte('\n')
	}
	_, err := fmt.Fprint(e.stdout, b.String())
	return err
}

func capacity(c *api.Capacity) string {
	if c == nil {
		return ""
	}
	s := fmt.Sprintf("%s, %s", c.Range, pool(&c.Pool))
	switch {
	case c.Shared:
		s += fmt.Sprintf(", %d containers per agent", c.PerHalf)
	case c.PerHalf > 0:
		s += fmt.Sprintf(", %d containers per half", c.PerHalf)
	}
	return s
}
