package coordinator_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// twoFamilies is the request of a host with an agent IP of each family.
func twoFamilies(id, ip, second string) api.RegisterRequest {
	req := request(id, ip, conf.Mesos)
	req.TwoFamilies, req.SecondIP, req.SecondMTU = true, netip.MustParseAddr(second), 1430
	return req
}

// TestSecondIP: a second agent IP is part of the lease and told to peers, costs an
// epoch when it comes or goes and nothing when it stays, and is kept over a restart.
// The state of DC/OS knows nothing of it.
func TestSecondIP(t *testing.T) {
	s := newStore(t)
	n := start(t, s, seedNetwork)
	first := n.register(t, twoFamilies("a", "10.0.0.1", "fd00::1"))
	if first.SecondIP.String() != "fd00::1" || first.SecondMTU != 1430 || !first.TwoFamilies || first.SecondError != "" {
		t.Errorf("lease %+v", first.Underlay)
	}
	if again := n.register(t, twoFamilies("a", "10.0.0.1", "fd00::1")); again.Epoch != first.Epoch {
		t.Errorf("epoch %d after a renewal, %d before", again.Epoch, first.Epoch)
	}
	n.register(t, request("b", "10.0.0.2"))
	w := n.watch(t, "b", 0)
	if e := w.next(t); len(e.Put) != 2 || e.Put[0].SecondIP != first.SecondIP && e.Put[1].SecondIP != first.SecondIP {
		t.Errorf("peers %+v", e.Put)
	}
	state, err := json.Marshal(n.State())
	if err != nil || strings.Contains(string(state), "fd00::1") || strings.Contains(string(state), "second") {
		t.Errorf("%v, state %s", err, state)
	}

	n.stop()
	n = start(t, s, seedNetwork)
	if a := n.Agents()[0]; a.SecondIP != first.SecondIP {
		t.Errorf("after a restart %+v", a.Underlay)
	}
	gone := n.register(t, request("a", "10.0.0.1", conf.Mesos))
	if gone.SecondIP.IsValid() || gone.Epoch <= first.Epoch {
		t.Errorf("without: epoch %d, %+v", gone.Epoch, gone.Underlay)
	}
	if l := n.register(t, twoFamilies("c", "10.0.0.3", "fd00::1")); l.SecondIP != first.SecondIP {
		t.Errorf("an address that was given up is refused: %s", l.SecondError)
	}
	if _, err := n.Delete(t.Context(), []string{"fd00::1"}); err != nil || len(n.Agents()) != 2 {
		t.Errorf("%v, %d agents are left", err, len(n.Agents()))
	}
	n.register(t, request("d", "fd00::1"))
}

// TestSecondIPRefused: an address that cannot be the second one keeps no host from
// registering; the lease says why it does not have it.
func TestSecondIPRefused(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	n.register(t, twoFamilies("a", "10.0.0.1", "fd00::1"))
	n.register(t, request("six", "fd00::6"))
	for second, words := range map[string]string{
		"10.0.0.9":  "same family",
		"fd01:b::1": "lies in overlay dcos6",
		"fd01:a::1": "lies in a VTEP subnet",
		"fe80::1":   "link-local",
		"fd00::1":   "belongs to agent a",
		"fd00::6":   "belongs to agent six",
	} {
		l := n.register(t, twoFamilies("b", "10.0.0.2", second))
		if l.SecondIP.IsValid() || l.SecondMTU != 0 || !strings.Contains(l.SecondError, words) {
			t.Errorf("%s: %+v, %q", second, l.Underlay, l.SecondError)
		}
	}
	if l := n.register(t, twoFamilies("b", "10.0.0.2", "fd00::2")); l.SecondError != "" || !l.SecondIP.IsValid() {
		t.Errorf("%+v, %q", l.Underlay, l.SecondError)
	}
	// Who is alive keeps its first one, and loses the second to whom it is the first.
	_, err := n.client.Register(t.Context(), request("c", "10.0.0.1"))
	refused(t, err, http.StatusConflict, "agent IP 10.0.0.1 belongs to agent a")
	w := n.watch(t, "b", 0)
	w.next(t)
	n.register(t, request("c", "fd00::1"))
	told := map[string]conf.Peer{}
	w.follow(t, told, func() bool { return told["a"].AgentID != "" && told["c"].AgentID != "" })
	if a := told["a"]; a.SecondIP.IsValid() || a.AgentIP.String() != "10.0.0.1" || told["c"].AgentIP.String() != "fd00::1" {
		t.Errorf("peers %+v", told)
	}
	for range 2 {
		l := n.register(t, twoFamilies("a", "10.0.0.1", "fd00::1"))
		if l.SecondIP.IsValid() || !strings.Contains(l.SecondError, "fd00::1 belongs to agent c at fd00::1") {
			t.Errorf("%+v, %q", l.Underlay, l.SecondError)
		}
		n.register(t, request("c", "fd00::1"))
	}
}

