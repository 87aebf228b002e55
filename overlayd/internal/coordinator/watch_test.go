package coordinator_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

func TestWatch(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	a := n.register(t, request("a", "10.0.0.1", conf.Mesos))
	w := n.watch(t, "a", 0)
	snapshot := w.next(t)
	want := api.PeerEvent{Revision: snapshot.Revision, Run: snapshot.Run, Snapshot: true, Put: []conf.Peer{a.Peer()}}
	same := cmp.Options{cmp.Comparer(samePrefix), cmp.Comparer(sameAddr)}
	if diff := cmp.Diff(want, snapshot, same); diff != "" {
		t.Errorf("snapshot (-want +got):\n%s", diff)
	}
	b := n.register(t, request("b", "10.0.0.2"))
	e := w.next(t)
	if e.Report { // what it has attached, for which there is time on a busy machine
		e = w.next(t)
	}
	if diff := cmp.Diff(api.PeerEvent{Revision: e.Revision, Run: snapshot.Run, Put: []conf.Peer{b.Peer()}}, e, same); diff != "" {
		t.Errorf("new peer (-want +got):\n%s", diff)
	}
	if e.Revision <= snapshot.Revision {
		t.Errorf("revision %d after %d", e.Revision, snapshot.Revision)
	}
	last := e.Revision
	w.stop()

	// Whoever comes back gets what it missed and no more.
	c := n.register(t, request("c", "10.0.0.3"))
	if _, err := n.client.Delete(t.Context(), []string{"b"}); err != nil {
		t.Fatal(err)
	}
	w = n.watch(t, "a", last)
	peers := map[string]conf.Peer{"a": a.Peer(), "b": b.Peer()}
	w.follow(t, peers, func() bool { return len(peers) == 2 && peers["c"].AgentID != "" })
	if diff := cmp.Diff(map[string]conf.Peer{"a": a.Peer(), "c": c.Peer()}, peers, same); diff != "" {
		t.Errorf("after the delta (-want +got):\n%s", diff)
	}
	// A revision of the future is that of another store.
	other := n.watch(t, "c", last+1000)
	if e := other.next(t); !e.Snapshot || len(e.Put) != 2 {
		t.Errorf("%+v, want a snapshot", e)
	}
}

// An agent whose lease was changed by somebody else is asked to register.
func TestWatchRegister(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	n := start(t, s, seedNetwork)
	n.register(t, request("a", "10.0.0.1"))
	n.register(t, request("b", "10.0.0.2"))
	w := n.watch(t, "a", 0)
	w.next(t)
	if _, err := n.client.Delete(t.Context(), []string{"a"}); err != nil {
		t.Fatal(err)
	}
	var e api.PeerEvent
	for !e.Register {
		e = w.next(t)
	}
	n.register(t, request("a", "10.0.0.1")) // the stream goes on for the new lease
	peers := map[string]conf.Peer{}
	w.follow(t, peers, func() bool { return peers["a"].AgentID == "a" })
	w.stop()

	// Its own change is no reason to ask.
	w = n.watch(t, "b", 0)
	w.next(t)
	n.register(t, request("b", "10.0.0.2", conf.Docker))
	own := w.next(t)
	if own.Register {
		t.Errorf("asked to register because it registered: %+v", own)
	}
	revision := own.Revision
	w.stop()
	n.stop()

	// Nothing happened but a restart: a snapshot or a delta, no question.
	n = start(t, s, seedNetwork)
	w = n.watch(t, "b", revision)
	n.register(t, request("c", "10.0.0.3"))
	if e := w.next(t); e.Register {
		t.Errorf("asked to register after a mere restart: %+v", e)
	}
	w.stop()
	n.stop()

	// The configuration changed: everything anew, and a new lease.
	n = start(t, s, strings.Replace(seedNetwork, "]}", `,{"name": "more", "subnet": "10.128.0.0/16", "prefix": 24}]}`, 1))
	w = n.watch(t, "b", revision)
	if e := w.next(t); !e.Snapshot {
		t.Errorf("%+v, want a snapshot", e)
	}
	if e := w.next(t); !e.Register {
		t.Errorf("%+v, want a question to register", e)
	}
	if got := len(n.register(t, request("b", "10.0.0.2", conf.Docker)).Grants); got != 3 {
		t.Errorf("%d overlays, want 3", got)
	}
}

