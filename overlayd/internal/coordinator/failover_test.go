package coordinator_test

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// oneOfSeveral starts one of several coordinators on a store; kill ends it as a
// power cut does, without a word to anybody.
func oneOfSeveral(t *testing.T, s store.Store) (server *httptest.Server, kill func()) {
	t.Helper()
	c, err := coordinator.New(t.Context(), coordinator.Options{
		Network: parseNetwork(t, seedNetwork), Store: s, Log: slog.New(slog.DiscardHandler), Version: "test", Shared: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- c.Run(ctx) }()
	server = httptest.NewServer(c.Handler())
	kill = sync.OnceFunc(func() {
		server.Listener.Close()
		server.CloseClientConnections()
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("run: %v", err)
		}
		server.Close()
	})
	t.Cleanup(kill)
	return server, kill
}

// follower is an agent as far as the coordinators are concerned.
type follower struct {
	req    api.RegisterRequest
	client *api.Client
	bytes  atomic.Int64 // received
	events atomic.Int64 // of its streams
	at     atomic.Pointer[api.Known]
	host   atomic.Pointer[string] // whom it connected to last
	whole  atomic.Int64           // snapshots
}

// counted counts what is read from a connection.
type counted struct {
	net.Conn
	n *atomic.Int64
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.n.Add(int64(n))
	return n, err
}

func newFollower(t *testing.T, i int, urls []string) *follower {
	t.Helper()
	f := &follower{req: nth(i)}
	f.at.Store(&api.Known{})
	transport := &http.Transport{MaxIdleConnsPerHost: 2, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		f.host.Store(&addr)
		return counted{c, &f.bytes}, nil
	}}
	t.Cleanup(transport.CloseIdleConnections)
	var err error
	if f.client, err = api.NewClient(urls, &http.Client{Transport: transport}); err != nil {
		t.Fatal(err)
	}
	f.client.Spread()
	return f
}

// follow is what an agent does until ctx ends.
func (f *follower) follow(ctx context.Context) {
	for ctx.Err() == nil {
		_ = f.client.Watch(ctx, f.req.AgentID, *f.at.Load(), func(e api.PeerEvent) error {
			if e.Snapshot {
				f.whole.Add(1)
			}
			if e.Revision != 0 {
				f.at.Store(&api.Known{Revision: e.Revision, Run: e.Run})
			}
			f.events.Add(1)
			return nil
		})
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// TestFailOver: a thousand agents spread over three coordinators. One of these is
// killed: its agents renew and follow elsewhere within ten seconds, and are told what
// has changed, not everything again.
func TestFailOver(t *testing.T) {
	const agents, limit = 1000, 10 * time.Second
	s := newStore(t)
	var urls []string
	var kills []func()
	for range 3 {
		server, kill := oneOfSeveral(t, s)
		urls, kills = append(urls, server.URL), append(kills, kill)
	}
	all := make([]*follower, agents)
	for i := range all {
		all[i] = newFollower(t, i, urls)
	}
	each := func(f func(*follower)) {
		var wg sync.WaitGroup
		turn := make(chan struct{}, 64)
		for _, a := range all {
			wg.Go(func() { turn <- struct{}{}; f(a); <-turn })
		}
		wg.Wait()
	}
	register := func(f *follower) {
		if _, err := f.client.Register(t.Context(), f.req); err != nil {
			t.Error(err)
		}
	}
	each(register)
	ctx, cancel := context.WithCancel(t.Context())
	var following sync.WaitGroup
	defer following.Wait()
	defer cancel()
	// The first comes from nothing and shows what everything takes. The others go on
	// from there: that a thousand read everything is another measurement.
	follows := func(some []*follower) {
		t.Helper()
		for _, f := range some {
			following.Go(func() { f.follow(ctx) })
		}
		eventually(t, "all follow", func() bool {
			return !slices.ContainsFunc(some, func(f *follower) bool { return f.events.Load() == 0 })
		})
	}
	before := all[0].bytes.Load()
	follows(all[:1])
	snapshot := all[0].bytes.Load() - before
	for _, f := range all[1:] {
		f.at.Store(all[0].at.Load())
	}
	follows(all[1:])
	at := map[string][]*follower{}
	for _, f := range all {
		at[*f.host.Load()] = append(at[*f.host.Load()], f)
	}
	dead := urls[0][len("http://"):]
	moving := at[dead]
	t.Logf("agents at the coordinators: %d, %d, %d", len(at[dead]), len(at[urls[1][len("http://"):]]), len(at[urls[2][len("http://"):]]))
	if len(moving) < agents/5 {
		t.Fatalf("%d of %d agents are at one of three coordinators", len(moving), agents)
	}
	for _, f := range moving {
		f.bytes.Store(0)
		f.events.Store(0)
		f.whole.Store(0)
	}

	began := time.Now()
	kills[0]()
	var renewed sync.WaitGroup
	for _, f := range moving {
		renewed.Go(func() { register(f) })
	}
	renewed.Wait()
	took := time.Since(began)
	eventually(t, "everybody follows elsewhere", func() bool {
		return !slices.ContainsFunc(moving, func(f *follower) bool { return f.events.Load() == 0 })
	})
	followed := time.Since(began)
	var bytes, whole int64
	for _, f := range moving {
		bytes += f.bytes.Load()
		whole += f.whole.Load()
	}
	bytes /= int64(len(moving))
	t.Logf("%d agents renewed elsewhere within %v and followed within %v; %d bytes each, where everything takes %d, %d snapshots",
		len(moving), took.Round(time.Millisecond), followed.Round(time.Millisecond), bytes, snapshot, whole)
	if took > limit || followed > limit {
		t.Errorf("%v and %v, want at most %v", took, followed, limit)
	}
	if whole > 0 || bytes*4 > snapshot {
		t.Errorf("%d snapshots, %d bytes to each; everything takes %d", whole, bytes, snapshot)
	}
}
