package coordinator_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/bbolt"
)

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// seedNetwork is the configuration the seed document shows.
const seedNetwork = `{
	"vtep_subnet": "44.128.0.0/20", "vtep_subnet6": "fd01:a::/64", "vtep_mac_oui": "70:B3:D5:00:00:00",
	"overlays": [
		{"name": "dcos", "subnet": "9.0.0.0/8", "prefix": 24},
		{"name": "dcos6", "subnet6": "fd01:b::/64", "prefix6": 80}
	]}`

func parseNetwork(t testing.TB, text string) conf.Network {
	t.Helper()
	var n conf.Network
	if err := json.Unmarshal([]byte(text), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

func openStore(t testing.TB, path string) store.Store {
	t.Helper()
	s, err := bbolt.Open(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func newStore(t testing.TB) store.Store {
	t.Helper()
	return openStore(t, filepath.Join(t.TempDir(), "coordinator.db"))
}

// node is a running coordinator with a client that talks to it.
type node struct {
	*coordinator.Coordinator
	client *api.Client
	store  store.Store
	url    string
	stop   func() // ends it; the store stays open
}

func start(t testing.TB, s store.Store, network string) *node {
	t.Helper()
	return startLogging(t, s, network, slog.DiscardHandler)
}

func startLogging(t testing.TB, s store.Store, network string, log slog.Handler) *node {
	t.Helper()
	return startOptions(t, coordinator.Options{Network: parseNetwork(t, network), Store: s, Log: slog.New(log), Version: "test"})
}

func startOptions(t testing.TB, o coordinator.Options) *node {
	t.Helper()
	c, err := coordinator.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- c.Run(ctx) }()
	server := httptest.NewServer(c.Handler())
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	client, err := api.NewClient([]string{server.URL}, &http.Client{Transport: transport})
	if err != nil {
		t.Fatal(err)
	}
	stopped := false
	n := &node{Coordinator: c, client: client, store: o.Store, url: server.URL}
	n.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("run: %v", err)
		}
		transport.CloseIdleConnections()
		server.Close()
	}
	t.Cleanup(n.stop)
	eventually(t, "ready", func() bool { return client.Ready(t.Context()) == nil })
	return n
}

// said is what was logged.
type said struct {
	mu   sync.Mutex
	text strings.Builder
}

func (s *said) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(b)
}

func (s *said) has(words string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Contains(s.text.String(), words)
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(patience)
	for !cond() {
		select {
		case <-deadline:
			t.Fatalf("still not: %s", what)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func request(id, ip string, bridges ...conf.Half) api.RegisterRequest {
	return api.RegisterRequest{AgentID: id, AgentIP: netip.MustParseAddr(ip), Bridges: bridges, Version: "1.0"}
}

// nth is the registration of one of many agents.
func nth(i int) api.RegisterRequest {
	return request(fmt.Sprintf("agent-%d", i), fmt.Sprintf("172.16.%d.%d", i/250, i%250+1), conf.Mesos, conf.Docker)
}

func (n *node) register(t testing.TB, req api.RegisterRequest) conf.Lease {
	t.Helper()
	lease, err := n.client.Register(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return lease
}

// refused checks that err is a refusal with a code and certain words.
func refused(t testing.TB, err error, code int, words ...string) {
	t.Helper()
	var refusal *api.Error
	if !errors.As(err, &refusal) {
		t.Fatalf("error %v, want a refusal with code %d", err, code)
	}
	if refusal.Code != code {
		t.Errorf("code %d (%v), want %d", refusal.Code, err, code)
	}
	for _, w := range words {
		if !strings.Contains(refusal.Message, w) {
			t.Errorf("message %q does not say %q", refusal.Message, w)
		}
	}
}

// stream is a watch in the background.
type stream struct {
	events chan api.PeerEvent
	done   chan struct{} // closed when the stream has ended
	err    error         // why it ended
	stop   func()
	last   api.Known // of the event that next returned last
}

// watch begins a stream after a revision, whichever coordinator told it.
func (n *node) watch(t testing.TB, id string, revision uint64) *stream {
	t.Helper()
	return n.watchFrom(t, id, api.Known{Revision: revision})
}

func (n *node) watchFrom(t testing.TB, id string, known api.Known) *stream {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := &stream{events: make(chan api.PeerEvent), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		s.err = n.client.Watch(ctx, id, known, func(e api.PeerEvent) error {
			select {
			case s.events <- e:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	s.stop = func() {
		cancel()
		<-s.done
	}
	t.Cleanup(s.stop)
	return s
}

func (s *stream) next(t testing.TB) api.PeerEvent {
	t.Helper()
	select {
	case e := <-s.events:
		s.last = api.Known{Revision: e.Revision, Run: e.Run}
		return e
	case <-s.done:
		t.Fatalf("watch ended: %v", s.err)
	case <-time.After(patience):
		t.Fatal("no event")
	}
	return api.PeerEvent{}
}

// follow applies events to a set of peers until cond holds.
func (s *stream) follow(t testing.TB, peers map[string]conf.Peer, cond func() bool) {
	t.Helper()
	for !cond() {
		e := s.next(t)
		if e.Snapshot {
			clear(peers)
		}
		for _, p := range e.Put {
			peers[p.AgentID] = p
		}
		for _, id := range e.Delete {
			delete(peers, id)
		}
	}
}
