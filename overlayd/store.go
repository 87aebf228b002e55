package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/pflag"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/location"
	"overlayd.internal/overlay/overlayd/internal/store/transfer"
)

// storeFlags say where the coordinator keeps its data.
type storeFlags struct {
	name     string
	identity location.Identity
}

func (f *storeFlags) declare(fs *pflag.FlagSet) {
	fs.Var(cli.String(&f.name, "", "STORE"), "store",
		"where leases are kept, bbolt:PATH or etcd:URL[,URL...][/prefix] (default bbolt:<state-dir>/coordinator.db)")
	f.identity.Declare(fs)
}

// open opens the store. shared says that other coordinators may use it too.
func (f *storeFlags) open(ctx context.Context, stateDir string, log *slog.Logger) (st store.Store, shared bool, err error) {
	switch {
	case f.name == "" && stateDir == "":
		return nil, false, cli.Usagef("--state-dir is empty; name the directory that the leases are to be kept in")
	case f.name == "":
		f.name = "bbolt:" + filepath.Join(stateDir, "coordinator.db")
	}
	st, shared, err = location.Open(ctx, "--store", f.name, f.identity, log)
	if err != nil {
		return nil, false, err
	}
	if err := f.checkCluster(ctx, st, stateDir); err != nil {
		return nil, false, errors.Join(err, st.Close())
	}
	return st, shared, nil
}

// clusterFile remembers in the state directory which cluster this coordinator
// serves, so that a store that was lost or swapped is no new cluster.
const clusterFile = "cluster.json"

type remembered struct {
	Cluster string `json:"cluster"`
	Store   string `json:"store"`
	// Config is what the file with the cluster configuration said when it was last
	// taken in, as a hash: a file that says something else has been edited since.
	Config string `json:"config,omitempty"`
}

// recall is what the state directory remembers; nothing where that is not there.
func recall(stateDir string) (was remembered, err error) {
	if stateDir == "" {
		return was, nil
	}
	path := filepath.Join(stateDir, clusterFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return was, nil
	} else if err != nil {
		return was, fmt.Errorf("--state-dir: %w", err)
	}
	if err := json.Unmarshal(text, &was); err != nil || was.Cluster == "" {
		return was, fmt.Errorf("--state-dir: %s cannot be read (%v); remove it if the store holds the right cluster", path, err)
	}
	return was, nil
}

// hashOf identifies what a configuration says, however it is written.
func hashOf(n conf.Network) (string, error) {
	text, err := json.Marshal(n)
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), err
}

// checkCluster refuses a store that does not hold the cluster this coordinator
// served before. Agents would get new leases from it, and running containers
// keep addresses that it gives to others.
func (f *storeFlags) checkCluster(ctx context.Context, st store.Store, stateDir string) error {
	was, err := recall(stateDir)
	if err != nil || was.Cluster == "" {
		return err
	}
	kvs, _, err := st.List(ctx, transfer.KeyCluster)
	if err != nil {
		return fmt.Errorf("read the store: %w", err)
	}
	holds := "no cluster; it is empty or was lost"
	for _, kv := range kvs {
		var now transfer.Cluster
		if kv.Key != transfer.KeyCluster || json.Unmarshal(kv.Value, &now) != nil {
			continue
		}
		if now.ID == was.Cluster {
			return nil
		}
		holds = "cluster " + now.ID
	}
	return fmt.Errorf("the store %s holds %s, but this coordinator served cluster %s from %s; "+
		"put a backup back with `overlayctl restore FILE --to %s`, or give the --store that has it, "+
		"or remove %s to begin with another cluster on purpose (its agents get new leases then)",
		f.name, holds, was.Cluster, was.Store, f.name, filepath.Join(stateDir, clusterFile))
}

// remember writes down which cluster is served, and what the file said that was
// last taken in.
func (f *storeFlags) remember(stateDir, cluster, config string) error {
	if stateDir == "" {
		return nil
	}
	text, err := json.Marshal(remembered{Cluster: cluster, Store: f.name, Config: config})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return err
	}
	return conf.WriteFile(filepath.Join(stateDir, clusterFile), append(text, '\n'), 0o600, stateDir)
}
