package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/bbolt"
	"overlayd.internal/overlay/overlayd/internal/store/etcd"
)

// storeFlags say where the coordinator keeps its data.
type storeFlags struct{ name, ca, cert, key string }

func (f *storeFlags) declare(fs *pflag.FlagSet) {
	fs.Var(cli.String(&f.name, "", "STORE"), "store",
		"where leases are kept, bbolt:PATH or etcd:URL[,URL...][/prefix] (default bbolt:<state-dir>/coordinator.db)")
	fs.Var(cli.String(&f.ca, "", "FILE"), "store-ca", "certificates of who signed those of etcd (default: the system's)")
	fs.Var(cli.String(&f.cert, "", "FILE"), "store-cert", "client certificate for etcd")
	fs.Var(cli.String(&f.key, "", "FILE"), "store-key", "its key")
}

// open opens the store. shared says that other coordinators may use it too.
func (f *storeFlags) open(ctx context.Context, stateDir string, log *slog.Logger) (st store.Store, shared bool, err error) {
	name := f.name
	switch {
	case name == "" && stateDir == "":
		return nil, false, cli.Usagef("--state-dir is empty; name the directory that the leases are to be kept in")
	case name == "":
		name = "bbolt:" + filepath.Join(stateDir, "coordinator.db")
	}
	if where, ok := strings.CutPrefix(name, "etcd:"); ok && where != "" {
		st, err = f.openEtcd(ctx, where, log)
		return st, true, err
	}
	path, ok := strings.CutPrefix(name, "bbolt:")
	if !ok || path == "" {
		return nil, false, cli.Usagef("--store %q: want bbolt:PATH or etcd:URL[,URL...][/prefix]", name)
	}
	if f.ca != "" || f.cert != "" || f.key != "" {
		return nil, false, cli.Usagef("--store-ca, --store-cert and --store-key are for etcd, and --store is %s", name)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, false, fmt.Errorf("--store: %w", err)
	}
	st, err = bbolt.Open(path, log)
	return st, false, err
}

// waitForEtcd is how long a start waits for etcd before it ends with the reason;
// whoever supervises the coordinator starts it again.
const waitForEtcd = 30 * time.Second

func (f *storeFlags) openEtcd(ctx context.Context, where string, log *slog.Logger) (store.Store, error) {
	endpoints, prefix, err := etcd.Parse(where, f.ca != "" || f.cert != "")
	if err != nil {
		return nil, cli.Usagef("--store etcd:%s: %w", where, err)
	}
	ctx, cancel := context.WithTimeout(ctx, waitForEtcd)
	defer cancel()
	return etcd.Open(ctx, etcd.Options{
		Endpoints: endpoints, Prefix: prefix,
		CAFile: f.ca, CertFile: f.cert, KeyFile: f.key, Log: log,
	})
}