// Two coordinators on one store tell their watchers the same.
func TestWatchOtherCoordinator(t *testing.T) {
	s := newStore(t)
	one, two := start(t, s, seedNetwork), start(t, s, seedNetwork)
	one.register(t, request("a", "10.0.0.1"))
	eventually(t, "known there", func() bool { return len(two.Agents()) == 1 })
	w := two.watch(t, "a", 0)
	w.next(t)
	one.register(t, request("b", "10.0.0.2"))
	peers := map[string]conf.Peer{}
	w.follow(t, peers, func() bool { return len(peers) == 1 && peers["b"].AgentID == "b" })
}

// Streams of every kind, also one that does not read for a long time and one
// that keeps reconnecting, end up with the same peers.
func TestWatchStorm(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	n.register(t, nth(0))
	n.register(t, nth(199))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()

	slow := n.watch(t, "agent-0", 0)
	fast, reconnecting := map[string]conf.Peer{}, map[string]conf.Peer{}
	apply := func(peers map[string]conf.Peer, e api.PeerEvent) bool {
		if e.Snapshot {
			clear(peers)
		}
		for _, p := range e.Put {
			peers[p.AgentID] = p
		}
		for _, id := range e.Delete {
			delete(peers, id)
		}
		return len(peers) == 150 && peers["agent-199"].AgentID != "" && peers["agent-0"].AgentID == ""
	}
	done := fmt.Errorf("done")
	results := make(chan error, 2)
	go func() {
		results <- n.client.Watch(ctx, "agent-199", api.Known{}, func(e api.PeerEvent) error {
			if apply(fast, e) {
				return done
			}
			return nil
		})
	}()
	go func() {
		var known api.Known
		again := fmt.Errorf("again")
		for {
			err := n.client.Watch(ctx, "agent-199", known, func(e api.PeerEvent) error {
				known = api.Known{Revision: e.Revision, Run: e.Run}
				if apply(reconnecting, e) {
					return done
				}
				return again
			})
			if !strings.Contains(err.Error(), again.Error()) {
				results <- err
				return
			}
		}
	}()
	registerAll(t, 200, n)
	for i := range 50 {
		if _, err := n.client.Delete(t.Context(), []string{nth(i).AgentID}); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		select {
		case err := <-results:
			if !strings.Contains(err.Error(), "done") {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Fatal("a stream did not get there")
		}
	}
	late := map[string]conf.Peer{}
	slow.follow(t, late, func() bool { return apply(late, api.PeerEvent{}) })
}

// Serve ends its streams and returns when its context ends.
func TestServe(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- n.Serve(ctx, l) }()
	client, err := api.NewClient([]string{"http://" + l.Addr().String()}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Register(t.Context(), request("a", "10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	first := make(chan struct{}, 1)
	watched := make(chan error, 1)
	go func() {
		watched <- client.Watch(context.WithoutCancel(t.Context()), "a", api.Known{}, func(api.PeerEvent) error {
			first <- struct{}{}
			return nil
		})
	}()
	<-first
	cancel()
	for name, ended := range map[string]chan error{"serve": served, "watch": watched} {
		select {
		case err := <-ended:
			if name == "serve" && err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Fatalf("%s does not end", name)
		}
	}
}

// countingListener remembers what is written to the connections it accepts.
type countingListener struct {
	net.Listener
	writes chan int // sizes
}

type countingConn struct {
	net.Conn
	writes chan<- int
}

func (l countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return countingConn{c, l.writes}, err
}

func (c countingConn) Write(p []byte) (int, error) {
	c.writes <- len(p)
	return c.Conn.Write(p)
}

// A message goes out in one piece: every piece is a way through the network and
// wakes the reader, for each of thousands of streams.
func TestMessageIsOneWrite(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	for i := range 100 {
		n.register(t, nth(i))
	}
	server := httptest.NewUnstartedServer(n.Handler())
	l := countingListener{server.Listener, make(chan int, 100)}
	server.Listener = l
	server.Start()
	defer server.Close()
	plain := http.Client{Transport: &http.Transport{DisableCompression: true, DisableKeepAlives: true}}
	resp, err := plain.Get(server.URL + api.PathWatch + "?agent=" + nth(0).AgentID)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	line, err := bufio.NewReader(resp.Body).ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	if len(line) < 8<<10 {
		t.Fatalf("the snapshot has %d bytes, too few to need more than a buffer", len(line))
	}
	<-l.writes // the header
	if size := <-l.writes; size != len(line) {
		t.Errorf("a snapshot of %d bytes begins with a write of %d", len(line), size)
	}
}
