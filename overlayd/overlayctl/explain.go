package main

import (
	"cmp"
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
outside. What several containers may be meant by, here or on other hosts, is refused, and
they are listed. Walks lease, isolation, forwarding, firewall, VTEP, route and neighbour,
and sends probes with the overlay's own encapsulation.

The walk is made on the host of A, and its end on the host of B as well. For another host
than this one, and for the name of a container elsewhere, the coordinator is asked; an
operator may (overlayctl login, or root on a coordinator's host). It is waited for five
seconds in all, and the hosts that it asks twelve; who has not answered by then is named,
and so is what is not known because of that.

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
	ask := e.others()
	unsure, err := ask.onlyThese(ctx, a, b)
	if err != nil {
		return err
	}
	r, err := explain.Walk(ctx, doctor.Options{RunDir: e.runDir, StateDir: e.agentStateDir()}, a, b)
	var elsewhere *explain.Elsewhere
	if errors.As(err, &elsewhere) || errors.Is(err, explain.ErrUnknown) || errors.Is(err, explain.ErrNoAgent) {
		r, err = ask.explainElsewhere(ctx, a, b, err)
	}
	if err != nil {
		return err
	}
	r.NamesUnknown = strings.Join(unsure, "; ")
	return ask.tell(ctx, r, a, b)
}

// tell prints the walk, and what the host of B says. People read the walk while that one
// is waited for.
func (o *others) tell(ctx context.Context, r explain.Result, a, b string) (err error) {
	e := o.env
	if e.structured() {
		o.askFar(ctx, &r)
		err = e.print(r)
	} else if err = e.printSteps(r); err == nil {
		o.askFar(ctx, &r)
		err = e.printFar(r, a, b)
	}
	if err == nil && !r.Reachable {
		err = cli.ErrReported
	}
	return err
}

// printFar prints what came after the walk.
func (e *env) printFar(r explain.Result, a, b string) (err error) {
	switch {
	case r.Far != nil:
		if _, err = fmt.Fprintln(e.stdout); err == nil {
			err = e.printSteps(*r.Far)
		}
	case r.FarUnknown != "":
		fmt.Fprintf(e.stderr, "what host %s sees is not known: %s\n", r.ToHost, printable(r.FarUnknown))
	}
	if err == nil && r.Reachable {
		_, err = fmt.Fprintf(e.stdout, "\n%s reaches %s\n", printable(a), printable(b))
	}
	return err
}

func (e *env) printSteps(r explain.Result) error {
	var rows [][]string
	for _, s := range r.Steps {
		mark := "ok"
		if !s.OK {
			mark = "STOP"
		}
		rows = append(rows, []string{mark, s.Name, s.Text})
	}
	return e.printTable([]string{"", "STEP", "SEEN ON " + known(r.Host)}, rows)
}

// askFar has the host of B look as well, if it is another one, and takes its word for what
// is wrong where nobody answered the host of A, or all was well there.
func (o *others) askFar(ctx context.Context, r *explain.Result) {
	if !r.ToHost.IsValid() {
		return
	}
	far, err := o.walk(ctx, r.ToHost.String(), api.SurveyOptions{A: r.FromAddress.String(), B: r.ToAddress.String(), Arrive: true})
	if err != nil {
		r.FarUnknown = err.Error()
		return
	}
	r.Far = &far
	if !far.Reachable && (r.Reachable || r.Silent && !far.Silent) {
		r.Reachable, r.StopsAt = false, "on host "+known(far.Host)+", "+far.StopsAt
	}
}

// onlyThese refuses names of containers of this host that may be ones of other hosts as
// well, or several of this one. Without a coordinator nobody knows of the others: then it
// returns that, in a sentence for each name.
func (o *others) onlyThese(ctx context.Context, names ...string) (unsure []string, _ error) {
	for _, name := range names {
		if _, err := netip.ParseAddr(name); err == nil {
			continue
		}
		here, err := explain.Named(ctx, o.env.runDir, name)
		if err != nil || len(here) == 0 || len(here) == 1 && here[0] == name {
			continue // the walk says what is wrong; a whole id is one container's
		}
		all, err := o.candidates(ctx, name)
		if err != nil {
			unsure = append(unsure, fmt.Sprintf("%s is taken for a container of this host; whether others are called so is not known: %v", name, err))
			fmt.Fprintln(o.env.stderr, printable(unsure[len(unsure)-1]))
		}
		for _, id := range here {
			if !slices.ContainsFunc(all, func(c api.Container) bool { return c.ID == id }) {
				all = append(all, api.Container{ID: id})
			}
		}
		if len(all) > 1 {
			return nil, several(name, all)
		}
	}
	return unsure, nil
}

// explainElsewhere has the host of A walk, because why.
func (o *others) explainElsewhere(ctx context.Context, a, b string, why error) (r explain.Result, err error) {
	fail := func(err error) (explain.Result, error) {
		return r, fmt.Errorf("%w; and the coordinator cannot be asked for it: %w", why, err)
	}
	var host string
	options := api.SurveyOptions{A: a, B: b}
	from, err := o.locate(ctx, a)
	var elsewhere *explain.Elsewhere
	switch known := errors.As(why, &elsewhere); {
	case err == nil:
		host = from.AgentID
		if !hasAddress(from, a) {
			options.A = from.ID
		}
	case known: // a host has the subnet, and has not told of the container
		host = elsewhere.Host.String()
	default:
		return fail(err)
	}
	if _, err := netip.ParseAddr(b); err != nil {
		to, err := o.locate(ctx, b)
		if err != nil {
			return fail(err)
		}
		if options.B, err = addressFor(from, to, b); err != nil {
			return r, err
		}
	}
	if r, err = o.walk(ctx, host, options); err != nil {
		return r, fmt.Errorf("%w; and host %s, which was to look, has not: %w", why, cmp.Or(known(from.AgentIP), host), err)
	}
	return r, nil
}

// locate is the one of the candidates; several are refused: names are one container's on
// a Docker host alone.
func (o *others) locate(ctx context.Context, name string) (api.Container, error) {
	are, err := o.candidates(ctx, name)
	switch {
	case err != nil:
		return api.Container{}, err
	case len(are) == 1:
		return are[0], nil
	case len(are) > 1:
		return api.Container{}, several(name, are)
	}
	return api.Container{}, fmt.Errorf("%q is no container of the cluster; overlayctl containers --all lists them", name)
}

// candidates finds containers of the cluster by address, or else by id, name, or the
// beginning of an id, in this order.
func candidates(ctx context.Context, client *api.Client, name string) ([]api.Container, error) {
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
			return nil, err
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
		if len(are) > 0 {
			return are, nil
		}
	}
	return nil, nil
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
		where := "this host"
		if c.AgentIP.IsValid() {
			where = "host " + c.AgentIP.String()
		}
		list = append(list, fmt.Sprintf("%s on %s", shortID(c.ID), where))
	}
	if len(are) > most {
		list = append(list, fmt.Sprintf("%d more", len(are)-most))
	}
	return fmt.Errorf("%q may be any of %d containers, so name one by its address or id: %s", name, len(are), strings.Join(list, ", "))
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
