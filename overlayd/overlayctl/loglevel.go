package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/logging"
)

// What log-level is about.
const (
	daemonAll         = "all"
	daemonAgent       = "agent"
	daemonCoordinator = "coordinator"
)

func (e *env) logLevelCommand() *cobra.Command {
	var of string
	cmd := &cobra.Command{
		Use: "log-level [debug|info|warn|error] [--of DAEMON]", Short: "what the daemons of this host log at least; changes it while they run", Args: cobra.MaximumNArgs(1),
		Long: `What the daemons of this host log at least; changes it while they run.

Agent and coordinator are asked over their sockets, and only root may change
something. After a restart it is again what --log-level says. The signal SIGUSR1
sets debug, and the next one what was set at the start.`,
		Example:   "  overlayctl log-level\n  overlayctl log-level debug\n  overlayctl log-level info --of coordinator",
		ValidArgs: logging.Levels,
		RunE: func(cmd *cobra.Command, args []string) error {
			to := ""
			if len(args) > 0 {
				to = args[0]
				if _, err := logging.ParseLevel(to); err != nil {
					return cli.Usage(err)
				}
			}
			return e.runLogLevel(cmd.Context(), of, to)
		},
	}
	cmd.Flags().Var(cli.Choice(&of, daemonAll, daemonAll, daemonAgent, daemonCoordinator), "of", "which daemon")
	return cmd
}

// daemonLevel is one row.
type daemonLevel struct {
	Daemon string `json:"daemon"`
	Level  string `json:"level"`
}

func (e *env) runLogLevel(ctx context.Context, of, to string) error {
	sockets := map[string]string{daemonAgent: filepath.Join(e.runDir, conf.SocketFile), daemonCoordinator: e.socket()}
	levels := []daemonLevel{}
	var errs []error
	for _, daemon := range []string{daemonAgent, daemonCoordinator} {
		if of != daemonAll && of != daemon {
			continue
		}
		if _, err := os.Stat(sockets[daemon]); err != nil && of == daemonAll {
			continue // it does not run here
		}
		client, err := overSocket(sockets[daemon])
		if err == nil {
			var level api.LogLevel
			if level, err = client.LogLevel(ctx, to); err == nil {
				levels = append(levels, daemonLevel{daemon, level.Level})
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("the %s of this host: %w", daemon, err))
		}
	}
	if len(levels) == 0 && len(errs) == 0 {
		return fmt.Errorf("neither an agent nor a coordinator runs here: there is no %s and no %s; see --run-dir and --state-dir", sockets[daemonAgent], sockets[daemonCoordinator])
	}
	return errors.Join(append(errs, e.printLevels(levels))...)
}

func (e *env) printLevels(levels []daemonLevel) error {
	if e.structured() {
		return e.print(levels)
	}
	rows := [][]string{}
	for _, l := range levels {
		rows = append(rows, []string{l.Daemon, l.Level})
	}
	return e.printTable([]string{"DAEMON", "LOG LEVEL"}, rows)
}

// overSocket is a client of a daemon of this host.
func overSocket(path string) (*api.Client, error) {
	return api.NewClient([]string{"http://localhost"}, &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}})
}
