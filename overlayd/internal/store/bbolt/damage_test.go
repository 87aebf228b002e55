package bbolt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/boltfile"
	"overlayd.internal/overlay/overlayd/internal/store"
)

func open(path string) (*Store, error) { return Open(path, slog.New(slog.DiscardHandler)) }

// filled makes a file with enough keys for several levels of pages and returns
// what is in it.
func filled(t *testing.T, path string) []store.KV {
	t.Helper()
	s := mustOpen(t, path)
	for batch := range 20 {
		var ops []store.Op
		for i := range 100 {
			n := batch*100 + i
			ops = append(ops, store.Op{Key: fmt.Sprintf("key/%d", n*7919%100003), Value: []byte(strings.Repeat("v", n%200))})
		}
		if _, err := s.Commit(t.Context(), store.Txn{Then: ops}); err != nil {
			t.Fatal(err)
		}
	}
	kvs, _, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return kvs
}

func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b", "store.db")
	want := filled(t, path)
	s := mustOpen(t, path)
	got, rev, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if rev != 20 || !reflect.DeepEqual(want, got) {
		t.Errorf("at revision %d, after reopening: %d keys, want %d", rev, len(got), len(want))
	}
	if next, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: "x"}}}); err != nil || next != 21 {
		t.Errorf("next revision %d (%v), want 21", next, err)
	}
	// What was before the start is not remembered.
	err = s.Watch(t.Context(), "", 19, func(uint64, []store.Event) error { return nil })
	if !errors.Is(err, store.ErrCompacted) {
		t.Errorf("watch from before the start: %v, want ErrCompacted", err)
	}
	for name, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700 | os.ModeDir} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want {
			t.Errorf("%s has mode %s, want %s", name, info.Mode(), want)
		}
	}
}

func TestLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	first := mustOpen(t, path)
	if _, err := open(path); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), path) {
		t.Errorf("second open: %v, want ErrLocked", err)
	}
	first.Close()
	mustOpen(t, path)
}

func TestTooLarge(t *testing.T) {
	s := mustOpen(t, filepath.Join(t.TempDir(), "store.db"))
	for _, op := range []store.Op{
		{Key: strings.Repeat("k", store.MaxKey+1)},
		{Key: "k", Value: make([]byte, store.MaxValue+1)},
	} {
		if _, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{op}}); err == nil {
			t.Errorf("key of %d bytes with value of %d bytes was taken", len(op.Key), len(op.Value))
		}
	}
}

// A file that cannot be used is an error that says so and stays as it is.
func TestUnusable(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	filled(t, good)
	image, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	foreign := func(bucket string, kv map[string][]byte) []byte {
		path := filepath.Join(dir, "foreign")
		os.Remove(path)
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{PageSize: pageSize})
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *bbolt.Tx) error {
			if bucket == "meta" {
				if _, err := tx.CreateBucket(bucketKV); err != nil {
					return err
				}
			}
			b, err := tx.CreateBucket([]byte(bucket))
			for k, v := range kv {
				err = errors.Join(err, b.Put([]byte(k), v))
			}
			return err
		})
		if err := errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, tt := range map[string]struct {
		content []byte
		words   string
	}{
		"text":          {[]byte("leases: none\n"), "no valid header"},
		"zeroes":        {make([]byte, 1<<16), "no valid header"},
		"first page":    {image[:pageSize], "truncated"},
		"half":          {image[:len(image)/2], "truncated"},
		"one byte":      {image[:1], "no valid header"},
		"other program": {foreign("buckets", nil), `bucket "buckets"`},
		"newer format":  {foreign("meta", map[string][]byte{"format": number(format + 1), "revision": number(7)}), "format 3"},
		"older format":  {foreign("meta", map[string][]byte{"format": number(format - 1), "revision": number(7)}), "format 1"},
		"no format":     {foreign("meta", nil), "format"},
		"no revision":   {foreign("meta", map[string][]byte{"format": number(format)}), "revision"},
		"no digest":     {foreign("meta", map[string][]byte{"format": number(format), "revision": number(0)}), "digest"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "store.db")
			if err := os.WriteFile(path, tt.content, 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := open(path)
			if err == nil {
				s.Close()
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), tt.words) || !strings.Contains(err.Error(), path) {
				t.Errorf("error %q does not say %q", err, tt.words)
			}
			after, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if string(after) != string(tt.content) {
				t.Error("the file was changed")
			}
			if f, err := os.Open(path); err != nil || lock(f, 0) != nil {
				t.Error("the file is still locked")
			} else {
				f.Close()
			}
		})
	}
	t.Run("directory", func(t *testing.T) {
		if _, err := open(t.TempDir()); err == nil {
			t.Error("opened a directory")
		}
	})
	t.Run("empty", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		mustOpen(t, path)
	})
}

