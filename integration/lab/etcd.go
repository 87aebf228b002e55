package lab

import (
	"context"
	"fmt"
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
	return "http://" + netip.AddrPortFrom(n.Underlay(), etcdPort).String()
}

// store is the coordinator's --store.
func (l *Lab) store(n *Node) string {
	if l.etcd {
		return "etcd:" + etcdURL(n)
	}
	return "bbolt:" + filepath.Join(l.coordinatorDir(), "coordinator.db")
}

// startEtcd starts a cluster of one member on a node and waits until it answers.
func (l *Lab) startEtcd(ctx context.Context, n *Node) error {
	const peer = "http://127.0.0.1:2380"
	_, err := l.Start(n.Netns, "etcd", "etcd", "--data-dir", filepath.Join(l.Dir, "etcd"),
		"--listen-client-urls", etcdURL(n), "--advertise-client-urls", etcdURL(n),
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)
	if err != nil {
		return err
	}
	return Wait(ctx, "etcd to answer", 20*time.Second, func() error {
		b, err := n.Get(ctx, etcdURL(n)+"/health")
		if err == nil && !strings.Contains(string(b), "true") {
			err = fmt.Errorf("%s", b)
		}
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
	argv := append(slices.Clone(first.argv), "--state-dir", dir, "--join-token", strings.TrimSpace(token)) // the last one counts
	second := &Coordinator{node: n, lab: l, URL: l.scheme() + netip.AddrPortFrom(n.Underlay(), CoordinatorPort).String(), argv: argv}
	if second.Proc, err = l.Start(n.Netns, "coordinator2", argv...); err != nil {
		return nil, err
	}
	err = Wait(ctx, "the second coordinator to be ready", 20*time.Second, func() error {
		_, err := get(ctx, socketClient(filepath.Join(dir, "coordinator.sock")), "http://coordinator/readyz")
		return err
	})
	first.URL += "," + second.URL
	return second, err
}