// hasty is a store in which something happens just before a commit.
type hasty struct {
	store.Store
	before func(store.Txn)
}

func (h *hasty) Commit(ctx context.Context, txn store.Txn) (uint64, error) {
	if h.before != nil {
		h.before(txn)
	}
	return h.Store.Commit(ctx, txn)
}

// TestIPOfNobody: a coordinator of before second agent IPs deletes an agent without the
// key of its second one, which leads to nobody then. It can be had at once, and by one:
// of two coordinators that grant it at the same time one finds that it is taken.
func TestIPOfNobody(t *testing.T) {
	for _, id := range []string{"new", "gone"} {
		s := &hasty{Store: newStore(t)}
		if _, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: "ip/fd00::1", Value: []byte("gone")}}}); err != nil {
			t.Fatal(err)
		}
		n := start(t, s, seedNetwork)
		n.applied(t, strings.Replace(seedNetwork, "]}", `, {"name": "near", "subnet6": "fd00::/64", "prefix6": 80}]}`, 1)) // nobody is in it
		n.applied(t, seedNetwork)
		took := false
		s.before = func(txn store.Txn) {
			if took || !slices.ContainsFunc(txn.Then, func(op store.Op) bool { return op.Key == "agents/"+id }) {
				return
			}
			took = true
			record := `{"ip": "fd00::1", "vtep": "44.128.0.9", "vtep6": "fd01:a::9"}`
			if _, err := s.Store.Commit(t.Context(), store.Txn{Then: []store.Op{
				{Key: "agents/other", Value: []byte(record)}, {Key: "ip/fd00::1", Value: []byte("other")},
				{Key: "vtep/44.128.0.9", Value: []byte("other")}, {Key: "vtep6/fd01:a::9", Value: []byte("other")},
			}}); err != nil {
				t.Error(err)
			}
		}
		_, err := n.client.Register(t.Context(), request(id, "fd00::1"))
		refused(t, err, http.StatusConflict, "agent IP fd00::1 belongs to agent other")
		if !took {
			t.Error("nobody took it")
		}
		if _, err := n.Delete(t.Context(), []string{"other"}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Store.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: "ip/fd00::1", Value: []byte("gone")}}}); err != nil {
			t.Fatal(err)
		}
		n.register(t, request(id, "fd00::1"))
		if kvs, _, err := s.List(t.Context(), "ip/fd00::1"); err != nil || len(kvs) != 1 || string(kvs[0].Value) != id {
			t.Errorf("%v, the key is %+v", err, kvs)
		}
	}
}

// TestIPsOfNobodySwept: keys that a coordinator of before second agent IPs left are
// removed once agents have had the time to come back, however many they are. Those of
// agents stay, also where the record has lost the address.
func TestIPsOfNobodySwept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t)
		b := inBubble(t, s)
		if _, err := b.Register(t.Context(), twoFamilies("here", "10.0.0.1", "fd00::1")); err != nil {
			t.Fatal(err)
		}
		b.stop()
		left := []store.Op{{Key: "ip/fd00::99", Value: []byte("here")}}
		for i := range 110 {
			left = append(left, store.Op{Key: fmt.Sprintf("ip/fd00::1:%x", i), Value: fmt.Appendf(nil, "gone%d", i)})
		}
		if _, err := s.Commit(t.Context(), store.Txn{Then: left}); err != nil {
			t.Fatal(err)
		}
		b = inBubble(t, s)
		time.Sleep(11 * time.Minute)
		synctest.Wait()
		kvs, _, err := s.List(t.Context(), "ip/")
		if err != nil {
			t.Fatal(err)
		}
		var keys []string
		for _, kv := range kvs {
			keys = append(keys, kv.Key)
		}
		if want := []string{"ip/10.0.0.1", "ip/fd00::1", "ip/fd00::99"}; !slices.Equal(keys, want) {
			t.Errorf("%d keys, want %v: %v", len(keys), want, keys[:min(5, len(keys))])
		}
		// It can be had afterwards as well.
		if l, err := b.Register(t.Context(), request("new", "fd00::1:7")); err != nil || l.AgentIP.String() != "fd00::1:7" {
			t.Errorf("%v, %+v", err, l)
		}
	})
}