// Whatever is done to the file: it opens with everything in it, or is refused;
// it never panics, and never shows other content.
func TestRandomDamage(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	want := filled(t, good)
	image, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	used := usedPages(t, good)
	rnd := rand.New(rand.NewSource(1))
	path := filepath.Join(dir, "damaged")
	refused := 0
	const rounds = 300
	for round := range rounds {
		damaged := append([]byte(nil), image...)
		page := used[rnd.Intn(len(used))] * pageSize
		var what string
		switch round % 4 {
		case 0:
			n := rnd.Intn(len(damaged))
			damaged, what = damaged[:n], fmt.Sprintf("truncated to %d", n)
		case 1:
			clear(damaged[page : page+pageSize])
			what = fmt.Sprintf("page at %d zeroed", page)
		default:
			bit := page*8 + rnd.Intn(pageSize*8)
			if round%4 == 3 { // where the structure is
				bit = page*8 + rnd.Intn(64*8)
			}
			damaged[bit/8] ^= 1 << (bit % 8)
			what = fmt.Sprintf("bit %d flipped", bit)
		}
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := open(path)
		if err != nil {
			refused++
			continue
		}
		got, rev, err := s.List(t.Context(), "")
		// When the newer meta page is hit the older one counts: the state before
		// the last transaction.
		if err != nil || rev < 19 || !reflect.DeepEqual(upTo(want, rev), got) {
			t.Errorf("%s: opened at revision %d (%v) with other content", what, rev, err)
		}
		s.Close()
	}
	if refused < rounds/4 {
		t.Errorf("only %d of %d damaged files were refused", refused, rounds)
	}
	t.Logf("%d of %d damaged files were refused, the others were whole", refused, rounds)
}

// A page whose header counts one element less is sound in itself: only what is
// known of the whole tells that keys are missing.
func TestMissingElement(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	filled(t, good)
	image, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "damaged")
	pages := 0
	for _, page := range usedPages(t, good) {
		damaged := append([]byte(nil), image...)
		head := damaged[page*pageSize:]
		flags, count := binary.NativeEndian.Uint16(head[8:]), binary.NativeEndian.Uint16(head[10:])
		if flags != 0x01 && flags != 0x02 {
			continue
		}
		pages++
		binary.NativeEndian.PutUint16(head[10:], count-1)
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := open(path)
		if err == nil {
			s.Close()
			t.Errorf("page %d without the last of its %d elements: opened", page, count)
		}
	}
	if pages < 10 {
		t.Errorf("only %d pages with elements", pages)
	}
}

// upTo are the keys that were there at a revision, when none was written twice.
func upTo(kvs []store.KV, rev uint64) (out []store.KV) {
	for _, kv := range kvs {
		if kv.Mod <= rev {
			out = append(out, kv)
		}
	}
	return out
}

// usedPages are the pages that the check looks at.
func usedPages(t *testing.T, path string) (pages []int) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	checked, err := boltfile.Check(f, boltfile.Options{}, func(_, _, _ []byte) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	for i, used := range checked.InUse {
		if used {
			pages = append(pages, i)
		}
	}
	return pages
}

