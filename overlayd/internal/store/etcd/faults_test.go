package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/etcd"
	"overlayd.internal/overlay/overlayd/internal/store/etcdtest"
)

// patience is how long a test waits for what must happen.
const patience = 60 * time.Second

func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(patience)
	for !cond() {
		select {
		case <-deadline:
			t.Fatalf("still not: %s", what)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// put commits one key and tries again as long as the store is not sure.
func put(t testing.TB, s store.Store, key, value string) (took time.Duration) {
	t.Helper()
	began := time.Now()
	deadline := began.Add(patience)
	for {
		_, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: key, Value: []byte(value)}}})
		if err == nil {
			return time.Since(began)
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// follower collects the values that a watch sees for one key.
type follower struct {
	mu     sync.Mutex
	values []string
}

func follow(t *testing.T, s store.Store) *follower {
	t.Helper()
	_, rev, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	f := &follower{}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- s.Watch(ctx, "", rev, func(_ uint64, events []store.Event) error {
			f.mu.Lock()
			defer f.mu.Unlock()
			for _, e := range events {
				f.values = append(f.values, string(e.Value))
			}
			return nil
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("watch ended: %v", err)
		}
	})
	return f
}

// has reports whether a value was seen. It need not be the last: a write whose
// outcome was unknown may be carried out after those that came later.
func (f *follower) has(value string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Contains(f.values, value)
}

// A member that hangs, with its connections open, is left within three seconds,
// by writes and by watches, whichever member the store uses.
func TestMemberHangs(t *testing.T) {
	c := etcdtest.New(t, 3)
	const stores = 8 // so many that every member is used by some
	var all [stores]*etcd.Store
	var followers [stores]*follower
	for n := range all {
		all[n] = open(t, c, fmt.Sprint("/hang", n))
		put(t, all[n], "k", "before")
		followers[n] = follow(t, all[n])
	}
	for i, m := range c.Members {
		if m == c.Leader() {
			continue // an election is another matter; see TestLeaderHangs
		}
		m.Pause()
		value := fmt.Sprint("paused ", i)
		began := time.Now()
		var wg sync.WaitGroup
		for n := range all {
			wg.Go(func() {
				put(t, all[n], "k", value)
				eventually(t, "the watch goes on", func() bool { return followers[n].has(value) })
			})
		}
		wg.Wait()
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("%s hangs: written and seen after %s", m.Name, took)
		} else {
			t.Logf("%s hangs: written and seen after %s", m.Name, took)
		}
		m.Resume()
		m.WaitReady()
	}
}

// A leader that hangs costs an election, and no more.
func TestLeaderHangs(t *testing.T) {
	c := etcdtest.New(t, 3)
	s := open(t, c, "/leader")
	put(t, s, "k", "before")
	f := follow(t, s)
	leader := c.Leader()
	leader.Pause()
	took := put(t, s, "k", "after")
	t.Logf("written after %s", took)
	eventually(t, "the watch goes on", func() bool { return f.has("after") })
	if took > 15*time.Second {
		t.Errorf("written after %s", took)
	}
	leader.Resume()
	put(t, s, "k", "end")
	eventually(t, "the watch goes on", func() bool { return f.has("end") })
}

// Without a majority the store says so, and it works again when there is one.
func TestLostQuorum(t *testing.T) {
	c := etcdtest.New(t, 3)
	s := open(t, c, "/quorum")
	put(t, s, "k", "before")
	f := follow(t, s)
	c.Members[0].Kill()
	c.Members[1].Kill()
	eventually(t, "it is not ready", func() bool { return s.Ready(t.Context()) != nil })
	if err := s.Ready(t.Context()); !strings.Contains(err.Error(), "no member of etcd can serve") {
		t.Errorf("it says %q", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := s.Commit(ctx, store.Txn{Then: []store.Op{{Key: "k"}}}); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("commit: %v, want that the outcome is unknown", err)
	}
	c.Members[0].Restart()
	eventually(t, "it is ready again", func() bool { return s.Ready(t.Context()) == nil })
	put(t, s, "k", "after")
	eventually(t, "the watch goes on", func() bool { return f.has("after") })
}

// When the space quota is used up, the store says so and reads go on; when that
// is over, writes do.
func TestNoSpace(t *testing.T) {
	c := etcdtest.New(t, 1, "--quota-backend-bytes=2000000")
	s := open(t, c, "/space")
	value := strings.Repeat("x", 200_000)
	var err error
	for i := 0; i < 100 && err == nil; i++ {
		_, err = s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: "k", Value: []byte(value)}}})
	}
	if err == nil || errors.Is(err, store.ErrUnknown) || !strings.Contains(err.Error(), "nothing was written: etcd has used up its space quota") {
		t.Fatalf("commit: %v", err)
	}
	if err := s.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "NOSPACE") {
		t.Errorf("ready: %v", err)
	}
	_, rev, err := s.List(t.Context(), "")
	if err != nil {
		t.Errorf("list: %v", err)
	}
	m := c.Members[0]
	for _, args := range [][]string{{"compact", fmt.Sprint(rev)}, {"defrag"}, {"alarm", "disarm"}} {
		if _, err := m.Etcdctl(args...); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "it is ready again", func() bool { return s.Ready(t.Context()) == nil })
	put(t, s, "k", "small")
}

