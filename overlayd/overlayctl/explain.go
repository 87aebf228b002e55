package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit/doctor"
	"overlayd.internal/overlay/overlayd/internal/audit/explain"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

func (e *env) explainCommand() *cobra.Command {
	return &cobra.Command{
		Use: "explain A B", Short: "the way from a container to another one or any address, and where it stops",
		Long: `The way from a container to another one or any address, and where it stops.

A and B are addresses, or containers by id, name, or the beginning of an id; B may be
outside. A name that several containers have is refused. Walks lease, isolation, forwarding, firewall, VTEP, route and neighbour, and
sends probes with the overlay's own encapsulation.

The walk is made on the host of A. Where that is another one than this, or a name is
of a container elsewhere, the coordinator is asked; an operator may (overlayctl
login, or root on a coordinator's host).

The exit code is 0 if B is reached, else 1.`,
		Example: "  overlayctl explain 3f2c 9.0.2.130\n  overlayctl explain 9.0.1.2 192.0.2.1 -o json",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return cli.Usagef("want two arguments: containers or addresses")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return e.runExplain(cmd.Context(), args[0], args[1]) },
	}
}

func (e *env) runExplain(ctx context.Context, a, b string) error {
	r, err := explain.Walk(ctx, doctor.Options{RunDir: e.runDir, StateDir: e.agentStateDir()}, a, b)
	var elsewhere *explain.Elsewhere
	if errors.As(err, &elsewhere) || errors.Is(err, explain.ErrUnknown) || errors.Is(err, explain.ErrNoAgent) {
		r, err = e.explainElsewhere(ctx, a, b, err)
	}
	if err != nil {
		return err
	}
	if e.structured() {
		err = e.print(r)
	} else {
		err = e.printExplanation(r, a, b)
	}
	if err == nil && !r.Reachable {
		err = cli.ErrReported
	}
	return err
}

func (e *env) printExplanation(r explain.Result, a, b string) error {
	var rows [][]string
	for _, s := range r.Steps {
		mark := "ok"
		if !s.OK {
			mark = "STOP"
		}
		rows = append(rows, []string{mark, s.Name, s.Text})
	}
	err := e.printTable([]string{"", "STEP", "SEEN ON " + known(r.Host)}, rows)
	if err == nil && r.Reachable {
		_, err = fmt.Fprintf(e.stdout, "\n%s reaches %s\n", printable(a), printable(b))
	}
	return err
}

// explainElsewhere has the host of A walk, because why.
func (e *env) explainElsewhere(ctx context.Context, a, b string, why error) (r explain.Result, err error) {
	fail := func(err error) (explain.Result, error) {
		return r, fmt.Errorf("%w; and the coordinator cannot be asked for it: %w", why, err)
	}
	client, err := e.client(ctx)
	if err != nil {
		return fail(err)
	}
	survey := api.Survey{Kind: api.SurveyExplain, SurveyOptions: api.SurveyOptions{A: a, B: b}}
	from, err := locate(ctx, client, a)
	var elsewhere *explain.Elsewhere
	switch known := errors.As(why, &elsewhere); {
	case err == nil:
		survey.Agents = []string{from.AgentID}
		if !hasAddress(from, a) {
			survey.A = from.ID
		}
	case known: // a host has the subnet, and has not told of the container
		survey.Agents = []string{elsewhere.Host.String()}
	default:
		return fail(err)
	}
	if _, err := netip.ParseAddr(b); err != nil {
		to, err := locate(ctx, client, b)
		if err != nil {
			return fail(err)
		}
		if survey.B, err = addressFor(from, to, b); err != nil {
			return r, err
		}
	}
	seen, err := e.survey(ctx, client, survey)
	if err != nil {
		return fail(err)
	}
	for _, report := range seen.reports {
		if report.Explain != nil {
			return *report.Explain, nil
		}
	}
	return r, cli.ErrReported // why there is none was said
}

// locate finds a container of the cluster by address, or else by id, name, or the
// beginning of an id, in this order. Names are one container's on a Docker host alone,
// so that a name of several is refused.
func locate(ctx context.Context, client *api.Client, name string) (api.Container, error) {
	text, ranks := name, []func(api.Container) bool{
		func(c api.Container) bool { return c.ID == name },
		func(c api.Container) bool { return c.Name == name },
		func(c api.Container) bool { return strings.HasPrefix(c.ID, name) },
	}
	if a, err := netip.ParseAddr(name); err == nil {
		text, ranks = a.Unmap().String(), []func(api.Container) bool{func(c api.Container) bool { return hasAddress(c, name) }}
	}
	found := make([][]api.Container, len(ranks))
	query := url.Values{"q": {text}, "limit": {fmt.Sprint(pageSize)}}
	for next := "-"; next != ""; {
		page, err := client.Containers(ctx, query)
		if err != nil {
			return api.Container{}, err
		}
		for _, c := range page.Containers {
			if rank := slices.IndexFunc(ranks, func(is func(api.Container) bool) bool { return is(c) }); rank >= 0 {
				found[rank] = join(found[rank], c)
			}
		}
		next = page.Next
		query.Set("after", next)
	}
	for _, are := range found {
		switch {
		case len(are) == 1:
			return are[0], nil
		case len(are) > 1:
			return api.Container{}, several(name, are)
		}
	}
	return api.Container{}, fmt.Errorf("%q is no container of the cluster; overlayctl containers --all lists them", name)
}

// join puts the interfaces of one container together.
func join(to []api.Container, c api.Container) []api.Container {
	if i := slices.IndexFunc(to, func(has api.Container) bool { return has.ID == c.ID && has.AgentID == c.AgentID }); i >= 0 {
		to[i].Addresses = append(slices.Clip(to[i].Addresses), c.Addresses...)
		return to
	}
	return append(to, c)
}

func several(name string, are []api.Container) error {
	const most = 10
	var list []string
	for _, c := range are[:min(len(are), most)] {
		list = append(list, fmt.Sprintf("%s on host %s", shortID(c.ID), c.AgentIP))
	}
	if len(are) > most {
		list = append(list, fmt.Sprintf("%d more", len(are)-most))
	}
	return fmt.Errorf("%q may be any of %d containers of the cluster, so name one by its address or id: %s", name, len(are), strings.Join(list, ", "))
}

func hasAddress(c api.Container, name string) bool {
	a, err := netip.ParseAddr(name)
	for _, has := range c.Addresses {
		if err == nil && has == a.Unmap() {
			return true
		}
	}
	return false
}

// addressFor is an address of one container in a family that the other one, where it is
// known, has as well.
func addressFor(from, to api.Container, name string) (string, error) {
	for _, b := range to.Addresses {
		if len(from.Addresses) == 0 || slices.ContainsFunc(from.Addresses, func(a netip.Addr) bool { return a.Is4() == b.Is4() }) {
			return b.String(), nil
		}
	}
	return "", fmt.Errorf("%s has no family of addresses in common with the container it is to be reached from", name)
}