// The commit of bbolt reports an error and nothing was written, or everything
// was, or the file cannot even be read.
func TestCommitFails(t *testing.T) {
	put := func(key string) store.Txn { return store.Txn{Then: []store.Op{{Key: key}}} }
	broken := errors.New("disk on fire")
	keys := func(t *testing.T, s *Store) (out []string) {
		t.Helper()
		kvs, _, err := s.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, kv := range kvs {
			out = append(out, kv.Key)
		}
		return out
	}
	t.Run("nothing written", func(t *testing.T) {
		s := mustOpen(t, filepath.Join(t.TempDir(), "store.db"))
		s.commit = func(tx *bbolt.Tx) error { return errors.Join(tx.Rollback(), broken) }
		_, err := s.Commit(t.Context(), put("a"))
		if !errors.Is(err, broken) || errors.Is(err, store.ErrUnknown) {
			t.Errorf("error %v", err)
		}
		s.commit = (*bbolt.Tx).Commit
		if rev, err := s.Commit(t.Context(), put("b")); err != nil || rev != 1 {
			t.Errorf("revision %d (%v), want 1", rev, err)
		}
		if diff := cmp.Diff([]string{"b"}, keys(t, s)); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("written after all", func(t *testing.T) {
		s := mustOpen(t, filepath.Join(t.TempDir(), "store.db"))
		s.commit = func(tx *bbolt.Tx) error { return errors.Join(tx.Commit(), broken) }
		if _, err := s.Commit(t.Context(), put("a")); !errors.Is(err, store.ErrUnknown) {
			t.Errorf("error %v, want ErrUnknown", err)
		}
		s.commit = (*bbolt.Tx).Commit
		if rev, err := s.Commit(t.Context(), put("b")); err != nil || rev != 2 {
			t.Errorf("revision %d (%v), want 2", rev, err)
		}
		var seen []string
		enough := errors.New("enough")
		err := s.Watch(t.Context(), "", 0, func(rev uint64, events []store.Event) error {
			seen = append(seen, events[0].Key)
			if rev == 2 {
				return enough
			}
			return nil
		})
		if diff := cmp.Diff([]string{"a", "b"}, seen); diff != "" || !errors.Is(err, enough) {
			t.Errorf("watchers see (%v):\n%s", err, diff)
		}
	})
	t.Run("unreadable", func(t *testing.T) {
		s := mustOpen(t, filepath.Join(t.TempDir(), "store.db"))
		s.commit = func(tx *bbolt.Tx) error {
			return errors.Join(tx.Bucket(bucketMeta).Delete(keyRevision), tx.Commit(), broken)
		}
		if _, err := s.Commit(t.Context(), put("a")); !errors.Is(err, store.ErrUnknown) {
			t.Errorf("error %v, want ErrUnknown", err)
		}
		if _, err := s.Commit(t.Context(), put("b")); err == nil || !strings.Contains(err.Error(), "reopened") {
			t.Errorf("a store that failed takes commits: %v", err)
		}
		if err := s.Watch(t.Context(), "", 0, func(uint64, []store.Event) error { return nil }); err == nil {
			t.Error("a watch on a store that failed goes on")
		}
	})
}

// A disk too full for a new store leaves nothing behind that is in the way when
// there is room again.
func TestNewOnFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a tmpfs")
	}
	dir := t.TempDir()
	for pages := 1; pages <= 5; pages++ {
		size := func(n int) string { return fmt.Sprintf("size=%d", n*pageSize) }
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, size(pages)); err != nil {
			t.Skipf("mount a tmpfs: %v", err)
		}
		path := filepath.Join(dir, "store.db")
		if s, err := open(path); err == nil {
			s.Close()
			t.Errorf("%d pages were enough; the test shows nothing", pages)
		} else if !errors.Is(err, unix.ENOSPC) {
			t.Errorf("with %d pages: %v, want %v", pages, err, unix.ENOSPC)
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, size(100)); err != nil {
			t.Error(err)
		}
		if s, err := open(path); err != nil {
			t.Errorf("with room again, after %d pages: %v", pages, err)
		} else if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
	}
}
