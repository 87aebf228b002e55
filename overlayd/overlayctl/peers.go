package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/audit"
)

func (e *env) peersCommand() *cobra.Command {
	return &cobra.Command{
		Use: "peers", Short: "the other hosts that this host's agent forwards to", Args: cobra.NoArgs,
		Long:    "The other hosts that this host's agent forwards to, from its state directory.",
		Example: "  overlayctl peers -o wide",
		RunE:    func(*cobra.Command, []string) error { return e.runPeers() },
	}
}

func (e *env) runPeers() error {
	peers, err := audit.StoredPeers(e.agentStateDir())
	if err != nil {
		return err
	}
	slices.SortFunc(peers, func(a, b conf.Peer) int { return a.VTEP().Compare(b.VTEP()) })
	if e.structured() {
		return e.print(append([]conf.Peer{}, peers...))
	}
	titles := []string{"AGENT IP", "VTEP", "SUBNETS"}
	if e.output == outputWide {
		titles = append(titles, "MTU", "TAKES", "VTEP MAC", "EPOCH", "AGENT")
	}
	var rows [][]string
	for _, p := range peers {
		var subnets []string
		for _, s := range p.Subnets {
			subnets = append(subnets, s.String())
		}
		mtu, takes := "", string(conf.RoutingVXLAN)
		if p.MTU != 0 {
			mtu = fmt.Sprint(p.MTU)
		}
		if p.Direct {
			takes = string(conf.RoutingDirect)
		}
		row := []string{p.AgentIP.String(), p.VTEP().String(), strings.Join(subnets, " ")}
		if e.output == outputWide {
			row = append(row, mtu, takes, p.VTEPMAC.String(), fmt.Sprint(p.Epoch), p.AgentID)
		}
		rows = append(rows, row)
	}
	return e.printTable(titles, rows)
}

// agentStateDir is the state directory that was given, else the one that the
// agent of this host has published, else the default.
func (e *env) agentStateDir() string {
	if e.stateDir != conf.DefaultStateDir {
		return e.stateDir
	}
	state, _ := lastPublished(e.runDir) // it need not be there
	return cmp.Or(state.Directories.State, e.stateDir)
}
