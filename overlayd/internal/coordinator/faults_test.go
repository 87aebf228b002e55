package coordinator_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/bbolt"
)

// unsure is a real store whose answers get lost: every third commit ends with
// ErrUnknown, half of these were written.
type unsure struct {
	store.Store
	n atomic.Int64
}

func (u *unsure) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	switch n := u.n.Add(1); {
	case n%6 == 2:
		return 0, fmt.Errorf("%w: lost before", store.ErrUnknown)
	case n%6 == 5:
		if _, err := u.Store.Commit(ctx, txn); err != nil {
			return 0, err
		}
		return 0, fmt.Errorf("%w: lost after", store.ErrUnknown)
	}
	return u.Store.Commit(ctx, txn)
}

func TestUnknownOutcome(t *testing.T) {
	n := start(t, &unsure{Store: newStore(t)}, seedNetwork)
	const agents = 200
	claims(t, registerAll(t, agents, n))
	checkExact(t, n, agents)
	for i := range agents {
		if err := n.client.Report(t.Context(), api.StatusReport{AgentID: nth(i).AgentID, Overlays: allOK}); err != nil {
			t.Error(err)
		}
	}
	var ids []string
	for i := range agents {
		ids = append(ids, nth(i).AgentID)
	}
	if _, err := n.client.Delete(t.Context(), ids); err != nil {
		t.Error(err)
	}
	if got := stored(t, n.store); len(got) != 3 {
		t.Errorf("left after the delete: %v", got)
	}
	checkPools(t, n, 0)
}

// late is a real store whose answer to a deletion of an agent gets lost, and which is
// quiet until something else has happened.
type late struct {
	store.Store
	lost      sync.Once
	meanwhile func()
}

func (l *late) Commit(ctx context.Context, txn store.Txn) (rev uint64, err error) {
	rev, err = l.Store.Commit(ctx, txn)
	if len(txn.Then) > 0 && txn.Then[0].Delete {
		l.lost.Do(func() {
			l.meanwhile()
			rev, err = 0, fmt.Errorf("%w: lost after", store.ErrUnknown)
		})
	}
	return rev, err
}

// A deletion that was carried out, and of which nobody knows, takes nothing from an agent
// that has registered since, nor from another one that has its address.
func TestDeletedOnce(t *testing.T) {
	for name, tt := range map[string]struct {
		delete string
		since  api.RegisterRequest
	}{
		"by id":                    {nth(0).AgentID, nth(0)},
		"by address":               {nth(0).AgentIP.String(), nth(0)},
		"its address is another's": {nth(0).AgentIP.String(), request(nth(1).AgentID, nth(0).AgentIP.String(), conf.Mesos, conf.Docker)},
	} {
		t.Run(name, func(t *testing.T) {
			s := &late{Store: newStore(t)}
			n := start(t, s, seedNetwork)
			n.register(t, nth(0))
			var since conf.Lease
			s.meanwhile = func() { since = n.register(t, tt.since) }
			state, err := n.client.Delete(t.Context(), []string{tt.delete})
			if err != nil {
				t.Fatal(err)
			}
			if since.AgentID == "" {
				t.Fatal("nothing was deleted")
			}
			if again := n.register(t, tt.since); again.Epoch != since.Epoch {
				t.Errorf("it has lease %d since it registered, and then %d", since.Epoch, again.Epoch)
			}
			if len(state.Agents) != 1 {
				t.Errorf("%d agents are left", len(state.Agents))
			}
			checkPools(t, n, 1)
		})
	}
}

// forgetful is a real store that now and then cannot say what happened.
type forgetful struct {
	store.Store
	compacted atomic.Int64
}

var errEnough = errors.New("enough")

func (f *forgetful) Watch(ctx context.Context, prefix string, after uint64, fn func(uint64, []store.Event) error) error {
	seen := 0
	err := f.Store.Watch(ctx, prefix, after, func(rev uint64, events []store.Event) error {
		if seen++; seen > 20 {
			return errEnough // this one is lost
		}
		return fn(rev, events)
	})
	if errors.Is(err, errEnough) {
		f.compacted.Add(1)
		return store.ErrCompacted
	}
	return err
}

func TestCompacted(t *testing.T) {
	s := &forgetful{Store: newStore(t)}
	n := start(t, s, seedNetwork)
	n.register(t, nth(0))
	w := n.watch(t, nth(0).AgentID, 0)
	const agents = 200
	claims(t, registerAll(t, agents, n))
	checkExact(t, n, agents)
	for i := range 50 {
		if _, err := n.client.Delete(t.Context(), []string{nth(100 + i).AgentID}); err != nil {
			t.Fatal(err)
		}
	}
	peers := map[string]conf.Peer{}
	w.follow(t, peers, func() bool { return len(peers) == agents-50 && peers["agent-149"].AgentID == "" })
	checkPools(t, n, agents-50)
	if s.compacted.Load() == 0 {
		t.Error("nothing was compacted")
	}
}

