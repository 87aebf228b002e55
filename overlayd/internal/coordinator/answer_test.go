package coordinator_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// behind serves a coordinator and holds up registrations that say so in their head,
// before it has read them.
type behind struct {
	url     string
	reached chan struct{}
	release chan struct{}
	served  chan struct{}
}

func (n *node) behind(t *testing.T) *behind {
	t.Helper()
	b := &behind{reached: make(chan struct{}), release: make(chan struct{}), served: make(chan struct{})}
	h := n.Handler()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Held") == "" {
			h.ServeHTTP(w, r)
			return
		}
		b.reached <- struct{}{}
		<-b.release
		h.ServeHTTP(w, r)
		b.served <- struct{}{}
	}))
	t.Cleanup(server.Close)
	b.url = server.URL
	return b
}

// send sends a registration that is held up, over a connection of its own.
func (b *behind) send(t *testing.T, req api.RegisterRequest) net.Conn {
	t.Helper()
	body, err := json.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", strings.TrimPrefix(b.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: coordinator\r\nX-Held: yes\r\nContent-Length: %d\r\n\r\n%s", api.PathRegister, len(body), body)
	<-b.reached
	return conn
}

// asked waits for the question whether the host lives, and answers nothing.
func (s *stream) asked(t testing.TB) {
	t.Helper()
	for !s.next(t).Register {
	}
}

// later registers in the background.
func (n *node) later(req api.RegisterRequest) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := n.client.Register(context.Background(), req)
		done <- err
	}()
	return done
}

// accepted registers, as an agent does that is told to come again, and checks that it
// does not take long.
func (n *node) accepted(t *testing.T, err error, req api.RegisterRequest) {
	t.Helper()
	began := time.Now()
	for err != nil {
		var refusal *api.Error
		if !errors.As(err, &refusal) || refusal.Code != http.StatusServiceUnavailable {
			t.Fatalf("error %v, want it to be accepted", err)
		}
		if time.Since(began) > 3*time.Second {
			t.Fatalf("still not accepted: %v", err)
		}
		_, err = n.client.Register(t.Context(), req)
	}
}

// An agent is killed with a registration on its way, and the next one of the same host
// comes while the stream is still open. The request that is only read then is no answer to
// whether the host of before lives.
func TestLateRequestIsNoAnswer(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	b := n.behind(t)
	lease := n.register(t, instanceOf("one", "10.0.0.1"))
	w := n.watchFrom(t, "a", api.Known{Instance: "one"})
	w.next(t)
	conn := b.send(t, instanceOf("one", "10.0.0.1"))
	conn.Close()

	two := instanceOf("two", "10.0.0.1", "one")
	done := n.later(two)
	w.asked(t)
	b.release <- struct{}{}
	<-b.served
	err := <-done // nobody has answered
	w.stop()
	n.accepted(t, err, two)
	if got := n.register(t, two); got.Epoch != lease.Epoch {
		t.Errorf("epoch %d, before %d", got.Epoch, lease.Epoch)
	}
	// What was said before is nothing that one can come back with.
	for _, replayed := range []api.RegisterRequest{instanceOf("one", "10.0.0.1"), instanceOf("copy", "10.0.0.1", "one")} {
		replayed.Previous = append(replayed.Previous, "zero")
		_, err := n.client.Register(t.Context(), replayed)
		copied(t, err)
	}
}

// conflicting is a real store that holds up the next transaction that only checks, and
// says then that something has changed.
type conflicting struct {
	store.Store
	on      atomic.Bool
	reached chan struct{}
	release chan struct{}
}

func (c *conflicting) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	if len(txn.Then) > 0 || !c.on.CompareAndSwap(true, false) {
		return c.Store.Commit(ctx, txn)
	}
	c.reached <- struct{}{}
	<-c.release
	return 0, store.ErrConflict
}

// The same where the coordinator has read the request, and tries it again when the host
// has been asked. Nobody tells it that the connection has ended: the host lost its power.
func TestRequestInProgressIsNoAnswer(t *testing.T) {
	s := &conflicting{Store: newStore(t), reached: make(chan struct{}), release: make(chan struct{})}
	n := startOptions(t, coordinator.Options{Network: parseNetwork(t, seedNetwork), Store: s, Log: slog.New(slog.DiscardHandler), Version: "test", Shared: true})
	n.register(t, instanceOf("one", "10.0.0.1"))
	w := n.watchFrom(t, "a", api.Known{Instance: "one"})
	w.next(t)
	s.on.Store(true)
	before := n.later(instanceOf("one", "10.0.0.1"))
	<-s.reached
	two := instanceOf("two", "10.0.0.1", "one")
	done := n.later(two)
	w.asked(t)
	s.release <- struct{}{}
	if err := <-before; err != nil {
		t.Fatal(err)
	}
	err := <-done
	w.stop()
	n.accepted(t, err, two)
}

// A start whose request comes to the coordinator only after the next start was accepted
// is refused, and the host goes on: neither it nor a start after it is a copy.
func TestStartThatComesLate(t *testing.T) {
	log := &said{}
	n := startLogging(t, newStore(t), seedNetwork, slog.NewTextHandler(log, nil))
	b := n.behind(t)
	n.register(t, instanceOf("one", "10.0.0.1"))
	killed := b.send(t, instanceOf("two", "10.0.0.1", "one"))
	late := b.send(t, instanceOf("three", "10.0.0.1", "two", "one")) // whose end is not noticed
	n.register(t, instanceOf("four", "10.0.0.1", "three", "two", "one"))
	killed.Close()
	for range 2 {
		b.release <- struct{}{}
		<-b.served
	}
	late.Close()
	five := instanceOf("five", "10.0.0.1", "four", "three", "two", "one")
	n.register(t, five)
	// A copy of the host as it was is one, whatever it shows, and remains one.
	_, err := n.client.Register(t.Context(), instanceOf("copy", "10.0.0.1", "three", "two", "one"))
	copied(t, err)
	w := n.watchFrom(t, "a", api.Known{Instance: "five"})
	w.next(t)
	go w.answer(n, func() api.RegisterRequest { return five })
	for _, c := range []api.RegisterRequest{
		instanceOf("copy2", "10.0.0.1", "five", "four", "three"),
		instanceOf("copy3", "10.0.0.1", "copy2", "five", "four", "three"),
	} {
		_, err = n.client.Register(t.Context(), c)
		copied(t, err)
	}
	w.stop()
	_, err = n.client.Register(t.Context(), instanceOf("copy3", "10.0.0.1", "copy2", "five", "four", "three"))
	copied(t, err)
	if !log.has("a copy of an agent asks for its lease") || log.has("instance=two") {
		t.Error("a copy is not said, or one that was killed is said to be one")
	}
}