// What was compacted is not known any more.
func TestCompacted(t *testing.T) {
	c := etcdtest.New(t, 1)
	s := open(t, c, "/compact")
	_, first, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		put(t, s, "k", fmt.Sprint(i))
	}
	_, rev, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Members[0].Etcdctl("compact", fmt.Sprint(rev)); err != nil {
		t.Fatal(err)
	}
	err = s.Watch(t.Context(), "", first, func(uint64, []store.Event) error { return errors.New("an event") })
	if !errors.Is(err, store.ErrCompacted) {
		t.Errorf("watch: %v, want that it was compacted", err)
	}
	enough := errors.New("enough")
	err = s.Watch(t.Context(), "", rev-1, func(uint64, []store.Event) error { return enough })
	if !errors.Is(err, enough) {
		t.Errorf("watch from what is still there: %v", err)
	}
}

// An etcd that was put back as it was before is not used: what was read from it
// and answered is no longer true.
func TestRestored(t *testing.T) {
	c := etcdtest.New(t, 1)
	s := open(t, c, "/restore")
	put(t, s, "k", "1")
	snapshot := filepath.Join(t.TempDir(), "snapshot.db")
	m := c.Members[0]
	if _, err := m.Etcdctl("snapshot", "save", snapshot); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		put(t, s, "k", fmt.Sprint(i))
	}
	watched := make(chan error, 1)
	go func() {
		_, rev, _ := s.List(context.Background(), "")
		watched <- s.Watch(context.Background(), "", rev, func(uint64, []store.Event) error { return nil })
	}()
	m.Kill()
	m.Restore(snapshot)
	select {
	case err := <-watched:
		if !errors.Is(err, etcd.ErrReplaced) {
			t.Errorf("watch: %v", err)
		}
	case <-time.After(patience):
		t.Fatal("the watch goes on")
	}
	if err := s.Ready(t.Context()); !errors.Is(err, etcd.ErrReplaced) {
		t.Errorf("ready: %v", err)
	}
	if _, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: "k"}}}); !errors.Is(err, etcd.ErrReplaced) {
		t.Errorf("commit: %v", err)
	}
	again := open(t, c, "/restore")
	if kvs, _, err := again.List(t.Context(), ""); err != nil || len(kvs) != 1 || string(kvs[0].Value) != "1" {
		t.Errorf("opened anew: %v %v", kvs, err)
	}
}

func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		"http://a:1":                 "[http://a:1] /overlay",
		"//a,b:7":                    "[http://a:2379 http://b:7] /overlay",
		"https://a,https://b/x/y/":   "[https://a:2379 https://b:2379] /x/y",
		"https://[fd00::1]:2379/one": "[https://[fd00::1]:2379] /one",
	} {
		endpoints, prefix, err := etcd.Parse(text, false)
		if got := fmt.Sprint(endpoints, " ", prefix); err != nil || got != want {
			t.Errorf("%s: %s, %v, want %s", text, got, err, want)
		}
	}
	if endpoints, _, err := etcd.Parse("a", true); err != nil || endpoints[0] != "https://a:2379" {
		t.Errorf("with certificates: %v %v", endpoints, err)
	}
	for _, bad := range []string{"", "http://", "ftp://a", "http://u:p@a", "http://a/p,http://b", "http://a?x=1", "http://a:b"} {
		if endpoints, prefix, err := etcd.Parse(bad, false); err == nil {
			t.Errorf("%q: %v %s", bad, endpoints, prefix)
		}
	}
}
