package coordinator_test

import (
	"bufio"
	"compress/gzip"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// known registers agents and returns a revision up to which a stream of the
// first knows all of them.
func known(t *testing.T, n *node, agents int) uint64 {
	t.Helper()
	for i := range agents {
		n.register(t, nth(i))
	}
	w := n.watch(t, nth(0).AgentID, 0)
	defer w.stop()
	e := w.next(t)
	if len(e.Put) != agents {
		t.Fatalf("%d peers, want %d", len(e.Put), agents)
	}
	return e.Revision
}

// peerIDs are the agents that an event puts, sorted.
func peerIDs(e api.PeerEvent) []string {
	var ids []string
	for _, p := range e.Put {
		ids = append(ids, p.AgentID)
	}
	slices.Sort(ids)
	return ids
}

// A coordinator that was restarted tells only what has changed: with thousands
// of agents a snapshot for each of them is a storm of its own.
func TestMissedAfterRestart(t *testing.T) {
	s := newStore(t)
	n := start(t, s, seedNetwork)
	revision := known(t, n, 20)
	// Reports are changes of the store, but of no peer.
	for i := range 20 {
		if err := n.client.Report(t.Context(), api.StatusReport{AgentID: nth(i).AgentID, Overlays: allOK}); err != nil {
			t.Fatal(err)
		}
	}
	n.stop()

	n = start(t, s, seedNetwork)
	w := n.watch(t, nth(0).AgentID, revision)
	if e := w.next(t); e.Snapshot || len(e.Put)+len(e.Delete) > 0 || e.Revision <= revision {
		t.Errorf("%+v after nothing has changed, want an empty event of a later revision", e)
	}
	w.stop()
	n.register(t, nth(20))
	n.register(t, nth(21))
	n.stop()

	n = start(t, s, seedNetwork)
	for _, since := range []uint64{revision, revision + 3, revision} {
		w := n.watch(t, nth(0).AgentID, since)
		if e := w.next(t); e.Snapshot || !slices.Equal(peerIDs(e), []string{nth(20).AgentID, nth(21).AgentID}) {
			t.Errorf("after revision %d: snapshot %t with %v, want the two new agents", since, e.Snapshot, peerIDs(e))
		}
		w.stop()
	}
}

// Where something was deleted, or was otherwise configured, what was kept does
// not tell what changed.
func TestMissedDeletion(t *testing.T) {
	s := newStore(t)
	n := start(t, s, seedNetwork)
	revision := known(t, n, 20)
	if _, err := n.client.Delete(t.Context(), []string{nth(7).AgentID}); err != nil {
		t.Fatal(err)
	}
	n.stop()

	n = start(t, s, seedNetwork)
	w := n.watch(t, nth(0).AgentID, revision)
	e := w.next(t)
	if !e.Snapshot || len(e.Put) != 19 {
		t.Errorf("snapshot %t with %d peers, want one with 19", e.Snapshot, len(e.Put))
	}
	w.stop()
	n.stop()

	n = start(t, s, seedNetwork)
	w = n.watch(t, nth(0).AgentID, e.Revision)
	if e := w.next(t); e.Snapshot || len(e.Put)+len(e.Delete) > 0 {
		t.Errorf("%+v for who knows of the deletion, want an empty event", e)
	}
}

// A store of a version that did not say when something was deleted is no proof
// that nothing was.
func TestMissedOldStore(t *testing.T) {
	s := newStore(t)
	n := start(t, s, seedNetwork)
	revision := known(t, n, 20)
	n.stop()
	if _, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: "deleted", Delete: true}}}); err != nil {
		t.Fatal(err)
	}
	n = start(t, s, seedNetwork)
	w := n.watch(t, nth(0).AgentID, revision)
	if e := w.next(t); !e.Snapshot {
		t.Errorf("%+v, want a snapshot", e)
	}
}

// Plain JSON is what everybody gets who does not ask for gzip, and the same
// lines come out of gzip, each as soon as it is sent.
func TestWatchGzip(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	known(t, n, 50)
	open := func(accept string) (*http.Response, *bufio.Reader) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, n.url+api.PathWatch+"?agent="+nth(0).AgentID, nil)
		if err != nil {
			t.Fatal(err)
		}
		if accept != "" {
			req.Header.Set("Accept-Encoding", accept)
		}
		resp, err := (&http.Client{Transport: &http.Transport{DisableCompression: true}}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		body := io.Reader(resp.Body)
		if resp.Header.Get("Content-Encoding") == "gzip" {
			if body, err = gzip.NewReader(resp.Body); err != nil {
				t.Fatal(err)
			}
		}
		return resp, bufio.NewReader(body)
	}
	var streams []*bufio.Reader
	for accept, want := range map[string]string{
		"": "", "identity": "", "gzip;q=0": "", "gzip; q=0.0, br": "", "gzip": "gzip", "br, GZIP;q=0.5": "gzip",
	} {
		resp, body := open(accept)
		if got := resp.Header.Get("Content-Encoding"); got != want {
			t.Errorf("Accept-Encoding %q is answered with %q, want %q", accept, got, want)
		}
		streams = append(streams, body)
	}
	n.register(t, request("new", "10.0.0.1"))
	for _, s := range streams {
		peers := map[string]bool{}
		for !peers["new"] {
			line, err := s.ReadBytes('\n')
			if err != nil {
				t.Fatal(err)
			}
			var e api.PeerEvent
			if err := json.Unmarshal(line, &e); err != nil {
				t.Fatalf("%v: %s", err, line)
			}
			for _, p := range e.Put {
				peers[p.AgentID] = true
			}
		}
		if len(peers) != 51 {
			t.Errorf("%d peers, want 51", len(peers))
		}
	}
}
