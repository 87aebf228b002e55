package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/api"
)

func (e *env) overlaysCommand() *cobra.Command {
	return &cobra.Command{
		Use: "overlays", Short: "every overlay and how much of it is leased", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return e.runOverlays(cmd.Context()) },
	}
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
	for _, o := range overlays {
		rows = append(rows, []string{o.Name, prefixes(o.Subnet, o.Subnet6), fmt.Sprint(o.Leases), pool(o.Pool), pool(o.Pool6), overlayNote(o)})
	}
	return e.printTable([]string{"OVERLAY", "SUBNET", "LEASES", "IPV4 POOL", "IPV6 POOL", "NOTE"}, rows)
}

func pool(p *api.Pool) string {
	switch {
	case p == nil:
		return ""
	case p.Total >= 1<<62:
		return fmt.Sprintf("%d of 2^62 or more", p.Used)
	}
	return fmt.Sprintf("%d of %d", p.Used, p.Total)
}

func overlayNote(o api.Overlay) string {
	switch {
	case !o.Configured:
		return "no longer configured; leases are kept and not served"
	case !o.IsEnabled():
		return "disabled; no new leases"
	}
	return ""
}
