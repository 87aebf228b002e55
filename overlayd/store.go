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
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/location"
	"overlayd.internal/overlay/overlayd/internal/store/transfer"
)

// storeFlags say where the coordinator keeps its data.
type storeFlags struct {
	name     string
	adopt    string // cluster whose leases are adopted by an empty store
	identity location.Identity
}

func (f *storeFlags) declare(fs *pflag.FlagSet) {
	fs.Var(cli.String(&f.name, "", "STORE"), "store",
		"where leases are kept, bbolt:PATH or etcd:URL[,URL...][/prefix] (default bbolt:<state-dir>/coordinator.db)")
	f.identity.Declare(fs)
	fs.Var(cli.Func("CLUSTER", "", f.setAdopt), "adopt",
		"id of the cluster that was in a store which was lost: if the store is empty, it becomes that cluster's again, and agents get back the leases they hold")
}

// setAdopt takes the id of a cluster.
func (f *storeFlags) setAdopt(id string) error {
	if b, err := hex.DecodeString(id); err != nil || len(b) != 16 && id != "" {
		return fmt.Errorf("want the id of a cluster, 32 hexadecimal digits, as the coordinator that misses it prints it, or cluster.json in its state directory")
	}
	f.adopt = id
	return nil
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
	switch {
	case err != nil:
		return err
	case was.Cluster == "" && f.adopt == "":
		return nil
	case was.Cluster == "":
		was = remembered{Cluster: f.adopt, Store: "another store"}
	case f.adopt != "" && f.adopt != was.Cluster:
		return cli.Usagef("--adopt %s: this coordinator served cluster %s; give that id, or leave --adopt out", f.adopt, was.Cluster)
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
	if f.adopt != "" && len(kvs) == 0 {
		return nil
	}
	return fmt.Errorf("the store %s holds %s, but this coordinator served cluster %s from %s; "+
		"put a backup back with `overlayctl restore FILE --to %s`, or give the --store that has it; "+
		"without either, start with an empty store and --adopt %s, and the agents get back what they hold; "+
		"or remove %s to begin with another cluster on purpose (its agents get new leases then)",
		f.name, holds, was.Cluster, was.Store, f.name, was.Cluster, filepath.Join(stateDir, clusterFile))
}

// witnessFile remembers in the state directory how far the store was.
const witnessFile = "store-epoch"

// openWitness opens what tells a store that was put back as it was before.
func openWitness(stateDir string, log *slog.Logger) (*coordinator.WitnessFile, error) {
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return nil, err
	}
	return coordinator.OpenWitness(filepath.Join(stateDir, witnessFile), log)
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