// TestNotSuperseded: a coordinator of before second agent IPs, which knows their keys
// alone, takes a host for superseded when its second address is the first one of another
// host. It still has its own, and is told to others again, whether its agent comes back
// or not. One that is superseded stays so.
func TestNotSuperseded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t)
		b := inBubble(t, s)
		for _, req := range []api.RegisterRequest{twoFamilies("here", "10.0.0.1", "fd00::1"), request("lost", "10.0.0.2")} {
			if _, err := b.Register(t.Context(), req); err != nil {
				t.Fatal(err)
			}
		}
		b.stop()
		var left []store.Op
		for id, ip := range map[string]string{"here": "10.0.0.1", "lost": "10.0.0.2"} {
			kvs, _, err := s.List(t.Context(), "agents/"+id)
			if err != nil || len(kvs) != 1 {
				t.Fatal(err, kvs)
			}
			var record map[string]any
			if err := json.Unmarshal(kvs[0].Value, &record); err != nil {
				t.Fatal(err)
			}
			delete(record, "second_ip")
			record["superseded"] = "new"
			value, err := json.Marshal(record)
			if err != nil || record["ip"] != ip {
				t.Fatal(err, record)
			}
			left = append(left, store.Op{Key: "agents/" + id, Value: value})
		}
		left = append(left, store.Op{Key: "ip/fd00::1", Value: []byte("new")}, store.Op{Key: "ip/10.0.0.2", Value: []byte("new")},
			store.Op{Key: "agents/new", Value: []byte(`{"ip": "fd00::1", "vtep": "44.128.0.9", "vtep6": "fd01:a::9"}`)},
			store.Op{Key: "vtep/44.128.0.9", Value: []byte("new")}, store.Op{Key: "vtep6/fd01:a::9", Value: []byte("new")})
		if _, err := s.Commit(t.Context(), store.Txn{Then: left}); err != nil {
			t.Fatal(err)
		}
		b = inBubble(t, s)
		time.Sleep(11 * time.Minute)
		synctest.Wait()
		if here, lost := b.superseded("here"), b.superseded("lost"); here != "" || lost != "new" {
			t.Errorf("here is superseded by %q, want nobody; lost by %q, want new", here, lost)
		}
	})
}

// TestSecondIPMoves: addresses of a host that is no longer alive go to the one that
// has them now, both at once, and roles may change. Nothing is left of them.
func TestSecondIPMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		take := func(req api.RegisterRequest) conf.Lease {
			t.Helper()
			l, err := b.Register(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			return l
		}
		second := func(id string) string {
			for _, a := range b.Agents() {
				if a.AgentID == id {
					return a.SecondIP.String()
				}
			}
			return "no agent"
		}
		take(twoFamilies("old", "10.0.0.1", "fd00::1"))
		time.Sleep(91 * time.Second)
		// The same host with a new id.
		take(twoFamilies("new", "10.0.0.1", "fd00::1"))
		if by := b.superseded("old"); by != "new" || second("new") != "fd00::1" || second("old") == "fd00::1" {
			t.Errorf("old is superseded by %q and has %s, new has %s", by, second("old"), second("new"))
		}
		// What was the second is the first now.
		if l := take(twoFamilies("new", "fd00::1", "10.0.0.1")); l.SecondIP.String() != "10.0.0.1" {
			t.Errorf("%+v", l.Underlay)
		}
		time.Sleep(91 * time.Second)
		// One that takes the second one alone leaves its holder the first.
		take(request("four", "10.0.0.1"))
		if by := b.superseded("new"); by != "" || second("new") != "invalid IP" {
			t.Errorf("new is superseded by %q and has %s", by, second("new"))
		}
		if _, err := b.Delete(t.Context(), []string{"new", "old"}); err != nil {
			t.Fatal(err)
		}
		take(request("six", "fd00::1"))
		if n := len(b.Agents()); n != 2 {
			t.Errorf("%d agents, want 2", n)
		}
	})
}
