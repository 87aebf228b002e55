package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/api"
)

func (e *env) caCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "ca", Short: "the cluster's certificate authority"}
	retire := false
	rotate := &cobra.Command{
		Use: "rotate [--retire]", Short: "make a new CA; the one before is trusted until its last certificate has ended", Args: cobra.NoArgs,
		Long: `Make a new CA; the one before is trusted until its last certificate has ended.

Agents learn of it within a minute and renew their certificates. When all have
(overlayctl agents shows who is connected), or at once when the old CA's key is
in wrong hands, overlayctl ca rotate --retire ends the trust in the old one.
Whoever has not renewed by then has to join again.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.changeCA(cmd.Context(), func(ctx context.Context, c *api.Client) ([]api.CA, error) {
				return c.CARotate(ctx, api.RotateRequest{Retire: retire})
			})
		},
	}
	rotate.Flags().BoolVar(&retire, "retire", false, "make none; trust only the newest from now on")
	list := &cobra.Command{
		Use: "list", Short: "the CAs that are trusted", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.changeCA(cmd.Context(), func(ctx context.Context, c *api.Client) ([]api.CA, error) { return c.CAs(ctx) })
		},
	}
	cmd.AddCommand(list, rotate)
	return cmd
}

func (e *env) changeCA(ctx context.Context, ask func(context.Context, *api.Client) ([]api.CA, error)) error {
	client, err := e.operator(ctx)
	if err != nil {
		return err
	}
	cas, err := ask(ctx, client)
	if err != nil {
		return err
	}
	if e.structured() {
		return e.print(cas)
	}
	var rows [][]string
	for _, ca := range cas {
		until := ca.NotAfter
		if !ca.Until.IsZero() && ca.Until.Before(until) {
			until = ca.Until
		}
		use := "trusted"
		if ca.Issues {
			use = "issues"
		}
		rows = append(rows, []string{ca.Fingerprint, ca.Subject, use, until.UTC().Format(time.RFC3339)})
	}
	return e.printTable([]string{"CA", "SUBJECT", "USE", "UNTIL"}, rows)
}
