package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/location"
	"overlayd.internal/overlay/overlayd/internal/store/transfer"
)

func (e *env) storeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "store", Short: "where coordinators keep leases"}
	var from, to string
	var identity location.Identity
	c := &cobra.Command{
		Use: "copy --from STORE --to STORE", Short: "move a cluster to another store", Args: cobra.NoArgs,
		Long: `Move a cluster to another store, in either direction, and check every entry.

Stop all coordinators first, and start them on the new store afterwards. The
store to copy to must be empty; the one to copy from is left as it is.`,
		Example: "  overlayctl store copy --from bbolt:/var/lib/overlay/coordinator.db --to etcd:https://10.0.0.1:2379 --store-ca ca.pem --store-cert c.pem --store-key c.key",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if from == "" || to == "" {
				return cli.Usagef("--from and --to are both needed")
			}
			return e.copyStore(cmd.Context(), from, to, identity)
		},
	}
	c.Flags().Var(cli.String(&from, "", "STORE"), "from", "bbolt:PATH or etcd:URL[,URL...][/prefix]")
	c.Flags().Var(cli.String(&to, "", "STORE"), "to", "the same")
	identity.Declare(c.Flags())
	cmd.AddCommand(c)
	return cmd
}

func (e *env) copyStore(ctx context.Context, from, to string, identity location.Identity) (err error) {
	content, err := e.readStore(ctx, from, identity)
	if err != nil {
		return fmt.Errorf("--from %s: %w", from, err)
	}
	if err := e.writeStore(ctx, to, identity, content.Copy); err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.stdout, "copied cluster %s, %d entries, from %s to %s; all of them were read back and are the same\n",
		content.Cluster.ID, len(content.Entries), from, to)
	return err
}

func (e *env) readStore(ctx context.Context, from string, identity location.Identity) (content transfer.Content, err error) {
	if path, ok := cutBbolt(from); ok {
		if _, err := os.Stat(path); err != nil { // opening it would make it
			return content, err
		}
	}
	s, err := open(ctx, "--from", from, identity)
	if err != nil {
		return content, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	return transfer.Read(ctx, s)
}

func cutBbolt(name string) (path string, ok bool) {
	const scheme = "bbolt:"
	if len(name) < len(scheme) || name[:len(scheme)] != scheme {
		return "", false
	}
	return name[len(scheme):], true
}

func (e *env) writeStore(ctx context.Context, to string, identity location.Identity, write func(context.Context, store.Store, time.Time) error) (err error) {
	s, err := open(ctx, "--to", to, identity)
	if err != nil {
		return fmt.Errorf("--to %s: %w", to, err)
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := write(ctx, s, time.Now()); err != nil {
		return fmt.Errorf("--to %s: %w", to, err)
	}
	return nil
}

func open(ctx context.Context, flag, name string, identity location.Identity) (store.Store, error) {
	s, _, err := location.Open(ctx, flag, name, identity, slog.New(slog.DiscardHandler))
	return s, err
}

func (e *env) backupCommand() *cobra.Command {
	return &cobra.Command{
		Use: "backup FILE", Short: "copy all that a running coordinator has stored to a file", Args: cobra.ExactArgs(1),
		Long: `Copy all that a running coordinator has stored to a file, as it is at one moment.

The file holds leases, tokens as hashes, and the CA: keep it as secret as the
coordinator's state directory. It is put back with overlayctl restore.`,
		Example: "  overlayctl backup /root/overlay-$(date +%F).backup",
		RunE:    func(cmd *cobra.Command, args []string) error { return e.backup(cmd.Context(), args[0]) },
	}
}

// backupPath is the file that a backup replaces, or makes: the one behind a link. What is
// no file, as /dev/stdout, would be replaced by one.
func backupPath(path string) (string, error) {
	if path == "-" {
		return "", cli.Usagef("FILE is -: a backup is read back before it counts, so give the name of a file")
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return path, nil
	}
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", cli.Usage(err)
	}
	if fi, err := os.Stat(target); err != nil || !fi.Mode().IsRegular() {
		return "", cli.Usagef("%s is there and is no file", path)
	}
	return target, nil
}

func (e *env) backup(ctx context.Context, path string) (err error) {
	if path, err = backupPath(path); err != nil {
		return err
	}
	client, err := e.operator(ctx)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.tmp") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	err = errors.Join(client.Backup(ctx, f), f.Sync())
	var content transfer.Content
	if err == nil {
		if _, err = f.Seek(0, io.SeekStart); err == nil {
			content, _, err = transfer.Decode(f)
		}
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	fmt.Fprintf(e.stdout, "%s: cluster %s at revision %d, %d entries\n", path, content.Cluster.ID, content.Revision, len(content.Entries))
	return nil
}

func (e *env) restoreCommand() *cobra.Command {
	var to string
	var identity location.Identity
	cmd := &cobra.Command{
		Use: "restore FILE --to STORE", Short: "put a backup into an empty store", Args: cobra.ExactArgs(1),
		Long: `Put a backup into an empty store, after it has been checked.

Stop all coordinators first; move a file away, or name another one, or another
prefix of etcd, and start the coordinators on it. Agents that got or changed a
lease after the backup was made show it when they register, and keep it. For ten
minutes from the start of the coordinators nothing is leased that such an agent
could hold: a host that is new waits so long.`,
		Example: "  overlayctl restore /root/overlay.backup --to bbolt:/var/lib/overlay/coordinator.db",
		RunE: func(cmd *cobra.Command, args []string) error {
			if to == "" {
				return cli.Usagef("--to is missing; name an empty store, as in --store of the coordinator")
			}
			return e.restore(cmd.Context(), args[0], to, identity)
		},
	}
	cmd.Flags().Var(cli.String(&to, "", "STORE"), "to", "bbolt:PATH or etcd:URL[,URL...][/prefix]")
	identity.Declare(cmd.Flags())
	return cmd
}

func (e *env) restore(ctx context.Context, path, to string, identity location.Identity) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	content, taken, err := transfer.Decode(f)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := e.writeStore(ctx, to, identity, content.Restore); err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.stdout, "restored cluster %s as of %s, %d entries, to %s; what agents hold that is not in it they get back when they register, "+
		"and hosts that are new get nothing in the first ten minutes\n",
		content.Cluster.ID, taken.Format(time.RFC3339), len(content.Entries), to)
	return err
}
