package lab

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// etcdPort is where clients reach etcd.
const etcdPort = 2379

func etcdURL(n *Node) string {
	return "https://" + netip.AddrPortFrom(n.Underlay(), etcdPort).String()
}

func (l *Lab) etcdDir() string { return filepath.Join(l.Dir, "etcd") }

// Store is the coordinator's --store.
func (c *Coordinator) Store() string {
	if c.lab.etcd {
		return "etcd:" + etcdURL(c.node)
	}
	return "bbolt:" + filepath.Join(c.lab.coordinatorDir(), "coordinator.db")
}

// StoreArgs are how a client of the store identifies itself.
func (c *Coordinator) StoreArgs() []string {
	if !c.lab.etcd {
		return nil
	}
	ca, client := c.lab.etcdIdentity("ca"), c.lab.etcdIdentity("client")
	return []string{"--store-ca", ca.cert, "--store-cert", client.cert, "--store-key", client.key}
}

// Etcdctl runs etcdctl as the coordinator's client of etcd.
func (c *Coordinator) Etcdctl(ctx context.Context, args ...string) (string, error) {
	return c.lab.etcdctl(ctx, c.node, args...)
}

func (l *Lab) etcdctl(ctx context.Context, n *Node, args ...string) (string, error) {
	ca, client := l.etcdIdentity("ca"), l.etcdIdentity("client")
	return n.Run(ctx, append([]string{"env", "ETCDCTL_API=3", "etcdctl", "--endpoints", etcdURL(n),
		"--cacert", ca.cert, "--cert", client.cert, "--key", client.key}, args...)...)
}

// startEtcd starts a cluster of one member on a node, which speaks TLS and demands
// certificates, and waits until it answers.
func (l *Lab) startEtcd(ctx context.Context, n *Node) error {
	ca, err := l.makeEtcdIdentities(n)
	if err != nil {
		return err
	}
	member := l.etcdIdentity("member")
	const peer = "http://127.0.0.1:2380"
	_, err = l.Start(n.Netns, "etcd", "etcd", "--data-dir", filepath.Join(l.etcdDir(), "data"),
		"--listen-client-urls", etcdURL(n), "--advertise-client-urls", etcdURL(n),
		"--cert-file", member.cert, "--key-file", member.key, "--trusted-ca-file", ca.cert, "--client-cert-auth",
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)
	if err != nil {
		return err
	}
	return Wait(ctx, "etcd to answer", time.Minute, func() error {
		_, err := l.etcdctl(ctx, n, "get", "none")
		return err
	})
}

// startSecond starts another coordinator on the store of the first, which is all
// it needs besides a token. Agents that are started afterwards know both.
func (l *Lab) startSecond(ctx context.Context, first *Coordinator, n *Node) (*Coordinator, error) {
	token, err := l.Overlayctl(ctx, "token", "create", "--role", "coordinator")
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(l.Dir, "coordinator2")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	second := l.newCoordinator(n, "coordinator2", dir)
	second.file = first.file
	second.argv = append(slices.Clone(first.argv), "--state-dir", dir, "--join-token", strings.TrimSpace(token)) // the last one counts
	first.URL += "," + second.URL
	return second, second.Restart(ctx)
}
