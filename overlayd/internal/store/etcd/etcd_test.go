package etcd_test

import (
	"fmt"
	"log/slog"
	"os"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/etcd"
	"overlayd.internal/overlay/overlayd/internal/store/etcdtest"
	"overlayd.internal/overlay/overlayd/internal/store/storetest"
)

func TestMain(m *testing.M) { os.Exit(etcdtest.Isolate(m)) }

func open(t testing.TB, c *etcdtest.Cluster, prefix string) *etcd.Store {
	t.Helper()
	s, err := etcd.Open(t.Context(), etcd.Options{Endpoints: c.Endpoints(), Prefix: prefix, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// The contract, on a cluster of three.
func TestContract(t *testing.T) {
	c := etcdtest.New(t, 3)
	n := 0
	storetest.Run(t, func(t *testing.T) store.Store {
		n++
		return open(t, c, fmt.Sprintf("/contract/%d", n))
	})
}
