package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

func TestWithoutSelf(t *testing.T) {
	own, b := testPeer("own", 4, 1), testPeer("b", 3, 1)
	damaged := testPeer("damaged", 9, 1)
	damaged.AgentIP = own.AgentIP.Next().Prev()
	damaged.VTEPIP = conf.Peer{}.VTEPIP
	for _, tc := range []struct {
		name     string
		in, want api.PeerEvent
		register bool
	}{
		{name: "heartbeat"},
		{name: "asked to register", in: api.PeerEvent{Register: true}, want: api.PeerEvent{Register: true}, register: true},
		{
			name: "snapshot",
			in:   api.PeerEvent{Snapshot: true, Put: []conf.Peer{b, own}},
			want: api.PeerEvent{Snapshot: true, Put: []conf.Peer{b}},
		}, {
			name:     "snapshot that lacks us",
			in:       api.PeerEvent{Snapshot: true, Put: []conf.Peer{b}},
			want:     api.PeerEvent{Snapshot: true, Put: []conf.Peer{b}},
			register: true,
		}, {
			name: "delta",
			in:   api.PeerEvent{Put: []conf.Peer{own, b}, Delete: []string{"c"}},
			want: api.PeerEvent{Put: []conf.Peer{b}, Delete: []string{"c"}},
		}, {
			name:     "we are deleted",
			in:       api.PeerEvent{Delete: []string{"c", "own"}},
			want:     api.PeerEvent{Delete: []string{"c"}},
			register: true,
		}, {
			name: "peer nobody could forward to",
			in:   api.PeerEvent{Put: []conf.Peer{damaged, b}},
			want: api.PeerEvent{Put: []conf.Peer{b}, Delete: []string{"damaged"}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := watcher{id: "own", log: slog.New(slog.DiscardHandler)}
			tc.in.Put = slices.Clone(tc.in.Put)
			if got := w.withoutSelf(&tc.in); got != tc.register {
				t.Errorf("register: %t, want %t", got, tc.register)
			}
			if diff := cmp.Diff(tc.want, tc.in, compareNetip, cmpopts.EquateEmpty(), cmpopts.EquateErrors()); diff != "" {
				t.Errorf("event (-want +got):\n%s", diff)
			}
		})
	}
}

// The watcher resumes at the last revision it handed on, and passes heartbeats
// on only where they say something.
func TestWatcherResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		streams := [][]api.PeerEvent{
			{{Revision: 7, Snapshot: true, Put: []conf.Peer{testPeer("own", 4, 1)}}, {}, {Revision: 8, Run: "r", Delete: []string{"b"}}},
			{}, // breaks at once
			{{}, {}, {Revision: 9, Delete: []string{"c"}}},
		}
		var from []api.Known
		errBroken := errors.New("stream broke")
		out := make(chan peerEvent)
		w := &watcher{
			watch: func(ctx context.Context, id string, position api.Known, fn func(api.PeerEvent) error) error {
				n := len(from)
				from = append(from, position)
				if n >= len(streams) {
					<-ctx.Done()
					return ctx.Err()
				}
				for _, e := range streams[n] {
					if err := fn(e); err != nil {
						return err
					}
				}
				return errBroken
			},
			id: "own", generation: 3, position: api.Known{Revision: 5}, timing: defaultTiming, log: slog.New(slog.DiscardHandler),
			register: make(chan struct{}, 1), out: out,
		}
		done := make(chan error)
		go func() { done <- w.run(ctx) }()
		var got []peerEvent
		for range 6 {
			c := <-out
			c.event.Put = nil
			got = append(got, c)
		}
		want := []peerEvent{
			{generation: 3, connected: true, self: testPeer("own", 4, 1), event: api.PeerEvent{Revision: 7, Snapshot: true}},
			{generation: 3, event: api.PeerEvent{Revision: 8, Run: "r", Delete: []string{"b"}}},
			{generation: 3, broken: errBroken},
			{generation: 3, connected: true},
			{generation: 3, event: api.PeerEvent{Revision: 9, Delete: []string{"c"}}},
			{generation: 3, broken: errBroken},
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(peerEvent{}), compareNetip, cmpopts.EquateEmpty(), cmpopts.EquateErrors()); diff != "" {
			t.Errorf("changes (-want +got):\n%s", diff)
		}
		time.Sleep(time.Minute) // the bubble's clock: let it connect again
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff([]api.Known{{Revision: 5}, {Revision: 8, Run: "r"}, {Revision: 8, Run: "r"}, {Revision: 9}}, from); diff != "" {
			t.Errorf("revisions watched from (-want +got):\n%s", diff)
		}
	})
}

// Only a newer registration at another address is another host's. After a move
// the stream still tells where we were.
func TestCheckSelf(t *testing.T) {
	for _, tc := range []struct {
		name      string
		self      conf.Peer
		following bool
	}{
		{name: "not named", following: true},
		{name: "as it was registered", self: testPeer("own", 4, 7), following: true},
		{name: "before we moved", self: testPeer("own", 3, 6), following: true},
		{name: "our own change, before its answer", self: testPeer("own", 4, 8), following: true},
		{name: "another host", self: testPeer("own", 3, 8)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := &loop{
				log:       slog.New(slog.DiscardHandler),
				lease:     leaseState{ip: testPeer("own", 4, 7).AgentIP, held: &heldLease{Lease: conf.Lease{Epoch: 7}}},
				peers:     peerState{backlog: newDeadline(), silent: newDeadline(), stop: func() {}},
				registrar: &registrar{kick: make(chan struct{}, 1)},
			}
			l.checkSelf(tc.self)
			if following := l.peers.stop != nil; following != tc.following || (len(l.registrar.kick) == 0) != tc.following {
				t.Errorf("following %t, kicks %d; want to follow: %t", following, len(l.registrar.kick), tc.following)
			}
		})
	}
}
