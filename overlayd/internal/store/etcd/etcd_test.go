package etcd_test

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

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

// The contract, on clusters of three that speak TLS; that plain HTTP does as well is
// shown by all other tests. The newest etcd has to be built, which takes a minute of
// two cores, so it is left to the long run.
func TestContract(t *testing.T) {
	programs := map[string]func(t *testing.T) string{"debian": func(*testing.T) string { return "etcd" }}
	if *full {
		programs["newest"] = buildNewest
	}
	for name, program := range programs {
		t.Run(name, func(t *testing.T) {
			c, n := etcdtest.NewSecure(t, 3, program(t)), 0
			storetest.Run(t, func(t *testing.T) store.Store {
				n++
				return openSecure(t, c, fmt.Sprintf("/contract/%d", n))
			})
		})
	}
}

func buildNewest(t *testing.T) string {
	program := filepath.Join(t.TempDir(), "etcd")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", program, ".")
	build.Dir, build.Env = "../etcdtest/newest", append(os.Environ(), "CGO_ENABLED=0")
	began := time.Now()
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	version, err := exec.CommandContext(t.Context(), program, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("built in %v: %s", time.Since(began).Round(time.Second), version)
	return program
}
