package main

import (
	"context"

	"github.com/spf13/cobra"
)

func (e *env) stateCommand() *cobra.Command {
	return &cobra.Command{
		Use: "state", Short: "the agents of the cluster and their overlays, as the coordinator serves them", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return e.runState(cmd.Context()) },
	}
}

func (e *env) runState(ctx context.Context) error {
	client, err := e.client(ctx)
	if err != nil {
		return err
	}
	state, err := client.State(ctx)
	if err != nil {
		return err
	}
	if e.structured() {
		return e.print(state)
	}
	var rows [][]string
	for _, a := range state.Agents {
		for _, o := range a.Overlays {
			rows = append(rows, []string{a.IP.String(), o.Info.Name, blockTexts(o.All()),
				prefixes(o.Backend.VXLAN.VTEPIP, o.Backend.VXLAN.VTEPIP6), o.Backend.VXLAN.VTEPMAC.String(), statusText(o.State)})
		}
		if len(a.Overlays) == 0 {
			rows = append(rows, []string{a.IP.String(), "", "", "", "", ""})
		}
	}
	return e.printTable([]string{"AGENT IP", "OVERLAY", "AGENT SUBNET", "VTEP", "VTEP MAC", "STATUS"}, rows)
}
