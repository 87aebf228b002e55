package boltfile

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// filled makes a file with several levels of pages, values longer than a page, a
// bucket in a bucket, free pages and an empty bucket, and returns its entries.
func filled(t *testing.T, o bolt.Options) ([]byte, map[string]string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "db")
	o.PageSize = PageSize
	db, err := bolt.Open(path, 0o600, &o)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"small": "", "large": "", "empty": "", "nested": ""}
	put := func(tx *bolt.Tx, bucket, key, value string) error {
		b, err := tx.CreateBucketIfNotExists([]byte(bucket))
		want[bucket+"/"+key] = value
		return errors.Join(err, b.Put([]byte(key), []byte(value)))
	}
	err = db.Update(func(tx *bolt.Tx) error {
		err := put(tx, "small", "k", "v")
		for i := range 1200 {
			err = errors.Join(err, put(tx, "large", fmt.Sprintf("%05d", i*7%1200), strings.Repeat("x", i%300)))
		}
		err = errors.Join(err, put(tx, "large", "long", strings.Repeat("y", 3*PageSize)), put(tx, "nested", "k", ""))
		_, empty := tx.CreateBucket([]byte("empty"))
		inner, nested := tx.Bucket([]byte("nested")).CreateBucket([]byte("inner"))
		want["nested/inner"] = "a bucket"
		return errors.Join(err, empty, nested, inner.Put([]byte("not"), []byte("reported")))
	})
	for i := range 400 { // frees pages
		key := fmt.Sprintf("%05d", i)
		delete(want, "large/"+key)
		err = errors.Join(err, db.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte("large")).Delete([]byte(key)) }))
	}
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b, want
}

// entries checks a file with this content.
func entries(t *testing.T, content []byte, o Options) (map[string]string, Result, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "db")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := map[string]string{}
	r, err := Check(f, o, func(bucket, key, value []byte) error {
		switch {
		case key == nil:
			got[string(bucket)] = ""
		case value == nil:
			got[string(bucket)+"/"+string(key)] = "a bucket"
		default:
			got[string(bucket)+"/"+string(key)] = string(value)
		}
		return nil
	})
	return got, r, err
}

func TestSoundFiles(t *testing.T) {
	for name, o := range map[string]bolt.Options{"free list": {}, "no free list": {NoFreelistSync: true}} {
		t.Run(name, func(t *testing.T) {
			content, want := filled(t, o)
			for _, latest := range []bool{false, true} {
				got, r, err := entries(t, content, Options{Latest: latest})
				if err != nil || !r.Walked || !maps.Equal(got, want) {
					t.Errorf("latest %v: %v, walked %v, %d entries and there are %d", latest, err, r.Walked, len(got), len(want))
				}
				got, r, err = entries(t, content, Options{Latest: latest, MaxPages: 10})
				if err != nil || r.Walked || len(got) > 0 {
					t.Errorf("latest %v, too large to be walked: %v, walked %v, %d entries", latest, err, r.Walked, len(got))
				}
			}
		})
	}
}

func TestErrorOfCallerEndsTheCheck(t *testing.T) {
	content, _ := filled(t, bolt.Options{})
	path := filepath.Join(t.TempDir(), "db")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	enough := errors.New("enough")
	calls := 0
	_, err = Check(f, Options{}, func(_, _, _ []byte) error {
		if calls++; calls == 100 {
			return enough
		}
		return nil
	})
	if err != enough || calls != 100 {
		t.Errorf("%v after %d calls", err, calls)
	}
}

func TestNoRegularFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := Check(f, Options{}, nil); !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v, want ErrDamaged", err)
	}
}

// Whatever is done to the structure of a page: it is found, or the entries are
// those that a sound tree would have without it. Nothing panics or runs on.
func TestDamagedStructure(t *testing.T) {
	content, want := filled(t, bolt.Options{})
	_, sound, err := entries(t, content, Options{})
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	found, rounds := 0, 0
	for page, inUse := range sound.InUse {
		if !inUse {
			continue
		}
		for range 2 {
			rounds++
			damaged := bytes.Clone(content)
			damaged[page*PageSize+rng.IntN(pageHeader+elementSize)] ^= 1 << rng.IntN(8)
			got, _, err := entries(t, damaged, Options{Latest: true})
			switch {
			case errors.Is(err, ErrDamaged):
				found++
			case err != nil:
				t.Fatalf("page %d: %v is no ErrDamaged", page, err)
			case len(got) > len(want):
				t.Errorf("page %d: %d entries, there were %d", page, len(got), len(want))
			}
		}
	}
	if found < rounds/2 {
		t.Errorf("only %d of %d damaged files were found", found, rounds)
	}
	for n := int64(0); n < int64(len(content))/PageSize; n += 5 {
		if _, _, err := entries(t, content[:n*PageSize+n], Options{}); err == nil && uint64(n) < uint64(len(sound.InUse)) {
			t.Errorf("cut off at page %d: sound", n)
		}
	}
}
