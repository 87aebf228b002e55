package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/calls"
	"overlayd.internal/overlay/internal/firewall/firewalld"
	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/runtimes/docker"
	"overlayd.internal/overlay/overlayd/internal/teardown"
)

// dockerPatience bounds what teardown asks of dockerd.
const dockerPatience = time.Minute

// Teardown takes everything of ours off this host: Docker networks, files of the
// runtimes, links, routes, firewall rules, and the sysctls of before. The host
// keeps its identity (agent id, keys) and forgets its lease. While containers
// are attached it changes nothing, unless force is set. It fails if an agent
// runs. Of the options only the directories, DockerHost and Log matter.
func Teardown(ctx context.Context, o Options, force bool) error {
	if err := errors.Join(o.checkDirs()...); err != nil {
		return err
	}
	existed := isThere(o.RunDir)
	files, err := openFiles(o.RunDir, o.StateDir, o.Log)
	if err != nil {
		return err
	}
	defer files.close()
	only, err := lockNamespace(ctx, o.RunDir)
	if err != nil {
		return err
	}
	defer only.release()
	bootID, err := conf.BootID()
	if err != nil {
		return err
	}
	attached, err := teardown.Attached()
	if err != nil {
		return fmt.Errorf("look for containers: %w", err)
	}
	if len(attached) > 0 && !force {
		return teardown.Refusal(attached)
	}
	var errs []error
	if o.DockerHost != "" {
		err := o.teardownDocker(ctx, force)
		if err != nil && !force {
			return err // before anything was changed
		}
		errs = append(errs, err)
	}
	runtimes := o.runtimeFiles(o.Log)
	errs = append(errs, runtimes.Remove())
	removed, err := teardown.Kernel(ctx, o.Log)
	errs = append(errs, err)
	zone, err := firewalld.Client{Address: firewalld.Address()}.Remove(ctx, "")
	errs = append(errs, err)
	restored, err := teardown.Restore(o.StateDir, bootID)
	errs = append(errs, err)
	if err := errors.Join(errs...); err != nil {
		return err // what is stored stays for the next try
	}
	if err := o.removeState(files, existed); err != nil {
		return fmt.Errorf("remove what is stored: %w", err)
	}
	o.Log.Info("teardown is complete; the identity of this host stays", logkey.Objects, removed+zone+restored, logkey.StateDir, o.StateDir)
	return nil
}

func (o Options) teardownDocker(ctx context.Context, force bool) error {
	ctx, cancel := context.WithTimeout(ctx, dockerPatience)
	defer cancel()
	n, users, err := docker.Teardown(ctx, o.DockerHost, force)
	switch {
	case err != nil:
		return err
	case len(users) > 0 && !force:
		return teardown.Refusal(users)
	case n > 0:
		o.Log.Info("removed", logkey.What, "docker networks", logkey.Objects, n)
	}
	return nil
}

// removeState removes what the agent and the CNI programs stored, but for the
// identity of the host. The run directory goes if nothing else is in it.
func (o Options) removeState(f *files, existed bool) error {
	paths := []string{f.state(), f.lease(), f.peers(), filepath.Join(o.StateDir, teardown.BeforeFile)}
	for _, name := range append(calls.Files(), conf.AttachmentsFile, conf.IPAMDir, conf.SocketFile, conf.CAFile) {
		paths = append(paths, filepath.Join(o.RunDir, name))
	}
	var errs []error
	for _, path := range paths {
		errs = append(errs, os.RemoveAll(path))
	}
	errs = append(errs, os.Remove(filepath.Join(o.RunDir, lockFile)))
	if err := os.Remove(o.RunDir); err != nil && !existed {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func isThere(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
