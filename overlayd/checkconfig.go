package main

import (
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/clusterfile"
	"overlayd.internal/overlay/overlayd/internal/allocate"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

func checkConfigCommand() *cobra.Command {
	return &cobra.Command{
		Use: "check-config FILE", Short: "say what a cluster configuration would do, or what is wrong with it",
		Example: "  overlayd check-config /etc/overlay/overlay.yaml",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return cli.Usagef("want one argument, the file with the cluster configuration")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			network, notes, problems, err := clusterfile.LoadFileNotes(args[0])
			if err != nil {
				return cli.Usage(err)
			}
			if err := cli.Problems(args[0], problems); err != nil {
				return err
			}
			if err := report(cmd.OutOrStdout(), network); err != nil {
				return err
			}
			for _, note := range notes {
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), note); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// pool is one range that every agent takes a part of.
type pool struct {
	path   string // in the configuration
	agents uint64
	// overlay is the one whose subnets these are; empty: VTEP addresses,
	// without which an agent cannot join at all.
	overlay string
}

// report says what a valid configuration would do.
func report(w io.Writer, n conf.Network) error {
	var pools []pool
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)

	fmt.Fprintln(t, "VTEP RANGE\tAGENTS\tFIRST ADDRESS\tFIRST MAC")
	for _, v := range []struct {
		path   string
		subnet netip.Prefix
	}{{"vtep_subnet", n.VTEPSubnet}, {"vtep_subnet6", n.VTEPPool6()}} {
		if !v.subnet.IsValid() {
			continue
		}
		free := allocate.NewAddrs(v.subnet)
		pools = append(pools, pool{v.path, free.Total(), ""})
		first, _ := free.Next()
		mac := ""
		if v.subnet.Addr().Is4() || !n.VTEPSubnet.IsValid() {
			mac = "\t" + conf.VTEPMAC(n.OUI(), first.Addr()).String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s%s\n", v.subnet, count(free.Total()), first.Addr(), mac)
	}
	if err := t.Flush(); err != nil {
		return err
	}

	fmt.Fprintln(t, "\nOVERLAY\tRANGE\tAGENT SUBNET\tAGENTS\tCONTAINERS PER HALF\tNOTE")
	for i, o := range n.Overlays {
		for _, f := range []struct {
			key    string
			subnet netip.Prefix
			bits   int
		}{{"subnet", o.Subnet, o.Prefix}, {"subnet6", o.Subnet6, o.Prefix6}} {
			if !f.subnet.IsValid() {
				continue
			}
			free := allocate.NewSubnets(f.subnet, f.bits)
			if o.IsEnabled() {
				pools = append(pools, pool{fmt.Sprintf("overlays[%d].%s", i, f.key), free.Total(), o.Name})
			}
			first, _ := free.Next()
			half := o.Part(conf.Mesos, first)
			fmt.Fprintf(t, "%s\t%s\t/%d\t%s\t%s\t%s\n", o.Name, f.subnet, f.bits,
				count(free.Total()), count(conf.Capacity(half)), note(o, half))
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\n%s\n%s\n", mtu(n), limit(pools))
	return err
}

func note(o conf.Overlay, half netip.Prefix) string {
	var notes []string
	switch {
	case !o.IsEnabled():
		notes = append(notes, "disabled: no new leases")
	case o.Isolation.Mode() == conf.IsolationNone:
		notes = append(notes, "not isolated")
	case o.Isolation.Mode() == conf.IsolationStrict:
		notes = append(notes, "strictly isolated")
	case o.Isolation != "":
		notes = append(notes, "isolated from other overlays")
	}
	if o.Shared() {
		notes = append(notes, "one pool for both halves")
	}
	if conf.Capacity(half) < conf.Containers(half) {
		notes = append(notes, fmt.Sprintf("a bridge has %s ports", count(conf.BridgePorts)))
	}
	if notes == nil {
		return "-"
	}
	return strings.Join(notes, "; ")
}

func mtu(n conf.Network) string {
	if n.VTEPMTU == 0 {
		return "MTU: each host's own network decides."
	}
	return fmt.Sprintf("MTU: %d on every host.", n.VTEPMTU)
}

// limit says which pool is exhausted first, and what happens then.
func limit(pools []pool) string {
	least := pools[0]
	for _, p := range pools[1:] {
		if p.agents < least.agents {
			least = p
		}
	}
	if least.overlay == "" {
		return fmt.Sprintf("Limit: %s agents, by %s; no more can join.", count(least.agents), least.path)
	}
	return fmt.Sprintf("Limit: %s agents, by %s; those after join without a subnet of %s.", count(least.agents), least.path, least.overlay)
}

// count prints a number that people read.
func count(n uint64) string {
	if n >= 1e15 {
		return "> 10^15"
	}
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
