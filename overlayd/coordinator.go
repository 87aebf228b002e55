package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/clusterfile"
	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// coordinatorFlags are the flags of overlayd coordinator.
type coordinatorFlags struct {
	config, listen, stateDir string
	store                    storeFlags
	insecure                 bool
}

// declare declares the flags. A new flag of the coordinator is one more line here.
func (f *coordinatorFlags) declare(fs *pflag.FlagSet) {
	fs.Var(cli.String(&f.config, "", "FILE"), "config", "cluster configuration, YAML or JSON; required")
	fs.Var(cli.Listen(&f.listen, "0.0.0.0:6440", false), "listen", "address and port to serve on")
	f.store.declare(fs)
	fs.Var(cli.String(&f.stateDir, conf.DefaultStateDir, "DIR"), "state-dir", "what survives a reboot")
	fs.BoolVar(&f.insecure, "insecure", false, "plain HTTP, anybody may join; at present the only mode")
}

func coordinatorCommand(env cli.LookupEnv) *cobra.Command {
	var f coordinatorFlags
	cmd := &cobra.Command{
		Use: "coordinator --config FILE [flags]", Short: "lease VTEP addresses and subnets to the agents of a cluster", Args: cobra.NoArgs,
		Example: "  overlayd coordinator --config /etc/overlay/overlay.yaml",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runCoordinator(cmd.Context(), f, env, cmd.ErrOrStderr())
		},
	}
	f.declare(cmd.Flags())
	return cmd
}

// gcPercent takes a quarter more memory than Go's default of 100, and when the
// whole cluster joins at once an eighth less of the processors.
const gcPercent = 200

func runCoordinator(ctx context.Context, f coordinatorFlags, env cli.LookupEnv, stderr io.Writer) error {
	if f.config == "" {
		return cli.Usagef("--config is missing; give the file with the cluster configuration")
	}
	network, err := loadNetwork(f.config)
	if err != nil {
		return err
	}
	if _, set := env("GOGC"); !set {
		debug.SetGCPercent(gcPercent)
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	if err := insecure(f.insecure, log); err != nil {
		return err
	}

	listener, err := serve.ListenTCP(ctx, f.listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	defer listener.Close()
	st, shared, err := f.store.open(ctx, f.stateDir, log)
	if err != nil {
		return err
	}
	defer st.Close()
	c, err := coordinator.New(ctx, coordinator.Options{Network: network, Store: st, Log: log, Version: version, Shared: shared})
	if errors.Is(err, coordinator.ErrMisfit) {
		return cli.Usagef("%s: %w", f.config, err)
	} else if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.Run(ctx) })
	group.Go(func() error { return c.Serve(ctx, listener) })
	log.Info("listening", "addr", listener.Addr().String())
	if err := group.Wait(); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

// loadNetwork reads the cluster configuration; its error holds every problem.
func loadNetwork(path string) (conf.Network, error) {
	network, problems, err := clusterfile.LoadFile(path)
	if err != nil {
		return conf.Network{}, cli.Usage(err)
	}
	return network, cli.Problems(path, problems)
}

// insecure refuses to start without --insecure and says what it means with it.
func insecure(flag bool, log *slog.Logger) error {
	if !flag {
		return cli.Usagef("TLS is not available yet; start with --insecure to use plain HTTP without any identity, on a network where you trust every host")
	}
	log.Warn("INSECURE: plain HTTP and no identity; every host that reaches the coordinator can join the cluster and read its traffic")
	return nil
}
