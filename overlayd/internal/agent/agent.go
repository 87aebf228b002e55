// Package agent is the one control loop of a host. It leases from the
// coordinator, tells the datapath what the kernel should look like, publishes
// the result for the CNI programs and keeps the runtimes' files.
//
//	registrar --lease, error--> +------+ --Config--> datapath --> kernel
//	watcher   --peers---------> | loop | --State---> state.json, HTTP
//	datapath  --change--------> |      | --overlays-> runtimes' files, Docker
//	file watch --change-------> +------+ --status--> reporter --> coordinator
//
// The loop alone owns what the agent knows. The others are goroutines of their
// own because they wait for the network, for disks or for other programs; they
// hand it values and never share any. What the agent knows survives in the state
// directory, so that a host starts, forwards and attaches containers without the
// coordinator. life.go draws the life of a lease.
//
// The agent takes nothing down when it ends: containers go on talking. Teardown
// does, when the operator asks for it.
package agent

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall/firewalld"
	"overlayd.internal/overlay/overlayd/internal/datapath"
	"overlayd.internal/overlay/overlayd/internal/fast"
	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/runtimes/docker"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/teardown"
)

// Agent is made by New and lives in Run.
type Agent struct {
	opts   Options
	log    *slog.Logger
	timing timing
	counts *counts
	served atomic.Pointer[served] // what HTTP shows; the loop replaces it
	peers  atomic.Int64           // that are programmed; the loop counts them
	docker *docker.Docker         // nil: no Docker
	fast   *fast.Path
	// firewall announces that Docker may have put rules before ours.
	firewall chan struct{}
	// containers announces that Docker has told of other containers.
	containers chan struct{}
	findings   atomic.Pointer[[]string] // of doctor, as they are told
	told       chan struct{}            // announces that findings are others
}

// Run works until ctx is done, then returns nil. It returns an error when the
// agent cannot start: directories, identity, sockets, kernel, another agent in
// this network namespace. The coordinator may be away at any time.
func (a *Agent) Run(ctx context.Context) error {
	files, err := openFiles(a.opts.RunDir, a.opts.StateDir, a.log)
	if err != nil {
		return err
	}
	defer files.close()
	only, err := lockNamespace(ctx, a.opts.RunDir)
	if err != nil {
		return err
	}
	defer only.release()
	id, start, bootID, err := a.begin(files)
	if err != nil {
		return err
	}
	if a.opts.Identify != nil {
		if err := a.opts.Identify(id); err != nil {
			return fmt.Errorf("agent id %s: %w", id, err)
		}
	}
	socket := serve.Socket{Group: a.opts.SocketGroup, Path: filepath.Join(a.opts.RunDir, conf.SocketFile), Perm: 0o660, Look: a.timing.socket}
	listeners, err := listen(ctx, socket, a.opts.Listen)
	if err != nil {
		return err
	}
	defer listeners.close()
	dp, err := datapath.New(a.log)
	if err != nil {
		return err
	}
	defer dp.Close()
	dp.SelectFirewall(a.opts.Firewall)
	pass := dp.UseFirewalld(firewalld.Address())

	log := a.log.With(logkey.Agent, id)
	group, ctx := errgroup.WithContext(ctx)
	l := a.newLoop(loopParts{id: id, instance: start, bootID: bootID, log: log, files: files, dp: dp, group: group})
	l.recall()

	group.Go(func() error { return listeners.serve(ctx, a.handler(), a.log) })
	running := []func(context.Context) error{
		only.answer, l.registrar.run, l.reporter.run, l.goHome, l.runtimes.Run,
		a.newSweeper(log).run, l.inventory.run, l.surveyor.run, a.newExaminer(log).run, l.room.run, a.fast.Run, pass.Run,
	}
	if a.docker != nil {
		running = append(running, a.docker.Run)
	}
	for _, run := range running {
		group.Go(func() error { return run(ctx) })
	}
	dp.OnRules(a.fast.RulesChanged)
	changes := dp.Changes(ctx)
	group.Go(func() error { return l.run(ctx, changes) })
	log.Info("agent started", logkey.Version, a.opts.Version, logkey.RunDir, a.opts.RunDir, logkey.StateDir, a.opts.StateDir)
	err = group.Wait()
	for range changes { // closed when the last goroutine has ended
	}
	return err
}

// begin stores what has to be on disk before anybody hears of this agent, or anything
// is changed: who it is, that it has begun, and what the host had before. They are
// files of their own, and written side by side the disk is waited for once.
func (a *Agent) begin(files *files) (id string, start *instance, bootID string, err error) {
	if bootID, err = conf.BootID(); err != nil {
		return "", nil, "", err
	}
	var writing errgroup.Group
	writing.Go(func() (err error) {
		id, err = files.identity(a.opts.ID)
		return err
	})
	writing.Go(func() (err error) {
		if start, err = files.newInstance(); err != nil {
			err = fmt.Errorf("begin an instance: %w", err)
		}
		return err
	})
	writing.Go(func() error {
		if err := teardown.Remember(a.opts.StateDir, bootID); err != nil {
			a.log.Warn("cannot store what the host had before; teardown will not put it back", logkey.Err, err)
		}
		return nil
	})
	err = writing.Wait() // before id and start are read
	return id, start, bootID, err
}
