package main

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/audit"
)

func (e *env) containersCommand() *cobra.Command {
	var f clusterFlags
	cmd := &cobra.Command{
		Use: "containers [--all] [TEXT]", Short: "the containers that are attached, of this host or of the cluster, with their addresses", Args: cobra.MaximumNArgs(1),
		Long: `The containers that are attached, with their addresses: those of this host, from its
files, or with --all, --host or --overlay those of the cluster, from the
coordinator. TEXT is looked for in all of the cluster: the beginning of an id or
of an address, a part of a name, or an overlay.`,
		Example: "  overlayctl containers -o wide\n  overlayctl containers --all 9.0.1.\n  overlayctl containers --host 10.0.0.4",
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.cluster() || len(args) > 0 {
				return e.clusterContainers(cmd.Context(), f, strings.Join(args, ""))
			}
			return e.runContainers(cmd.Context())
		},
	}
	f.declare(e, cmd)
	return cmd
}

// container is one attachment as people look for it.
type container struct {
	ID string `json:"id"`
	conf.Origin
	Overlay   string    `json:"overlay"`
	Half      conf.Half `json:"half"`
	Addresses []string  `json:"addresses"`
	IfName    string    `json:"ifname"`
	Network   string    `json:"network"`
	Interface string    `json:"interface,omitempty"` // its end on this host
	Agent     string    `json:"agent"`
	Since     time.Time `json:"since"`
}

func (e *env) runContainers(ctx context.Context) error {
	h, err := audit.Read(ctx, e.runDir)
	if err != nil {
		return err
	}
	booted := time.Now().Add(-conf.Boottime())
	list := []container{}
	for overlay, s := range h.Stores {
		for _, r := range s.Records {
			c := container{ID: r.ContainerID, Origin: r.Origin, Overlay: overlay, Half: r.Half, IfName: r.IfName, Network: r.Network,
				Interface: hostEnd(h.Links, r), Agent: h.State.AgentID, Since: booted.Add(r.Since).Truncate(time.Second)}
			if r.IsDocker() {
				c.Runtime = conf.RuntimeDocker
			}
			for _, a := range r.Addrs {
				c.Addresses = append(c.Addresses, a.String())
			}
			list = append(list, c)
		}
	}
	slices.SortFunc(list, func(a, b container) int {
		return cmp.Or(a.Since.Compare(b.Since), strings.Compare(a.ID, b.ID), strings.Compare(a.IfName, b.IfName))
	})
	return errors.Join(e.printContainers(list), unreadable(h))
}

func (e *env) printContainers(list []container) error {
	if e.structured() {
		return e.print(list)
	}
	titles := []string{"CONTAINER", "NAME", "OVERLAY", "HALF", "ADDRESSES", "SINCE"}
	if e.output == outputWide {
		titles = append(titles, "RUNTIME", "IFNAME", "NETWORK", "INTERFACE", "AGENT")
	}
	var rows [][]string
	for _, c := range list {
		row := []string{c.ID, c.Name, c.Overlay, string(c.Half), strings.Join(c.Addresses, " "), c.Since.Format(time.DateTime)}
		if e.output == outputWide {
			row = append(row, c.Runtime, c.IfName, c.Network, c.Interface, c.Agent)
		}
		rows = append(rows, row)
	}
	return e.printTable(titles, rows)
}
