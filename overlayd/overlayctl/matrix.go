package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit/ping"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

// progress says on a terminal how much of long work is done; nil where there is none.
func (e *env) progress(what string) func(done, all int) {
	if !terminal(e.stderr) {
		return nil
	}
	return func(done, all int) {
		fmt.Fprintf(e.stderr, "\r%s %d of %d", what, done, all)
		if done == all {
			fmt.Fprint(e.stderr, "\r\x1b[K")
		}
	}
}

// surveyed is what a survey has brought.
type surveyed struct {
	begun   bool // the coordinator has asked
	asked   int  // hosts
	reports []api.SurveyReport
	missing []api.SurveyMissing
}

// survey has the coordinator ask hosts, and returns what they have seen; beside an
// error that is what had come before. Those that have not answered are named on
// standard error.
func (e *env) survey(ctx context.Context, client *api.Client, survey api.Survey) (seen surveyed, err error) {
	seen, err = e.ask(ctx, client, survey, func() {})
	for _, m := range seen.missing {
		fmt.Fprintf(e.stderr, "host %s has not answered: %s\n", m.AgentIP, printable(m.Reason))
	}
	for _, r := range seen.reports {
		if r.Error != "" {
			fmt.Fprintf(e.stderr, "host %s: %s\n", r.AgentIP, printable(r.Error))
		}
	}
	return seen, err
}

// ask is survey without a word about who has not answered. It calls begun when the
// coordinator has asked.
func (e *env) ask(ctx context.Context, client *api.Client, survey api.Survey, begun func()) (seen surveyed, err error) {
	progress := e.progress("answered")
	err = client.Survey(ctx, survey, func(line api.SurveyLine) error {
		if !seen.begun {
			begun()
		}
		seen.begun = true
		seen.asked = max(seen.asked, line.Asked)
		if line.Report != nil {
			seen.reports = append(seen.reports, *line.Report)
		}
		seen.missing = line.Missing
		if progress != nil && seen.asked > 0 {
			done := len(seen.reports)
			if line.Done {
				done = seen.asked
			}
			progress(done, seen.asked)
		}
		return nil
	})
	return seen, err
}

// runMatrix measures the ways between all hosts. Unless wait was asked for, the
// coordinator chooses one that fits.
func (e *env) runMatrix(ctx context.Context, o ping.Options, wait bool) error {
	if o.Count > api.MaxSurveyCount || o.Wait > api.MaxSurveyWait {
		return cli.Usagef("--count is at most %d and --wait %s between all hosts; --here measures from this one alone", api.MaxSurveyCount, api.MaxSurveyWait)
	}
	options := api.SurveyOptions{Count: o.Count}
	if wait {
		options.WaitMS = int(o.Wait / time.Millisecond)
	}
	client, err := e.client(ctx)
	var seen surveyed
	if err == nil {
		seen, err = e.survey(ctx, client, api.Survey{Kind: api.SurveyPing, SurveyOptions: options})
	}
	var refused *api.Error
	switch {
	case err == nil, seen.begun && ctx.Err() == nil:
	case ctx.Err() != nil || errors.As(err, &refused) && refused.Code != http.StatusForbidden && refused.Code != http.StatusUnauthorized && refused.Code != http.StatusNotFound:
		return err
	default:
		fmt.Fprintf(e.stderr, "the coordinator cannot be asked, so these are the ways from this host alone: %s\n", printable(err.Error()))
		return e.runPing(ctx, nil, o)
	}
	ways, failed := []api.Way{}, len(seen.missing) > 0
	for _, r := range seen.reports {
		ways, failed = append(ways, r.Ways...), failed || r.Error != ""
	}
	slices.SortFunc(ways, func(a, b api.Way) int { return cmp.Or(a.From.Compare(b.From), a.To.Compare(b.To)) })
	if perr := e.printMatrix(ways, seen.missing); perr != nil {
		return perr
	}
	switch {
	case err != nil:
		return fmt.Errorf("%d of %d hosts had answered: %w", len(seen.reports), seen.asked, err)
	case failed:
		return cli.ErrReported
	}
	return wholeOr(ways)
}

// printMatrix prints round trips as a matrix, and what is wrong of each way in full.
func (e *env) printMatrix(ways []api.Way, missing []api.SurveyMissing) error {
	if e.structured() || e.output == outputWide {
		return e.printPing(ways)
	}
	hosts := map[netip.Addr]struct{}{}
	cells := map[[2]netip.Addr]string{}
	var bad []api.Way
	for _, w := range ways {
		hosts[w.From], hosts[w.To] = struct{}{}, struct{}{}
		cells[[2]netip.Addr{w.From, w.To}] = cell(w)
		if !w.Whole() {
			bad = append(bad, w)
		}
	}
	for _, m := range missing {
		hosts[m.AgentIP] = struct{}{}
	}
	order := make([]netip.Addr, 0, len(hosts))
	for h := range hosts {
		order = append(order, h)
	}
	slices.SortFunc(order, netip.Addr.Compare)
	titles := []string{"", "FROM"}
	var rows [][]string
	for i, from := range order {
		titles = append(titles, fmt.Sprintf("TO %d", i+1))
		row := []string{fmt.Sprint(i + 1), from.String()}
		for _, to := range order {
			row = append(row, cmp.Or(cells[[2]netip.Addr{from, to}], map[bool]string{true: ".", false: "?"}[from == to]))
		}
		rows = append(rows, row)
	}
	if len(rows) > 0 {
		if err := e.printTable(titles, rows); err != nil {
			return err
		}
	}
	if len(bad) == 0 {
		_, err := fmt.Fprintf(e.stdout, "\naverage round trip in ms; %d ways, nothing lost, full packets\n", len(ways))
		return err
	}
	if _, err := fmt.Fprintf(e.stdout, "\naverage round trip in ms; %d of %d ways are not as they should be:\n\n", len(bad), len(ways)); err != nil {
		return err
	}
	return e.printPing(bad)
}

// cell is a way in the matrix.
func cell(w api.Way) string {
	switch {
	case w.Received == 0:
		return "LOST"
	case w.Received < w.Sent:
		return fmt.Sprintf("%.3f -%.0f%%", w.Avg, w.Loss)
	case w.PathMTU == 0:
		return fmt.Sprintf("%.3f MTU?", w.Avg)
	case !w.Whole():
		return fmt.Sprintf("%.3f MTU", w.Avg)
	}
	return fmt.Sprintf("%.3f", w.Avg)
}
