package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/clusterfile"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/logging"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/systemd"
)

// coordinatorFlags are the flags of overlayd coordinator.
type coordinatorFlags struct {
	config, listen, stateDir string
	store                    storeFlags
	advertise                []string
	pkiDir, joinToken        string
	statePublic, pagePublic  bool
	insecure                 bool
	log                      logging.Flags
}

// declare declares the flags. A new flag of the coordinator is one more line here.
func (f *coordinatorFlags) declare(fs *pflag.FlagSet) {
	fs.Var(cli.String(&f.config, "", "FILE"), "config", "cluster configuration, YAML or JSON; required")
	fs.Var(cli.Listen(&f.listen, "0.0.0.0:6440", false), "listen", "address and port to serve on")
	f.store.declare(fs)
	fs.Var(cli.String(&f.stateDir, conf.DefaultStateDir, "DIR"), "state-dir", "what survives a reboot")
	fs.Var(cli.List(&f.advertise, ",", "", "HOST[,HOST...]"), "advertise",
		"further names and addresses by which agents reach this coordinator; its own addresses need not be given")
	fs.Var(cli.String(&f.pkiDir, "", "DIR"), "pki-dir", "where a CA lies that is to be the cluster's: ca.crt and ca.key (default: one is made)")
	fs.Var(cli.Func("TOKEN", "", setToken(&f.joinToken)), "join-token", "of role coordinator: what a further coordinator on the same store starts with, once")
	fs.BoolVar(&f.statePublic, "state-public", false, "serve /overlay-master/state to anybody, to be read by DC/OS tools")
	fs.BoolVar(&f.pagePublic, "page-public", false, "show the page to anybody, with the agents, containers, addresses and events that it reads")
	f.log.Declare(fs)
	fs.BoolVar(&f.insecure, "insecure", false, "plain HTTP without any identity, for a laboratory")
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
	return cli.Daemon(cmd)
}

// gcPercent takes a fifth more memory than Go's default of 100, and when the whole
// cluster joins at once a tenth less of the processors. 200 would take another fifth,
// and save a twentieth.
const gcPercent = 150

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
	leveled := f.log.New(stderr)
	leveled.Level().ToggleOnSignal(ctx)
	log := leveled.Logger
	if err := f.checkIdentity(); err != nil {
		return err
	}
	if f.insecure {
		warnInsecure(ctx, log)
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
	identity, err := f.openIdentity(ctx, st, log)
	if err != nil {
		return err
	}
	witness, err := openWitness(f.stateDir, log)
	if err != nil {
		return fmt.Errorf("--state-dir: %w", err)
	}
	defer witness.Close()
	o := coordinator.Options{
		Network: network, Store: st, Log: log, LogLevel: leveled.Level(), Version: version, Shared: shared, Identity: identity, StatePublic: f.statePublic, PagePublic: f.pagePublic,
		Adopt: coordinator.Adopt{Cluster: f.store.adopt, Witness: witness},
		URLs:  f.urls(listener.Addr(), network), PeerClient: peerClient(identity), Networks: ownNetworks(),
	}
	c, err := f.begin(ctx, o)
	if err != nil {
		return err
	}
	local, err := listenLocal(ctx, f.stateDir, log)
	if err != nil {
		return fmt.Errorf("--state-dir: %w", err)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.Run(ctx) })
	group.Go(func() error { return c.Serve(ctx, listener) })
	if local != nil {
		group.Go(func() error { return c.ServeLocal(ctx, local) })
	}
	if identity != nil {
		group.Go(func() error { return identity.Run(ctx) })
	}
	group.Go(f.followFile(ctx, c, log))
	group.Go(func() error { return systemd.New(log).Watch(ctx, c.Alive) })
	log.Info("listening", "addr", listener.Addr().String())
	if err := group.Wait(); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

// begin makes the coordinator, and remembers with which file. A file that says
// something else than it did when it was last taken in has been edited since.
func (f *coordinatorFlags) begin(ctx context.Context, o coordinator.Options) (*coordinator.Coordinator, error) {
	was, err := recall(f.stateDir)
	if err != nil {
		return nil, err
	}
	hash, err := hashOf(o.Network)
	if err != nil {
		return nil, err
	}
	o.Unedited = was.Config == "" || was.Config == hash
	c, err := coordinator.New(ctx, o)
	if errors.Is(err, coordinator.ErrMisfit) {
		return nil, cli.Usagef("%s: %w", f.config, err)
	} else if err != nil {
		return nil, err
	}
	if err := f.store.remember(f.stateDir, c.ClusterID(), hash); err != nil {
		return nil, fmt.Errorf("--state-dir: %w", err)
	}
	return c, nil
}

// followFile waits for SIGHUP from now on and returns what applies the file once more
// whenever one comes, until ctx ends. What cannot be read or applied changes nothing.
func (f *coordinatorFlags) followFile(ctx context.Context, c *coordinator.Coordinator, log *slog.Logger) func() error {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	return func() error {
		defer signal.Stop(hangups)
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-hangups:
			}
			f.applyFile(ctx, c, log)
		}
	}
}

// applyFile applies the file and logs what came of it. What was applied is so also
// where it cannot be written down.
func (f *coordinatorFlags) applyFile(ctx context.Context, c *coordinator.Coordinator, log *slog.Logger) {
	var plan api.NetworkPlan
	network, err := loadNetwork(f.config)
	if err == nil {
		plan, err = c.ApplyFile(ctx, network)
	}
	if err != nil {
		log.Error("the configuration file was not applied; the configuration stays as it was", "file", f.config, "err", err)
		return
	}
	log.Info("the cluster's configuration is that of the file as it was read again", "file", f.config, "changes", len(plan.Changes))
	hash, err := hashOf(network)
	if err == nil {
		err = f.store.remember(f.stateDir, c.ClusterID(), hash)
	}
	if err != nil {
		log.Error("the configuration file was applied, and that cannot be written down: the next start would apply it once more, over what others have changed since; "+
			"make room in the state directory and send SIGHUP again", "file", f.config, "err", err)
	}
}

// loadNetwork reads the cluster configuration; its error holds every problem.
func loadNetwork(path string) (conf.Network, error) {
	network, problems, err := clusterfile.LoadFile(path)
	if err != nil {
		return conf.Network{}, cli.Usage(err)
	}
	return network, cli.Problems(path, problems)
}
