package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

// allReserved stands for every reservation.
const allReserved = "all"

func (e *env) importStateCommand() *cobra.Command {
	var dryRun, list bool
	var drop []string
	cmd := &cobra.Command{
		Use: "import-state [FILE] [--dry-run] [--list] [--drop IP[,IP...]|all]", Short: "reserve for the hosts of a DC/OS cluster what they hold there", Args: cobra.MaximumNArgs(1),
		Long: `Reserve for the hosts of a DC/OS cluster what they hold there.

FILE is what the cluster's leading master answers to GET /overlay-master/state;
"-" is standard input. The agent that registers first with the address of a host
gets the VTEP and the subnets of that host, and nobody else does. When something
of the file cannot be reserved, all of it is said and nothing is reserved. It can
be imported again at any time.`,
		Example: "  curl -s http://leader.mesos:5050/overlay-master/state > state.json\n" +
			"  overlayctl import-state --dry-run state.json\n  overlayctl import-state state.json\n  overlayctl import-state --list\n  overlayctl import-state --drop 10.0.0.7",
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) == 1 && !list && len(drop) == 0:
				return e.importState(cmd, args[0], dryRun)
			case len(args) == 0 && list && !dryRun && len(drop) == 0:
				return e.listReserved(cmd.Context())
			case len(args) == 0 && !list && !dryRun && len(drop) > 0:
				return e.dropReserved(cmd.Context(), drop)
			}
			return cli.Usagef("name a FILE, or one of --list and --drop")
		},
	}
	fs := cmd.Flags()
	fs.BoolVar(&dryRun, "dry-run", false, "only say what would be reserved")
	fs.BoolVar(&list, "list", false, "show what waits for its host")
	fs.Var(cli.List(&drop, ",", "", "IP[,IP...]"), "drop", "give back what waits for these hosts, or for all")
	return cmd
}

func (e *env) importState(cmd *cobra.Command, path string, dryRun bool) error {
	document, err := readFileOr(cmd.InOrStdin(), path)
	if err != nil {
		return err
	}
	if !json.Valid(document) {
		return cli.Usagef("%s is not JSON; want the answer of GET /overlay-master/state", path)
	}
	client, err := e.operator(cmd.Context())
	if err != nil {
		return err
	}
	result, err := client.ImportState(cmd.Context(), document, dryRun)
	var refusal *api.Error
	if errors.As(err, &refusal) && len(refusal.Problems) > 0 {
		return cli.Usagef("%s: nothing was reserved, for %d of what it says cannot be:\n  %s", path, len(refusal.Problems), strings.Join(refusal.Problems, "\n  "))
	} else if err != nil {
		return err
	}
	if e.structured() {
		return e.print(result)
	}
	if e.output == outputWide {
		if err := e.printReserved(result.Reserved); err != nil {
			return err
		}
	}
	verb := "reserved"
	if dryRun {
		verb = "would be reserved"
	}
	fmt.Fprintf(e.stdout, "%d leases %s, %d were before, %d hosts have registered and hold theirs\n", len(result.Reserved), verb, len(result.Before), len(result.Taken))
	if len(result.Skipped) > 0 {
		fmt.Fprintf(e.stdout, "%d agents of the file hold nothing: %s\n", len(result.Skipped), strings.Join(result.Skipped, ", "))
	}
	return nil
}

// readFileOr reads a file, or standard input for "-".
func readFileOr(stdin io.Reader, path string) ([]byte, error) {
	if path == "-" {
		return io.ReadAll(stdin)
	}
	return os.ReadFile(path)
}

func (e *env) listReserved(ctx context.Context) error {
	client, err := e.client(ctx)
	if err != nil {
		return err
	}
	list, err := client.Reserved(ctx)
	if err != nil {
		return err
	}
	if e.structured() {
		return e.print(list)
	}
	return e.printReserved(list)
}

func (e *env) printReserved(list []api.Reservation) error {
	var rows [][]string
	for _, r := range list {
		var subnets []string
		for _, s := range r.Subnets {
			subnets = append(subnets, s.Overlay+" "+prefixes(s.Subnet, s.Subnet6))
		}
		var vteps []string
		for _, a := range [...]netip.Addr{r.VTEP, r.VTEP6} {
			if a.IsValid() {
				vteps = append(vteps, a.String())
			}
		}
		rows = append(rows, []string{r.AgentIP.String(), strings.Join(vteps, " "), strings.Join(subnets, ", ")})
	}
	return e.printTable([]string{"AGENT IP", "VTEP", "SUBNETS"}, rows)
}

func (e *env) dropReserved(ctx context.Context, names []string) error {
	var req api.ReservedDrop
	for _, name := range names {
		if name == allReserved {
			req.All = true
			continue
		}
		ip, err := netip.ParseAddr(name)
		if err != nil {
			return cli.Usagef("--drop: %q is neither an address nor the word %s", name, allReserved)
		}
		req.Agents = append(req.Agents, ip)
	}
	client, err := e.operator(ctx)
	if err != nil {
		return err
	}
	dropped, err := client.ReservedDrop(ctx, req)
	if err != nil {
		return err
	}
	if e.structured() {
		return e.print(dropped)
	}
	_, err = fmt.Fprintf(e.stdout, "%d reservations dropped\n", len(dropped))
	return err
}
