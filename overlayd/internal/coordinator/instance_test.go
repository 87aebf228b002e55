package coordinator_test

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// instanceOf is the registration of one start of agent a.
func instanceOf(own, ip string, previous ...string) api.RegisterRequest {
	req := request("a", ip)
	req.Instance, req.Previous = own, previous
	return req
}

func copied(t *testing.T, err error) {
	t.Helper()
	var refusal *api.Error
	if !errors.As(err, &refusal) || refusal.Code != http.StatusConflict || refusal.Kind != api.KindIDInUse || !strings.Contains(refusal.Message, "is a copy of it") {
		t.Errorf("error %v, want a copy to be refused", err)
	}
}

// answer registers, as an agent does, whenever that is asked for, until the stream
// ends.
func (s *stream) answer(n *node, with func() api.RegisterRequest) {
	for {
		select {
		case e := <-s.events:
			if e.Register {
				_, _ = n.client.Register(context.Background(), with()) // a failure is no answer
			}
		case <-s.done:
			return
		}
	}
}

// A host that lost its power comes back while the connection from before is open
// still, where nobody answers. It is not taken for a copy for good.
func TestPowerCutIsNotACopy(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	lease := n.register(t, instanceOf("one", "10.0.0.1"))
	w := n.watchFrom(t, "a", api.Known{Instance: "one"})
	w.next(t)
	notYet := func(own string) {
		t.Helper()
		_, err := n.client.Register(t.Context(), instanceOf(own, "10.0.0.1", "one"))
		var refusal *api.Error
		if !errors.As(err, &refusal) || refusal.Code != http.StatusServiceUnavailable || refusal.Kind != api.KindIDInUse {
			t.Errorf("error %v, want to be told to come again", err)
		}
	}
	notYet("two")
	w.stop()
	if again := n.register(t, instanceOf("two", "10.0.0.1", "one")); again.Epoch != lease.Epoch {
		t.Errorf("epoch %d, before %d", again.Epoch, lease.Epoch)
	}
	// It renews, and starts again as any host does.
	n.register(t, instanceOf("two", "10.0.0.1"))
	if again := n.register(t, instanceOf("three", "10.0.0.1", "two", "one")); again.Epoch != lease.Epoch {
		t.Errorf("epoch %d, before %d", again.Epoch, lease.Epoch)
	}
	// One that was told so is a copy when the host answers late.
	w = n.watchFrom(t, "a", api.Known{Instance: "three"})
	w.next(t)
	_, err := n.client.Register(t.Context(), instanceOf("copy", "10.0.0.1", "three"))
	if err == nil {
		t.Error("a copy was accepted")
	}
	n.register(t, instanceOf("three", "10.0.0.1"))
	w.stop()
	_, err = n.client.Register(t.Context(), instanceOf("copy", "10.0.0.1", "three"))
	copied(t, err)
}

// A copy of a host, with the same id and address, is refused as long as the host
// lives: while it is connected, while it starts again, and whoever starts again
// or asks another coordinator.
func TestCopyOfAHost(t *testing.T) {
	s := newStore(t)
	n := start(t, s, seedNetwork)
	lease := n.register(t, instanceOf("one", "10.0.0.1"))
	at := "10.0.0.1"
	follow := func(instance string) *stream {
		w := n.watchFrom(t, "a", api.Known{Instance: instance})
		w.next(t)
		go w.answer(n, func() api.RegisterRequest { return instanceOf(instance, at) })
		return w
	}
	w := follow("one")

	// The copy was made while "one" ran.
	for range 2 {
		_, err := n.client.Register(t.Context(), instanceOf("copy", "10.0.0.1", "one"))
		copied(t, err)
		_, err = n.client.Register(t.Context(), instanceOf("copy", "10.0.0.2", "one"))
		copied(t, err)
	}
	// The host starts again, and the copy too, in the moment in between.
	w.stop()
	for _, c := range []api.RegisterRequest{instanceOf("copy", "10.0.0.1", "one"), instanceOf("copy2", "10.0.0.1", "copy", "one")} {
		_, err := n.client.Register(t.Context(), c)
		copied(t, err)
	}
	if again := n.register(t, instanceOf("two", "10.0.0.1", "one")); again.Epoch != lease.Epoch {
		t.Errorf("epoch %d after a restart, before it %d", again.Epoch, lease.Epoch)
	}
	w = follow("two")
	// It moves while its stream is open: it is known to be itself.
	at = "10.0.0.9"
	if moved := n.register(t, instanceOf("two", "10.0.0.9", "one")); moved.AgentIP.String() != "10.0.0.9" {
		t.Errorf("it moved to %s", moved.AgentIP)
	}
	w.stop()

	// The coordinator starts again; both ask the new one.
	n.stop()
	n = start(t, s, seedNetwork)
	for _, c := range []api.RegisterRequest{instanceOf("copy3", "10.0.0.9", "copy2", "one"), instanceOf("copy", "10.0.0.1", "one")} {
		_, err := n.client.Register(t.Context(), c)
		copied(t, err)
	}
	// Killed between being accepted and noting it, it shows both.
	n.register(t, instanceOf("four", "10.0.0.9", "three", "two"))
	// One that says nothing is an agent of before.
	n.register(t, request("a", "10.0.0.9"))
}

// A host whose stream is only just ending is waited for.
func TestRestartIsNotACopy(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	n.register(t, instanceOf("one", "10.0.0.1"))
	w := n.watchFrom(t, "a", api.Known{Instance: "one"})
	w.next(t)
	ended := time.AfterFunc(100*time.Millisecond, w.stop)
	defer ended.Stop()
	n.register(t, instanceOf("two", "10.0.0.1", "one"))
	_, err := n.client.Register(t.Context(), instanceOf(strings.Repeat("x", 65), "10.0.0.1"))
	refused(t, err, http.StatusBadRequest, "instance of agent a")
}

// A copy that asks another coordinator than the one the host is connected to is
// refused there as well.
func TestCopyAtAnotherCoordinator(t *testing.T) {
	s := newStore(t)
	a, b := shared(t, s, "127.0.0.1:0"), shared(t, s, "127.0.0.1:0")
	a.register(t, instanceOf("one", "10.0.0.1"))
	w := a.watchFrom(t, "a", api.Known{Instance: "one"})
	w.next(t)
	go w.answer(a, func() api.RegisterRequest { return instanceOf("one", "10.0.0.1") })
	eventually(t, "b knows that it is connected", func() bool {
		agents, err := b.client.Agents(t.Context())
		return err == nil && len(agents) == 1 && agents[0].Connected
	})
	for _, ip := range []string{"10.0.0.1", "10.0.0.2"} {
		_, err := b.client.Register(t.Context(), instanceOf("copy", ip, "one"))
		copied(t, err)
	}
	// When that coordinator ends, nobody has to wait until it counts as dead.
	a.stop()
	eventually(t, "the host is accepted elsewhere after a start", func() bool {
		began := time.Now()
		_, err := b.client.Register(t.Context(), instanceOf("two", "10.0.0.1", "one"))
		return err == nil && time.Since(began) < time.Second
	})
}
