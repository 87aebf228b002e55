package transfer_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/bbolt"
	"overlayd.internal/overlay/overlayd/internal/store/transfer"
)

func open(t *testing.T) store.Store {
	t.Helper()
	s, err := bbolt.Open(filepath.Join(t.TempDir(), "store.db"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func put(t *testing.T, s store.Store, key, value string) {
	t.Helper()
	if _, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: key, Value: []byte(value)}}}); err != nil {
		t.Fatal(err)
	}
}

// cluster is a store with what coordinators keep in it.
func cluster(t *testing.T) store.Store {
	t.Helper()
	s := open(t)
	put(t, s, "cluster", `{"id": "c1"}`)
	put(t, s, "runs", "[]")
	put(t, s, "coordinators/x", "{}")
	for i := range 250 {
		put(t, s, fmt.Sprintf("agents/%d", 250-i), strings.Repeat("v", i))
	}
	put(t, s, "empty", "")
	put(t, s, "bytes", "\x00\xff")
	return s
}

var now = time.UnixMilli(1_800_000_000_000)

func content(t *testing.T, s store.Store) transfer.Content {
	t.Helper()
	c, err := transfer.Read(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCopyAndBackup(t *testing.T) {
	from := cluster(t)
	c := content(t, from)
	var file bytes.Buffer
	if err := c.Encode(&file, now); err != nil {
		t.Fatal(err)
	}
	read, taken, err := transfer.Decode(bytes.NewReader(file.Bytes()))
	if err != nil || !taken.Equal(now) {
		t.Fatalf("taken %s: %v", taken, err)
	}
	for name, c := range map[string]transfer.Content{"copy": c, "restored": read} {
		to := open(t)
		if err := c.Copy(t.Context(), to, now); err != nil {
			t.Fatal(err)
		}
		kvs, _, err := to.List(t.Context(), "")
		if err != nil || len(kvs) != 253 {
			t.Fatalf("%s: %d keys, %v", name, len(kvs), err)
		}
		created := map[string]uint64{}
		for _, kv := range kvs {
			created[kv.Key] = kv.Create
			var cl transfer.Cluster
			if kv.Key == "cluster" && (json.Unmarshal(kv.Value, &cl) != nil || cl.ID != "c1" || cl.EpochBase != 1_800_000_000_000) {
				t.Errorf("%s: cluster %s", name, kv.Value)
			}
		}
		if created["agents/250"] > created["agents/1"] {
			t.Errorf("%s: the order of the agents is another one", name)
		}
		if err := c.Copy(t.Context(), to, now); !errors.Is(err, transfer.ErrNotEmpty) {
			t.Errorf("%s: a second time: %v", name, err)
		}
	}
}

// Whatever is cut off a backup, or changed in it, is noticed before anything is
// written.
func TestDamagedBackup(t *testing.T) {
	var file bytes.Buffer
	if err := content(t, cluster(t)).Encode(&file, now); err != nil {
		t.Fatal(err)
	}
	whole := file.Bytes()
	for n := 0; n < len(whole)-1; n += 97 {
		if _, _, err := transfer.Decode(bytes.NewReader(whole[:n])); err == nil {
			t.Errorf("cut off after %d of %d bytes: no error", n, len(whole))
		}
		bad := bytes.Clone(whole)
		bad[n] ^= 1
		if _, _, err := transfer.Decode(bytes.NewReader(bad)); err == nil {
			t.Errorf("byte %d changed: no error", n)
		}
	}
}

func TestNoCluster(t *testing.T) {
	s := open(t)
	put(t, s, "other", "1")
	if _, err := transfer.Read(t.Context(), s); err == nil || !strings.Contains(err.Error(), "no cluster") {
		t.Errorf("%v", err)
	}
}

// fails is a store that takes some transactions and then no more.
type fails struct {
	store.Store
	after int
}

func (f *fails) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	if f.after--; f.after < 0 {
		return 0, errors.New("no space left on device")
	}
	return f.Store.Commit(ctx, txn)
}

// Who is left with half a copy is told so.
func TestHalfWritten(t *testing.T) {
	c := content(t, cluster(t))
	for _, after := range []int{0, 1, 3} {
		err := c.Copy(t.Context(), &fails{open(t), after}, now)
		if err == nil || !strings.Contains(err.Error(), "no space left") || !strings.Contains(err.Error(), "empty the store, or name another one") {
			t.Errorf("after %d transactions: %v", after, err)
		}
	}
	full := open(t)
	put(t, full, "other", "1")
	if err := c.Copy(t.Context(), full, now); err == nil || strings.Contains(err.Error(), "try again") {
		t.Errorf("nothing was written: %v", err)
	}
}
