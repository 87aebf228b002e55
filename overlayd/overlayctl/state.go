package main

import "context"

func stateCommand() command {
	return command{name: "state", summary: "the agents of the cluster and their overlays, as the coordinator serves them", run: runState}
}

func runState(ctx context.Context, e *env, args []string) error {
	if err := noArgs(args); err != nil {
		return err
	}
	client, err := e.client(ctx)
	if err != nil {
		return err
	}
	state, err := client.State(ctx)
	if err != nil {
		return err
	}
	if e.output == "json" {
		return e.printJSON(state)
	}
	var rows [][]string
	for _, a := range state.Agents {
		for _, o := range a.Overlays {
			rows = append(rows, []string{a.IP.String(), o.Info.Name, prefixes(o.Subnet, o.Subnet6),
				prefixes(o.Backend.VXLAN.VTEPIP, o.Backend.VXLAN.VTEPIP6), o.Backend.VXLAN.VTEPMAC.String(), statusText(o.State)})
		}
		if len(a.Overlays) == 0 {
			rows = append(rows, []string{a.IP.String(), "", "", "", "", ""})
		}
	}
	return e.printTable([]string{"AGENT IP", "OVERLAY", "AGENT SUBNET", "VTEP", "VTEP MAC", "STATUS"}, rows)
}