// A store that fails ends Run, so that somebody starts the coordinator anew.
func TestStoreFails(t *testing.T) {
	s := newStore(t)
	c, err := coordinator.New(t.Context(), coordinator.Options{
		Network: parseNetwork(t, seedNetwork), Store: s, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- c.Run(t.Context()) }()
	s.Close()
	if err := <-ran; err == nil {
		t.Error("run ended without an error")
	}
	if _, err := c.Register(t.Context(), nth(0)); err == nil {
		t.Error("registered without a store")
	}
}

// full is a real store that takes no writes while it is told to.
type full struct {
	store.Store
	now atomic.Bool
}

var errFull = errors.New("no space left on device")

func (f *full) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	if f.now.Load() {
		return 0, errFull
	}
	return f.Store.Commit(ctx, txn)
}

// A coordinator that cannot write says so where one looks, renews nevertheless,
// and grants again as soon as it can.
func TestStoreTakesNoWrites(t *testing.T) {
	s := &full{Store: newStore(t)}
	n := start(t, s, seedNetwork)
	n.register(t, nth(0))
	metric := func(value string) {
		t.Helper()
		resp, err := http.Get(n.url + api.PathMetrics)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if want := "overlay_coordinator_ready " + value + "\n"; !strings.Contains(string(b), want) {
			t.Errorf("the metrics do not say %q", want)
		}
	}
	metric("1")

	s.now.Store(true)
	if _, err := n.client.Register(t.Context(), nth(1)); err == nil {
		t.Fatal("registered without a write")
	}
	refused(t, n.client.Ready(t.Context()), http.StatusServiceUnavailable, "last write", errFull.Error())
	metric("0")
	n.register(t, nth(0))
	refused(t, n.client.Ready(t.Context()), http.StatusServiceUnavailable, "last write")

	s.now.Store(false)
	n.register(t, nth(1))
	if err := n.client.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	metric("1")
	checkPools(t, n, 2)
}

// childEnv holds the path of the store when the test binary is to be the
// coordinator that gets killed.
const childEnv = "COORDINATOR_CRASH_CHILD"

func runAsChild() bool {
	path := os.Getenv(childEnv)
	if path == "" {
		return false
	}
	if err := serveAsChild(path); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}

func serveAsChild(path string) error {
	log := slog.New(slog.DiscardHandler)
	s, err := bbolt.Open(path, log)
	if err != nil {
		return err
	}
	var network conf.Network
	if err := json.Unmarshal([]byte(seedNetwork), &network); err != nil {
		return err
	}
	c, err := coordinator.New(context.Background(), coordinator.Options{Network: network, Store: s, Log: log})
	if err != nil {
		return err
	}
	go c.Run(context.Background())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println("http://" + l.Addr().String())
	return c.Serve(context.Background(), l)
}

// Whatever a coordinator has answered before a kill -9 is true afterwards.
func TestKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	answered := map[string]conf.Lease{}
	var mu sync.Mutex
	next := 0
	for round := range 10 {
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
		url, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		client, err := api.NewClient([]string{strings.TrimSpace(url)}, nil)
		if err != nil {
			t.Fatal(err)
		}
		killAt := len(answered) + 20 + 13*round
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				for {
					mu.Lock()
					req := nth(next)
					next++
					mu.Unlock()
					lease, err := client.Register(t.Context(), req)
					if err != nil {
						return // killed
					}
					mu.Lock()
					answered[req.AgentID] = lease
					if len(answered) == killAt {
						if err := cmd.Process.Kill(); err != nil {
							t.Error(err)
						}
					}
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		cmd.Wait() // killed; that is no news
	}
	n := start(t, openStore(t, path), seedNetwork)
	var leases []conf.Lease
	for _, a := range n.Agents() {
		leases = append(leases, a.Lease)
		if was, ok := answered[a.AgentID]; ok {
			sameLease(t, a.AgentID, was, a.Lease)
			delete(answered, a.AgentID)
		}
	}
	claims(t, leases)
	checkPools(t, n, uint64(len(leases)))
	if len(answered) > 0 {
		t.Errorf("%d answered leases are lost", len(answered))
	}
	t.Logf("%d leases after 10 kills", len(leases))
}

// A coordinator that has the store for itself is ready soon after the store takes writes
// again, though nobody asks it for anything.
func TestReadyAgainByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &full{Store: newStore(t)}
		b := inBubble(t, s)
		ready := func() int {
			w := httptest.NewRecorder()
			b.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
			return w.Code
		}
		s.now.Store(true)
		if _, err := b.Register(t.Context(), request("a", "10.0.0.1")); !errors.Is(err, errFull) {
			t.Fatalf("registered: %v", err)
		}
		time.Sleep(time.Minute)
		if code := ready(); code != http.StatusServiceUnavailable {
			t.Errorf("%d while nothing can be written", code)
		}
		s.now.Store(false)
		time.Sleep(time.Minute)
		if code := ready(); code != http.StatusOK {
			t.Errorf("%d a minute after the store takes writes again", code)
		}
	})
}
