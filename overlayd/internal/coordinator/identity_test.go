package coordinator_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// bubble is a coordinator inside a synctest bubble, where time passes only when
// nothing else happens. It is called without a network.
type bubble struct {
	*coordinator.Coordinator
	t    *testing.T
	stop func()
}

func inBubble(t *testing.T, s store.Store) *bubble {
	t.Helper()
	return bubbleWith(t, coordinator.Options{Store: s})
}

func bubbleWith(t *testing.T, o coordinator.Options) *bubble {
	t.Helper()
	return bubbleOf(t, o, seedNetwork)
}

func bubbleOf(t *testing.T, o coordinator.Options, network string) *bubble {
	t.Helper()
	o.Network, o.Log = parseNetwork(t, network), slog.New(slog.DiscardHandler)
	c, err := coordinator.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- c.Run(ctx) }()
	synctest.Wait()
	stopped := false
	b := &bubble{c, t, func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("run: %v", err)
		}
	}}
	t.Cleanup(b.stop)
	return b
}

func (b *bubble) register(id, ip string) conf.Lease {
	b.t.Helper()
	lease, err := b.Register(b.t.Context(), request(id, ip))
	if err != nil {
		b.t.Fatal(err)
	}
	return lease
}

func (b *bubble) refuses(id, ip string, words ...string) {
	b.t.Helper()
	_, err := b.Register(b.t.Context(), request(id, ip))
	refused(b.t, err, http.StatusConflict, words...)
}

// pipe is the writing end of a response without a connection.
type pipe struct {
	*io.PipeWriter
	header http.Header
}

func (p pipe) Header() http.Header { return p.header }
func (p pipe) WriteHeader(int)     {}
func (p pipe) Flush()              {}

// connect begins a watch; lines come out of the channel.
func (b *bubble) connect(id string) (events <-chan api.PeerEvent, disconnect func()) {
	b.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		req := httptest.NewRequestWithContext(ctx, http.MethodGet, api.PathWatch+"?agent="+id, nil)
		b.Handler().ServeHTTP(pipe{w, http.Header{}}, req)
		w.Close()
	}()
	out := make(chan api.PeerEvent, 1000)
	go func() {
		for lines := bufio.NewScanner(r); lines.Scan(); {
			var e api.PeerEvent
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				b.t.Error(err)
			}
			out <- e
		}
		close(out)
	}()
	synctest.Wait()
	return out, func() {
		cancel()
		<-done
		synctest.Wait()
	}
}

// superseded returns the id of the agent that has the IP of agent id.
func (b *bubble) superseded(id string) string {
	b.t.Helper()
	for _, a := range b.Agents() {
		if a.AgentID == id {
			return a.Superseded
		}
	}
	b.t.Fatalf("no agent %s", id)
	return ""
}

// An agent IP goes to a newcomer only when its holder is no longer alive. The
// holder keeps its lease, and is no peer until it comes back.
func TestSupersede(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		old := b.register("old", "10.0.0.1")
		b.register("other", "10.0.0.9")
		b.refuses("new", "10.0.0.1", "agent IP 10.0.0.1", "agent old", "agent new", "--agent-ip")
		time.Sleep(60 * time.Second)
		b.register("old", "10.0.0.1") // a renewal counts
		time.Sleep(60 * time.Second)
		b.refuses("new", "10.0.0.1")

		events, disconnect := b.connect("other")
		defer disconnect()
		if e := <-events; len(e.Put) != 2 {
			t.Fatalf("snapshot %+v", e)
		}
		time.Sleep(31 * time.Second)
		fresh := b.register("new", "10.0.0.1")
		if fresh.VTEP == old.VTEP || fresh.Grants[0].Subnet == old.Grants[0].Subnet {
			t.Error("the newcomer got the old agent's lease")
		}
		if got := b.superseded("old"); got != "new" {
			t.Errorf("old is superseded by %q, want new", got)
		}
		if n := len(b.State().Agents); n != 2 {
			t.Errorf("%d agents in the state, want 2", n)
		}
		var e api.PeerEvent
		for len(e.Put) == 0 {
			e = <-events
		}
		if len(e.Put) != 1 || e.Put[0].AgentID != "new" || len(e.Delete) != 1 || e.Delete[0] != "old" {
			t.Errorf("event %+v, want new instead of old", e)
		}

		b.refuses("old", "10.0.0.1", "agent new") // alive in turn
		back := b.register("old", "10.0.0.2")
		if back.VTEP != old.VTEP || back.Grants[0].Subnet != old.Grants[0].Subnet || back.Epoch <= old.Epoch {
			t.Errorf("lease %+v, before it was superseded %+v", back, old)
		}
		if got := b.superseded("old"); got != "" || len(b.State().Agents) != 3 {
			t.Errorf("back, but superseded by %q", got)
		}
		// Its address goes back and forth without a trace.
		time.Sleep(91 * time.Second)
		b.register("old", "10.0.0.1")
		if got := b.superseded("new"); got != "old" {
			t.Errorf("new is superseded by %q, want old", got)
		}
		b.register("third", "10.0.0.2")
	})
}

// A coordinator that has just begun cannot know who is alive.
func TestSupersedeAfterRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t)
		b := inBubble(t, s)
		b.register("old", "10.0.0.1")
		time.Sleep(time.Hour)
		b.stop()
		b = inBubble(t, s)
		time.Sleep(80 * time.Second)
		b.refuses("new", "10.0.0.1", "agent old")
		time.Sleep(11 * time.Second)
		b.register("new", "10.0.0.1")
	})
}

