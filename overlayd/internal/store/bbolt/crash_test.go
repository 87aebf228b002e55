package bbolt

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// childEnv holds the path of the store when the test binary is to be the
// process that gets killed.
const childEnv = "STORE_CRASH_CHILD"

// runAsChild commits from many goroutines until it is killed, and prints every
// key once its commit is acknowledged.
func runAsChild() bool {
	path := os.Getenv(childEnv)
	if path == "" {
		return false
	}
	s, err := Open(path, slog.New(slog.DiscardHandler))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				key := fmt.Sprintf("%d/%d/%d", os.Getpid(), g, i)
				rev, err := s.Commit(context.Background(), store.Txn{
					If:   []store.Cond{{Key: "a/" + key}},
					Then: []store.Op{{Key: "a/" + key, Value: []byte(key)}, {Key: "b/" + key, Value: []byte(key)}},
				})
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				mu.Lock()
				fmt.Println(key, rev)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return true
}

// Whatever was acknowledged before a kill -9 is there afterwards, and what was
// not is there whole or not at all.
func TestKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	acknowledged := map[string]uint64{}
	for round := range 20 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(out)
		for n := 0; ; n++ {
			line, err := lines.ReadString('\n')
			if err != nil {
				break // what the kill cut off was not acknowledged
			}
			if n == 40+17*round {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
			key, rev, _ := strings.Cut(strings.TrimSpace(line), " ")
			if acknowledged[key], err = strconv.ParseUint(rev, 10, 64); err != nil {
				t.Fatal(err)
			}
		}
		cmd.Wait() // killed; that is no news
		s := mustOpen(t, path)
		checkAcknowledged(t, s, acknowledged)
		if t.Failed() {
			t.Fatalf("after round %d", round)
		}
		s.Close()
	}
	t.Logf("%d acknowledged commits survived 20 kills", len(acknowledged))
}

func checkAcknowledged(t *testing.T, s *Store, acknowledged map[string]uint64) {
	t.Helper()
	stored := map[string]store.KV{}
	kvs, rev, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range kvs {
		stored[kv.Key] = kv
	}
	for key, want := range acknowledged {
		if stored["a/"+key].Mod != want || stored["b/"+key].Mod != want {
			t.Errorf("%s was acknowledged at %d and is stored at %d and %d", key, want, stored["a/"+key].Mod, stored["b/"+key].Mod)
		}
	}
	seen := map[uint64]string{}
	for key, kv := range stored {
		base := key[2:]
		if stored["a/"+base].Mod != stored["b/"+base].Mod {
			t.Errorf("half of %s is stored", base)
		}
		if other, ok := seen[kv.Mod]; ok && other != base {
			t.Errorf("%s and %s have one revision, %d", base, other, kv.Mod)
		}
		seen[kv.Mod] = base
		if kv.Mod > rev {
			t.Errorf("%s is at %d and the store at %d", key, kv.Mod, rev)
		}
	}
}
