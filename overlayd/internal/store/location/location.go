// Package location opens the store that a command line names.
package location

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/bbolt"
	"overlayd.internal/overlay/overlayd/internal/store/etcd"
)

// Identity is who a client of etcd is, as files.
type Identity struct{ CA, Cert, Key string }

// Declare declares --store-ca, --store-cert and --store-key.
func (i *Identity) Declare(fs *pflag.FlagSet) {
	fs.Var(cli.String(&i.CA, "", "FILE"), "store-ca", "certificates of who signed those of etcd (default: the system's)")
	fs.Var(cli.String(&i.Cert, "", "FILE"), "store-cert", "client certificate for etcd")
	fs.Var(cli.String(&i.Key, "", "FILE"), "store-key", "its key")
}

// waitForEtcd is how long Open waits for etcd before it fails with the reason.
const waitForEtcd = 30 * time.Second

// Open opens bbolt:PATH or etcd:URL[,URL...][/prefix]. shared says that others
// may use it at the same time. flag is the one that name comes from.
func Open(ctx context.Context, flag, name string, i Identity, log *slog.Logger) (st store.Store, shared bool, err error) {
	if where, ok := strings.CutPrefix(name, "etcd:"); ok && where != "" {
		endpoints, prefix, err := etcd.Parse(where, i.CA != "" || i.Cert != "")
		if err != nil {
			return nil, false, cli.Usagef("%s %s: %w", flag, name, err)
		}
		ctx, cancel := context.WithTimeout(ctx, waitForEtcd)
		defer cancel()
		st, err := etcd.Open(ctx, etcd.Options{
			Endpoints: endpoints, Prefix: prefix, CAFile: i.CA, CertFile: i.Cert, KeyFile: i.Key, Log: log,
		})
		if err != nil {
			return nil, false, err // and no Store that is a nil pointer
		}
		return st, true, nil
	}
	path, ok := strings.CutPrefix(name, "bbolt:")
	if !ok || path == "" {
		return nil, false, cli.Usagef("%s %q: want bbolt:PATH or etcd:URL[,URL...][/prefix]", flag, name)
	}
	if i != (Identity{}) && flag == "--store" {
		return nil, false, cli.Usagef("--store-ca, --store-cert and --store-key are for etcd, and --store is %s", name)
	}
	b, err := bbolt.Open(path, log)
	if err != nil {
		return nil, false, err
	}
	return b, false, nil
}