// While an agent is connected nobody gets its IP, nor its id from elsewhere.
func TestConnectedIsAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		lease := b.register("a", "10.0.0.1")
		_, disconnect := b.connect("a")
		time.Sleep(time.Hour)
		b.refuses("b", "10.0.0.1", "agent a", "connected")
		b.refuses("a", "10.0.0.2", "agent id a", "10.0.0.1", "10.0.0.2", "--agent-id")
		if got := b.register("a", "10.0.0.1"); got.Epoch != lease.Epoch {
			t.Error("the refused attempts changed the lease")
		}
		disconnect()
		moved := b.register("a", "10.0.0.2")
		if moved.Epoch <= lease.Epoch || moved.VTEP != lease.VTEP || !cmp.Equal(moved.Grants[0], lease.Grants[0], cmpopts.EquateComparable(netip.Prefix{})) {
			t.Errorf("lease after the move %+v, before %+v", moved, lease)
		}
		b.register("c", "10.0.0.1") // free at once, its owner has moved
		if got := b.superseded("a"); got != "" {
			t.Errorf("the agent that moved is superseded by %s", got)
		}
	})
}

func TestHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		b.register("a", "10.0.0.1")
		events, disconnect := b.connect("a")
		defer disconnect()
		snapshot := <-events
		if !snapshot.Snapshot || len(snapshot.Put) != 1 {
			t.Fatalf("first event %+v", snapshot)
		}
		began := time.Now()
		for beats := 0; beats < 3; {
			e := <-events
			if e.Report { // asked once what is attached, which says nothing of peers
				continue
			}
			beats++
			if e.Snapshot || len(e.Put)+len(e.Delete) > 0 || e.Register || e.Revision != snapshot.Revision {
				t.Errorf("heartbeat %+v", e)
			}
			took := time.Since(began)
			if beats == 1 && took >= api.HeartbeatInterval/2 && took < api.HeartbeatInterval {
				took = api.HeartbeatInterval // the first one after news, see TestHeartbeatsSpread
			}
			if took != api.HeartbeatInterval {
				t.Errorf("heartbeat %d after %s", beats, took)
			}
			began = time.Now()
		}
		// A report moves the revision; the next heartbeat says so.
		if err := b.Report(t.Context(), api.StatusReport{AgentID: "a", Overlays: allOK}); err != nil {
			t.Fatal(err)
		}
		if e := <-events; e.Revision <= snapshot.Revision {
			t.Errorf("heartbeat at %d after a report, want more than %d", e.Revision, snapshot.Revision)
		}
	})
}

// What all streams are told at one moment does not have them all say that they are
// alive at one moment, for as long as nothing else happens: who renews then would wait.
func TestHeartbeatsSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const streams = 100
		b := inBubble(t, newStore(t))
		var all []<-chan api.PeerEvent
		for i := range streams {
			id := fmt.Sprint("agent-", i)
			b.register(id, fmt.Sprint("10.0.0.", i+1))
			events, disconnect := b.connect(id)
			defer disconnect()
			all = append(all, events)
		}
		time.Sleep(time.Minute)
		b.register("new", "10.0.1.1")
		time.Sleep(time.Second)
		for range 2 {
			for _, events := range all {
				for len(events) > 0 {
					<-events
				}
			}
			at := make(chan time.Duration, streams)
			began := time.Now()
			for _, events := range all {
				go func() { <-events; at <- time.Since(began) }()
			}
			busiest, buckets := 0, map[time.Duration]int{}
			for range streams {
				bucket := (<-at).Truncate(500 * time.Millisecond)
				buckets[bucket]++
				busiest = max(busiest, buckets[bucket])
			}
			if busiest > streams/2 {
				t.Errorf("%d of %d heartbeats within half a second: %v", busiest, streams, buckets)
			}
		}
	})
}

// A change goes out at once, those that follow are gathered.
func TestCoalescing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		b.register("watcher", "10.0.0.1")
		events, disconnect := b.connect("watcher")
		defer disconnect()
		time.Sleep(time.Second)
		for len(events) > 0 { // how it begins, and whether it is asked to report
			<-events
		}
		began := time.Now()
		b.register("first", "10.0.1.1")
		if e := <-events; len(e.Put) != 1 || time.Since(began) > 0 {
			t.Errorf("first change after %s: %+v", time.Since(began), e)
		}
		peers, batches := map[string]bool{}, 0
		for i := range 300 {
			b.register(nth(i).AgentID, nth(i).AgentIP.String())
			time.Sleep(time.Millisecond)
		}
		for len(peers) < 300 {
			e := <-events
			batches++
			for _, p := range e.Put {
				peers[p.AgentID] = true
			}
		}
		if batches > 10 {
			t.Errorf("300 changes in 300 ms came in %d events", batches)
		}
	})
}

func TestRefusalsNameWhatToDo(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	n.register(t, request("a", "10.0.0.1"))
	_, err := n.client.Register(t.Context(), request("b", "10.0.0.1"))
	refused(t, err, http.StatusConflict, "delete agent a")
	if _, err := n.client.Delete(t.Context(), []string{"a"}); err != nil {
		t.Fatal(err)
	}
	n.register(t, request("b", "10.0.0.1")) // what the message said helps
	if got := len(n.Agents()); got != 1 {
		t.Errorf("%d agents", got)
	}
	if !strings.Contains(strings.Join(stored(t, n.store), " "), "ip/10.0.0.1") {
		t.Error("the IP belongs to nobody")
	}
}
