package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/api"
)

func (e *env) overlaysCommand() *cobra.Command {
	list := func(cmd *cobra.Command, _ []string) error { return e.runOverlays(cmd.Context()) }
	cmd := &cobra.Command{
		Use: "overlays", Short: "every overlay and how much of it is leased; plan and change the configuration of the cluster", Args: cobra.NoArgs, RunE: list,
	}
	cmd.AddCommand(
		&cobra.Command{Use: "list", Short: "every overlay, how much of it is leased, and what is left of one that is drained", Args: cobra.NoArgs, RunE: list},
		e.overlaysPlanCommand(), e.overlaysApplyCommand(), e.overlaysDrainCommand(), e.overlaysUndrainCommand(), e.overlaysRemoveCommand(),
	)
	return cmd
}

func (e *env) runOverlays(ctx context.Context) error {
	client, err := e.client(ctx)
	if err != nil {
		return err
	}
	overlays, err := client.Overlays(ctx)
	if err != nil {
		return err
	}
	if e.structured() {
		return e.print(overlays)
	}
	var rows [][]string
	differs := false
	for _, o := range overlays {
		differs = differs || o.FileDiffers != ""
		rows = append(rows, []string{o.Name, prefixes(o.Subnet, o.Subnet6), fmt.Sprint(o.Leases), pool(o.Pool), pool(o.Pool6), overlayNote(o)})
	}
	if err := e.printTable([]string{"OVERLAY", "SUBNET", "LEASES", "IPV4 POOL", "IPV6 POOL", "NOTE"}, rows); err != nil || !differs {
		return err
	}
	_, err = fmt.Fprint(e.stdout, "\nThe coordinator's configuration file differs from what is served: overlayctl overlays plan FILE shows how, overlayctl overlays apply FILE applies it.\n")
	return err
}

func pool(p *api.Pool) string {
	switch {
	case p == nil:
		return ""
	case p.Total >= 1<<62-2: // less the addresses that are not given out
		return fmt.Sprintf("%d of 2^62 or more", p.Used)
	}
	return fmt.Sprintf("%d of %d", p.Used, p.Total)
}

func overlayNote(o api.Overlay) string {
	var notes []string
	switch {
	case o.FileDiffers != "" && !o.Configured:
	case !o.Configured:
		notes = append(notes, "no longer configured; leases are kept and not served")
	case !o.IsEnabled():
		notes = append(notes, "disabled; no new leases")
	}
	if o.Draining {
		notes = append(notes, "drained; "+remaining(o))
	}
	if o.FileDiffers != "" {
		notes = append(notes, o.FileDiffers)
	}
	return strings.Join(notes, "; ")
}

// remaining says which hosts still have containers of an overlay.
func remaining(o api.Overlay) string {
	var hosts []string
	for _, h := range o.Hosts {
		what := fmt.Sprint(h.Containers)
		if h.Unknown {
			what = "unknown"
		}
		hosts = append(hosts, fmt.Sprintf("%s: %s", h.AgentIP, what))
	}
	if hosts == nil {
		return "no container is left"
	}
	return "containers left on " + strings.Join(hosts, ", ")
}
