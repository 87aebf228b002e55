package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/veth"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/audit"
	"overlayd.internal/overlay/overlayd/internal/audit/doctor"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

// ipamCommand has commands of its own; alone it is ipam show.
func (e *env) ipamCommand() *cobra.Command {
	asJSON := false
	do := func(f func(context.Context) error) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, _ []string) error {
			if asJSON {
				e.output = outputJSON
			}
			return f(cmd.Context())
		}
	}
	ipam := &cobra.Command{
		Use: "ipam", Short: "this host's container addresses", Args: cobra.NoArgs,
		RunE: do(e.listAddresses),
	}
	ipam.PersistentFlags().BoolVar(&asJSON, "json", false, "the same as -o json")
	var f clusterFlags
	show := &cobra.Command{
		Use: "show", Aliases: []string{"list"}, Short: "how many addresses are in use, and which container has which", Args: cobra.NoArgs,
		Long: `How many addresses are in use, and which container has which: on this host, or with
--all, --host or --overlay in the cluster. Of all hosts those are listed where
addresses run out; -o wide lists every one.`,
		RunE: do(func(ctx context.Context) error {
			if f.cluster() {
				return e.clusterAddresses(ctx, f)
			}
			return e.listAddresses(ctx)
		}),
	}
	f.declare(e, show)
	ipam.AddCommand(
		e.releaseCommand(),
		show,
		&cobra.Command{
			Use: "check", Short: "whether address stores, kernel and lease agree; exit code 1 if not", Args: cobra.NoArgs,
			RunE: do(e.checkAddresses),
		},
	)
	return ipam
}

func (e *env) releaseCommand() *cobra.Command {
	force := false
	cmd := &cobra.Command{
		Use: "release CONTAINER", Short: "give back the addresses of a container that is gone", Args: cobra.ExactArgs(1),
		Long: `Give back the addresses of a container of this host that is gone and whose runtime
has not said so. The agent does it by itself after a minute.`,
		Example:           "  overlayctl ipam release 3f2c8a11",
		ValidArgsFunction: e.completeContainers,
		RunE: func(cmd *cobra.Command, args []string) error {
			released, err := audit.Release(cmd.Context(), e.runDir, args[0], force)
			for _, a := range released {
				fmt.Fprintln(e.stdout, a)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also of one that is attached: it goes on with addresses that others get")
	return cmd
}

// checkAddresses prints a line for each difference. That there is one is an
// error, for scripts.
func (e *env) checkAddresses(ctx context.Context) error {
	differences, err := audit.Lasting(ctx, func() ([]audit.Difference, error) { return e.differences(ctx) })
	if err != nil {
		return err
	}
	if e.structured() {
		err = e.print(struct {
			Clean       bool               `json:"clean"`
			Differences []audit.Difference `json:"differences"`
		}{len(differences) == 0, append([]audit.Difference{}, differences...)})
	} else {
		for _, d := range differences {
			if err == nil {
				_, err = fmt.Fprintln(e.stdout, printable(d.String()))
			}
		}
		if len(differences) == 0 {
			_, err = fmt.Fprintln(e.stdout, "address stores, kernel and lease agree")
		}
	}
	if err == nil && len(differences) > 0 {
		err = cli.ErrReported
	}
	return err
}

// differences are those of the books, and of the devices that hold them together.
func (e *env) differences(ctx context.Context) ([]audit.Difference, error) {
	h, err := audit.Read(ctx, e.runDir)
	if err != nil {
		return nil, err
	}
	out := audit.Compare(h)
	devices, err := doctor.Devices(ctx, e.runDir)
	for _, f := range devices {
		out = append(out, audit.Difference{Text: f.What + ": " + f.Evidence + "; the agent repairs it if it runs"})
	}
	return out, err
}

// attached is one attachment.
type attached struct {
	Overlay string `json:"overlay"`
	ipam.Record
	Interface string `json:"interface,omitempty"` // on the host, if it is there
}

func (e *env) listAddresses(ctx context.Context) error {
	h, err := audit.Read(ctx, e.runDir)
	if err != nil {
		return err
	}
	attachments := []attached{}
	for _, overlay := range slices.Sorted(maps.Keys(h.Stores)) {
		for _, r := range h.Stores[overlay].Records {
			attachments = append(attachments, attached{overlay, r, hostEnd(h.Links, r)})
		}
	}
	slices.SortStableFunc(attachments, func(a, b attached) int {
		return cmp.Or(cmp.Compare(a.Overlay, b.Overlay), slices.CompareFunc(a.Addrs, b.Addrs, netip.Addr.Compare))
	})
	return errors.Join(e.printAddresses(append([]audit.Usage{}, h.Usage()...), attachments), unreadable(h))
}

// unreadable is the error of the stores whose records are not in a list.
func unreadable(h audit.Host) error {
	var errs []error
	for _, overlay := range slices.Sorted(maps.Keys(h.Stores)) {
		if s := h.Stores[overlay]; s.Err != nil || len(s.Problems) > 0 {
			errs = append(errs, fmt.Errorf("overlay %s: the address store cannot be read; see overlayctl ipam check", overlay))
		}
	}
	return errors.Join(errs...)
}

func hostEnd(links []veth.Link, r ipam.Record) string {
	for _, l := range links {
		if l.Key() == mark.KeyOf(r.Attachment) {
			return l.Name
		}
	}
	return ""
}

func (e *env) printAddresses(usages []audit.Usage, attachments []attached) error {
	if e.structured() {
		return e.print(struct {
			Usage       []audit.Usage `json:"usage"`
			Attachments []attached    `json:"attachments"`
		}{usages, attachments})
	}
	var rows [][]string
	for _, u := range usages {
		rows = append(rows, []string{u.Overlay, string(u.Half), u.Range.String(), fmt.Sprint(u.Used), fmt.Sprint(u.Cooling), fmt.Sprint(u.Total), fmt.Sprint(u.Early)})
	}
	if err := e.printTable([]string{"OVERLAY", "HALF", "RANGE", "USED", "COOLING", "TOTAL", "REUSED EARLY"}, rows); err != nil {
		return err
	}
	fmt.Fprintln(e.stdout)
	rows = nil
	for _, a := range attachments {
		var addrs []string
		for _, ip := range a.Addrs {
			addrs = append(addrs, ip.String())
		}
		rows = append(rows, []string{a.Overlay, string(a.Half), strings.Join(addrs, " "), a.ContainerID, a.IfName, a.Network, a.Interface})
	}
	return e.printTable([]string{"OVERLAY", "HALF", "ADDRESSES", "CONTAINER", "IFNAME", "NETWORK", "INTERFACE"}, rows)
}
