package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

func (e *env) tokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "token", Short: "what hosts and people join the cluster with",
		Long: `What hosts and people join the cluster with.

A token is one word. It pins the cluster's CA, so that whoever joins knows the
coordinator, and carries a secret, so that the coordinator knows who may join.
Keep it as you would a password until it is used up.`,
	}
	cmd.AddCommand(e.tokenCreateCommand(), e.tokenListCommand(), e.tokenRevokeCommand())
	return cmd
}

func (e *env) tokenCreateCommand() *cobra.Command {
	var role string
	req := api.TokenRequest{}
	var ttl time.Duration
	cmd := &cobra.Command{
		Use: "create [flags]", Short: "make a token and print it, alone on one line", Args: cobra.NoArgs,
		Example: "  overlayctl token create\n  overlayctl token create --role operator --ttl 10m\n  overlayctl token create --uses 100 --ttl 1h",
		RunE: func(cmd *cobra.Command, _ []string) error {
			req.Role, req.TTLSeconds = role, int64(ttl/time.Second)
			return e.createToken(cmd.Context(), req)
		},
	}
	fs := cmd.Flags()
	fs.DurationVar(&ttl, "ttl", 24*time.Hour, "how long it is good")
	fs.IntVar(&req.Uses, "uses", 1, "how many may join with it")
	fs.Var(cli.Choice(&role, "agent", "agent", "operator", "reader", "coordinator"), "role", "what those who join may do")
	fs.Var(cli.String(&req.AgentID, "", "ID"), "agent-id", "the agent that alone may join with it, even if it has joined before (it lost its key)")
	return cmd
}

func (e *env) createToken(ctx context.Context, req api.TokenRequest) error {
	client, err := e.operator(ctx)
	if err != nil {
		return err
	}
	created, err := client.TokenCreate(ctx, req)
	if err != nil {
		return err
	}
	if e.structured() {
		return e.print(created)
	}
	_, err = fmt.Fprintln(e.stdout, created.Token)
	return err
}

func (e *env) tokenListCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "the tokens, without their secrets", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return e.listTokens(cmd.Context()) },
	}
}

func (e *env) listTokens(ctx context.Context) error {
	client, err := e.operator(ctx)
	if err != nil {
		return err
	}
	tokens, err := client.Tokens(ctx)
	if err != nil {
		return err
	}
	if e.structured() {
		return e.print(tokens)
	}
	var rows [][]string
	for _, t := range tokens {
		state := "good"
		if t.Left < 1 {
			state = "used up"
		} else if !time.Now().Before(t.Expires) {
			state = "expired"
		}
		rows = append(rows, []string{t.ID, t.Role, t.AgentID, t.Created.UTC().Format(time.RFC3339), t.Expires.UTC().Format(time.RFC3339), fmt.Sprintf("%d of %d", t.Left, t.Uses), state})
	}
	return e.printTable([]string{"TOKEN", "ROLE", "AGENT", "CREATED", "EXPIRES", "LEFT", "STATE"}, rows)
}

func (e *env) tokenRevokeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "revoke TOKEN...", Short: "have nobody join with a token any more; take its id, or the token itself", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			client, err := e.operator(cmd.Context())
			if err != nil {
				return err
			}
			for _, id := range ids {
				if err := client.TokenRevoke(cmd.Context(), id); err != nil {
					return err
				}
			}
			return nil
		},
	}
}
